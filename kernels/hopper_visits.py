"""Which tiles the forward for Hopper visits: found by the warp that loads, said to those that multiply. In Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashfuse.kernels import mask
from flashfuse.kernels.forward import whole_tiles
from flashfuse.kernels.hopper_tiles import tile_and_position
from flashfuse.kernels.tiles import batch_pointer

# How many tiles of queries are known at a time; numbers that say which they are, and those that are in use.
TILES_SAID: gl.constexpr = gl.constexpr(4)
TILE_LEN: gl.constexpr = gl.constexpr(16)
TILE_USED: gl.constexpr = gl.constexpr(9)
# Queries that share a row of `ranges_ptr`.
MASK_BLOCK: gl.constexpr = gl.constexpr(mask.MASK_BLOCK)


@gluon.jit
def owned(
    number, batch_0, batch_1, batch_2, batch_3, q_len, BLOCK_Q: gl.constexpr, LONGEST_FIRST: gl.constexpr,
    SHARED_BATCH: gl.constexpr, SPREAD: gl.constexpr,
):  # fmt: skip
    """The first of a tile's BLOCK_Q queries, and their position on the four axes."""
    tiles = gl.cdiv(q_len, BLOCK_Q)
    tile, n0, n1, n2, n3 = tile_and_position(
        number, tiles, batch_0, batch_1, batch_2, batch_3, SHARED_BATCH, SPREAD
    )  # fmt: skip
    if LONGEST_FIRST:
        tile = tiles - 1 - tile
    return tile * BLOCK_Q, n0, n1, n2, n3


@gluon.jit
def visited(
    q_start, n0, n1, n2, n3, ranges_ptr, ranges_strides, q_len, kv_len, sizes, KV_BOUNDS: gl.constexpr,
    BLOCK_Q: gl.constexpr, BLOCK_KV: gl.constexpr,
):  # fmt: skip
    """(start, full_start, full_end, end) at whole tiles of keys, as in `forward`, but one tile at least."""
    start, full_start, full_end, end = visible(
        q_start, n0, n1, n2, n3, ranges_ptr, ranges_strides, q_len, kv_len, sizes, KV_BOUNDS, BLOCK_Q
    )  # fmt: skip
    start, full_start, full_end, end = whole_tiles(start, full_start, full_end, end, BLOCK_KV)
    start = gl.minimum(start, (kv_len - 1) // BLOCK_KV * BLOCK_KV)
    return start, full_start, full_end, gl.maximum(end, start + BLOCK_KV)


@gluon.jit
def visible(
    q_start, n0, n1, n2, n3, ranges_ptr, ranges_strides, q_len, kv_len, sizes, KV_BOUNDS: gl.constexpr,
    BLOCK_Q: gl.constexpr,
):  # fmt: skip
    """(start, full_start, full_end, end): the keys that a tile of queries sees, by positions and by data."""
    q_stop = gl.minimum(q_start + BLOCK_Q, q_len)
    start, full_start, full_end, end = KV_BOUNDS(q_start, q_stop, n0, n1, n2, n3, q_len, kv_len, sizes)
    if ranges_ptr is not None:
        ranges = batch_pointer(ranges_ptr, ranges_strides, n0, n1, n2, n3)
        row = ranges + (q_start // MASK_BLOCK).to(gl.int64) * ranges_strides[4]
        first, first_full, last_full, last = _stored(row, ranges_strides[5])
        for block in gl.static_range(1, BLOCK_Q // MASK_BLOCK):
            at = gl.minimum(q_start // MASK_BLOCK + block, (q_len - 1) // MASK_BLOCK)
            one, one_full, other_full, other = _stored(
                ranges + at.to(gl.int64) * ranges_strides[4], ranges_strides[5]
            )  # fmt: skip
            first, first_full = gl.minimum(first, one), gl.maximum(first_full, one_full)
            last_full, last = gl.minimum(last_full, other_full), gl.maximum(last, other)
        end = gl.minimum(end, last)
        start = gl.minimum(gl.maximum(start, first), end)
        full_start = gl.minimum(gl.maximum(gl.maximum(start, full_start), first_full), end)
        full_end = gl.maximum(gl.minimum(end, gl.minimum(full_end, last_full)), full_start)
    return start, full_start, full_end, end


@gluon.jit
def _stored(row, stride):
    """The fields of one stored range."""
    return gl.load(row), gl.load(row + stride), gl.load(row + 2 * stride), gl.load(row + 3 * stride)


@gluon.jit
def say(said_s, said, heard, turn, numbers):
    """Tell the groups the TILE_USED numbers of the tile of queries whose turn it is."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slot = turn % TILES_SAID
    mbarrier.wait(heard.index(slot), turn // TILES_SAID % 2 ^ 1)
    for place in gl.static_range(TILE_USED):
        said_s.index(TILE_LEN * slot + place).store(gl.full([1], numbers[place], gl.int32, ONE))
    gl.thread_barrier()
    mbarrier.arrive(said.index(slot), count=1)


@gluon.jit
def _number(said_s, turn, PLACE: gl.constexpr):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(said_s.index(TILE_LEN * (turn % TILES_SAID) + PLACE).load(ONE), 0)


@gluon.jit
def said_rows(said_s, turn):
    """(first query of a tile, or -1 where there is none, and its position) as `say` has it."""
    q_start, n0, n1 = _number(said_s, turn, 0), _number(said_s, turn, 1), _number(said_s, turn, 2)
    return q_start, n0, n1, _number(said_s, turn, 3), _number(said_s, turn, 4)


@gluon.jit
def said_keys(said_s, turn):
    """(start, full_start, full_end, end)"""
    start, full_start = _number(said_s, turn, 5), _number(said_s, turn, 6)
    return start, full_start, _number(said_s, turn, 7), _number(said_s, turn, 8)


@gluon.jit
def skipped(filled_s, turn, start, end, kv_len, BLOCK_KV: gl.constexpr, GROUPS: gl.constexpr):
    """(tiles before, tiles behind) those visited, if a row of any group has seen nothing above the fill."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    of_all = filled_s.index(turn % 2 * GROUPS).load(ONE)
    for group in gl.static_range(1, GROUPS):
        of_all |= filled_s.index(turn % 2 * GROUPS + group).load(ONE)
    filled = gl.max(of_all, 0)
    return filled * (start // BLOCK_KV), filled * gl.cdiv(gl.maximum(kv_len - end, 0), BLOCK_KV)


@gluon.jit
def skipped_tile(i, before, end, BLOCK_KV: gl.constexpr):
    return gl.where(i < before, 0, end - before * BLOCK_KV) + i * BLOCK_KV
