"""The gradient of a captured tensor with an element for each pair, a dense bias, or for each distance, a relative one.

Each program owns a tile of pairs, or all pairs of tiles at one distance from each other, in which the distances of
pairs stand at the same places. It makes the probabilities of every batch position that shares them once more, so that
nothing is added by more than one program.
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


@triton.jit(do_not_specialize=PARTED_NUMBERS)
def attention_pairs_backward_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, rows_ptr, ranges_ptr, seed_ptr, dt_ptr,
    q_strides, k_strides, v_strides, grad_strides, ranges_strides, dt_strides,
    batch_0, batch_1, batch_2, batch_3, loop_0, loop_1, loop_2, loop_3, q_first, q_end,
    q_len, kv_len, sizes, captured, captured_strides,
    BY_DISTANCE: tl.constexpr, PAIR_GRAD: tl.constexpr, PAIR_SCALE: tl.constexpr, GRADS_MASKED: tl.constexpr,
    KV_BOUNDS: tl.constexpr, SCALE: tl.constexpr, SLACK: tl.constexpr, APART: tl.constexpr, NORMALISED: tl.constexpr,
    SKIPS: tl.constexpr, FILL_THRESHOLD: tl.constexpr,
    FACTOR_MASKED: tl.constexpr, ROW_FACTOR: tl.constexpr, DROP_LEAST: tl.constexpr, KEEP_SCALE: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr, PROBS_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, UNITS: tl.constexpr, CAPTURED_UNITS: tl.constexpr,
):  # fmt: skip
    """dt_ij = PAIR_SCALE * sum_n PAIR_GRAD(n, i, j) over the batch positions n that share the element.

    One program owns BLOCK_Q queries by BLOCK_KV keys at one of batch_0 * .. * batch_3 positions, and passes over the
    loop_0 * .. * loop_3 positions that share them (of each axis one of the two is 1). BY_DISTANCE: it owns a distance
    of tiles, and passes over the query tiles too; dt is `DistanceSums.tiles`. Else the first row of dt is that of the
    query q_first, and the last that before q_end. SKIPS: whether masks rule tiles out; a loop without that question
    loads ahead.
    """
    operands = (q_strides, k_strides, v_strides, grad_strides, dt_strides)
    q_strides, k_strides, v_strides, grad_strides, dt_strides = all_in_units(operands, UNITS)
    captured_strides = all_in_units(captured_strides, CAPTURED_UNITS)
    q_tiles = tl.cdiv(q_len, BLOCK_Q)
    kv_tiles = tl.cdiv(kv_len, BLOCK_KV)
    if BY_DISTANCE:
        row_tiles = 1
        column_tiles = (q_tiles - 1) * (BLOCK_Q // BLOCK_KV) + kv_tiles
    else:
        row_tiles = tl.cdiv(q_end - q_first, BLOCK_Q)
        column_tiles = kv_tiles
    column = tl.program_id(0) % column_tiles
    row = tl.program_id(0) // column_tiles % row_tiles
    n0, n1, n2, n3 = batch_position(tl.program_id(0) // column_tiles // row_tiles, batch_0, batch_1, batch_2, batch_3)
    # Of the query tiles, `first_tile` and those behind it, and how far from each its key tile starts.
    if BY_DISTANCE:
        distance = column * BLOCK_KV - (q_tiles - 1) * BLOCK_Q
        first_tile = tl.cdiv(tl.maximum(-distance, 0), BLOCK_Q)
        tiles = tl.minimum(q_tiles, tl.cdiv(kv_len - distance, BLOCK_Q)) - first_tile
    else:
        first_tile = q_first // BLOCK_Q + row
        distance = column * BLOCK_KV - first_tile * BLOCK_Q
        tiles = 1
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    seed = 0 if seed_ptr is None else tl.load(seed_ptr)
    dt = tl.zeros([BLOCK_Q, BLOCK_KV], tl.float32)

    for i in tl.range(0, loop_0 * loop_1 * loop_2 * loop_3 * tiles):
        q_start = (first_tile + i % tiles) * BLOCK_Q
        kv_start = q_start + distance
        offs_q = q_start + tl.arange(0, BLOCK_Q)
        offs_kv = kv_start + tl.arange(0, BLOCK_KV)
        q_idx = tl.minimum(offs_q, q_len - 1)
        q_stop = tl.minimum(q_start + BLOCK_Q, q_len)
        s0, s1, s2, s3 = batch_position(i // tiles, loop_0, loop_1, loop_2, loop_3)
        m0, m1, m2, m3 = n0 + s0, n1 + s1, n2 + s2, n3 + s3
        position = ((m0 * batch_1 * loop_1 + m1) * batch_2 * loop_2 + m2) * batch_3 * loop_3 + m3
        planes = (batch_0 * loop_0).to(tl.int64) * batch_1 * loop_1 * batch_2 * loop_2 * batch_3 * loop_3
        planes *= rows_length(q_len)
        rows_base = rows_ptr + position.to(tl.int64) * rows_length(q_len)

        visited = True
        if SKIPS:
            start, _full_start, _full_end, end = KV_BOUNDS(q_start, q_stop, m0, m1, m2, m3, q_len, kv_len, sizes)
            if ranges_ptr is not None:
                ranges = batch_pointer(ranges_ptr, ranges_strides, m0, m1, m2, m3)
                ranges = range_pointers(ranges, ranges_strides, q_start, q_len, BLOCK_Q)
                start, _full_start, _full_end, end = narrowed(start, start, end, end, ranges, ranges_strides[5])
            visited = (kv_start < end) & (kv_start + BLOCK_KV > start)
            if FILL_THRESHOLD is not None:
                # Rows that saw nothing above the fill have gradients through all keys.
                visited |= sees_every_key(rows_base, planes, offs_q, FILL_THRESHOLD) > 0
        if visited:
            # [block_q, block_d], [block_q, block_dv]
            q_ptrs = tile_pointers(batch_pointer(q_ptr, q_strides, m0, m1, m2, m3), q_idx, offs_d, q_strides)
            q = load_columns(q_ptrs, offs_d[None, :], HEAD_DIM, BLOCK_D).to(PRODUCT_DTYPE)
            base = batch_pointer(grad_ptr, grad_strides, m0, m1, m2, m3)
            grad_ptrs = tile_pointers(base, q_idx, offs_dv, grad_strides)
            grad = load_keys(grad_ptrs, offs_q, q_len, True, VALUE_DIM, BLOCK_DV).to(PROBS_DTYPE)
            # [block_kv, block_d], [block_kv, block_dv]
            k_ptrs = tile_pointers(batch_pointer(k_ptr, k_strides, m0, m1, m2, m3), offs_kv, offs_d, k_strides)
            k = load_keys(k_ptrs, offs_kv, kv_len, True, HEAD_DIM, BLOCK_D).to(PRODUCT_DTYPE)
            v_ptrs = tile_pointers(batch_pointer(v_ptr, v_strides, m0, m1, m2, m3), offs_kv, offs_dv, v_strides)
            v = load_keys(v_ptrs, offs_kv, kv_len, True, VALUE_DIM, BLOCK_DV).to(PROBS_DTYPE)
            # [block_q, block_kv]
            qk = product(q, tl.trans(k), PRECISION)
            shifts = load_shifts(rows_base, planes, offs_q, 1, SCALE, SLACK, APART, NORMALISED)
            delta = load_delta(rows_base, planes, offs_q, 1, NORMALISED)
            row_factor = row_factor_of(
                q_idx, m0, m1, m2, m3, q_len, kv_len, sizes, captured, captured_strides, ROW_FACTOR
            )  # fmt: skip
            kept = None
            if DROP_LEAST is not None:
                kept = kept_scales((seed, position), q_idx, kv_start, BLOCK_KV, DROP_LEAST, KEEP_SCALE)
            _w, p, slope, factor = tile_weights(
                qk, kept, shifts, row_factor[:, None], q_idx[:, None], offs_kv[None, :], m0, m1, m2, m3, q_len,
                kv_len, sizes, captured, captured_strides, GRADS_MASKED, FACTOR_MASKED, True, SCALE, SLACK, APART,
                NORMALISED,
            )  # fmt: skip
            dw = product(grad, tl.trans(v), PRECISION)
            _dqk, ds, of_factor = tile_gradients(
                dw, p, slope, factor, kept, delta, offs_kv[None, :], kv_len, True, None, NORMALISED
            )  # fmt: skip
            dt += PAIR_GRAD(
                ds, of_factor, qk, m0, m1, m2, m3, q_idx[:, None], offs_kv[None, :], q_len, kv_len, sizes, captured,
                captured_strides,
            )  # fmt: skip

    rows = row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = column * BLOCK_KV + tl.arange(0, BLOCK_KV)
    dt_ptrs = tile_pointers(batch_pointer(dt_ptr, dt_strides, n0, n1, n2, n3), rows, columns, dt_strides)
    # Every row and column of sums by distance exists.
    stored = None if BY_DISTANCE else (rows[:, None] < q_end - q_first) & (columns[None, :] < kv_len)
    tl.store(dt_ptrs, (dt * PAIR_SCALE).to(dt_ptr.dtype.element_ty), mask=stored)
