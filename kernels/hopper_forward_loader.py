"""The warp of the forward for Hopper that loads: what it brings for which tile. In Gluon; see `hopper_forward`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashfuse.kernels.hopper_tiles import ROWS, load_own, next_stage, read_columns, store_columns
from flashfuse.kernels.hopper_visits import owned, say, skipped, skipped_tile, visited

# Queries of a group of warps that multiply.
GROUP_Q: gl.constexpr = gl.constexpr(64)


@gluon.jit
def load_tiles(
    q_desc, k_desc, v_desc, pairs_desc, shared, pairs_s, barriers, ranges_ptr, counter_ptr, ranges_strides,
    batch_0, batch_1, batch_2, batch_3, q_len, kv_len, sizes, captured, captured_strides, KV_BOUNDS: gl.constexpr,
    FILL_THRESHOLD: gl.constexpr, LONGEST_FIRST: gl.constexpr, Q_AXES: gl.constexpr, K_AXES: gl.constexpr,
    V_AXES: gl.constexpr, PAIRS_AT: gl.constexpr, PAIRS_AXES: gl.constexpr, COLUMNS: gl.constexpr,
    CODED_ROWS: gl.constexpr, CODE_OF: gl.constexpr, SHARED_BATCH: gl.constexpr,
    GROUPS: gl.constexpr, Q_STAGES: gl.constexpr, STAGES: gl.constexpr, SPREAD: gl.constexpr,
):  # fmt: skip
    """Queries, and tiles of keys as stages become free, the last tile first: each with the values of the one before.

    Who is done first takes the next tile of queries.
    """
    q_s, k_s, v_s, columns_s, said_s, filled_s = shared
    said, heard, known, q_full, q_empty, full, empty, pairs_full, pairs_empty = barriers
    BLOCK_Q: gl.constexpr = GROUPS * GROUP_Q
    BLOCK_KV: gl.constexpr = k_s.shape[1]
    Q_SLOTS: gl.constexpr = q_s.shape[0] // Q_STAGES
    stage = 0
    phase = 1
    turn = 0
    # Tiles of keys before.
    met = 0
    # Where the values of the tile before lie. In front of the first row TMA reads zeros.
    m0 = 0
    m1 = 0
    m2 = 0
    v_start = -BLOCK_KV
    keys = gl.arange(0, BLOCK_KV, gl.BlockedLayout([4], [32], [1], [0]))
    tiles = batch_0 * batch_1 * batch_2 * batch_3 * gl.cdiv(q_len, BLOCK_Q)
    number = gl.program_id(0)
    while number < tiles:
        q_start, n0, n1, n2, n3 = owned(
            number, batch_0, batch_1, batch_2, batch_3, q_len, BLOCK_Q, LONGEST_FIRST, SHARED_BATCH, SPREAD
        )  # fmt: skip
        start, full_start, full_end, end = visited(
            q_start, n0, n1, n2, n3, ranges_ptr, ranges_strides, q_len, kv_len, sizes, KV_BOUNDS, BLOCK_Q,
            BLOCK_KV,
        )  # fmt: skip
        say(said_s, said, heard, turn, (q_start, n0, n1, n2, n3, start, full_start, full_end, end))
        q_stage = turn % Q_STAGES
        mbarrier.wait(q_empty.index(q_stage), turn // Q_STAGES % 2 ^ 1)
        mbarrier.expect(q_full.index(q_stage), GROUPS * q_desc.block_type.nbytes)
        for group in gl.static_range(GROUPS):
            slot = q_s.index(Q_SLOTS * q_stage + group)
            load_own(q_desc, n0, n1, n2, q_start + group * GROUP_Q, q_full.index(q_stage), slot, Q_AXES)
        at = (n0, n1, n2, n3, q_len, kv_len, sizes)
        q_idx = gl.minimum(q_start + gl.arange(0, ROWS, gl.BlockedLayout([4], [32], [1], [0])), q_len - 1)
        for i in range((end - start) // BLOCK_KV):
            kv_start = end - (i + 1) * BLOCK_KV
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
            load_own(k_desc, n0, n1, n2, kv_start, full.index(stage), k_s.index(stage), K_AXES)
            load_own(v_desc, m0, m1, m2, v_start, full.index(stage), v_s.index(stage), V_AXES)
            _load_pairs(pairs_desc, pairs_s, pairs_full, pairs_empty, at, q_start, kv_start, met, PAIRS_AT, PAIRS_AXES)
            columns = read_columns(
                at, kv_start + keys, q_idx, captured, captured_strides, COLUMNS, CODED_ROWS, CODE_OF
            )  # fmt: skip
            _say_columns(columns_s, stage, columns, full)
            met += 1
            m0, m1, m2, v_start = n0, n1, n2, kv_start
            stage, phase = next_stage(stage, phase, STAGES)
        if FILL_THRESHOLD is not None:
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), v_desc.block_type.nbytes)
            load_own(v_desc, n0, n1, n2, start, full.index(stage), v_s.index(stage), V_AXES)
            _say_no_columns(full, stage, COLUMNS)
            stage, phase = next_stage(stage, phase, STAGES)
            v_start = -BLOCK_KV
            mbarrier.wait(known, turn % 2)
            before, behind = skipped(filled_s, turn, start, end, kv_len, BLOCK_KV, GROUPS)
            for i in range(before + behind):
                kv_start = skipped_tile(i, before, end, BLOCK_KV)
                columns = read_columns(
                    at, kv_start + keys, q_idx, captured, captured_strides, COLUMNS, CODED_ROWS, CODE_OF
                )  # fmt: skip
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(full.index(stage), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
                load_own(k_desc, n0, n1, n2, kv_start, full.index(stage), k_s.index(stage), K_AXES)
                load_own(v_desc, n0, n1, n2, kv_start, full.index(stage), v_s.index(stage), V_AXES)
                _load_pairs(
                    pairs_desc, pairs_s, pairs_full, pairs_empty, at, q_start, kv_start, met, PAIRS_AT, PAIRS_AXES
                )  # fmt: skip
                _say_columns(columns_s, stage, columns, full)
                met += 1
                stage, phase = next_stage(stage, phase, STAGES)
        turn += 1
        if counter_ptr is None:
            number += gl.num_programs(0)
        else:
            number = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
    say(said_s, said, heard, turn, (-1, 0, 0, 0, 0, 0, 0, 0, 0))
    if FILL_THRESHOLD is None:
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(full.index(stage), v_desc.block_type.nbytes)
        load_own(v_desc, m0, m1, m2, v_start, full.index(stage), v_s.index(stage), V_AXES)
        _say_no_columns(full, stage, COLUMNS)


@gluon.jit
def _load_pairs(
    pairs_desc, pairs_s, pairs_full, pairs_empty, at, q_start, kv_start, number, PAIRS_AT: gl.constexpr,
    PAIRS_AXES: gl.constexpr,
):  # fmt: skip
    """What is read for each pair of the program's tile with this number, if anything is."""
    if pairs_desc is not None:
        n0, n1, n2, n3, q_len, kv_len, sizes = at
        m0, m1, m2 = PAIRS_AT(n0, n1, n2, n3, q_len, kv_len, sizes)
        for group in gl.static_range(2):
            mbarrier.wait(pairs_empty.index(group), (number & 1) ^ 1)
            mbarrier.expect(pairs_full.index(group), pairs_desc.block_type.nbytes)
            row = q_start + group * GROUP_Q
            load_own(
                pairs_desc, m0, m1, m2, row, pairs_full.index(group), pairs_s.index(group), PAIRS_AXES, kv_start
            )  # fmt: skip


@gluon.jit
def _say_columns(columns_s, stage, columns, full):
    """Put what was read into a stage, which is not full without."""
    if len(columns) > 0:
        store_columns(columns_s, stage, columns)
        gl.thread_barrier()
        mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def _say_no_columns(full, stage, COLUMNS: gl.constexpr):
    """The same of a stage that holds no keys."""
    if COLUMNS is not None:
        mbarrier.arrive(full.index(stage), count=1)
