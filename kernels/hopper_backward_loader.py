"""The warp of the one pass for Hopper that loads: what it brings for which tile. In Gluon; see `hopper_backward`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashfuse.kernels.backward_rows import DELTA, MINUS_SHIFT, SHARE, batch_position, rows_length
from flashfuse.kernels.hopper_query_visits import BLOCK_KV, GROUP_KV, owned_keys, visited_queries
from flashfuse.kernels.hopper_tiles import load_own, load_rows, next_stage, read_columns, store_columns

# Queries of a product.
HALF: gl.constexpr = gl.constexpr(64)
# Tiles of queries that are loaded ahead.
STAGES: gl.constexpr = gl.constexpr(2)


@gluon.jit
def load_tiles(
    q_desc, k_desc, v_desc, grad_desc, pairs_desc, rows_ptr, q_s, k_s, v_s, grad_s, rows_s, columns_s, pairs_s,
    barriers, ranges_ptr, filled_ptr, ranges_strides, batch_0, batch_1, batch_2, batch_3, loop_0, loop_1, loop_2,
    loop_3, q_len, kv_len, sizes, captured, captured_strides, QUERY_BOUNDS: gl.constexpr, SLACK: gl.constexpr,
    PAIRS_AT: gl.constexpr, PAIRS_AXES: gl.constexpr, COLUMNS: gl.constexpr, CODED_ROWS: gl.constexpr,
    CODE_OF: gl.constexpr, SHARED_BATCH: gl.constexpr, BLOCK_Q: gl.constexpr, SPREAD: gl.constexpr,
):  # fmt: skip
    """Keys and values once, and tiles of queries with their gradients and numbers as slots become free."""
    keys_full, full, empty, pairs_full, pairs_empty = barriers
    HALVES: gl.constexpr = BLOCK_Q // HALF
    row = gl.arange(0, HALF, gl.BlockedLayout([2], [32], [1], [0]))
    keys = gl.arange(0, BLOCK_KV, gl.BlockedLayout([4], [32], [1], [0]))
    kv_start, n0, n1, n2, n3 = owned_keys(batch_0, batch_1, batch_2, batch_3, kv_len, SHARED_BATCH, SPREAD)
    mbarrier.expect(keys_full, 2 * k_desc.block_type.nbytes + 2 * v_desc.block_type.nbytes)
    for group in gl.static_range(2):
        load_rows(k_desc, n0, n1, n2, kv_start + group * GROUP_KV, keys_full, k_s.index(group))
        load_rows(v_desc, n0, n1, n2, kv_start + group * GROUP_KV, keys_full, v_s.index(group))
    rows_len = rows_length(q_len)
    planes = (batch_0 * loop_0).to(gl.int64) * batch_1 * loop_1 * batch_2 * loop_2 * batch_3 * loop_3 * rows_len
    stage = 0
    phase = 1
    slot = 0
    for shared in range(loop_0 * loop_1 * loop_2 * loop_3):
        s0, s1, s2, s3 = batch_position(shared, loop_0, loop_1, loop_2, loop_3)
        m0, m1, m2, m3 = n0 + s0, n1 + s1, n2 + s2, n3 + s3
        position = ((m0 * batch_1 * loop_1 + m1) * batch_2 * loop_2 + m2) * batch_3 * loop_3 + m3
        start, _, _, end = visited_queries(
            kv_start, position, m0, m1, m2, m3, ranges_ptr, filled_ptr, ranges_strides, q_len, kv_len, sizes,
            QUERY_BOUNDS, BLOCK_Q,
        )  # fmt: skip
        at = (m0, m1, m2, m3, q_len, kv_len, sizes)
        for q_start in range(start, end, BLOCK_Q):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), q_desc.block_type.nbytes + grad_desc.block_type.nbytes)
            load_rows(q_desc, m0, m1, m2, q_start, full.index(stage), q_s.index(stage))
            load_rows(grad_desc, m0, m1, m2, q_start, full.index(stage), grad_s.index(stage))
            numbers = rows_ptr + position.to(gl.int64) * rows_len + q_start
            for half in gl.static_range(HALVES):
                shifts = gl.load(numbers + MINUS_SHIFT * planes + half * HALF + row)
                deltas = gl.load(numbers + DELTA * planes + half * HALF + row)
                rows_s.index(4 * HALVES * stage + half).store(shifts)
                rows_s.index(4 * HALVES * stage + HALVES + half).store(deltas)
                if SLACK is not None:
                    shares = gl.load(numbers + SHARE * planes + half * HALF + row)
                    rows_s.index(4 * HALVES * stage + 2 * HALVES + half).store(shares)
                q_idx = gl.minimum(q_start + half * HALF + row, q_len - 1)
                columns = read_columns(
                    at, q_idx, kv_start + keys, captured, captured_strides, COLUMNS, CODED_ROWS, CODE_OF
                )  # fmt: skip
                store_columns(columns_s, HALVES * stage + half, columns)
            gl.thread_barrier()
            mbarrier.arrive(full.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
            if pairs_desc is not None:
                p0, p1, p2 = PAIRS_AT(m0, m1, m2, m3, q_len, kv_len, sizes)
                for half in gl.static_range(HALVES):
                    turn = slot if HALVES == 1 else half
                    for group in gl.static_range(2):
                        mbarrier.wait(pairs_empty.index(group), turn ^ 1)
                        mbarrier.expect(pairs_full.index(group), pairs_desc.block_type.nbytes)
                        load_own(
                            pairs_desc, p0, p1, p2, q_start + half * HALF, pairs_full.index(group),
                            pairs_s.index(group), PAIRS_AXES, kv_start + group * GROUP_KV,
                        )  # fmt: skip
                slot ^= 1
