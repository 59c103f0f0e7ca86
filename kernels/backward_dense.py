"""The gradient of a captured tensor with an element for each pair: a dense bias of few batch positions each.

One pass by query tile, as for the gradient of the queries, and after that: by then delta is right to the last digit. A
tile of gradients is summed over the positions that share it, whose rows are all held, and written as it is found.
"""

import triton
import triton.language as tl

from flashfuse.kernels.backward_rows import (
    PARTED_NUMBERS,
    batch_position,
    load_delta,
    load_shifts,
    rows_length,
    sees_every_key,
)
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


@triton.jit(do_not_specialize=[*PARTED_NUMBERS, "tiles_each"])
def attention_dense_backward_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, rows_ptr, ranges_ptr, seed_ptr, dt_ptr,
    q_strides, k_strides, v_strides, grad_strides, ranges_strides, dt_strides,
    batch_0, batch_1, batch_2, batch_3, loop_0, loop_1, loop_2, loop_3, q_first, q_end, tiles_each,
    q_len, kv_len, sizes, captured, captured_strides,
    PAIR_GRAD_MASKED: tl.constexpr, PAIR_GRAD_FULL: tl.constexpr, PAIR_SCALE: tl.constexpr,
    GRADS_MASKED: tl.constexpr, GRADS_FULL: tl.constexpr, KV_BOUNDS: tl.constexpr,
    SCALE: tl.constexpr, SLACK: tl.constexpr, APART: tl.constexpr, NORMALISED: tl.constexpr,
    FILL_THRESHOLD: tl.constexpr, LONGEST_FIRST: tl.constexpr,
    FACTOR_MASKED: tl.constexpr, FACTOR_FULL: tl.constexpr, ROW_FACTOR: tl.constexpr,
    DROP_LEAST: tl.constexpr, KEEP_SCALE: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr, PROBS_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SHARED_BY: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, UNITS: tl.constexpr,
    CAPTURED_UNITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dt_ij = PAIR_SCALE * sum_n PAIR_GRAD(n, i, j) over the batch positions n that share the element.

    One program owns BLOCK_Q rows of dt by tiles_each tiles of keys at one of batch_0 * .. * batch_3 positions, for the
    SHARED_BY = loop_0 * .. * loop_3 positions that share them (of each axis one of the two is 1). Tiles that it skips
    are zeros. The first row of dt is that of the query q_first, and the last that before q_end.
    """
    operands = (q_strides, k_strides, v_strides, grad_strides, dt_strides)
    q_strides, k_strides, v_strides, grad_strides, dt_strides = all_in_units(operands, UNITS)
    captured_strides = all_in_units(captured_strides, CAPTURED_UNITS)
    q_tiles = tl.cdiv(q_end - q_first, BLOCK_Q)
    kv_parts = tl.cdiv(tl.cdiv(kv_len, BLOCK_KV), tiles_each)
    tile = tl.program_id(0) % q_tiles
    if LONGEST_FIRST:
        tile = q_tiles - 1 - tile
    part = tl.program_id(0) // q_tiles % kv_parts
    n0, n1, n2, n3 = batch_position(tl.program_id(0) // q_tiles // kv_parts, batch_0, batch_1, batch_2, batch_3)
    q_start = q_first + tile * BLOCK_Q
    q_stop = tl.minimum(q_start + BLOCK_Q, q_len)
    offs_q = q_start + tl.arange(0, BLOCK_Q)
    q_idx = tl.minimum(offs_q, q_len - 1)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    seed = 0 if seed_ptr is None else tl.load(seed_ptr)
    exists = offs_q < q_len
    # [block_q, block_kv]
    dt_base = batch_pointer(dt_ptr, dt_strides, n0, n1, n2, n3)
    dt_ptrs = tile_pointers(dt_base, offs_q - q_first, tl.arange(0, BLOCK_KV), dt_strides)
    keys = tl.arange(0, BLOCK_KV)
    all_positions = (batch_0 * loop_0).to(tl.int64) * batch_1 * loop_1 * batch_2 * loop_2 * batch_3 * loop_3
    planes = all_positions * rows_length(q_len)

    # Of each position its place, rows, and pointers to keys and values.
    positions = ()
    start, full_start, full_end, end = kv_len, 0, kv_len, 0
    for shared in tl.static_range(SHARED_BY):
        s0, s1, s2, s3 = batch_position(shared, loop_0, loop_1, loop_2, loop_3)
        m0, m1, m2, m3 = n0 + s0, n1 + s1, n2 + s2, n3 + s3
        position = ((m0 * batch_1 * loop_1 + m1) * batch_2 * loop_2 + m2) * batch_3 * loop_3 + m3
        rows_base = rows_ptr + position.to(tl.int64) * rows_length(q_len)
        # [block_q, block_d], [block_q, block_dv]
        q_ptrs = tile_pointers(batch_pointer(q_ptr, q_strides, m0, m1, m2, m3), q_idx, offs_d, q_strides)
        q = load_columns(q_ptrs, offs_d[None, :], HEAD_DIM, BLOCK_D).to(PRODUCT_DTYPE)
        base = batch_pointer(grad_ptr, grad_strides, m0, m1, m2, m3)
        grad_ptrs = tile_pointers(base, q_idx, offs_dv, grad_strides)
        grad = load_keys(grad_ptrs, offs_q, q_len, True, VALUE_DIM, BLOCK_DV).to(PROBS_DTYPE)
        shifts = load_shifts(rows_base, planes, offs_q, 1, SCALE, SLACK, APART, NORMALISED)
        delta = load_delta(rows_base, planes, offs_q, 1, NORMALISED)
        row_factor = row_factor_of(
            q_idx, m0, m1, m2, m3, q_len, kv_len, sizes, captured, captured_strides, ROW_FACTOR
        )  # fmt: skip
        # [block_kv, block_d], [block_kv, block_dv]
        k_ptrs = tile_pointers(batch_pointer(k_ptr, k_strides, m0, m1, m2, m3), keys, offs_d, k_strides)
        v_ptrs = tile_pointers(batch_pointer(v_ptr, v_strides, m0, m1, m2, m3), keys, offs_dv, v_strides)
        rows = (q, grad, shifts, delta, row_factor, (seed, position), k_ptrs, v_ptrs, m0, m1, m2, m3)
        positions = positions + (rows,)  # type: ignore[assignment]  # noqa: RUF005

        first, full_first, full_stop, stop = KV_BOUNDS(q_start, q_stop, m0, m1, m2, m3, q_len, kv_len, sizes)
        if ranges_ptr is not None:
            ranges = batch_pointer(ranges_ptr, ranges_strides, m0, m1, m2, m3)
            ranges = range_pointers(ranges, ranges_strides, q_start, q_len, BLOCK_Q)
            first, full_first, full_stop, stop = narrowed(
                first, full_first, full_stop, stop, ranges, ranges_strides[5]
            )  # fmt: skip
        if FILL_THRESHOLD is not None:
            # Rows that saw nothing above the fill have gradients through all keys.
            filled = sees_every_key(rows_base, planes, offs_q, FILL_THRESHOLD) > 0
            first = tl.where(filled, 0, first)
            stop = tl.where(filled, kv_len, stop)
        start, end = tl.minimum(start, first), tl.maximum(end, stop)
        full_start, full_end = tl.maximum(full_start, full_first), tl.minimum(full_end, full_stop)

    # Key positions at whole tiles: first_key <= start <= full_start <= full_end <= end <= last_key.
    first_key = part * tiles_each * BLOCK_KV
    last_key = tl.minimum((part + 1) * tiles_each, tl.cdiv(kv_len, BLOCK_KV)) * BLOCK_KV
    start = tl.minimum(tl.maximum(start // BLOCK_KV * BLOCK_KV, first_key), last_key)
    end = tl.maximum(tl.minimum(tl.cdiv(end, BLOCK_KV) * BLOCK_KV, last_key), start)
    full_start = tl.maximum(tl.minimum(tl.cdiv(full_start, BLOCK_KV) * BLOCK_KV, end), start)
    full_end = tl.maximum(tl.minimum(full_end // BLOCK_KV * BLOCK_KV, end), full_start)

    tiles_ahead = (start - first_key) // BLOCK_KV
    for i in tl.range(0, tiles_ahead + (last_key - end) // BLOCK_KV):
        kv_start = tl.where(i < tiles_ahead, first_key, end - tiles_ahead * BLOCK_KV) + i * BLOCK_KV
        stored = exists[:, None] & (kv_start + keys < kv_len)[None, :]
        zeros = tl.zeros([BLOCK_Q, BLOCK_KV], dt_ptr.dtype.element_ty)
        tl.store(dt_ptrs + kv_start.to(tl.int64) * dt_strides[5], zeros, mask=stored)

    for kv_start in tl.range(full_start, full_end, BLOCK_KV, num_stages=STAGES):
        _write_pairs(
            dt_ptrs, exists, positions, k_strides, v_strides, dt_strides, kv_start, q_idx, q_len, kv_len, sizes,
            captured, captured_strides,
            PAIR_GRAD_FULL, PAIR_SCALE, GRADS_FULL, FACTOR_FULL, False, SCALE, SLACK, APART, NORMALISED,
            DROP_LEAST, KEEP_SCALE, PRODUCT_DTYPE, PROBS_DTYPE, PRECISION, HEAD_DIM, VALUE_DIM,
        )  # fmt: skip

    tiles_before = (full_start - start) // BLOCK_KV
    tiles_behind = (end - full_end) // BLOCK_KV
    for i in tl.range(0, tiles_before + tiles_behind, num_stages=STAGES):
        kv_start = tl.where(i < tiles_before, start, full_end - tiles_before * BLOCK_KV) + i * BLOCK_KV
        _write_pairs(
            dt_ptrs, exists, positions, k_strides, v_strides, dt_strides, kv_start, q_idx, q_len, kv_len, sizes,
            captured, captured_strides,
            PAIR_GRAD_MASKED, PAIR_SCALE, GRADS_MASKED, FACTOR_MASKED, True, SCALE, SLACK, APART,
            NORMALISED, DROP_LEAST, KEEP_SCALE, PRODUCT_DTYPE, PROBS_DTYPE, PRECISION, HEAD_DIM,
            VALUE_DIM,
        )  # fmt: skip


@triton.jit
def _write_pairs(
    dt_ptrs, exists, positions, k_strides, v_strides, dt_strides, kv_start, q_idx, q_len, kv_len, sizes,
    captured, captured_strides,
    PAIR_GRAD: tl.constexpr, PAIR_SCALE: tl.constexpr, GRADS: tl.constexpr, FACTOR: tl.constexpr,
    KEYS_END: tl.constexpr, SCALE: tl.constexpr, SLACK: tl.constexpr, APART: tl.constexpr,
    NORMALISED: tl.constexpr, DROP_LEAST: tl.constexpr, KEEP_SCALE: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr, PROBS_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """One tile of keys, of all positions."""
    BLOCK_Q: tl.constexpr = dt_ptrs.shape[0]
    BLOCK_KV: tl.constexpr = dt_ptrs.shape[1]
    kv_idx = kv_start + tl.arange(0, BLOCK_KV)
    key = tl.cast(kv_start, tl.int64)
    dt_ptrs += key * dt_strides[5]
    stored = exists[:, None] & (kv_idx < kv_len)[None, :] if KEYS_END else exists[:, None]
    total = tl.zeros([BLOCK_Q, BLOCK_KV], tl.float32)
    for shared in tl.static_range(len(positions)):
        q, grad, shifts, delta, row_factor, draw, k_ptrs, v_ptrs, n0, n1, n2, n3 = positions[shared]
        # [block_kv, block_d], [block_kv, block_dv]
        k_ptrs += key * k_strides[4]
        v_ptrs += key * v_strides[4]
        k = load_keys(k_ptrs, kv_idx, kv_len, KEYS_END, HEAD_DIM, k_ptrs.shape[1]).to(PRODUCT_DTYPE)
        v = load_keys(v_ptrs, kv_idx, kv_len, KEYS_END, VALUE_DIM, v_ptrs.shape[1]).to(PROBS_DTYPE)
        # [block_q, block_kv]
        qk = product(q, tl.trans(k), PRECISION)
        kept = None
        if DROP_LEAST is not None:
            kept = kept_scales(draw, q_idx, kv_start, BLOCK_KV, DROP_LEAST, KEEP_SCALE)
        _w, p, slope, factor = tile_weights(
            qk, kept, shifts, row_factor[:, None], q_idx[:, None], kv_idx[None, :], n0, n1, n2, n3, q_len, kv_len,
            sizes, captured, captured_strides, GRADS, FACTOR, KEYS_END, SCALE, SLACK, APART, NORMALISED,
        )  # fmt: skip
        dw = product(grad, tl.trans(v), PRECISION)
        _dqk, ds, of_factor = tile_gradients(
            dw, p, slope, factor, kept, delta, kv_idx[None, :], kv_len, KEYS_END, None, NORMALISED
        )  # fmt: skip
        dt = PAIR_GRAD(
            ds, of_factor, qk, n0, n1, n2, n3, q_idx[:, None], kv_idx[None, :], q_len, kv_len, sizes, captured,
            captured_strides,
        )  # fmt: skip
        total += dt
    tl.store(dt_ptrs, (total * PAIR_SCALE).to(dt_ptrs.dtype.element_ty), mask=stored)
