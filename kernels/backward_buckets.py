"""Gradients of pairs added up in buckets: of elements of a table that several pairs share, whichever those are.

A program owns some buckets, of rows, of keys or of all pairs, and asks of every pair that may be in one whether it is.
That is an operation for each pair and bucket, and nothing is added by more than one program.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "keys", "buckets", "rows_each", "at_row_stride"])
def bucket_sums_kernel(
    values_ptr, at_ptr, sums_ptr, rows, keys, buckets, rows_each,
    values_stride, row_stride, at_row_stride, at_key_stride,
    OF_ROWS: tl.constexpr, OF_KEYS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """sums[n, o, b] = sum_ij values[n, i, j] over the pairs of the owner o that are in bucket at[i, j] = b.

    values [N, rows, keys], at [rows, keys], sums [N, owners, buckets]. An owner is a row (OF_ROWS), a key (OF_KEYS), or
    rows_each rows, whole tiles. What at says is clamped to the buckets.
    """
    bucket_blocks = tl.cdiv(buckets, BLOCK_B)
    key_blocks = tl.cdiv(keys, BLOCK_KV)
    if OF_ROWS:
        owners, owner_blocks, steps = rows, tl.cdiv(rows, BLOCK_Q), key_blocks
    elif OF_KEYS:
        owners, owner_blocks, steps = keys, key_blocks, tl.cdiv(rows, BLOCK_Q)
    else:
        owners = tl.cdiv(rows, rows_each)
        owner_blocks, steps = owners, tl.cdiv(rows_each, BLOCK_Q) * key_blocks
    b = tl.program_id(0) % bucket_blocks * BLOCK_B + tl.arange(0, BLOCK_B)
    owner_block = tl.program_id(0) // bucket_blocks % owner_blocks
    n = (tl.program_id(0) // bucket_blocks // owner_blocks).to(tl.int64)

    # [block_b, block_q, block_kv]
    acc = tl.zeros([BLOCK_B, BLOCK_Q, BLOCK_KV], tl.float32)
    for step in tl.range(0, steps):
        if OF_ROWS:
            row, key = owner_block * BLOCK_Q, step * BLOCK_KV
        elif OF_KEYS:
            row, key = step * BLOCK_Q, owner_block * BLOCK_KV
        else:
            row, key = owner_block * rows_each + step // key_blocks * BLOCK_Q, step % key_blocks * BLOCK_KV
        i = row + tl.arange(0, BLOCK_Q)
        j = key + tl.arange(0, BLOCK_KV)
        exists = (i < rows)[:, None] & (j < keys)[None, :]
        # [block_q, block_kv]
        value_ptrs = values_ptr + n * values_stride + i.to(tl.int64)[:, None] * row_stride + j[None, :]
        values = tl.load(value_ptrs, mask=exists, other=0)
        at_ptrs = at_ptr + i.to(tl.int64)[:, None] * at_row_stride + j.to(tl.int64)[None, :] * at_key_stride
        at = tl.load(at_ptrs, mask=exists, other=0).to(tl.int32)
        at = tl.minimum(tl.maximum(at, 0), buckets - 1)
        acc += tl.where(at[None, :, :] == b[:, None, None], values[None, :, :], 0.0)

    sums_ptrs = sums_ptr + n * owners * buckets + b
    if OF_ROWS:
        offs = owner_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
        found = tl.sum(acc, 2)
    elif OF_KEYS:
        offs = owner_block * BLOCK_KV + tl.arange(0, BLOCK_KV)
        found = tl.sum(acc, 1)
    else:
        offs = owner_block + tl.arange(0, 1)
        found = tl.sum(tl.sum(acc, 2), 1)[:, None]
    stored = (b < buckets)[:, None] & (offs < owners)[None, :]
    tl.store(sums_ptrs[:, None] + offs.to(tl.int64)[None, :] * buckets, found, mask=stored)
