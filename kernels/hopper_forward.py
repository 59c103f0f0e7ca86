"""The forward by warp-specialised programs for Hopper: 16-bit operands, in Gluon.

One warp loads, two groups of four warps have 64 queries each. The products of a tile of keys run beside each other and
under exponentials: scores of one tile are issued before the values of the tile before it, which are waited for when the
row maxima are known. What the loader brings for a tile is therefore its keys, and the values of the tile before.
Shah et al., FlashAttention-3, https://arxiv.org/abs/2407.08608, section 3.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from flashfuse.kernels import mask
from flashfuse.kernels.backward_rows import batch_position
from flashfuse.kernels.forward import exponentials, finished_rows, shifts_with, whole_tiles
from flashfuse.kernels.hopper_tiles import arrived, load_rows, next_stage, opaque, store_rows
from flashfuse.kernels.tiles import batch_pointer

# Queries of a group of warps, and of a program; keys of a tile. Shapes of matrix instructions: no table chooses them.
GROUP_Q: gl.constexpr = gl.constexpr(64)
BLOCK_Q: gl.constexpr = gl.constexpr(128)
BLOCK_KV: gl.constexpr = gl.constexpr(128)
# Queries that share a row of `ranges_ptr`.
MASK_BLOCK: gl.constexpr = gl.constexpr(mask.MASK_BLOCK)
# Registers of a thread that multiplies, and of one that loads; `MAX_REGISTERS` of each are there to be shared out.
REGISTERS: gl.constexpr = gl.constexpr(240)
LOADER_REGISTERS: gl.constexpr = gl.constexpr(24)
MAX_REGISTERS = 168


@gluon.jit(do_not_specialize=["batch_0", "batch_1", "batch_2", "batch_3", "q_len", "kv_len", "sizes"])
def attention_hopper_forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, ranges_ptr, ranges_strides,
    batch_0, batch_1, batch_2, batch_3, q_len, kv_len, sizes, captured, captured_strides,
    SCORE_MASKED: gl.constexpr, SCORE_FULL: gl.constexpr, KV_BOUNDS: gl.constexpr,
    LOG2_SCALE: gl.constexpr, FILL_THRESHOLD: gl.constexpr, LARGE_SCORES: gl.constexpr, FILLS: gl.constexpr,
    ZERO_EMPTY_ROWS: gl.constexpr, LONGEST_FIRST: gl.constexpr, SINK: gl.constexpr, ROW_FACTOR: gl.constexpr,
    ROW_KEPT: gl.constexpr, Q_AXES: gl.constexpr, K_AXES: gl.constexpr, V_AXES: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, STAGES: gl.constexpr, SPREAD: gl.constexpr,
):  # fmt: skip
    """out_i = sum_j exp(s_ij - lse_i) v_j,  lse_i = log(sum_j exp(s_ij)): see `forward`, whose results these are.

    q_desc, .., out_desc: [n0, n1, n2, T, D]. Q_AXES, ..: on which of the three axes the operand has
    positions of its own.
    BLOCK_D, BLOCK_DV: 64 or 128 columns, behind the last of which TMA gives zeros and writes nothing.
    STAGES: tiles of keys, each with one of values, that are loaded ahead.
    SPREAD: how many positions take a tile of queries before the next is begun; a divisor of their number.
    """
    dtype: gl.constexpr = q_desc.dtype
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    WIDEST: gl.constexpr = BLOCK_D if BLOCK_D > BLOCK_DV else BLOCK_DV
    # Queries, and in their place the output when all keys are done.
    q_s = gl.allocate_shared_memory(
        dtype, [2, GROUP_Q, WIDEST], gl.NVMMASharedLayout.get_default_for([GROUP_Q, WIDEST], dtype)
    )  # fmt: skip
    k_s = gl.allocate_shared_memory(
        dtype, [STAGES, BLOCK_KV, BLOCK_D], gl.NVMMASharedLayout.get_default_for([BLOCK_KV, BLOCK_D], dtype)
    )  # fmt: skip
    v_s = gl.allocate_shared_memory(
        dtype, [STAGES, BLOCK_KV, BLOCK_DV], gl.NVMMASharedLayout.get_default_for([BLOCK_KV, BLOCK_DV], dtype)
    )  # fmt: skip
    # Whether the queries of a group see the keys that a mask has ruled out.
    filled_s = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    known = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(q_full, count=1)
    mbarrier.init(known, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    barriers = (q_full, full, empty, known)
    gl.warp_specialize(
        [
            (_attend, (
                0, out_desc, lse_ptr, q_s, k_s, v_s, filled_s, barriers, ranges_ptr, ranges_strides,
                batch_0, batch_1, batch_2, batch_3, q_len, kv_len, sizes, captured, captured_strides,
                SCORE_MASKED, SCORE_FULL, KV_BOUNDS, LOG2_SCALE, FILL_THRESHOLD, LARGE_SCORES, FILLS, ZERO_EMPTY_ROWS,
                LONGEST_FIRST, SINK, ROW_FACTOR, ROW_KEPT, BLOCK_D, BLOCK_DV, STAGES, SPREAD,
            )),
            (_attend, (
                1, out_desc, lse_ptr, q_s, k_s, v_s, filled_s, barriers, ranges_ptr, ranges_strides,
                batch_0, batch_1, batch_2, batch_3, q_len, kv_len, sizes, captured, captured_strides,
                SCORE_MASKED, SCORE_FULL, KV_BOUNDS, LOG2_SCALE, FILL_THRESHOLD, LARGE_SCORES, FILLS, ZERO_EMPTY_ROWS,
                LONGEST_FIRST, SINK, ROW_FACTOR, ROW_KEPT, BLOCK_D, BLOCK_DV, STAGES, SPREAD,
            )),
            (_load, (
                q_desc, k_desc, v_desc, q_s, k_s, v_s, filled_s, barriers, ranges_ptr, ranges_strides,
                batch_0, batch_1, batch_2, batch_3, q_len, kv_len, sizes, KV_BOUNDS, FILL_THRESHOLD, LONGEST_FIRST,
                Q_AXES, K_AXES, V_AXES, BLOCK_D, STAGES, SPREAD,
            )),
        ],
        [4, 1],
        [REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Which tiles there are: the same for those who load and those who multiply


@gluon.jit
def _owned(batch_0, batch_1, batch_2, batch_3, q_len, LONGEST_FIRST: gl.constexpr, SPREAD: gl.constexpr):
    """This program's first query, and its position on the four axes."""
    tiles = gl.cdiv(q_len, BLOCK_Q)
    round_of = gl.program_id(0) // (tiles * SPREAD)
    rest = gl.program_id(0) % (tiles * SPREAD)
    n0, n1, n2, n3 = batch_position(round_of * SPREAD + rest % SPREAD, batch_0, batch_1, batch_2, batch_3)
    tile = rest // SPREAD
    if LONGEST_FIRST:
        tile = tiles - 1 - tile
    return tile * BLOCK_Q, n0, n1, n2, n3


@gluon.jit
def _visited(
    q_start, n0, n1, n2, n3, ranges_ptr, ranges_strides, q_len, kv_len, sizes, KV_BOUNDS: gl.constexpr
):  # fmt: skip
    """(start, full_start, full_end, end) at whole tiles of keys, as in `forward`, but one tile at least."""
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
    start, full_start, full_end, end = whole_tiles(start, full_start, full_end, end, BLOCK_KV)
    start = gl.minimum(start, (kv_len - 1) // BLOCK_KV * BLOCK_KV)
    return start, full_start, full_end, gl.maximum(end, start + BLOCK_KV)


@gluon.jit
def _stored(row, stride):
    """The fields of one stored range."""
    return gl.load(row), gl.load(row + stride), gl.load(row + 2 * stride), gl.load(row + 3 * stride)


@gluon.jit
def _skipped(filled_s, start, end, kv_len):
    """(tiles before, tiles behind) those visited, if a row of either group has seen nothing above the fill."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    filled = gl.max(filled_s.index(0).load(ONE) | filled_s.index(1).load(ONE), 0)
    return filled * (start // BLOCK_KV), filled * gl.cdiv(gl.maximum(kv_len - end, 0), BLOCK_KV)


@gluon.jit
def _skipped_tile(i, before, end):
    return gl.where(i < before, 0, end - before * BLOCK_KV) + i * BLOCK_KV


@gluon.jit
def _q_slot(q_s, group, BLOCK: gl.constexpr, dtype: gl.constexpr):
    """The rows [64, BLOCK] of a group, in its part of the shared memory of queries."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP_Q, BLOCK], dtype)
    return q_s.index(group)._reinterpret(dtype, [q_s.shape[2] // BLOCK, GROUP_Q, BLOCK], LAYOUT).index(0)


# --------------------------------------------------------------------------------------------------------------------
# The warp that loads


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, q_s, k_s, v_s, filled_s, barriers, ranges_ptr, ranges_strides,
    batch_0, batch_1, batch_2, batch_3, q_len, kv_len, sizes, KV_BOUNDS: gl.constexpr, FILL_THRESHOLD: gl.constexpr,
    LONGEST_FIRST: gl.constexpr, Q_AXES: gl.constexpr, K_AXES: gl.constexpr, V_AXES: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, SPREAD: gl.constexpr,
):  # fmt: skip
    """Queries once, and tiles of keys and values as stages become free: the last tile first, values a stage later."""
    q_full, full, empty, known = barriers
    q_start, n0, n1, n2, n3 = _owned(batch_0, batch_1, batch_2, batch_3, q_len, LONGEST_FIRST, SPREAD)
    start, _, _, end = _visited(
        q_start, n0, n1, n2, n3, ranges_ptr, ranges_strides, q_len, kv_len, sizes, KV_BOUNDS
    )  # fmt: skip
    mbarrier.expect(q_full, 2 * q_desc.block_type.nbytes)
    for group in gl.static_range(2):
        slot = _q_slot(q_s, group, BLOCK_D, q_desc.dtype)
        _load_own(q_desc, n0, n1, n2, q_start + group * GROUP_Q, q_full, slot, Q_AXES)
    mbarrier.expect(full.index(0), k_desc.block_type.nbytes)
    _load_own(k_desc, n0, n1, n2, end - BLOCK_KV, full.index(0), k_s.index(0), K_AXES)
    stage = 1
    phase = 1
    for i in range(1, (end - start) // BLOCK_KV):
        kv_start = end - (i + 1) * BLOCK_KV
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(full.index(stage), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        _load_own(k_desc, n0, n1, n2, kv_start, full.index(stage), k_s.index(stage), K_AXES)
        _load_own(v_desc, n0, n1, n2, kv_start + BLOCK_KV, full.index(stage), v_s.index(stage), V_AXES)
        stage, phase = next_stage(stage, phase, STAGES)
    mbarrier.wait(empty.index(stage), phase)
    mbarrier.expect(full.index(stage), v_desc.block_type.nbytes)
    _load_own(v_desc, n0, n1, n2, start, full.index(stage), v_s.index(stage), V_AXES)
    if FILL_THRESHOLD is not None:
        mbarrier.wait(known, 0)
        before, behind = _skipped(filled_s, start, end, kv_len)
        for i in range(before + behind):
            stage, phase = next_stage(stage, phase, STAGES)
            kv_start = _skipped_tile(i, before, end)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
            _load_own(k_desc, n0, n1, n2, kv_start, full.index(stage), k_s.index(stage), K_AXES)
            _load_own(v_desc, n0, n1, n2, kv_start, full.index(stage), v_s.index(stage), V_AXES)


@gluon.jit
def _load_own(desc, n0, n1, n2, row, barrier, slot, AXES: gl.constexpr):
    """Rows of an operand; on axes where it has one position for all, that."""
    load_rows(
        desc, n0 if AXES[0] else 0, n1 if AXES[1] else 0, n2 if AXES[2] else 0, row, barrier, slot
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# The groups of warps that multiply


@gluon.jit
def _attend(
    GROUP: gl.constexpr, out_desc, lse_ptr, q_s, k_s, v_s, filled_s, barriers, ranges_ptr, ranges_strides,
    batch_0, batch_1, batch_2, batch_3, q_len, kv_len, sizes, captured, captured_strides,
    SCORE_MASKED: gl.constexpr, SCORE_FULL: gl.constexpr, KV_BOUNDS: gl.constexpr,
    LOG2_SCALE: gl.constexpr, FILL_THRESHOLD: gl.constexpr, LARGE_SCORES: gl.constexpr, FILLS: gl.constexpr,
    ZERO_EMPTY_ROWS: gl.constexpr, LONGEST_FIRST: gl.constexpr, SINK: gl.constexpr, ROW_FACTOR: gl.constexpr,
    ROW_KEPT: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, STAGES: gl.constexpr, SPREAD: gl.constexpr,
):  # fmt: skip
    """The output and the log-sum-exp of the 64 queries of one group."""
    q_full, full, empty, known = barriers
    dtype: gl.constexpr = q_s.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KV, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, SUMS)
    q_start, n0, n1, n2, n3 = _owned(batch_0, batch_1, batch_2, batch_3, q_len, LONGEST_FIRST, SPREAD)
    start, full_start, full_end, end = _visited(
        q_start, n0, n1, n2, n3, ranges_ptr, ranges_strides, q_len, kv_len, sizes, KV_BOUNDS
    )  # fmt: skip
    q_start += GROUP * GROUP_Q
    at = (n0, n1, n2, n3, q_len, kv_len, sizes)
    q = _q_slot(q_s, GROUP, BLOCK_D, dtype)
    nothing = gl.zeros([GROUP_Q, BLOCK_KV], gl.float32, SCORES)
    acc = gl.zeros([GROUP_Q, BLOCK_DV], gl.float32, SUMS)
    row_max = gl.full([GROUP_Q], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))

    # The last tile, which mostly has a mask; there are no values yet.
    mbarrier.wait(q_full, 0)
    mbarrier.wait(full.index(0), 0)
    qk = warpgroup_mma(q, k_s.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    score = _scores(qk, q_start, end - BLOCK_KV, at, captured, captured_strides, SCORE_MASKED, 0)
    mbarrier.arrive(empty.index(0), count=1)
    stage = 1
    phase = 0
    new_max, row_shift, subtracted = shifts_with(score, row_max, LOG2_SCALE, LARGE_SCORES)
    p, _ = exponentials(score, row_max, row_max, subtracted, LOG2_SCALE, LARGE_SCORES, False)
    row_max = new_max
    row_sum = gl.sum(p, 1)
    w = gl.convert_layout(p.to(dtype), WEIGHTS)

    for i in range(1, (end - start) // BLOCK_KV):
        kv_start = end - (i + 1) * BLOCK_KV
        masked = (kv_start < full_start) | (kv_start >= full_end)
        mbarrier.wait(full.index(stage), phase)
        qk = warpgroup_mma(q, k_s.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        acc_next = warpgroup_mma(w, v_s.index(stage), acc, is_async=True)
        if masked:
            score = _scores(qk, q_start, opaque(kv_start), at, captured, captured_strides, SCORE_MASKED, 1)
        else:
            score = _scores(qk, q_start, kv_start, at, captured, captured_strides, SCORE_FULL, 1)
        new_max, new_shift, subtracted = shifts_with(score, row_max, LOG2_SCALE, LARGE_SCORES)
        acc = arrived(acc_next, 0)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
        p, correction = exponentials(score, row_max, row_shift, subtracted, LOG2_SCALE, LARGE_SCORES, False)
        row_sum = row_sum * correction + gl.sum(p, 1)
        row_max, row_shift = new_max, new_shift
        # Not before the wait: the product under way reads the registers of the weights before.
        w = gl.convert_layout(p.to(dtype), WEIGHTS)
        acc = acc * gl.convert_layout(correction, OUT_ROWS)[:, None]
    mbarrier.wait(full.index(stage), phase)
    acc = warpgroup_mma(w, v_s.index(stage), acc)

    if FILL_THRESHOLD is not None:
        # Rows that have seen nothing above the fill see all other keys too. Rare.
        mbarrier.arrive(empty.index(stage), count=1)
        filled = gl.max((row_max <= FILL_THRESHOLD).to(gl.int32), 0)
        filled_s.index(GROUP).store(gl.full([1], filled, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
        gl.thread_barrier()
        mbarrier.arrive(known, count=1)
        mbarrier.wait(known, 0)
        before, behind = _skipped(filled_s, start, end, kv_len)
        for i in range(before + behind):
            stage, phase = next_stage(stage, phase, STAGES)
            kv_start = _skipped_tile(i, before, end)
            mbarrier.wait(full.index(stage), phase)
            qk = warpgroup_mma(q, k_s.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            score = _scores(qk, q_start, kv_start, at, captured, captured_strides, SCORE_MASKED, 0)
            new_max, new_shift, subtracted = shifts_with(score, row_max, LOG2_SCALE, LARGE_SCORES)
            p, correction = exponentials(score, row_max, row_shift, subtracted, LOG2_SCALE, LARGE_SCORES, False)
            row_sum = row_sum * correction + gl.sum(p, 1)
            row_max, row_shift = new_max, new_shift
            w = gl.convert_layout(p.to(dtype), WEIGHTS)
            acc = acc * gl.convert_layout(correction, OUT_ROWS)[:, None]
            acc = warpgroup_mma(w, v_s.index(stage), acc)
            mbarrier.arrive(empty.index(stage), count=1)

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
    slot = _q_slot(q_s, GROUP, BLOCK_DV, out_desc.dtype)
    store_rows(out_desc, n0, n1, n2, q_start, slot, out.to(out_desc.dtype))
    tma.store_wait(0)


@gluon.jit
def _scores(
    qk, q_start, kv_start, at, captured, captured_strides, SCORE: gl.constexpr, OUTSTANDING: gl.constexpr
):  # fmt: skip
    """The inner scores of a tile whose products are under way, and OUTSTANDING products issued after those."""
    n0, n1, n2, n3, q_len, kv_len, sizes = at
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KV, 16])
    q_idx = gl.minimum(q_start + gl.arange(0, GROUP_Q, gl.SliceLayout(1, LAYOUT)), q_len - 1)[:, None]
    kv_idx = kv_start + gl.arange(0, BLOCK_KV, gl.SliceLayout(0, LAYOUT))[None, :]
    score, _ = SCORE(qk, OUTSTANDING, n0, n1, n2, n3, q_idx, kv_idx, q_len, kv_len, sizes, captured, captured_strides)
    return score
