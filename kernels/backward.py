"""The backward kernels: probabilities made again from q, k and the saved log-sum-exp, nothing stored for a pair.

Rows first (`backward_rows`): what a row subtracts and its delta. Then one pass by key tile for the gradients of keys
and values, one by query tile for that of queries, each of which owns what it writes, so there are no atomics and the
result is one. Captured tensors are summed where the pass goes along anyway; one with an element for each pair has a
pass of its own.
Tri Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691, section 3.1.
"""

import triton
import triton.language as tl

from flashfuse.kernels.backward_rows import batch_position, load_delta, load_shifts, rows_length, sees_every_key
from flashfuse.kernels.backward_tile import row_factor_of, tile_gradients, tile_weights
from flashfuse.kernels.philox import kept_scales
from flashfuse.kernels.tiles import (
    all_in_units,
    batch_pointer,
    load_columns,
    load_keys,
    narrowed,
    product,
    range_pointers,
    tile_pointers,
)

_LENGTHS = ["q_len", "kv_len", "sizes"]
_BATCH = ["batch_0", "batch_1", "batch_2", "batch_3"]
_LOOP = ["loop_0", "loop_1", "loop_2", "loop_3"]


# A loop of one position is no loop, which the compiler has to know: it is worth a spill.
@triton.jit(do_not_specialize=[*_BATCH, *_LENGTHS], do_not_specialize_on_alignment=_LOOP)
def attention_keys_backward_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, rows_ptr, ranges_ptr, seed_ptr, filled_ptr, dk_ptr, dv_ptr, sums_ptrs,
    q_strides, k_strides, v_strides, grad_strides, ranges_strides, dk_strides, dv_strides,
    batch_0, batch_1, batch_2, batch_3, loop_0, loop_1, loop_2, loop_3,
    q_len, kv_len, sizes, captured, captured_strides,
    GRADS_MASKED: tl.constexpr, GRADS_FULL: tl.constexpr, QUERY_BOUNDS: tl.constexpr,
    SCALE: tl.constexpr, SLOPE: tl.constexpr, SLACK: tl.constexpr, APART: tl.constexpr, NORMALISED: tl.constexpr,
    MASKED_WHERE: tl.constexpr, FULL_WHERE: tl.constexpr,
    FACTOR_MASKED: tl.constexpr, FACTOR_FULL: tl.constexpr, ROW_FACTOR: tl.constexpr,
    SUMS_MASKED: tl.constexpr, SUMS_FULL: tl.constexpr, NUM_SUMS: tl.constexpr,
    DROP_LEAST: tl.constexpr, KEEP_SCALE: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr, PROBS_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, UNITS: tl.constexpr, CAPTURED_UNITS: tl.constexpr,
    ROWS_CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """dk_j = SLOPE sum_i ds_ij slope_ij q_i,  dv_j = sum_i w_ij grad_i, over the queries of all positions that share j.

    One program owns BLOCK_KV keys of one of batch_0 * .. * batch_3 positions, and passes over the loop_0 * .. * loop_3
    positions that share them (of each axis one of the two is 1). ranges_ptr [n.., key tiles, 4] narrows the queries,
    filled_ptr [n.., 2] holds the queries that see every key. sums_ptrs [n.., kv_len] take the gradients of reads.
    """
    operands = (q_strides, k_strides, v_strides, grad_strides, dk_strides, dv_strides)
    q_strides, k_strides, v_strides, grad_strides, dk_strides, dv_strides = all_in_units(operands, UNITS)
    captured_strides = all_in_units(captured_strides, CAPTURED_UNITS)
    kv_tiles = tl.cdiv(kv_len, BLOCK_KV)
    tile = tl.program_id(0) % kv_tiles
    n0, n1, n2, n3 = batch_position(tl.program_id(0) // kv_tiles, batch_0, batch_1, batch_2, batch_3)
    kv_start = tile * BLOCK_KV
    offs_kv = kv_start + tl.arange(0, BLOCK_KV)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    inside = offs_kv < kv_len

    # [block_kv, block_d], [block_kv, block_dv]
    k_ptrs = tile_pointers(batch_pointer(k_ptr, k_strides, n0, n1, n2, n3), offs_kv, offs_d, k_strides)
    v_ptrs = tile_pointers(batch_pointer(v_ptr, v_strides, n0, n1, n2, n3), offs_kv, offs_dv, v_strides)
    k = load_keys(k_ptrs, offs_kv, kv_len, True, HEAD_DIM, BLOCK_D).to(PRODUCT_DTYPE)
    v = load_keys(v_ptrs, offs_kv, kv_len, True, VALUE_DIM, BLOCK_DV).to(PROBS_DTYPE)
    seed = 0 if seed_ptr is None else tl.load(seed_ptr)
    dk = tl.zeros([BLOCK_KV, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_KV, BLOCK_DV], tl.float32)

    for shared in tl.range(0, loop_0 * loop_1 * loop_2 * loop_3):
        s0, s1, s2, s3 = batch_position(shared, loop_0, loop_1, loop_2, loop_3)
        m0, m1, m2, m3 = n0 + s0, n1 + s1, n2 + s2, n3 + s3
        position = ((m0 * batch_1 * loop_1 + m1) * batch_2 * loop_2 + m2) * batch_3 * loop_3 + m3
        planes = (batch_0 * loop_0).to(tl.int64) * batch_1 * loop_1 * batch_2 * loop_2 * batch_3 * loop_3
        planes *= rows_length(q_len)
        q_base = batch_pointer(q_ptr, q_strides, m0, m1, m2, m3)
        grad_base = batch_pointer(grad_ptr, grad_strides, m0, m1, m2, m3)
        rows_base = rows_ptr + position.to(tl.int64) * rows_length(q_len)
        draw = (seed, position)
        sums = _zeros(NUM_SUMS, BLOCK_KV)

        # Query positions at whole tiles: start <= full_start <= full_end <= end.
        kv_stop = tl.minimum(kv_start + BLOCK_KV, kv_len)
        start, full_start, full_end, end = QUERY_BOUNDS(kv_start, kv_stop, m0, m1, m2, m3, kv_len, q_len, sizes)
        if ranges_ptr is not None:
            ranges = batch_pointer(ranges_ptr, ranges_strides, m0, m1, m2, m3) + tile * ranges_strides[4]
            ranges += tl.arange(0, 1)
            start, full_start, full_end, end = narrowed(start, full_start, full_end, end, ranges, ranges_strides[5])
        start = start // BLOCK_Q * BLOCK_Q
        end = tl.cdiv(end, BLOCK_Q) * BLOCK_Q
        full_start = tl.minimum(tl.cdiv(full_start, BLOCK_Q) * BLOCK_Q, end)
        full_end = tl.where(kv_start + BLOCK_KV <= kv_len, full_end // BLOCK_Q * BLOCK_Q, full_start)
        full_end = tl.maximum(full_end, full_start)

        for q_start in tl.range(full_start, full_end, BLOCK_Q):
            dk, dv, sums = _take_queries(
                dk, dv, sums, k, v, q_base, grad_base, rows_base, draw, planes, q_strides, grad_strides, q_start,
                kv_start, offs_kv, m0, m1, m2, m3, q_len, kv_len, sizes, captured, captured_strides, GRADS_FULL,
                FACTOR_FULL, ROW_FACTOR, SUMS_FULL, False, SCALE, SLACK, APART, NORMALISED, FULL_WHERE, DROP_LEAST,
                KEEP_SCALE, PRODUCT_DTYPE, PROBS_DTYPE, PRECISION, HEAD_DIM, VALUE_DIM, BLOCK_Q, ROWS_CONTIGUOUS,
            )  # fmt: skip

        tiles_before = (full_start - start) // BLOCK_Q
        tiles_behind = (end - full_end) // BLOCK_Q
        for i in tl.range(0, tiles_before + tiles_behind):
            q_start = tl.where(i < tiles_before, start, full_end - tiles_before * BLOCK_Q) + i * BLOCK_Q
            dk, dv, sums = _take_queries(
                dk, dv, sums, k, v, q_base, grad_base, rows_base, draw, planes, q_strides, grad_strides, q_start,
                kv_start, offs_kv, m0, m1, m2, m3, q_len, kv_len, sizes, captured, captured_strides, GRADS_MASKED,
                FACTOR_MASKED, ROW_FACTOR, SUMS_MASKED, True, SCALE, SLACK, APART, NORMALISED, MASKED_WHERE, DROP_LEAST,
                KEEP_SCALE, PRODUCT_DTYPE, PROBS_DTYPE, PRECISION, HEAD_DIM, VALUE_DIM, BLOCK_Q, ROWS_CONTIGUOUS,
            )  # fmt: skip

        if filled_ptr is not None:
            # Rare: rows that saw nothing above the fill have gradients through all keys.
            low = tl.load(filled_ptr + 2 * position) // BLOCK_Q * BLOCK_Q
            high = tl.cdiv(tl.load(filled_ptr + 2 * position + 1), BLOCK_Q) * BLOCK_Q
            behind = tl.maximum(low, end)
            tiles_before = tl.maximum(tl.minimum(high, start) - low, 0) // BLOCK_Q
            tiles_behind = tl.maximum(high - behind, 0) // BLOCK_Q
            for i in tl.range(0, tiles_before + tiles_behind):
                q_start = tl.where(i < tiles_before, low, behind - tiles_before * BLOCK_Q) + i * BLOCK_Q
                dk, dv, sums = _take_queries(
                    dk, dv, sums, k, v, q_base, grad_base, rows_base, draw, planes, q_strides, grad_strides, q_start,
                    kv_start, offs_kv, m0, m1, m2, m3, q_len, kv_len, sizes, captured, captured_strides, GRADS_MASKED,
                    FACTOR_MASKED, ROW_FACTOR, SUMS_MASKED, True, SCALE, SLACK, APART, NORMALISED, MASKED_WHERE,
                    DROP_LEAST, KEEP_SCALE, PRODUCT_DTYPE, PROBS_DTYPE, PRECISION, HEAD_DIM, VALUE_DIM, BLOCK_Q,
                    ROWS_CONTIGUOUS,
                )  # fmt: skip

        for i in tl.static_range(NUM_SUMS):
            tl.store(sums_ptrs[i] + position.to(tl.int64) * kv_len + offs_kv, sums[i], mask=inside)

    if dk_ptr is not None:
        dk_ptrs = tile_pointers(batch_pointer(dk_ptr, dk_strides, n0, n1, n2, n3), offs_kv, offs_d, dk_strides)
        stored = inside[:, None] & (offs_d[None, :] < HEAD_DIM)
        tl.store(dk_ptrs, (dk * SLOPE).to(dk_ptr.dtype.element_ty), mask=stored)
    if dv_ptr is not None:
        dv_ptrs = tile_pointers(batch_pointer(dv_ptr, dv_strides, n0, n1, n2, n3), offs_kv, offs_dv, dv_strides)
        stored = inside[:, None] & (offs_dv[None, :] < VALUE_DIM)
        tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _take_queries(
    dk, dv, sums, k, v, q_base, grad_base, rows_base, draw, planes, q_strides, grad_strides, q_start, kv_start, kv_idx,
    n0, n1, n2, n3, q_len, kv_len, sizes, captured, captured_strides,
    GRADS: tl.constexpr, FACTOR: tl.constexpr, ROW_FACTOR: tl.constexpr, SUMS: tl.constexpr, MASKED: tl.constexpr,
    SCALE: tl.constexpr, SLACK: tl.constexpr, APART: tl.constexpr, NORMALISED: tl.constexpr, MASKED_WHERE: tl.constexpr,
    DROP_LEAST: tl.constexpr, KEEP_SCALE: tl.constexpr, PRODUCT_DTYPE: tl.constexpr, PROBS_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS_CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """One tile of queries, transposed: its rows are keys.

    MASKED: whether the tile may meet a mask, or reach behind the last key or query.
    ROWS_CONTIGUOUS: whether the rows of q or of the gradient are; seen by the compiler, that gives a tile a transposed
        layout in shared memory, with which products have come out wrong (Triton 3.6 on sm_90, head dim 1).
    """
    BLOCK_KV: tl.constexpr = k.shape[0]
    BLOCK_D: tl.constexpr = k.shape[1]
    BLOCK_DV: tl.constexpr = v.shape[1]
    row = tl.arange(0, BLOCK_Q)
    offs_q = q_start + row
    if MASKED or ROWS_CONTIGUOUS:
        # Rows behind the last query repeat it; with a gradient of 0 they add nothing.
        row = tl.minimum(row, q_len - 1 - q_start)
    q_idx = q_start + row
    first = tl.cast(q_start, tl.int64)

    # [block_q, block_d], [block_q, block_dv]
    q_ptrs = tile_pointers(q_base + first * q_strides[4], row, tl.arange(0, BLOCK_D), q_strides)
    q = load_columns(q_ptrs, tl.arange(0, BLOCK_D)[None, :], HEAD_DIM, BLOCK_D).to(PRODUCT_DTYPE)
    grad_ptrs = tile_pointers(grad_base + first * grad_strides[4], row, tl.arange(0, BLOCK_DV), grad_strides)
    grad = load_keys(grad_ptrs, offs_q, q_len, MASKED, VALUE_DIM, BLOCK_DV).to(PROBS_DTYPE)
    # [block_kv, block_q]; numbers of rows are read, and the second product formed, when they are needed and not before:
    # registers are scarce.
    qk = product(k, tl.trans(q), PRECISION)
    shifts = load_shifts(rows_base + q_start, planes, tl.arange(0, BLOCK_Q), 0, SCALE, SLACK, APART, NORMALISED)
    row_factor = row_factor_of(
        q_idx, n0, n1, n2, n3, q_len, kv_len, sizes, captured, captured_strides, ROW_FACTOR
    )  # fmt: skip
    kept = None
    if DROP_LEAST is not None:
        kept = tl.trans(kept_scales(draw, q_idx, kv_start, BLOCK_KV, DROP_LEAST, KEEP_SCALE))
    # A key behind the last one has a row of its own, which is not stored.
    w, p, slope, factor = tile_weights(
        qk, kept, shifts, row_factor[None, :], q_idx[None, :], kv_idx[:, None], n0, n1, n2, n3, q_len, kv_len, sizes,
        captured, captured_strides, GRADS, FACTOR, False, SCALE, SLACK, APART, NORMALISED,
    )  # fmt: skip
    dw = product(v, tl.trans(grad), PRECISION)
    delta = load_delta(rows_base + q_start, planes, tl.arange(0, BLOCK_Q), 0, NORMALISED)
    dqk, ds, of_factor = tile_gradients(
        dw, p, slope, factor, kept, delta, kv_idx[:, None], kv_len, False, MASKED_WHERE, NORMALISED
    )  # fmt: skip
    dv = _added_product(dv, w.to(PROBS_DTYPE), grad, PRECISION)
    dk = _added_product(dk, dqk.to(PRODUCT_DTYPE), q, PRECISION)
    if SUMS is not None:
        sums = SUMS(
            sums, ds, of_factor, p, qk, n0, n1, n2, n3, q_idx[None, :], kv_idx[:, None], q_len, kv_len, sizes,
            captured, captured_strides,
        )  # fmt: skip
    return dk, dv, sums


@triton.jit(do_not_specialize=[*_BATCH, *_LENGTHS])
def attention_queries_backward_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, rows_ptr, ranges_ptr, seed_ptr, dq_ptr, sums_ptrs,
    q_strides, k_strides, v_strides, grad_strides, ranges_strides, dq_strides,
    batch_0, batch_1, batch_2, batch_3, q_len, kv_len, sizes, captured, captured_strides,
    GRADS_MASKED: tl.constexpr, GRADS_FULL: tl.constexpr, KV_BOUNDS: tl.constexpr,
    SCALE: tl.constexpr, SLOPE: tl.constexpr, SLACK: tl.constexpr, APART: tl.constexpr, NORMALISED: tl.constexpr,
    MASKED_WHERE: tl.constexpr, FULL_WHERE: tl.constexpr, FILL_THRESHOLD: tl.constexpr,
    LONGEST_FIRST: tl.constexpr, FACTOR_MASKED: tl.constexpr, FACTOR_FULL: tl.constexpr, ROW_FACTOR: tl.constexpr,
    SUMS_MASKED: tl.constexpr, SUMS_FULL: tl.constexpr, NUM_SUMS: tl.constexpr,
    DROP_LEAST: tl.constexpr, KEEP_SCALE: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr, PROBS_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, UNITS: tl.constexpr, CAPTURED_UNITS: tl.constexpr,
):  # fmt: skip
    """dq_i = SLOPE sum_j ds_ij slope_ij k_j.

    One program owns BLOCK_Q queries of one batch position, and visits the keys that the forward visits. sums_ptrs
    [n.., q_len] take the gradients of reads.
    """
    operands = (q_strides, k_strides, v_strides, grad_strides, dq_strides)
    q_strides, k_strides, v_strides, grad_strides, dq_strides = all_in_units(operands, UNITS)
    captured_strides = all_in_units(captured_strides, CAPTURED_UNITS)
    q_tiles = tl.cdiv(q_len, BLOCK_Q)
    tile = tl.program_id(0) % q_tiles
    position = tl.program_id(0) // q_tiles
    n0, n1, n2, n3 = batch_position(position, batch_0, batch_1, batch_2, batch_3)
    if LONGEST_FIRST:
        tile = q_tiles - 1 - tile
    q_start = tile * BLOCK_Q
    offs_q = q_start + tl.arange(0, BLOCK_Q)
    offs_kv = tl.arange(0, BLOCK_KV)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    q_idx = tl.minimum(offs_q, q_len - 1)

    # [block_q, block_d], [block_q, block_dv]
    q_ptrs = tile_pointers(batch_pointer(q_ptr, q_strides, n0, n1, n2, n3), q_idx, offs_d, q_strides)
    q = load_columns(q_ptrs, offs_d[None, :], HEAD_DIM, BLOCK_D).to(PRODUCT_DTYPE)
    grad_ptrs = tile_pointers(batch_pointer(grad_ptr, grad_strides, n0, n1, n2, n3), q_idx, offs_dv, grad_strides)
    grad = load_columns(grad_ptrs, offs_dv[None, :], VALUE_DIM, BLOCK_DV).to(PROBS_DTYPE)
    # [block_kv, block_d], [block_kv, block_dv]: the first key tile
    k_ptrs = tile_pointers(batch_pointer(k_ptr, k_strides, n0, n1, n2, n3), offs_kv, offs_d, k_strides)
    v_ptrs = tile_pointers(batch_pointer(v_ptr, v_strides, n0, n1, n2, n3), offs_kv, offs_dv, v_strides)
    # [block_q]
    planes = batch_0.to(tl.int64) * batch_1 * batch_2 * batch_3 * rows_length(q_len)
    rows_base = rows_ptr + position.to(tl.int64) * rows_length(q_len)
    shifts = load_shifts(rows_base, planes, offs_q, 1, SCALE, SLACK, APART, NORMALISED)
    delta = load_delta(rows_base, planes, offs_q, 1, NORMALISED)
    row_factor = row_factor_of(
        q_idx, n0, n1, n2, n3, q_len, kv_len, sizes, captured, captured_strides, ROW_FACTOR
    )  # fmt: skip
    draw = (0 if seed_ptr is None else tl.load(seed_ptr), position)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    sums = _zeros(NUM_SUMS, BLOCK_Q)

    # Key positions at whole tiles: start <= full_start <= full_end <= end.
    q_stop = tl.minimum(q_start + BLOCK_Q, q_len)
    start, full_start, full_end, end = KV_BOUNDS(q_start, q_stop, n0, n1, n2, n3, q_len, kv_len, sizes)
    if ranges_ptr is not None:
        ranges = batch_pointer(ranges_ptr, ranges_strides, n0, n1, n2, n3)
        ranges = range_pointers(ranges, ranges_strides, q_start, q_len, BLOCK_Q)
        start, full_start, full_end, end = narrowed(start, full_start, full_end, end, ranges, ranges_strides[5])
    start = start // BLOCK_KV * BLOCK_KV
    end = tl.cdiv(end, BLOCK_KV) * BLOCK_KV
    full_start = tl.minimum(tl.cdiv(full_start, BLOCK_KV) * BLOCK_KV, end)
    full_end = tl.maximum(full_end // BLOCK_KV * BLOCK_KV, full_start)

    for kv_start in tl.range(full_start, full_end, BLOCK_KV):
        dq, sums = _take_keys(
            dq, sums, q, grad, shifts, delta, row_factor, draw, k_ptrs, v_ptrs, k_strides, v_strides, kv_start, q_idx,
            n0, n1, n2, n3, q_len, kv_len, sizes, captured, captured_strides, GRADS_FULL, FACTOR_FULL, SUMS_FULL,
            False, SCALE, SLACK, APART, NORMALISED, FULL_WHERE, DROP_LEAST, KEEP_SCALE, PRODUCT_DTYPE, PROBS_DTYPE,
            PRECISION, HEAD_DIM, VALUE_DIM,
        )  # fmt: skip

    tiles_before = (full_start - start) // BLOCK_KV
    tiles_behind = (end - full_end) // BLOCK_KV
    for i in tl.range(0, tiles_before + tiles_behind):
        kv_start = tl.where(i < tiles_before, start, full_end - tiles_before * BLOCK_KV) + i * BLOCK_KV
        dq, sums = _take_keys(
            dq, sums, q, grad, shifts, delta, row_factor, draw, k_ptrs, v_ptrs, k_strides, v_strides, kv_start, q_idx,
            n0, n1, n2, n3, q_len, kv_len, sizes, captured, captured_strides, GRADS_MASKED, FACTOR_MASKED,
            SUMS_MASKED, True, SCALE, SLACK, APART, NORMALISED, MASKED_WHERE, DROP_LEAST, KEEP_SCALE, PRODUCT_DTYPE,
            PROBS_DTYPE, PRECISION, HEAD_DIM, VALUE_DIM,
        )  # fmt: skip

    if FILL_THRESHOLD is not None:
        filled = sees_every_key(rows_base, planes, offs_q, FILL_THRESHOLD)
        tiles_before = filled * (start // BLOCK_KV)
        tiles_behind = filled * tl.cdiv(tl.maximum(kv_len - end, 0), BLOCK_KV)
        for i in tl.range(0, tiles_before + tiles_behind):
            kv_start = tl.where(i < tiles_before, 0, end - tiles_before * BLOCK_KV) + i * BLOCK_KV
            dq, sums = _take_keys(
                dq, sums, q, grad, shifts, delta, row_factor, draw, k_ptrs, v_ptrs, k_strides, v_strides, kv_start,
                q_idx, n0, n1, n2, n3, q_len, kv_len, sizes, captured, captured_strides, GRADS_MASKED, FACTOR_MASKED,
                SUMS_MASKED, True, SCALE, SLACK, APART, NORMALISED, MASKED_WHERE, DROP_LEAST, KEEP_SCALE, PRODUCT_DTYPE,
                PROBS_DTYPE, PRECISION, HEAD_DIM, VALUE_DIM,
            )  # fmt: skip

    stored = offs_q < q_len
    for i in tl.static_range(NUM_SUMS):
        tl.store(sums_ptrs[i] + position.to(tl.int64) * q_len + offs_q, sums[i], mask=stored)
    if dq_ptr is not None:
        dq_ptrs = tile_pointers(batch_pointer(dq_ptr, dq_strides, n0, n1, n2, n3), offs_q, offs_d, dq_strides)
        stored = stored[:, None] & (offs_d[None, :] < HEAD_DIM)
        tl.store(dq_ptrs, (dq * SLOPE).to(dq_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _take_keys(
    dq, sums, q, grad, shifts, delta, row_factor, draw, k_ptrs, v_ptrs, k_strides, v_strides, kv_start, q_idx,
    n0, n1, n2, n3, q_len, kv_len, sizes, captured, captured_strides,
    GRADS: tl.constexpr, FACTOR: tl.constexpr, SUMS: tl.constexpr, KEYS_END: tl.constexpr,
    SCALE: tl.constexpr, SLACK: tl.constexpr, APART: tl.constexpr, NORMALISED: tl.constexpr, MASKED_WHERE: tl.constexpr,
    DROP_LEAST: tl.constexpr, KEEP_SCALE: tl.constexpr, PRODUCT_DTYPE: tl.constexpr, PROBS_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """One tile of keys."""
    BLOCK_KV: tl.constexpr = k_ptrs.shape[0]
    BLOCK_D: tl.constexpr = k_ptrs.shape[1]
    BLOCK_DV: tl.constexpr = v_ptrs.shape[1]
    kv_idx = kv_start + tl.arange(0, BLOCK_KV)
    key = tl.cast(kv_start, tl.int64)

    # [block_kv, block_d], [block_kv, block_dv]
    k = load_keys(k_ptrs + key * k_strides[4], kv_idx, kv_len, KEYS_END, HEAD_DIM, BLOCK_D).to(PRODUCT_DTYPE)
    v = load_keys(v_ptrs + key * v_strides[4], kv_idx, kv_len, KEYS_END, VALUE_DIM, BLOCK_DV).to(PROBS_DTYPE)
    # [block_q, block_kv]
    qk = product(q, tl.trans(k), PRECISION)
    kept = None
    if DROP_LEAST is not None:
        kept = kept_scales(draw, q_idx, kv_start, BLOCK_KV, DROP_LEAST, KEEP_SCALE)
    SUMMED_END: tl.constexpr = KEYS_END and SUMS is not None
    _, p, slope, factor = tile_weights(
        qk, kept, shifts, row_factor[:, None], q_idx[:, None], kv_idx[None, :], n0, n1, n2, n3, q_len, kv_len, sizes,
        captured, captured_strides, GRADS, FACTOR, SUMMED_END, SCALE, SLACK, APART, NORMALISED,
    )  # fmt: skip
    dw = product(grad, tl.trans(v), PRECISION)
    dqk, ds, of_factor = tile_gradients(
        dw, p, slope, factor, kept, delta, kv_idx[None, :], kv_len, KEYS_END, MASKED_WHERE, NORMALISED
    )  # fmt: skip
    dq = _added_product(dq, dqk.to(PRODUCT_DTYPE), k, PRECISION)
    if SUMS is not None:
        sums = SUMS(
            sums, ds, of_factor, p, qk, n0, n1, n2, n3, q_idx[:, None], kv_idx[None, :], q_len, kv_len, sizes,
            captured, captured_strides,
        )  # fmt: skip
    return dq, sums


@triton.jit
def _added_product(acc, a, b, PRECISION: tl.constexpr):
    """acc + a b, as in the forward: float32 is summed a tile at a time."""
    if PRECISION == "ieee" and b.dtype == tl.float32:
        return acc + product(a, b, PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def _zeros(N: tl.constexpr, BLOCK: tl.constexpr):
    """N sums [block] that are 0."""
    sums = ()
    for _ in tl.static_range(N):
        sums = sums + (tl.zeros([BLOCK], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return sums
