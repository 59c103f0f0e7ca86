"""What the pass by key tile asks of data: the queries that visit each tile, and those that see every key."""

import triton
import triton.language as tl

from flashfuse.kernels.backward_rows import batch_position
from flashfuse.kernels.tiles import MASK_BLOCK, batch_pointer

# More blocks of queries than there ever are.
BEHIND_ALL: tl.constexpr = tl.constexpr(1 << 24)


@triton.jit(do_not_specialize=["batch_0", "batch_1", "batch_2", "batch_3", "q_len", "kv_len"])
def query_ranges_kernel(
    kv_ranges_ptr, ranges_ptr, kv_ranges_strides, batch_0, batch_1, batch_2, batch_3, q_len, kv_len,
    BLOCK_KV: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The queries that visit each tile of BLOCK_KV keys: int32 [n.., key tiles, 4], as `KvRange`s of queries.

    kv_ranges_ptr [n.., blocks of queries, 4]: the keys that each MASK_BLOCK queries visit. The result holds all
    visiting blocks, and the first run of blocks of which each key of the tile is in the full range.
    """
    kv_tiles = tl.cdiv(kv_len, BLOCK_KV)
    groups = tl.cdiv(kv_tiles, TILES)
    position = tl.program_id(0) // groups
    n0, n1, n2, n3 = batch_position(position, batch_0, batch_1, batch_2, batch_3)
    base = batch_pointer(kv_ranges_ptr, kv_ranges_strides, n0, n1, n2, n3)
    tile = tl.program_id(0) % groups * TILES + tl.arange(0, TILES)
    first_key = (tile * BLOCK_KV)[:, None]
    key_stop = tl.minimum(first_key + BLOCK_KV, kv_len)
    blocks = tl.cdiv(q_len, MASK_BLOCK)
    # [tiles], in blocks of queries
    start = tl.full([TILES], BEHIND_ALL, tl.int32)
    full_start, full_end, end = start, start, tl.zeros([TILES], tl.int32)

    for at in tl.range(0, blocks, BLOCKS):
        number = at + tl.arange(0, BLOCKS)
        exists = number < blocks
        ptrs = base + number.to(tl.int64) * kv_ranges_strides[4]
        visited = tl.load(ptrs, mask=exists, other=0)[None, :]
        full = tl.load(ptrs + kv_ranges_strides[5], mask=exists, other=0)[None, :]
        full_stop = tl.load(ptrs + 2 * kv_ranges_strides[5], mask=exists, other=0)[None, :]
        # A block that does not exist visits nothing.
        stop = tl.load(ptrs + 3 * kv_ranges_strides[5], mask=exists, other=0)[None, :]
        # [tiles, blocks]
        some = (visited < key_stop) & (stop > first_key)
        every = some & (full <= first_key) & (full_stop >= key_stop)
        number = number[None, :]
        start = tl.minimum(start, tl.min(tl.where(some, number, BEHIND_ALL), 1))
        end = tl.maximum(end, tl.max(tl.where(some, number + 1, 0), 1))
        full_start = tl.minimum(full_start, tl.min(tl.where(every, number, BEHIND_ALL), 1))
        behind = (number > full_start[:, None]) & (every == 0)
        full_end = tl.minimum(full_end, tl.min(tl.where(behind, number, BEHIND_ALL), 1))

    full_start = tl.minimum(full_start, end)
    full_end = tl.maximum(tl.minimum(full_end, end), full_start)
    ptrs = ranges_ptr + (position.to(tl.int64) * kv_tiles + tile) * 4
    stored = tile < kv_tiles
    tl.store(ptrs, tl.minimum(tl.minimum(start, end) * MASK_BLOCK, q_len), mask=stored)
    tl.store(ptrs + 1, tl.minimum(full_start * MASK_BLOCK, q_len), mask=stored)
    tl.store(ptrs + 2, tl.minimum(full_end * MASK_BLOCK, q_len), mask=stored)
    tl.store(ptrs + 3, tl.minimum(end * MASK_BLOCK, q_len), mask=stored)


@triton.jit(do_not_specialize=["q_len"])
def filled_rows_kernel(lse_ptr, filled_ptr, q_len, FILL_THRESHOLD: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The queries [first, stop) that may have gradients through all keys, int32 [n.., 2]; q_len and 0 for none.

    Those whose largest score is not above FILL_THRESHOLD, where there is one, and those that are NaN for want of a key.
    """
    base = lse_ptr + tl.program_id(0).to(tl.int64) * q_len * 2
    first = tl.zeros([BLOCK_Q], tl.int32) + q_len
    stop = tl.zeros([BLOCK_Q], tl.int32)
    for start in tl.range(0, q_len, BLOCK_Q):
        q_idx = start + tl.arange(0, BLOCK_Q)
        exists = q_idx < q_len
        row_sum = tl.load(base + 2 * q_idx.to(tl.int64) + 1, mask=exists, other=1.0)
        found = row_sum != row_sum
        if FILL_THRESHOLD is not None:
            largest = tl.load(base + 2 * q_idx.to(tl.int64), mask=exists, other=float("inf"))
            found = found | (largest <= FILL_THRESHOLD)
        first = tl.minimum(first, tl.where(found, q_idx, q_len))
        stop = tl.maximum(stop, tl.where(found, q_idx + 1, 0))
    tl.store(filled_ptr + 2 * tl.program_id(0), tl.min(first, 0))
    tl.store(filled_ptr + 2 * tl.program_id(0) + 1, tl.max(stop, 0))
