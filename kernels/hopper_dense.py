"""The gradient of a tensor that is read for each pair, by warp-specialised programs for Hopper: 16 bits, in Gluon.

As in `backward_dense` a program owns rows of it, and for those sums over the batch positions that share them: the
queries of all stay in shared memory, with the output's gradients, while keys and values pass by, a tile of one position
after the other. One warp loads, two groups of four warps have 64 queries each. The products of a position run under the
exponentials of the one before it, and those of one group under those of the other.
A tile of the tensor is copied to registers, and its place taken by the tile of gradients, which is stored from there.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashfuse.kernels.backward_rows import (
    DELTA,
    MINUS_SHIFT,
    SHARE,
    batch_position,
    rows_length,
    sees_every_key,
    slack_of,
)
from flashfuse.kernels.backward_tile import probabilities
from flashfuse.kernels.forward import whole_tiles
from flashfuse.kernels.hopper_tiles import load_own, load_rows, next_stage, opaque, store_rows
from flashfuse.kernels.hopper_visits import visible

# Queries of a group of warps and of both, and keys of a tile. Shapes of matrix instructions: no table chooses them.
GROUP_Q: gl.constexpr = gl.constexpr(64)
BLOCK_Q: gl.constexpr = gl.constexpr(128)
BLOCK_KV: gl.constexpr = gl.constexpr(64)
# Registers of a thread that multiplies, and of one that loads; `MAX_REGISTERS` of each are there to be shared out.
REGISTERS: gl.constexpr = gl.constexpr(240)
LOADER_REGISTERS: gl.constexpr = gl.constexpr(24)
MAX_REGISTERS = 168


@gluon.jit(
    do_not_specialize=["batch_0", "batch_1", "batch_2", "batch_3", "q_len", "kv_len", "sizes"],
    do_not_specialize_on_alignment=["loop_0", "loop_1", "loop_2", "loop_3"],
)
def attention_hopper_dense_backward_kernel(
    q_desc, k_desc, v_desc, grad_desc, dt_desc, pairs_desc, rows_ptr, ranges_ptr, ranges_strides,
    batch_0, batch_1, batch_2, batch_3, loop_0, loop_1, loop_2, loop_3, q_len, kv_len, sizes,
    captured, captured_strides,
    PAIR_GRAD_MASKED: gl.constexpr, PAIR_GRAD_FULL: gl.constexpr, PAIR_SCALE: gl.constexpr,
    GRADS_MASKED: gl.constexpr, GRADS_FULL: gl.constexpr, KV_BOUNDS: gl.constexpr,
    SCALE: gl.constexpr, SLACK: gl.constexpr, FILL_THRESHOLD: gl.constexpr, LONGEST_FIRST: gl.constexpr,
    K_AXES: gl.constexpr, V_AXES: gl.constexpr, PAIRS_AT: gl.constexpr, PAIRS_AXES: gl.constexpr,
    SHARED_BY: gl.constexpr, SLOTS: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dt_ij = PAIR_SCALE * sum_n PAIR_GRAD(n, i, j) over the batch positions n that share the element.

    One program owns BLOCK_Q rows of dt at one of batch_0 * .. * batch_3 positions, for the SHARED_BY = loop_0 * .. *
    loop_3 positions that share them (of each axis one of the two is 1). Tiles that it skips are zeros.
    q_desc, .., grad_desc: [n0, n1, n2, T, D]; dt_desc, pairs_desc: [n0, n1, n2, Tq, Tkv]. PAIRS_AT: where on the three
    axes pairs_desc is read. K_AXES, ..: on which of them the operand has positions of its own.
    BLOCK_D: 64 or 128 columns, behind the last of which TMA gives zeros. SLOTS: a power of two from SHARED_BY on.
    STAGES: tiles of keys and values of one position, loaded ahead.
    """
    dtype: gl.constexpr = q_desc.dtype
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP_Q, BLOCK_D], dtype)
    PAIRS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP_Q, BLOCK_KV], dt_desc.dtype)
    # By position, group.
    q_s = gl.allocate_shared_memory(dtype, [2 * SLOTS, GROUP_Q, BLOCK_D], ROWS)
    grad_s = gl.allocate_shared_memory(dtype, [2 * SLOTS, GROUP_Q, BLOCK_D], ROWS)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_KV, BLOCK_D], ROWS)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_KV, BLOCK_D], ROWS)
    # Two slots, by group: what is read for each pair of a tile, and then its gradients.
    pairs_s = gl.allocate_shared_memory(dt_desc.dtype, [4, GROUP_Q, BLOCK_KV], PAIRS)
    rows_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    pairs_full = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    pairs_empty = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    mbarrier.init(rows_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    for slot in gl.static_range(4):
        mbarrier.init(pairs_full.index(slot), count=1)
        mbarrier.init(pairs_empty.index(slot), count=1)
    fence_async_shared()
    shared_memory = (q_s, grad_s, k_s, v_s, pairs_s)
    barriers = (rows_full, full, empty, pairs_full, pairs_empty)

    q_tiles = gl.cdiv(q_len, BLOCK_Q)
    tile = gl.program_id(0) % q_tiles
    if LONGEST_FIRST:
        tile = q_tiles - 1 - tile
    n0, n1, n2, n3 = batch_position(gl.program_id(0) // q_tiles, batch_0, batch_1, batch_2, batch_3)
    q_start = tile * BLOCK_Q
    start, full_start, full_end, end = _visited(
        q_start, n0, n1, n2, n3, rows_ptr, ranges_ptr, ranges_strides, batch_0, batch_1, batch_2, batch_3, loop_0,
        loop_1, loop_2, loop_3, q_len, kv_len, sizes, KV_BOUNDS, FILL_THRESHOLD, SHARED_BY,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_multiply, (
                0, dt_desc, shared_memory, barriers, rows_ptr, q_start, n0, n1, n2, n3, start, full_start, full_end,
                end, batch_0, batch_1, batch_2, batch_3, loop_0, loop_1, loop_2, loop_3, q_len, kv_len, sizes,
                captured, captured_strides, PAIR_GRAD_MASKED, PAIR_GRAD_FULL, PAIR_SCALE, GRADS_MASKED, GRADS_FULL,
                SCALE, SLACK, SHARED_BY, STAGES,
            )),
            (_multiply, (
                1, dt_desc, shared_memory, barriers, rows_ptr, q_start, n0, n1, n2, n3, start, full_start, full_end,
                end, batch_0, batch_1, batch_2, batch_3, loop_0, loop_1, loop_2, loop_3, q_len, kv_len, sizes,
                captured, captured_strides, PAIR_GRAD_MASKED, PAIR_GRAD_FULL, PAIR_SCALE, GRADS_MASKED, GRADS_FULL,
                SCALE, SLACK, SHARED_BY, STAGES,
            )),
            (_load, (
                q_desc, k_desc, v_desc, grad_desc, pairs_desc, shared_memory, barriers, q_start, n0, n1, n2, n3, start,
                end, loop_0, loop_1, loop_2, loop_3, q_len, kv_len, sizes, K_AXES, V_AXES, PAIRS_AT, PAIRS_AXES,
                SHARED_BY, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _visited(
    q_start, n0, n1, n2, n3, rows_ptr, ranges_ptr, ranges_strides, batch_0, batch_1, batch_2, batch_3, loop_0, loop_1,
    loop_2, loop_3, q_len, kv_len, sizes, KV_BOUNDS: gl.constexpr, FILL_THRESHOLD: gl.constexpr,
    SHARED_BY: gl.constexpr,
):  # fmt: skip
    """(start, full_start, full_end, end) at whole tiles of keys: what one position sees, and each of them in full."""
    rows = q_start + gl.arange(0, BLOCK_Q, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    planes = (batch_0 * loop_0).to(gl.int64) * batch_1 * loop_1 * batch_2 * loop_2 * batch_3 * loop_3
    planes *= rows_length(q_len)
    start, full_start, full_end, end = kv_len, 0, kv_len, 0
    for shared in gl.static_range(SHARED_BY):
        s0, s1, s2, s3 = batch_position(shared, loop_0, loop_1, loop_2, loop_3)
        m0, m1, m2, m3 = n0 + s0, n1 + s1, n2 + s2, n3 + s3
        first, full_first, full_stop, stop = visible(
            q_start, m0, m1, m2, m3, ranges_ptr, ranges_strides, q_len, kv_len, sizes, KV_BOUNDS, BLOCK_Q
        )  # fmt: skip
        if FILL_THRESHOLD is not None:
            # Rows that saw nothing above the fill have gradients through all keys.
            position = ((m0 * batch_1 * loop_1 + m1) * batch_2 * loop_2 + m2) * batch_3 * loop_3 + m3
            of_rows = rows_ptr + position.to(gl.int64) * rows_length(q_len)
            filled = sees_every_key(of_rows, planes, rows, FILL_THRESHOLD) > 0
            first = gl.where(filled, 0, first)
            stop = gl.where(filled, kv_len, stop)
        start, end = gl.minimum(start, first), gl.maximum(end, stop)
        full_start, full_end = gl.maximum(full_start, full_first), gl.minimum(full_end, full_stop)
    return whole_tiles(start, full_start, full_end, end, BLOCK_KV)


# --------------------------------------------------------------------------------------------------------------------
# The warp that loads


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, grad_desc, pairs_desc, shared_memory, barriers, q_start, n0, n1, n2, n3, start, end,
    loop_0, loop_1, loop_2, loop_3, q_len, kv_len, sizes, K_AXES: gl.constexpr, V_AXES: gl.constexpr,
    PAIRS_AT: gl.constexpr, PAIRS_AXES: gl.constexpr, SHARED_BY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Queries of all positions once, and tiles of pairs, keys and values as slots become free."""
    q_s, grad_s, k_s, v_s, pairs_s = shared_memory
    rows_full, full, empty, pairs_full, pairs_empty = barriers
    mbarrier.expect(rows_full, 2 * SHARED_BY * (q_desc.block_type.nbytes + grad_desc.block_type.nbytes))
    for shared in gl.static_range(SHARED_BY):
        s0, s1, s2, _ = batch_position(shared, loop_0, loop_1, loop_2, loop_3)
        for group in gl.static_range(2):
            row = q_start + group * GROUP_Q
            load_rows(q_desc, n0 + s0, n1 + s1, n2 + s2, row, rows_full, q_s.index(2 * shared + group))
            load_rows(grad_desc, n0 + s0, n1 + s1, n2 + s2, row, rows_full, grad_s.index(2 * shared + group))
    p0, p1, p2 = PAIRS_AT(n0, n1, n2, n3, q_len, kv_len, sizes)
    stage = 0
    phase = 1
    for kv_start in range(start, end, BLOCK_KV):
        turn = (kv_start - start) // BLOCK_KV
        for group in gl.static_range(2):
            slot = 2 * (turn & 1) + group
            mbarrier.wait(pairs_empty.index(slot), (turn >> 1 & 1) ^ 1)
            mbarrier.expect(pairs_full.index(slot), pairs_desc.block_type.nbytes)
            load_own(
                pairs_desc, p0, p1, p2, q_start + group * GROUP_Q, pairs_full.index(slot), pairs_s.index(slot),
                PAIRS_AXES, kv_start,
            )  # fmt: skip
        for shared in gl.static_range(SHARED_BY):
            s0, s1, s2, _ = batch_position(shared, loop_0, loop_1, loop_2, loop_3)
            m0, m1, m2 = n0 + s0, n1 + s1, n2 + s2
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
            load_own(k_desc, m0, m1, m2, kv_start, full.index(stage), k_s.index(stage), K_AXES)
            load_own(v_desc, m0, m1, m2, kv_start, full.index(stage), v_s.index(stage), V_AXES)
            stage, phase = next_stage(stage, phase, STAGES)


# --------------------------------------------------------------------------------------------------------------------
# The groups of warps that multiply


@gluon.jit
def _multiply(
    GROUP: gl.constexpr, dt_desc, shared_memory, barriers, rows_ptr, q_start, n0, n1, n2, n3, start, full_start,
    full_end, end, batch_0, batch_1, batch_2, batch_3, loop_0, loop_1, loop_2, loop_3, q_len, kv_len, sizes,
    captured, captured_strides, PAIR_GRAD_MASKED: gl.constexpr, PAIR_GRAD_FULL: gl.constexpr, PAIR_SCALE: gl.constexpr,
    GRADS_MASKED: gl.constexpr, GRADS_FULL: gl.constexpr, SCALE: gl.constexpr, SLACK: gl.constexpr,
    SHARED_BY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The gradients of 64 rows of pairs."""
    q_s, grad_s, k_s, v_s, pairs_s = shared_memory
    rows_full, full, empty, pairs_full, pairs_empty = barriers
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KV, 16])
    own_start = q_start + GROUP * GROUP_Q
    rows = own_start + gl.arange(0, GROUP_Q, gl.SliceLayout(1, SCORES))
    positions = _of_positions(
        rows_ptr, rows, n0, n1, n2, n3, batch_0, batch_1, batch_2, batch_3, loop_0, loop_1, loop_2, loop_3, q_len,
        SLACK, SHARED_BY,
    )  # fmt: skip
    stage = 0
    phase = 0
    mbarrier.wait(rows_full, 0)
    for kv_start in range(start, end, BLOCK_KV):
        masked = (kv_start < full_start) | (kv_start >= full_end)
        turn = (kv_start - start) // BLOCK_KV
        slot = 2 * (turn & 1) + GROUP
        # Addresses that follow from a number of the loop are not kept in registers, which would spill.
        own = GROUP + opaque(0)
        mbarrier.wait(full.index(stage), phase)
        qk_next, dw_next = _products(q_s, grad_s, k_s, v_s, own, stage, SCORES)
        if turn > 0:
            # One thread waits until the gradients before have left their slot, and the others for it.
            tma.store_wait(0)
            gl.thread_barrier()
            mbarrier.arrive(pairs_empty.index(slot ^ 2), count=1)
        mbarrier.wait(pairs_full.index(slot), turn >> 1 & 1)
        pairs = pairs_s.index(slot).load(SCORES)
        total = gl.zeros([GROUP_Q, BLOCK_KV], gl.float32, SCORES)
        for shared in gl.static_range(SHARED_BY):
            qk = qk_next
            dw = dw_next
            read = stage
            stage, phase = next_stage(stage, phase, STAGES)
            if shared + 1 < SHARED_BY:
                mbarrier.wait(full.index(stage), phase)
                qk_next, dw_next = _products(q_s, grad_s, k_s, v_s, 2 * shared + 2 + own, stage, SCORES)
                # What is summed so far is, or the compiler puts that off and keeps all of its operands.
                qk, total = warpgroup_mma_wait(num_outstanding=3, deps=(qk, total))
            else:
                qk, total = warpgroup_mma_wait(num_outstanding=1, deps=(qk, total))
            minus_shift, share, delta, m0, m1, m2, m3 = positions[shared]
            at = (m0, m1, m2, m3, q_len, kv_len, sizes)
            if masked:
                p = _probabilities(
                    qk, pairs, minus_shift, share, own_start, opaque(kv_start), at, captured, captured_strides,
                    GRADS_MASKED, True, SCALE, SLACK,
                )  # fmt: skip
            else:
                p = _probabilities(
                    qk, pairs, minus_shift, share, own_start, kv_start, at, captured, captured_strides, GRADS_FULL,
                    False, SCALE, SLACK,
                )  # fmt: skip
            if shared + 1 < SHARED_BY:
                dw = warpgroup_mma_wait(num_outstanding=2, deps=(dw,))
            else:
                dw = warpgroup_mma_wait(num_outstanding=0, deps=(dw,))
            mbarrier.arrive(empty.index(read), count=1)
            ds = p * (dw - delta[:, None])
            if masked:
                total += _pair_gradients(
                    ds, qk, own_start, opaque(kv_start), at, captured, captured_strides, PAIR_GRAD_MASKED
                )  # fmt: skip
            else:
                total += _pair_gradients(ds, qk, own_start, kv_start, at, captured, captured_strides, PAIR_GRAD_FULL)
        store_rows(
            dt_desc, n0, n1, n2, own_start, pairs_s.index(slot), (total * PAIR_SCALE).to(dt_desc.dtype), kv_start
        )
    tma.store_wait(0)
    gl.thread_barrier()
    _write_zeros(dt_desc, n0, n1, n2, own_start, start, end, kv_len, pairs_s.index(GROUP), SCORES)
    tma.store_wait(0)


@gluon.jit
def _of_positions(
    rows_ptr, rows, n0, n1, n2, n3, batch_0, batch_1, batch_2, batch_3, loop_0, loop_1, loop_2, loop_3, q_len,
    SLACK: gl.constexpr, SHARED_BY: gl.constexpr,
):  # fmt: skip
    """Of each position that shares the rows: (minus_shift, share, delta, its place), see `load_shifts`."""
    planes = (batch_0 * loop_0).to(gl.int64) * batch_1 * loop_1 * batch_2 * loop_2 * batch_3 * loop_3
    planes *= rows_length(q_len)
    positions = ()
    for shared in gl.static_range(SHARED_BY):
        s0, s1, s2, s3 = batch_position(shared, loop_0, loop_1, loop_2, loop_3)
        m0, m1, m2, m3 = n0 + s0, n1 + s1, n2 + s2, n3 + s3
        position = ((m0 * batch_1 * loop_1 + m1) * batch_2 * loop_2 + m2) * batch_3 * loop_3 + m3
        numbers = rows_ptr + position.to(gl.int64) * rows_length(q_len) + rows
        minus_shift = gl.load(numbers + MINUS_SHIFT * planes)
        share = minus_shift
        if SLACK is not None:
            share = gl.load(numbers + SHARE * planes)
        found = (minus_shift, share, gl.load(numbers + DELTA * planes), m0, m1, m2, m3)
        positions = positions + (found,)  # type: ignore[assignment]  # noqa: RUF005
    return positions


@gluon.jit
def _products(q_s, grad_s, k_s, v_s, rows, stage, SCORES: gl.constexpr):
    """q k^T and grad v^T of 64 rows of one position, in flight."""
    nothing = gl.zeros([GROUP_Q, BLOCK_KV], gl.float32, SCORES)
    qk = warpgroup_mma(q_s.index(rows), k_s.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    dw = warpgroup_mma(grad_s.index(rows), v_s.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    return qk, dw


@gluon.jit
def _probabilities(
    qk, pairs, minus_shift, share, q_start, kv_start, at, captured, captured_strides, GRADS: gl.constexpr,
    ENDS: gl.constexpr, SCALE: gl.constexpr, SLACK: gl.constexpr,
):  # fmt: skip
    """Of a tile of products. Where it ENDS, 0 behind the last key; behind the last query the rows' numbers say so."""
    n0, n1, n2, n3, q_len, kv_len, sizes = at
    q_idx, kv_idx = _positions(qk, q_start, kv_start, q_len)
    s, _ = GRADS(qk, pairs, (), n0, n1, n2, n3, q_idx, kv_idx, q_len, kv_len, sizes, captured, captured_strides)
    minus_shift = minus_shift[:, None]
    slack = minus_shift
    if SLACK is not None:
        slack = slack_of(minus_shift, SCALE, SLACK)
    p = probabilities(s, (minus_shift, share[:, None], slack), SCALE, SLACK, False)
    return gl.where(kv_idx < kv_len, p, 0.0) if ENDS else p


@gluon.jit
def _pair_gradients(ds, qk, q_start, kv_start, at, captured, captured_strides, PAIR_GRAD: gl.constexpr):
    """What a tile of the scores' gradients gives the tensor, but for PAIR_SCALE."""
    n0, n1, n2, n3, q_len, kv_len, sizes = at
    q_idx, kv_idx = _positions(qk, q_start, kv_start, q_len)
    return PAIR_GRAD(ds, 0, qk, n0, n1, n2, n3, q_idx, kv_idx, q_len, kv_len, sizes, captured, captured_strides)


@gluon.jit
def _positions(qk, q_start, kv_start, q_len):
    """(q_idx, kv_idx) of a tile."""
    LAYOUT: gl.constexpr = qk.type.layout
    q_idx = gl.minimum(q_start + gl.arange(0, GROUP_Q, gl.SliceLayout(1, LAYOUT)), q_len - 1)
    kv_idx = kv_start + gl.arange(0, BLOCK_KV, gl.SliceLayout(0, LAYOUT))
    return q_idx[:, None], kv_idx[None, :]


@gluon.jit
def _write_zeros(dt_desc, n0, n1, n2, row, start, end, kv_len, slot, LAYOUT: gl.constexpr):
    """What is not in [start, end), by way of a slot that nobody uses any more."""
    slot.store(gl.zeros([GROUP_Q, BLOCK_KV], dt_desc.dtype, LAYOUT))
    fence_async_shared()
    gl.thread_barrier()
    part = slot._reinterpret(dt_desc.dtype, dt_desc.block_type.shape, dt_desc.layout)
    for kv_start in range(0, gl.minimum(start, kv_len), BLOCK_KV):
        tma.async_copy_shared_to_global(dt_desc, [n0, n1, n2, row, kv_start], part)
    for kv_start in range(end, kv_len, BLOCK_KV):
        tma.async_copy_shared_to_global(dt_desc, [n0, n1, n2, row, kv_start], part)
