"""The forward by warp-specialised programs for Hopper: 16-bit operands, in Gluon.

One warp loads, two or three groups of four warps have 64 queries each. The products of a tile of keys run beside each
other and under exponentials: scores of one tile are issued before the values of the tile before it, which are waited
for when the row maxima are known. What the loader brings for a tile is therefore its keys, and the values of the tile
before.
A program takes tiles of queries until none is left. What comes before their first tile of keys is then the last one of
the queries before, whose output is stored when the first scores of the next are known. All tiles of keys, the first
too, take the same instructions: two groups' are all that a processor's cache of instructions holds.
A captured tensor that is read for each pair comes in tiles too, each into a group's registers before its scores are
there, so that one buffer a group is enough.
Shah et al., FlashAttention-3, https://arxiv.org/abs/2407.08608, section 3.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from flashfuse.kernels.forward import exponentials, finished_rows, shifts_with
from flashfuse.kernels.hopper_forward_loader import GROUP_Q, load_tiles
from flashfuse.kernels.hopper_tiles import (
    arrived,
    column_buffers,
    halves,
    in_words,
    issued,
    load_columns,
    next_stage,
    opaque,
    out_of_words,
    store_rows,
)
from flashfuse.kernels.hopper_visits import (
    TILE_LEN,
    TILES_SAID,
    said_keys,
    said_rows,
    skipped,
    skipped_tile,
)

# Registers of a thread that loads.
LOADER_REGISTERS: gl.constexpr = gl.constexpr(24)


@gluon.jit(do_not_specialize=["batch_0", "batch_1", "batch_2", "batch_3", "q_len", "kv_len", "sizes"])
def attention_hopper_forward_kernel(
    q_desc, k_desc, v_desc, out_desc, pairs_desc, lse_ptr, ranges_ptr, counter_ptr, ranges_strides,
    batch_0, batch_1, batch_2, batch_3, q_len, kv_len, sizes, captured, captured_strides,
    SCORE_MASKED: gl.constexpr, SCORE_FULL: gl.constexpr, KV_BOUNDS: gl.constexpr,
    LOG2_SCALE: gl.constexpr, FILL_THRESHOLD: gl.constexpr, LARGE_SCORES: gl.constexpr, FILLS: gl.constexpr,
    ZERO_EMPTY_ROWS: gl.constexpr, LONGEST_FIRST: gl.constexpr, SINK: gl.constexpr, ROW_FACTOR: gl.constexpr,
    ROW_KEPT: gl.constexpr, Q_AXES: gl.constexpr, K_AXES: gl.constexpr, V_AXES: gl.constexpr,
    PAIRS_AT: gl.constexpr, PAIRS_AXES: gl.constexpr, COLUMNS: gl.constexpr,
    CODED_ROWS: gl.constexpr, CODE_OF: gl.constexpr, COLUMN_TYPES: gl.constexpr, SHARED_BATCH: gl.constexpr,
    DEPTH: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_KV: gl.constexpr, GROUPS: gl.constexpr,
    Q_STAGES: gl.constexpr, STAGES: gl.constexpr, SPREAD: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """out_i = sum_j exp(s_ij - lse_i) v_j,  lse_i = log(sum_j exp(s_ij)): see `forward`, whose results these are.

    q_desc, .., out_desc: [n0, n1, n2, T, D]; pairs_desc: [n0, n1, n2, Tq, Tkv], or None. Q_AXES, ..: on which of the
    three axes the operand has positions of its own. PAIRS_AT: where on them pairs_desc is read.
    COLUMNS, CODED_ROWS, CODE_OF, COLUMN_TYPES: see `columns`.
    counter_ptr: a 0 that counts the tiles taken beside each program's first; without it a program takes every
    num_programs-th.
    DEPTH: columns of queries and keys, as a multiple of 16.
    BLOCK_D, BLOCK_DV: 64 to 256 columns, behind the last of which TMA gives zeros and writes nothing.
    GROUPS: of warps that multiply, two or three; REGISTERS: of each of their threads.
    Q_STAGES: tiles of queries that are loaded ahead; STAGES: tiles of keys, each with one of values.
    SPREAD: how many positions take a tile of queries before the next is begun; a divisor of their number.
    SHARED_BATCH: whether positions next to each other are those of the first axis.
    """
    dtype: gl.constexpr = q_desc.dtype
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # Shapes of shared memory are powers of two.
    SLOTS: gl.constexpr = 2 if GROUPS == 2 else 4
    q_s = gl.allocate_shared_memory(
        dtype, [SLOTS * Q_STAGES, GROUP_Q, BLOCK_D], gl.NVMMASharedLayout.get_default_for([GROUP_Q, BLOCK_D], dtype)
    )  # fmt: skip
    k_s = gl.allocate_shared_memory(
        dtype, [STAGES, BLOCK_KV, BLOCK_D], gl.NVMMASharedLayout.get_default_for([BLOCK_KV, BLOCK_D], dtype)
    )  # fmt: skip
    v_s = gl.allocate_shared_memory(
        dtype, [STAGES, BLOCK_KV, BLOCK_DV], gl.NVMMASharedLayout.get_default_for([BLOCK_KV, BLOCK_DV], dtype)
    )  # fmt: skip
    STORED: gl.constexpr = out_desc.block_type.shape[4]
    out_s = gl.allocate_shared_memory(
        dtype, [SLOTS, GROUP_Q, STORED], gl.NVMMASharedLayout.get_default_for([GROUP_Q, STORED], dtype)
    )  # fmt: skip
    # What is read for each pair of a tile, by the queries of each group.
    if pairs_desc is not None:
        pairs_s = gl.allocate_shared_memory(
            pairs_desc.dtype, [2, GROUP_Q, BLOCK_KV],
            gl.NVMMASharedLayout.get_default_for([GROUP_Q, BLOCK_KV], pairs_desc.dtype),
        )  # fmt: skip
    # What is read for each key of a tile.
    columns_s = column_buffers(COLUMN_TYPES, CODE_OF, STAGES, BLOCK_KV)
    # What `say` says, and of two tiles of queries whether those of a group see the keys that a mask has ruled out.
    said_s = gl.allocate_shared_memory(gl.int32, [TILES_SAID * TILE_LEN, 1], NUMBERS)
    filled_s = gl.allocate_shared_memory(gl.int32, [2 * SLOTS, 1], NUMBERS)
    said = gl.allocate_shared_memory(gl.int64, [TILES_SAID, 1], BARRIER)
    heard = gl.allocate_shared_memory(gl.int64, [TILES_SAID, 1], BARRIER)
    known = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    pairs_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    pairs_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(known, count=GROUPS)
    for slot in gl.static_range(TILES_SAID):
        mbarrier.init(said.index(slot), count=1)
        mbarrier.init(heard.index(slot), count=GROUPS)
    for stage in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(q_empty.index(stage), count=GROUPS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1 if COLUMNS is None else 2)
        mbarrier.init(empty.index(stage), count=GROUPS)
    for group in gl.static_range(2):
        mbarrier.init(pairs_full.index(group), count=1)
        mbarrier.init(pairs_empty.index(group), count=1)
    fence_async_shared()
    shared = (q_s, k_s, v_s, columns_s, said_s, filled_s)
    barriers = (said, heard, known, q_full, q_empty, full, empty, pairs_full, pairs_empty)
    work = (
        out_desc, lse_ptr, out_s, shared, pairs_s if pairs_desc is not None else None, barriers,
        batch_1, batch_2, batch_3, q_len, kv_len, sizes, captured, captured_strides,
    )  # fmt: skip
    if GROUPS == 2:
        gl.warp_specialize([
            (_attend, (
                0, work, SCORE_MASKED, SCORE_FULL, LOG2_SCALE, FILL_THRESHOLD, LARGE_SCORES, FILLS, ZERO_EMPTY_ROWS,
                SINK, ROW_FACTOR, ROW_KEPT, CODE_OF, DEPTH, BLOCK_DV, GROUPS, Q_STAGES, STAGES,
            )),
            (_attend, (
                1, work, SCORE_MASKED, SCORE_FULL, LOG2_SCALE, FILL_THRESHOLD, LARGE_SCORES, FILLS, ZERO_EMPTY_ROWS,
                SINK, ROW_FACTOR, ROW_KEPT, CODE_OF, DEPTH, BLOCK_DV, GROUPS, Q_STAGES, STAGES,
            )),
            (load_tiles, (
                q_desc, k_desc, v_desc, pairs_desc, shared, pairs_s if pairs_desc is not None else None, barriers,
                ranges_ptr, counter_ptr, ranges_strides, batch_0, batch_1, batch_2, batch_3, q_len, kv_len, sizes,
                captured, captured_strides, KV_BOUNDS, FILL_THRESHOLD, LONGEST_FIRST, Q_AXES, K_AXES, V_AXES,
                PAIRS_AT, PAIRS_AXES, COLUMNS, CODED_ROWS, CODE_OF, SHARED_BATCH, GROUPS, Q_STAGES, STAGES, SPREAD,
            )),
        ], [4, 1], [REGISTERS, LOADER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_attend, (
                0, work, SCORE_MASKED, SCORE_FULL, LOG2_SCALE, FILL_THRESHOLD, LARGE_SCORES, FILLS, ZERO_EMPTY_ROWS,
                SINK, ROW_FACTOR, ROW_KEPT, CODE_OF, DEPTH, BLOCK_DV, GROUPS, Q_STAGES, STAGES,
            )),
            (_attend, (
                1, work, SCORE_MASKED, SCORE_FULL, LOG2_SCALE, FILL_THRESHOLD, LARGE_SCORES, FILLS, ZERO_EMPTY_ROWS,
                SINK, ROW_FACTOR, ROW_KEPT, CODE_OF, DEPTH, BLOCK_DV, GROUPS, Q_STAGES, STAGES,
            )),
            (_attend, (
                2, work, SCORE_MASKED, SCORE_FULL, LOG2_SCALE, FILL_THRESHOLD, LARGE_SCORES, FILLS, ZERO_EMPTY_ROWS,
                SINK, ROW_FACTOR, ROW_KEPT, CODE_OF, DEPTH, BLOCK_DV, GROUPS, Q_STAGES, STAGES,
            )),
            (load_tiles, (
                q_desc, k_desc, v_desc, pairs_desc, shared, pairs_s if pairs_desc is not None else None, barriers,
                ranges_ptr, counter_ptr, ranges_strides, batch_0, batch_1, batch_2, batch_3, q_len, kv_len, sizes,
                captured, captured_strides, KV_BOUNDS, FILL_THRESHOLD, LONGEST_FIRST, Q_AXES, K_AXES, V_AXES,
                PAIRS_AT, PAIRS_AXES, COLUMNS, CODED_ROWS, CODE_OF, SHARED_BATCH, GROUPS, Q_STAGES, STAGES, SPREAD,
            )),
        ], [4, 4, 1], [REGISTERS, REGISTERS, LOADER_REGISTERS])  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# The groups of warps that multiply


@gluon.jit
def _attend(
    GROUP: gl.constexpr, work, SCORE_MASKED: gl.constexpr, SCORE_FULL: gl.constexpr, LOG2_SCALE: gl.constexpr,
    FILL_THRESHOLD: gl.constexpr, LARGE_SCORES: gl.constexpr, FILLS: gl.constexpr, ZERO_EMPTY_ROWS: gl.constexpr,
    SINK: gl.constexpr, ROW_FACTOR: gl.constexpr, ROW_KEPT: gl.constexpr, CODE_OF: gl.constexpr, DEPTH: gl.constexpr,
    BLOCK_DV: gl.constexpr, GROUPS: gl.constexpr, Q_STAGES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The output and the log-sum-exp of 64 queries of each tile.

    Where rows may see keys that a mask has ruled out, a tile of queries ends before the next begins.
    """
    out_desc, lse_ptr, out_s, shared, pairs_s, barriers = work[:6]
    batch_1, batch_2, batch_3, q_len, kv_len, sizes, captured, captured_strides = work[6:]
    q_s, k_s, v_s, columns_s, said_s, _ = shared
    said, heard, _, q_full, q_empty, full, empty, pairs_full, pairs_empty = barriers
    dtype: gl.constexpr = q_s.dtype
    BLOCK_KV: gl.constexpr = k_s.shape[1]
    Q_SLOTS: gl.constexpr = q_s.shape[0] // Q_STAGES
    RUNS_ON: gl.constexpr = FILL_THRESHOLD is None
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KV, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, SUMS)
    nothing = gl.zeros([GROUP_Q, BLOCK_KV], gl.float32, SCORES)
    nowhere = gl.full([GROUP_Q], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    no_sum = gl.zeros([GROUP_Q], gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([GROUP_Q, BLOCK_DV], gl.float32, SUMS)
    row_max, row_shift, row_sum = nowhere, nowhere, no_sum
    done_max, done_shift, done_sum = nowhere, nowhere, no_sum
    w = in_words(nothing, dtype)
    stage = 0
    phase = 0
    turn = 0
    # Tiles of keys before.
    met = 0
    # Whether the tile before was the first of its queries.
    begun = False
    mbarrier.wait(said.index(0), 0)
    q_start, n0, n1, n2, n3 = said_rows(said_s, turn)
    while q_start >= 0:
        start, full_start, full_end, end = said_keys(said_s, turn)
        at = (n0, n1, n2, n3, q_len, kv_len, sizes)
        q_start += GROUP * GROUP_Q
        q_stage = turn % Q_STAGES
        q = q_s.index(Q_SLOTS * q_stage + GROUP)
        mbarrier.wait(q_full.index(q_stage), turn // Q_STAGES % 2)
        for i in range((end - start) // BLOCK_KV):
            kv_start = end - (i + 1) * BLOCK_KV
            first = i == 0
            mbarrier.wait(full.index(stage), phase)
            qk = issued(q, k_s.index(stage), nothing, DEPTH)
            # Beside the first tile of keys, the last values of the queries before, or nothing; behind it sums begin.
            acc_next = warpgroup_mma(
                out_of_words(w, dtype, WEIGHTS), v_s.index(stage), acc, use_acc=not begun, is_async=True
            )  # fmt: skip
            pairs = _pairs(pairs_s, pairs_full, pairs_empty, GROUP, met)
            columns = (columns_s, stage, GROUP, CODE_OF)
            met += 1
            if (kv_start < full_start) | (kv_start >= full_end):
                score = _scores(
                    qk, pairs, columns, q_start, opaque(kv_start), at, captured, captured_strides, SCORE_MASKED, 1,
                    BLOCK_KV,
                )  # fmt: skip
            else:
                score = _scores(
                    qk, pairs, columns, q_start, kv_start, at, captured, captured_strides, SCORE_FULL, 1, BLOCK_KV
                )  # fmt: skip
            new_max, new_shift, subtracted = shifts_with(score, row_max, LOG2_SCALE, LARGE_SCORES)
            acc = arrived(acc_next, 0)
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
            p, correction = exponentials(score, row_max, row_shift, subtracted, LOG2_SCALE, LARGE_SCORES, False)
            new_sum = row_sum * correction + gl.sum(p, 1)
            # Not before the wait: the product under way reads the registers of the weights before.
            w = in_words(p, dtype)
            acc = acc * gl.convert_layout(gl.where(first, 1.0, correction), OUT_ROWS)[:, None]
            if RUNS_ON and first & (turn > 0):
                _finish(
                    GROUP, acc, done_sum, done_max, done_shift, out_desc, lse_ptr, out_s, said_s, heard, turn - 1,
                    batch_1, batch_2, batch_3, q_len, kv_len, sizes, captured, captured_strides, LOG2_SCALE,
                    LARGE_SCORES, FILLS, ZERO_EMPTY_ROWS, SINK, ROW_FACTOR, ROW_KEPT,
                )  # fmt: skip
            row_max, row_shift, row_sum = new_max, new_shift, new_sum
            begun = first
        if not RUNS_ON:
            acc, w, stage, phase, met = _see_all(
                GROUP, work, q, acc, begun, row_max, row_shift, row_sum, w, q_start, start, end, at, stage, phase, turn,
                met, SCORE_MASKED, LOG2_SCALE, FILL_THRESHOLD, LARGE_SCORES, FILLS, ZERO_EMPTY_ROWS, SINK, ROW_FACTOR,
                ROW_KEPT, CODE_OF, DEPTH, GROUPS, STAGES,
            )  # fmt: skip
        mbarrier.arrive(q_empty.index(q_stage), count=1)
        done_max, done_shift, done_sum = row_max, row_shift, row_sum
        row_max, row_shift, row_sum = nowhere, nowhere, no_sum
        turn += 1
        mbarrier.wait(said.index(turn % TILES_SAID), turn // TILES_SAID % 2)
        q_start, n0, n1, n2, n3 = said_rows(said_s, turn)

    if RUNS_ON:
        mbarrier.wait(full.index(stage), phase)
        acc = warpgroup_mma(out_of_words(w, dtype, WEIGHTS), v_s.index(stage), acc, use_acc=not begun)
        _finish(
            GROUP, acc, done_sum, done_max, done_shift, out_desc, lse_ptr, out_s, said_s, heard, turn - 1, batch_1,
            batch_2, batch_3, q_len, kv_len, sizes, captured, captured_strides, LOG2_SCALE, LARGE_SCORES, FILLS,
            ZERO_EMPTY_ROWS, SINK, ROW_FACTOR, ROW_KEPT,
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def _see_all(
    GROUP: gl.constexpr, work, q, acc, begun, row_max, row_shift, row_sum, w, rows, start, end, at, stage, phase, turn,
    met, SCORE_MASKED: gl.constexpr, LOG2_SCALE: gl.constexpr, FILL_THRESHOLD: gl.constexpr,
    LARGE_SCORES: gl.constexpr, FILLS: gl.constexpr, ZERO_EMPTY_ROWS: gl.constexpr, SINK: gl.constexpr,
    ROW_FACTOR: gl.constexpr, ROW_KEPT: gl.constexpr, CODE_OF: gl.constexpr, DEPTH: gl.constexpr,
    GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Finish queries that may see keys which a mask has ruled out: rows that have seen nothing above the fill see all.

    begun: whether they have seen one tile. Returns what the next queries take no notice of, the stage and the phase
    that come next, and how many tiles were met.
    """
    out_desc, lse_ptr, out_s, shared, pairs_s, barriers = work[:6]
    batch_1, batch_2, batch_3, q_len, kv_len, sizes, captured, captured_strides = work[6:]
    q_s, k_s, v_s, columns_s, said_s, filled_s = shared
    _, heard, known, _, _, full, empty, pairs_full, pairs_empty = barriers
    dtype: gl.constexpr = q_s.dtype
    BLOCK_KV: gl.constexpr = k_s.shape[1]
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    nothing = gl.zeros([GROUP_Q, BLOCK_KV], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KV, 16]))
    mbarrier.wait(full.index(stage), phase)
    acc = warpgroup_mma(out_of_words(w, dtype, WEIGHTS), v_s.index(stage), acc, use_acc=not begun)
    mbarrier.arrive(empty.index(stage), count=1)
    stage, phase = next_stage(stage, phase, STAGES)
    filled = gl.full(
        [1], gl.max((row_max <= FILL_THRESHOLD).to(gl.int32), 0), gl.int32,
        gl.BlockedLayout([1], [32], [4], [0]),
    )  # fmt: skip
    filled_s.index(turn % 2 * GROUPS + GROUP).store(filled)
    gl.thread_barrier()
    mbarrier.arrive(known, count=1)
    mbarrier.wait(known, turn % 2)
    before, behind = skipped(filled_s, turn, start, end, kv_len, BLOCK_KV, GROUPS)
    # Rare.
    for i in range(before + behind):
        kv_start = skipped_tile(i, before, end, BLOCK_KV)
        mbarrier.wait(full.index(stage), phase)
        qk = issued(q, k_s.index(stage), nothing, DEPTH)
        pairs = _pairs(pairs_s, pairs_full, pairs_empty, GROUP, met)
        columns = (columns_s, stage, GROUP, CODE_OF)
        met += 1
        score = _scores(
            qk, pairs, columns, rows, kv_start, at, captured, captured_strides, SCORE_MASKED, 0, BLOCK_KV
        )  # fmt: skip
        new_max, new_shift, subtracted = shifts_with(score, row_max, LOG2_SCALE, LARGE_SCORES)
        p, correction = exponentials(score, row_max, row_shift, subtracted, LOG2_SCALE, LARGE_SCORES, False)
        row_sum = row_sum * correction + gl.sum(p, 1)
        row_max, row_shift = new_max, new_shift
        w = in_words(p, dtype)
        acc = acc * gl.convert_layout(correction, OUT_ROWS)[:, None]
        acc = warpgroup_mma(out_of_words(w, dtype, WEIGHTS), v_s.index(stage), acc)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    _finish(
        GROUP, acc, row_sum, row_max, row_shift, out_desc, lse_ptr, out_s, said_s, heard, turn, batch_1, batch_2,
        batch_3, q_len, kv_len, sizes, captured, captured_strides, LOG2_SCALE, LARGE_SCORES, FILLS, ZERO_EMPTY_ROWS,
        SINK, ROW_FACTOR, ROW_KEPT,
    )  # fmt: skip
    return acc, w, stage, phase, met


@gluon.jit
def _finish(
    GROUP: gl.constexpr, acc, row_sum, row_max, row_shift, out_desc, lse_ptr, out_s, said_s, heard, turn, batch_1,
    batch_2, batch_3, q_len, kv_len, sizes, captured, captured_strides, LOG2_SCALE: gl.constexpr,
    LARGE_SCORES: gl.constexpr, FILLS: gl.constexpr, ZERO_EMPTY_ROWS: gl.constexpr, SINK: gl.constexpr,
    ROW_FACTOR: gl.constexpr, ROW_KEPT: gl.constexpr,
):  # fmt: skip
    """Store what the queries of a turn give when all their keys are done; the last that asks where they are."""
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    q_start, n0, n1, n2, n3 = said_rows(said_s, turn)
    gl.thread_barrier()
    mbarrier.arrive(heard.index(turn % TILES_SAID), count=1)
    q_start += GROUP * GROUP_Q
    row_sum = gl.convert_layout(row_sum, OUT_ROWS)
    # The one tile of rows without any may hold a value that is no number.
    acc = gl.where(row_sum[:, None] == 0, 0.0, acc)
    rows = q_start + gl.arange(0, GROUP_Q, OUT_ROWS)
    out, largest, lse_sum = finished_rows(
        acc, row_sum, gl.convert_layout(row_max, OUT_ROWS), gl.convert_layout(row_shift, OUT_ROWS), n0, n1, n2, n3,
        gl.minimum(rows, q_len - 1), q_len, kv_len, sizes, captured, captured_strides, LOG2_SCALE, LARGE_SCORES, FILLS,
        ZERO_EMPTY_ROWS, True, SINK, ROW_FACTOR, ROW_KEPT,
    )  # fmt: skip
    position = ((n0 * batch_1 + n1) * batch_2 + n2) * batch_3 + n3
    lse_ptrs = lse_ptr + 2 * (position.to(gl.int64) * q_len + rows)
    gl.store(lse_ptrs, largest, mask=rows < q_len)
    gl.store(lse_ptrs + 1, lse_sum, mask=rows < q_len)
    _store(out_desc, n0, n1, n2, q_start, out_s.index(GROUP), out.to(out_desc.dtype), 0)


@gluon.jit
def _store(out_desc, n0, n1, n2, row, slot, out, COLUMN: gl.constexpr):
    """Rows of an output from a column on, by as many columns as the buffer has."""
    if out.shape[1] > slot.shape[1]:
        left, right = halves(out)
        _store(out_desc, n0, n1, n2, row, slot, left, COLUMN)
        _store(out_desc, n0, n1, n2, row, slot, right, COLUMN + left.shape[1])
    else:
        # One thread waits until the output before has left the buffer, and the others for it.
        tma.store_wait(0)
        gl.thread_barrier()
        store_rows(out_desc, n0, n1, n2, row, slot, out, COLUMN)


@gluon.jit
def _pairs(pairs_s, pairs_full, pairs_empty, GROUP: gl.constexpr, number):
    """What is read for each pair of the group's tile with this number; 0 where nothing is."""
    if pairs_s is None:
        return 0
    else:
        mbarrier.wait(pairs_full.index(GROUP), number & 1)
        pairs = pairs_s.index(GROUP).load(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, pairs_s.shape[2], 16]))
        # All threads have read before TMA writes there again.
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(pairs_empty.index(GROUP), count=1)
        return pairs


@gluon.jit
def _scores(
    qk, pairs, columns, q_start, kv_start, at, captured, captured_strides,
    SCORE: gl.constexpr, OUTSTANDING: gl.constexpr, BLOCK_KV: gl.constexpr,
):  # fmt: skip
    """The inner scores of a tile whose products are under way, and OUTSTANDING products issued after those.

    columns: see `load_columns`.
    """
    n0, n1, n2, n3, q_len, kv_len, sizes = at
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KV, 16])
    q_idx = gl.minimum(q_start + gl.arange(0, GROUP_Q, gl.SliceLayout(1, LAYOUT)), q_len - 1)[:, None]
    kv_idx = kv_start + gl.arange(0, BLOCK_KV, gl.SliceLayout(0, LAYOUT))[None, :]
    read = load_columns(columns, LAYOUT)
    score, _ = SCORE(
        qk, pairs, read, OUTSTANDING, n0, n1, n2, n3, q_idx, kv_idx, q_len, kv_len, sizes, captured, captured_strides
    )  # fmt: skip
    return score
