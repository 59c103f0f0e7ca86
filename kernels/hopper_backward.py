"""The gradients of q, k and v in one pass, by warp-specialised programs for Hopper: 16-bit operands, in Gluon.

The plain passes of `backward` form seven products of a tile, since each of the two makes the probabilities again. Here
a program owns 128 keys, and adds its part of dq to float32 sums in global memory, by reductions of the tensor memory
accelerator (TMA): five products, and a dq whose last digits depend on who came first. One warp loads, two groups of
four warps have 64 keys each. A product runs from where it is issued to where it is waited for.
A captured tensor that is read for each pair comes in tiles, as in `hopper_forward`; its gradient is no business of this
pass, but sums that it waits for are.
Shah et al., FlashAttention-3, https://arxiv.org/abs/2407.08608, section 3.
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashfuse.kernels.backward_rows import batch_position, rows_length, slack_of
from flashfuse.kernels.backward_tile import probabilities
from flashfuse.kernels.hopper_backward_loader import HALF, STAGES, load_tiles
from flashfuse.kernels.hopper_query_visits import BLOCK_KV, GROUP_KV, owned_keys, visited_queries
from flashfuse.kernels.hopper_sums import clear, group_sums, warp_sums
from flashfuse.kernels.hopper_tiles import (
    column_buffers,
    issued,
    load_columns,
    next_stage,
    opaque,
    parts_of,
    store_rows,
)

# Registers of a thread that multiplies, and of one that loads; `MAX_REGISTERS` of each are there to be shared out.
REGISTERS: gl.constexpr = gl.constexpr(240)
LOADER_REGISTERS: gl.constexpr = gl.constexpr(24)
MAX_REGISTERS = 168


@gluon.jit(
    do_not_specialize=["batch_0", "batch_1", "batch_2", "batch_3", "q_len", "kv_len", "sizes"],
    do_not_specialize_on_alignment=["loop_0", "loop_1", "loop_2", "loop_3"],
)
def attention_hopper_backward_kernel(
    q_desc, k_desc, v_desc, grad_desc, dk_desc, dv_desc, dq_desc, pairs_desc, rows_ptr, left_ptr, ranges_ptr,
    filled_ptr, ranges_strides, batch_0, batch_1, batch_2, batch_3, loop_0, loop_1, loop_2, loop_3,
    q_len, kv_len, sizes, captured, captured_strides,
    GRADS_MASKED: gl.constexpr, GRADS_FULL: gl.constexpr, QUERY_BOUNDS: gl.constexpr,
    SCALE: gl.constexpr, SLOPE: gl.constexpr, SLACK: gl.constexpr,
    FULL_MASKED: gl.constexpr, PAIRS_AT: gl.constexpr, PAIRS_AXES: gl.constexpr, COLUMNS: gl.constexpr,
    CODED_ROWS: gl.constexpr, CODE_OF: gl.constexpr, COLUMN_TYPES: gl.constexpr,
    SHARED_BATCH: gl.constexpr, DEPTH: gl.constexpr, DEPTH_V: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_Q: gl.constexpr, SPREAD: gl.constexpr,
):  # fmt: skip
    """dk_j = SLOPE sum_i ds_ij slope_ij q_i,  dv_j = sum_i p_ij grad_i,  dq_i += sum_j ds_ij slope_ij k_j.

    dq_desc [positions, Tq, D] holds zeros before, and has to be multiplied by SLOPE after; the other operands are
    [n0, n1, n2, T, D].
    DEPTH, DEPTH_V: columns of q and k, and of v, as multiples of 16. BLOCK_D: 64 or 128 columns, behind the last of
    which TMA gives zeros and writes nothing.
    pairs_desc: [n0, n1, n2, Tq, Tkv], or None. PAIRS_AT: where on the three axes it is read. PAIRS_AXES: on which of
    them it has positions of its own.
    FULL_MASKED: whether masks of data are left where others are not.
    COLUMNS, CODED_ROWS, CODE_OF, COLUMN_TYPES: see `columns`.
    left_ptr: sum_j ds_ij over the keys of each program, float32 [positions, tiles of keys, rows_length], 0 where a tile
    is skipped; each slope_ij is 0 or 1 then. None where nobody asks.
    SPREAD: how many positions take a tile of keys before the next is begun; a divisor of their number.
    SHARED_BATCH: whether positions next to each other are those of the first axis.
    """
    dtype: gl.constexpr = q_desc.dtype
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, BLOCK_D], dtype)
    PAIRS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP_KV, HALF], dtype)
    SUMS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.float32)
    HALVES: gl.constexpr = BLOCK_Q // HALF
    q_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_Q, BLOCK_D], ROWS)
    grad_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_Q, BLOCK_D], ROWS)
    k_s = gl.allocate_shared_memory(dtype, [2, GROUP_KV, BLOCK_D], ROWS)
    v_s = gl.allocate_shared_memory(dtype, [2, GROUP_KV, BLOCK_D], ROWS)
    # What is read for each pair of a tile, by the keys of each group.
    if pairs_desc is not None:
        pairs_s = gl.allocate_shared_memory(
            pairs_desc.dtype, [2, HALF, GROUP_KV],
            gl.NVMMASharedLayout.get_default_for([HALF, GROUP_KV], pairs_desc.dtype),
        )  # fmt: skip
    # Two slots, by [half of the queries,] group of warps.
    ds_s = gl.allocate_shared_memory(dtype, [4 * HALVES, GROUP_KV, HALF], PAIRS)
    dq_s = gl.allocate_shared_memory(gl.float32, [2, 64, 64], SUMS)
    # By slot, half, group: the sums of each warp over its keys.
    if left_ptr is not None:
        left_s = gl.allocate_shared_memory(
            gl.float32, [4 * HALVES, 4, HALF], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        )  # fmt: skip
    # Of each stage the shifts of the halves, then their deltas and, where there is slack, their shares.
    rows_s = gl.allocate_shared_memory(
        gl.float32, [4 * STAGES * HALVES, HALF], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )  # fmt: skip
    # What is read for each query of those halves.
    columns_s = column_buffers(COLUMN_TYPES, CODE_OF, STAGES * HALVES, HALF)
    keys_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    pairs_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    pairs_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mbarrier.init(keys_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=2)
        mbarrier.init(empty.index(stage), count=2)
    for group in gl.static_range(2):
        mbarrier.init(pairs_full.index(group), count=1)
        mbarrier.init(pairs_empty.index(group), count=1)
    fence_async_shared()
    barriers = (keys_full, full, empty, pairs_full, pairs_empty)
    written = (dk_desc, dv_desc, dq_desc, ds_s, dq_s)
    gdc_launch_dependents()
    # Nothing that a kernel has written is read before.
    gdc_wait()
    gl.warp_specialize(
        [
            (_multiply, (
                0, written, q_s, k_s, v_s, grad_s, rows_s, columns_s, pairs_s if pairs_desc is not None else None,
                left_s if left_ptr is not None else None, barriers, left_ptr, ranges_ptr, filled_ptr, ranges_strides,
                batch_0, batch_1, batch_2, batch_3, loop_0, loop_1, loop_2, loop_3, q_len, kv_len, sizes, captured,
                captured_strides, GRADS_MASKED, GRADS_FULL, QUERY_BOUNDS, SCALE, SLOPE, SLACK, FULL_MASKED, CODE_OF,
                SHARED_BATCH, DEPTH, DEPTH_V, BLOCK_D, BLOCK_Q, SPREAD,
            )),
            (_multiply, (
                1, written, q_s, k_s, v_s, grad_s, rows_s, columns_s, pairs_s if pairs_desc is not None else None,
                left_s if left_ptr is not None else None, barriers, left_ptr, ranges_ptr, filled_ptr, ranges_strides,
                batch_0, batch_1, batch_2, batch_3, loop_0, loop_1, loop_2, loop_3, q_len, kv_len, sizes, captured,
                captured_strides, GRADS_MASKED, GRADS_FULL, QUERY_BOUNDS, SCALE, SLOPE, SLACK, FULL_MASKED, CODE_OF,
                SHARED_BATCH, DEPTH, DEPTH_V, BLOCK_D, BLOCK_Q, SPREAD,
            )),
            (load_tiles, (
                q_desc, k_desc, v_desc, grad_desc, pairs_desc, rows_ptr, q_s, k_s, v_s, grad_s, rows_s, columns_s,
                pairs_s if pairs_desc is not None else None, barriers, ranges_ptr, filled_ptr, ranges_strides,
                batch_0, batch_1, batch_2, batch_3, loop_0, loop_1, loop_2, loop_3, q_len, kv_len, sizes, captured,
                captured_strides, QUERY_BOUNDS, SLACK, PAIRS_AT, PAIRS_AXES, COLUMNS, CODED_ROWS, CODE_OF,
                SHARED_BATCH, BLOCK_Q, SPREAD,
            )),
        ],
        [4, 1],
        [REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# The groups of warps that multiply


@gluon.jit
def _multiply(
    GROUP: gl.constexpr, written, q_s, k_s, v_s, grad_s, rows_s, columns_s, pairs_s, left_s, barriers, left_ptr,
    ranges_ptr, filled_ptr, ranges_strides, batch_0, batch_1, batch_2, batch_3, loop_0, loop_1, loop_2, loop_3, q_len,
    kv_len, sizes, captured, captured_strides, GRADS_MASKED: gl.constexpr, GRADS_FULL: gl.constexpr,
    QUERY_BOUNDS: gl.constexpr, SCALE: gl.constexpr, SLOPE: gl.constexpr, SLACK: gl.constexpr,
    FULL_MASKED: gl.constexpr, CODE_OF: gl.constexpr, SHARED_BATCH: gl.constexpr, DEPTH: gl.constexpr,
    DEPTH_V: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_Q: gl.constexpr, SPREAD: gl.constexpr,
):  # fmt: skip
    """dk, dv of the 64 keys of one group, and half of what the program's 128 keys add to dq."""
    keys_full, full, empty, pairs_full, pairs_empty = barriers
    dk_desc, dv_desc, dq_desc, ds_s, dq_s = written
    dtype: gl.constexpr = q_s.dtype
    HALVES: gl.constexpr = BLOCK_Q // HALF
    SUMMED: gl.constexpr = left_ptr is not None
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    SQUARE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    # A thread has all rows of a column.
    COLUMN: gl.constexpr = gl.BlockedLayout([4, 1], [1, 32], [1, 4], [1, 0])
    COLUMNS: gl.constexpr = gl.SliceLayout(0, COLUMN)
    kv_start, n0, n1, n2, n3 = owned_keys(batch_0, batch_1, batch_2, batch_3, kv_len, SHARED_BATCH, SPREAD)
    kv_start += GROUP * GROUP_KV
    dk = gl.zeros([GROUP_KV, BLOCK_D], gl.float32, SUMS)
    dv = gl.zeros([GROUP_KV, BLOCK_D], gl.float32, SUMS)
    nothing = gl.zeros([GROUP_KV, HALF], gl.float32, SCORES)
    stage = 0
    phase = 0
    slot = 0
    mbarrier.wait(keys_full, 0)
    for shared in range(loop_0 * loop_1 * loop_2 * loop_3):
        s0, s1, s2, s3 = batch_position(shared, loop_0, loop_1, loop_2, loop_3)
        m0, m1, m2, m3 = n0 + s0, n1 + s1, n2 + s2, n3 + s3
        position = ((m0 * batch_1 * loop_1 + m1) * batch_2 * loop_2 + m2) * batch_3 * loop_3 + m3
        start, full_start, full_end, end = visited_queries(
            kv_start - GROUP * GROUP_KV, position, m0, m1, m2, m3, ranges_ptr, filled_ptr, ranges_strides, q_len,
            kv_len, sizes, QUERY_BOUNDS, BLOCK_Q,
        )  # fmt: skip
        at = (m0, m1, m2, m3, q_len, kv_len, sizes)
        of_left = position.to(gl.int64) * gl.cdiv(kv_len, BLOCK_KV) + kv_start // BLOCK_KV
        if SUMMED and GROUP == 0:
            clear(left_ptr + of_left * rows_length(q_len), 0, gl.minimum(start, rows_length(q_len)))
            clear(left_ptr + of_left * rows_length(q_len), gl.maximum(end, 0), rows_length(q_len))
        for q_start in range(start, end, BLOCK_Q):
            masked = (q_start < full_start) | (q_start >= full_end)
            # Addresses that follow from a number of the loop are not kept in registers, which would spill.
            here = opaque(0)
            k = k_s.index(GROUP + here)
            v = v_s.index(GROUP + here)
            q = q_s.index(stage)
            grad = grad_s.index(stage)
            first = 4 * HALVES * stage
            of_queries = (rows_s, columns_s, stage, GROUP, CODE_OF)
            mbarrier.wait(full.index(stage), phase)
            if HALVES == 2:
                # The products of the second half run under the exponentials of the first.
                q_0 = q._reinterpret(dtype, [2, HALF, BLOCK_D], SQUARE).index(0)
                q_1 = q._reinterpret(dtype, [2, HALF, BLOCK_D], SQUARE).index(1)
                grad_0 = grad._reinterpret(dtype, [2, HALF, BLOCK_D], SQUARE).index(0)
                grad_1 = grad._reinterpret(dtype, [2, HALF, BLOCK_D], SQUARE).index(1)
                qk = issued(k, q_0, nothing, DEPTH)
                dw = issued(v, grad_0, nothing, DEPTH_V)
                qk_1 = issued(k, q_1, nothing, DEPTH)
                pairs = _pairs(pairs_s, pairs_full, pairs_empty, GROUP, 0)
                qk = warpgroup_mma_wait(num_outstanding=parts_of(DEPTH_V) + parts_of(DEPTH), deps=(qk,))
                w, p = _weights(
                    qk, pairs, of_queries, 0, masked, kv_start, q_start, at, captured, captured_strides,
                    GRADS_MASKED, GRADS_FULL, SCALE, SLACK, FULL_MASKED, SUMMED, HALVES, WEIGHTS, dtype,
                )  # fmt: skip
                dw = warpgroup_mma_wait(num_outstanding=parts_of(DEPTH), deps=(dw,))
                ds, sums = _gradients(
                    dw, p, rows_s.index(first + HALVES), masked, FULL_MASKED, SUMMED, dtype
                )  # fmt: skip
                if SUMMED:
                    left_s.index(4 * slot + GROUP).store(warp_sums(sums))
                ds_s.index(4 * slot + 2 * GROUP).store(ds)
                dv = warpgroup_mma(w, grad_0, dv, is_async=True)
                dk = warpgroup_mma(gl.convert_layout(ds, WEIGHTS), q_0, dk, is_async=True)
                dw = issued(v, grad_1, nothing, DEPTH_V)
                pairs = _pairs(pairs_s, pairs_full, pairs_empty, GROUP, 1)
                qk = warpgroup_mma_wait(num_outstanding=2 + parts_of(DEPTH_V), deps=(qk_1,))
                w, p = _weights(
                    qk, pairs, of_queries, 1, masked, kv_start, q_start + HALF, at, captured, captured_strides,
                    GRADS_MASKED, GRADS_FULL, SCALE, SLACK, FULL_MASKED, SUMMED, HALVES, WEIGHTS, dtype,
                )  # fmt: skip
                dw, dv, dk = warpgroup_mma_wait(num_outstanding=0, deps=(dw, dv, dk))
                ds, sums = _gradients(
                    dw, p, rows_s.index(first + HALVES + 1), masked, FULL_MASKED, SUMMED, dtype
                )  # fmt: skip
                q_last = q_1
                grad_last = grad_1
                ds_slot = ds_s.index(4 * slot + 2 * GROUP + 1)
            else:
                qk = issued(k, q, nothing, DEPTH)
                dw = issued(v, grad, nothing, DEPTH_V)
                pairs = _pairs(pairs_s, pairs_full, pairs_empty, GROUP, slot)
                qk = warpgroup_mma_wait(num_outstanding=parts_of(DEPTH_V), deps=(qk,))
                w, p = _weights(
                    qk, pairs, of_queries, 0, masked, kv_start, q_start, at, captured, captured_strides,
                    GRADS_MASKED, GRADS_FULL, SCALE, SLACK, FULL_MASKED, SUMMED, HALVES, WEIGHTS, dtype,
                )  # fmt: skip
                dw = warpgroup_mma_wait(num_outstanding=0, deps=(dw,))
                ds, sums = _gradients(
                    dw, p, rows_s.index(first + HALVES), masked, FULL_MASKED, SUMMED, dtype
                )  # fmt: skip
                q_last = q
                grad_last = grad
                ds_slot = ds_s.index(2 * slot + GROUP)
            if SUMMED:
                left_s.index(2 * HALVES * slot + 2 * (HALVES - 1) + GROUP).store(warp_sums(sums))
            ds_slot.store(ds)
            # Issued before ds is stored, this one waits for its operand in registers, and the store with it.
            dv_next = warpgroup_mma(w, grad_last, dv, is_async=True)
            fence_async_shared()
            # Who comes here has read the slot before: two are enough.
            _meet()
            dq = _queries(ds_s, k_s, slot, here, GROUP, BLOCK_D, SQUARE)
            dk_next = warpgroup_mma(gl.convert_layout(ds, WEIGHTS), q_last, dk, is_async=True)
            dq, dv = warpgroup_mma_wait(num_outstanding=1, deps=(dq, dv_next))
            # One thread waits until the reduction before has read the buffer, and the others for it.
            tma.store_wait(0)
            gl.thread_barrier()
            if SUMMED:
                left_ptrs = left_ptr + (of_left + here) * rows_length(q_len) + q_start + gl.arange(0, HALF, COLUMNS)
                # One half is each group's, or in turn the only one.
                if HALVES == 2:
                    gl.store(left_ptrs + GROUP * HALF, group_sums(left_s, 4 * slot + 2 * GROUP, COLUMN))
                elif slot == GROUP:
                    gl.store(left_ptrs, group_sums(left_s, 2 * slot, COLUMN))
            dq_s.index(GROUP).store(dq)
            fence_async_shared()
            gl.thread_barrier()
            part = dq_s.index(GROUP)._reinterpret(gl.float32, [1, 64, 64], dq_desc.layout)
            if BLOCK_D == 128:
                _add_to_global(dq_desc, [position, q_start, GROUP * 64], part)
            else:
                _add_to_global(dq_desc, [position, q_start + GROUP * 64, 0], part)
            dk = warpgroup_mma_wait(num_outstanding=0, deps=(dk_next,))
            gl.thread_barrier()
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
            slot ^= 1
    # Through buffers that nobody else reads: the values' own, and that of dq when its last reduction has read it.
    store_rows(dv_desc, n0, n1, n2, kv_start, v_s.index(GROUP), dv.to(dtype))
    tma.store_wait(1)
    gl.thread_barrier()
    free = dq_s.index(GROUP)._reinterpret(dtype, [128 // BLOCK_D, GROUP_KV, BLOCK_D], SQUARE).index(0)
    store_rows(dk_desc, n0, n1, n2, kv_start, free, (dk * SLOPE).to(dtype))
    tma.store_wait(0)


@gluon.jit
def _pairs(pairs_s, pairs_full, pairs_empty, GROUP: gl.constexpr, turn):
    """[keys, queries] of what is read for each pair, when it is the group's turn in this phase; 0 where nothing is."""
    if pairs_s is None:
        return 0
    else:
        mbarrier.wait(pairs_full.index(GROUP), turn)
        # A tensor has keys along its rows, and a group along its columns.
        pairs = pairs_s.index(GROUP).permute((1, 0)).load(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16]))
        # All threads have read before TMA writes there again.
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(pairs_empty.index(GROUP), count=1)
        return pairs


@gluon.jit
def _weights(
    qk, pairs, of_queries, half, masked, kv_start, q_start, at, captured, captured_strides, GRADS_MASKED: gl.constexpr,
    GRADS_FULL: gl.constexpr, SCALE: gl.constexpr, SLACK: gl.constexpr, FULL_MASKED: gl.constexpr,
    SUMMED: gl.constexpr, HALVES: gl.constexpr, WEIGHTS: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """(p as an operand, p * slope) of a tile of products [keys, queries], the half of a stage `of_queries`.

    masked: whether the tile may meet a mask, or reach behind the last key or query.
    """
    if masked:
        w, p = _weights_of(
            qk, pairs, of_queries, half, opaque(kv_start), q_start, at, captured, captured_strides, GRADS_MASKED, True,
            True, SUMMED, SCALE, SLACK, HALVES, WEIGHTS, dtype,
        )  # fmt: skip
    else:
        w, p = _weights_of(
            qk, pairs, of_queries, half, kv_start, q_start, at, captured, captured_strides, GRADS_FULL, False,
            FULL_MASKED, SUMMED, SCALE, SLACK, HALVES, WEIGHTS, dtype,
        )  # fmt: skip
    return w, p


@gluon.jit
def _weights_of(
    qk, pairs, of_queries, half, kv_start, q_start, at, captured, captured_strides, GRADS: gl.constexpr,
    ENDS: gl.constexpr, MASKED: gl.constexpr, SUMMED: gl.constexpr, SCALE: gl.constexpr, SLACK: gl.constexpr,
    HALVES: gl.constexpr, WEIGHTS: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Where the tile ENDS, both are 0 behind the last key; behind the last query the numbers of rows make them so.

    MASKED: whether a mask may have made the score. Where p is SUMMED and slope 0, the second is -p.
    """
    LAYOUT: gl.constexpr = qk.type.layout
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    rows, columns_s, stage, group, code_of = of_queries
    number = 4 * HALVES * stage + half
    n0, n1, n2, n3, q_len, kv_len, sizes = at
    kv_idx = kv_start + gl.arange(0, GROUP_KV, gl.SliceLayout(1, LAYOUT))[:, None]
    q_idx = q_start + gl.arange(0, HALF, COLUMNS)[None, :]
    if ENDS:
        q_idx = gl.minimum(q_idx, q_len - 1)
    columns = load_columns((columns_s, HALVES * stage + half, group, code_of), LAYOUT)
    s, slope = GRADS(
        qk, pairs, columns, n0, n1, n2, n3, q_idx, kv_idx, q_len, kv_len, sizes, captured, captured_strides
    )  # fmt: skip
    minus_shift = rows.index(number).load(COLUMNS)[None, :]
    share = minus_shift
    slack = minus_shift
    if SLACK is not None:
        share = rows.index(number + 2 * HALVES).load(COLUMNS)[None, :]
        slack = slack_of(minus_shift, SCALE, SLACK)
    p = probabilities(s, (minus_shift, share, slack), SCALE, SLACK, False)
    if ENDS:
        p = gl.where(kv_idx < kv_len, p, 0.0)
    w = gl.convert_layout(p.to(dtype), WEIGHTS)
    if SUMMED:
        p = gl.where(slope == 0, -p, p) if MASKED else p
    else:
        p = gl.where(slope == 0, 0.0, p * slope) if MASKED else p * slope
    return w, p


@gluon.jit
def _gradients(
    dw, p, deltas, masked, FULL_MASKED: gl.constexpr, SUMMED: gl.constexpr, dtype: gl.constexpr
):  # fmt: skip
    """ds * slope = p slope (dw - delta), but 0 where a mask has made p 0, whatever dw is; and ds if it is SUMMED."""
    if not SUMMED:
        delta = deltas.load(gl.SliceLayout(0, dw.type.layout))
        ds = p * (dw - delta[None, :])
        if FULL_MASKED:
            ds = gl.where(p == 0, 0.0, ds)
        elif masked:
            ds = gl.where(p == opaque(0).to(gl.float32), 0.0, ds)
        return ds.to(dtype), 0
    elif masked:
        return _summed_gradients(dw, p, deltas, opaque(0).to(gl.float32), True, dtype)
    else:
        return _summed_gradients(dw, p, deltas, 0.0, FULL_MASKED, dtype)


@gluon.jit
def _summed_gradients(dw, p, deltas, nothing, MASKED: gl.constexpr, dtype: gl.constexpr):
    """The same, each in one step from p, which is negative where slope is 0. nothing: 0."""
    delta = deltas.load(gl.SliceLayout(0, dw.type.layout))
    ds = gl.abs(p) * (dw - delta[None, :]) if MASKED else p * (dw - delta[None, :])
    if MASKED:
        ds = gl.where(p == nothing, 0.0, ds)
        return gl.where(p < nothing, 0.0, ds).to(dtype), ds
    else:
        return ds.to(dtype), ds


@gluon.jit
def _queries(
    ds_s, k_s, slot, here, GROUP: gl.constexpr, BLOCK_D: gl.constexpr, SQUARE: gl.constexpr
):  # fmt: skip
    """This group's half of ds k over all 128 keys, in flight: half of 128 columns, or of the rows."""
    acc = gl.zeros([64, 64], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
    for group in gl.static_range(2):
        k = k_s.index(group + here)
        if BLOCK_D == 128:
            ds = ds_s.index(2 * slot + group)
            k = k._reinterpret(k.dtype, [2, 64, 64], SQUARE).index(GROUP)
        else:
            ds = ds_s.index(4 * slot + 2 * group + GROUP)
        acc = warpgroup_mma(ds.permute((1, 0)), k, acc, use_acc=group > 0, is_async=True)
    return acc


@gluon.jit
def _meet():
    """Wait for both groups that multiply. Named barriers from 8 on are nobody's."""
    gl.inline_asm_elementwise("bar.sync 8, 256; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@builtin
def _add_to_global(desc, coord, src, _semantic=None):
    """global tile += shared tile, by TMA; Gluon 3.6 has the operation and no name for it."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)
