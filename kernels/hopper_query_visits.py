"""Which tiles of queries the one pass for Hopper visits: the same for those who load and multiply. In Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashfuse.kernels.hopper_tiles import tile_and_position
from flashfuse.kernels.tiles import batch_pointer

# Keys of a program, and of a group of its warps. Shapes of matrix instructions: no table chooses them.
BLOCK_KV: gl.constexpr = gl.constexpr(128)
GROUP_KV: gl.constexpr = gl.constexpr(64)


@gluon.jit
def owned_keys(
    batch_0, batch_1, batch_2, batch_3, kv_len, SHARED_BATCH: gl.constexpr, SPREAD: gl.constexpr
):  # fmt: skip
    """This program's first key, and its position on the four axes. The first keys have the most queries, if any do."""
    tiles = gl.cdiv(kv_len, BLOCK_KV)
    tile, n0, n1, n2, n3 = tile_and_position(
        gl.program_id(0), tiles, batch_0, batch_1, batch_2, batch_3, SHARED_BATCH, SPREAD
    )  # fmt: skip
    return tile * BLOCK_KV, n0, n1, n2, n3


@gluon.jit
def visited_queries(
    kv_start, position, n0, n1, n2, n3, ranges_ptr, filled_ptr, ranges_strides, q_len, kv_len, sizes,
    QUERY_BOUNDS: gl.constexpr, BLOCK_Q: gl.constexpr,
):  # fmt: skip
    """(start, full_start, full_end, end) at whole tiles of queries, as in `backward`.

    Queries that see every key lie within too, and so do those between: a mask is evaluated there.
    """
    kv_stop = gl.minimum(kv_start + BLOCK_KV, kv_len)
    start, full_start, full_end, end = QUERY_BOUNDS(kv_start, kv_stop, n0, n1, n2, n3, kv_len, q_len, sizes)
    if ranges_ptr is not None:
        ranges = batch_pointer(ranges_ptr, ranges_strides, n0, n1, n2, n3) + kv_start // BLOCK_KV * ranges_strides[4]
        end = gl.minimum(end, gl.load(ranges + 3 * ranges_strides[5]))
        start = gl.minimum(gl.maximum(start, gl.load(ranges)), end)
        full_start = gl.maximum(gl.maximum(start, full_start), gl.load(ranges + ranges_strides[5]))
        full_end = gl.minimum(gl.minimum(full_end, gl.load(ranges + 2 * ranges_strides[5])), end)
    start = start // BLOCK_Q * BLOCK_Q
    end = gl.cdiv(end, BLOCK_Q) * BLOCK_Q
    full_start = gl.minimum(gl.cdiv(full_start, BLOCK_Q) * BLOCK_Q, end)
    full_end = gl.where(kv_start + BLOCK_KV <= kv_len, full_end // BLOCK_Q * BLOCK_Q, full_start)
    if filled_ptr is not None:
        first = gl.load(filled_ptr + 2 * position)
        stop = gl.load(filled_ptr + 2 * position + 1)
        start = gl.minimum(start, first // BLOCK_Q * BLOCK_Q)
        end = gl.maximum(end, gl.cdiv(stop, BLOCK_Q) * BLOCK_Q)
    return start, full_start, gl.maximum(full_end, full_start), end
