"""The forward kernel: online softmax over key tiles, in base 2, with the score program and its mask compiled in.

The keys of a query tile fall into tiles that no mask touches, tiles that need the mask evaluated, and tiles that are
masked throughout. The first two kinds have a loop each; the last are skipped, except for rows that turn out to hold
nothing but a finite fill, whose probabilities are then spread over all keys as the source program spreads them.
"""

import triton
import triton.language as tl

from flashfuse.kernels.elementary import scaled_exp2
from flashfuse.kernels.philox import kept_scales
from flashfuse.kernels.tiles import (
    all_in_units,
    batch_pointer,
    from_stored,
    load_columns,
    load_keys,
    narrowed,
    product,
    range_pointers,
    tile_pointers,
)

# From this size on a unit in the last place of a score is one or more, no correction of an exponent.
LARGE: tl.constexpr = tl.constexpr(1e7)
# From this size on what a shift loses by its rounding is no exponent, and gradients are NaN.
HUGE: tl.constexpr = tl.constexpr(1e9)
LARGEST_FLOAT32: tl.constexpr = tl.constexpr(3.4028234663852886e38)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


# Lengths change from call to call and nothing is gained from knowing that they are 1 or a multiple of 16.
@triton.jit(do_not_specialize=["batch_0", "batch_1", "batch_2", "batch_3", "q_len", "kv_len", "sizes"])
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, ranges_ptr, seed_ptr,
    q_strides, k_strides, v_strides, out_strides, ranges_strides,
    batch_0, batch_1, batch_2, batch_3, q_len, kv_len, sizes, captured, captured_strides,
    SCORE_MASKED: tl.constexpr, SCORE_FULL: tl.constexpr, KV_BOUNDS: tl.constexpr,
    LOG2_SCALE: tl.constexpr, FILL_THRESHOLD: tl.constexpr, LARGE_SCORES: tl.constexpr, FILLS: tl.constexpr,
    ZERO_EMPTY_ROWS: tl.constexpr, LONGEST_FIRST: tl.constexpr, SHARED_BATCH: tl.constexpr,
    NORMALISED: tl.constexpr, SINK: tl.constexpr, FACTOR_MASKED: tl.constexpr, FACTOR_FULL: tl.constexpr,
    ROW_FACTOR: tl.constexpr, ROW_KEPT: tl.constexpr, DROP_LEAST: tl.constexpr, KEEP_SCALE: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, PRODUCT_DTYPE: tl.constexpr, PROBS_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, UNITS: tl.constexpr,
    CAPTURED_UNITS: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j exp(s_ij - lse_i) v_j,  lse_i = log(sum_j exp(s_ij)),  s_ij = score(q_i . k_j, n, i, j)

    lse is stored as the row's largest score and the sum of exp(s_ij - largest), see `ops`.

    SINK adds exp(sink(n, i)) to the sum, FACTOR or ROW_FACTOR multiplies exp(s_ij - lse_i), and rows that are not
    ROW_KEPT become 0; where the score is not NORMALISED, out_i = sum_j s_ij v_j. With a seed what multiplies v_j is
    dropped at random, see `dropout`. KEY and VALUE make k_j and v_j of stored ones.
    Operands have four batch axes (size 1 where the attention has fewer) and strides (n0, n1, n2, n3, row, column), 0 on
    axes they are shared over; so has ranges_ptr [n.., blocks of queries, 4], where there is one. One program computes
    BLOCK_Q rows of one batch position; LOG2_SCALE turns inner scores into base-2 logarithms. UNITS, CAPTURED_UNITS:
    see `in_units`, of q, k, v and out, and of what is captured.
    """
    COMPUTE: tl.constexpr = lse_ptr.dtype.element_ty
    q_strides, k_strides, v_strides, out_strides = all_in_units(
        (q_strides, k_strides, v_strides, out_strides), UNITS
    )  # fmt: skip
    captured_strides = all_in_units(captured_strides, CAPTURED_UNITS)

    # Programs next to each other share keys and values: the tiles of one head first, then the heads of one group.
    q_tiles = tl.cdiv(q_len, BLOCK_Q)
    tile = tl.program_id(0) % q_tiles
    position = tl.program_id(0) // q_tiles
    if SHARED_BATCH:
        # .. or captured tiles: then the same head of all batches.
        n0 = position % batch_0
        position = position // batch_0
    n3 = position % batch_3
    n2 = position // batch_3 % batch_2
    n1 = position // (batch_3 * batch_2) % batch_1
    if not SHARED_BATCH:
        n0 = position // (batch_3 * batch_2 * batch_1)
    if LONGEST_FIRST:
        tile = q_tiles - 1 - tile

    q_start = tile * BLOCK_Q
    offs_q = q_start + tl.arange(0, BLOCK_Q)
    offs_kv = tl.arange(0, BLOCK_KV)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    # Rows behind the last query repeat it, so that no load has to be masked for them; they are not stored.
    q_idx = tl.minimum(offs_q, q_len - 1)

    # [block_q, block_d]
    q_ptrs = tile_pointers(batch_pointer(q_ptr, q_strides, n0, n1, n2, n3), q_idx, offs_d, q_strides)
    q = load_columns(q_ptrs, offs_d[None, :], HEAD_DIM, BLOCK_D).to(PRODUCT_DTYPE)
    # [block_kv, block_d], [block_kv, block_dv]: the first key tile
    k_ptrs = tile_pointers(batch_pointer(k_ptr, k_strides, n0, n1, n2, n3), offs_kv, offs_d, k_strides)
    v_ptrs = tile_pointers(batch_pointer(v_ptr, v_strides, n0, n1, n2, n3), offs_kv, offs_dv, v_strides)

    # Key positions at whole tiles: start <= full_start <= full_end <= end.
    q_stop = tl.minimum(q_start + BLOCK_Q, q_len)
    start, full_start, full_end, end = key_tiles(
        q_start, q_stop, n0, n1, n2, n3, q_len, kv_len, sizes, ranges_ptr, ranges_strides, KV_BOUNDS, BLOCK_Q, BLOCK_KV
    )

    position = ((n0 * batch_1 + n1) * batch_2 + n2) * batch_3 + n3
    draw = (0 if seed_ptr is None else tl.load(seed_ptr), position)
    row_max = tl.full([BLOCK_Q], float("-inf"), COMPUTE)
    row_shift = tl.full([BLOCK_Q], float("-inf"), COMPUTE)
    row_sum = tl.zeros([BLOCK_Q], COMPUTE)
    acc = tl.zeros([BLOCK_Q, BLOCK_DV], COMPUTE)
    acc, row_sum, row_max, row_shift = visit(
        acc, row_sum, row_max, row_shift, q, k_ptrs, v_ptrs, k_strides, v_strides, start, full_start, full_end, end,
        draw, n0, n1, n2, n3, q_idx, q_len, kv_len, sizes, captured, captured_strides, SCORE_MASKED, SCORE_FULL,
        FACTOR_MASKED, FACTOR_FULL, LOG2_SCALE, LARGE_SCORES, NORMALISED, DROP_LEAST, KEEP_SCALE, KEY, VALUE,
        PRODUCT_DTYPE, PROBS_DTYPE, PRECISION, HEAD_DIM, VALUE_DIM,
    )  # fmt: skip
    if FILL_THRESHOLD is not None:
        acc, row_sum, row_max, row_shift = visit_skipped(
            acc, row_sum, row_max, row_shift, q, k_ptrs, v_ptrs, k_strides, v_strides, start, end,
            draw, n0, n1, n2, n3, q_idx, q_len, kv_len, sizes, captured, captured_strides, SCORE_MASKED, FACTOR_MASKED,
            FILL_THRESHOLD, LOG2_SCALE, LARGE_SCORES, NORMALISED, DROP_LEAST, KEEP_SCALE, KEY, VALUE, PRODUCT_DTYPE,
            PROBS_DTYPE, PRECISION, HEAD_DIM, VALUE_DIM,
        )  # fmt: skip

    lse_ptrs = lse_ptr + 2 * (position.to(tl.int64) * q_len + offs_q)
    out_ptrs = tile_pointers(batch_pointer(out_ptr, out_strides, n0, n1, n2, n3), offs_q, offs_dv, out_strides)
    finish(
        acc, row_sum, row_max, row_shift, out_ptrs, lse_ptrs, offs_q < q_len, n0, n1, n2, n3, q_idx, q_len, kv_len,
        sizes, captured, captured_strides, LOG2_SCALE, LARGE_SCORES, FILLS, ZERO_EMPTY_ROWS, NORMALISED, SINK,
        ROW_FACTOR, ROW_KEPT, VALUE_DIM,
    )  # fmt: skip


@triton.jit
def key_tiles(
    q_start, q_stop, n0, n1, n2, n3, q_len, kv_len, sizes, ranges_ptr, ranges_strides,
    KV_BOUNDS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """The keys that queries [q_start, q_stop) visit, at whole tiles: start <= full_start <= full_end <= end."""
    start, full_start, full_end, end = KV_BOUNDS(q_start, q_stop, n0, n1, n2, n3, q_len, kv_len, sizes)
    if ranges_ptr is not None:
        ranges = batch_pointer(ranges_ptr, ranges_strides, n0, n1, n2, n3)
        ranges = range_pointers(ranges, ranges_strides, q_start, q_len, BLOCK_Q)
        start, full_start, full_end, end = narrowed(start, full_start, full_end, end, ranges, ranges_strides[5])
    return whole_tiles(start, full_start, full_end, end, BLOCK_KV)


@triton.jit
def whole_tiles(start, full_start, full_end, end, BLOCK_KV: tl.constexpr):
    """A range of keys at whole tiles: all that hold one, and as full those that lie within the full range."""
    start = start // BLOCK_KV * BLOCK_KV
    end = tl.cdiv(end, BLOCK_KV) * BLOCK_KV
    full_start = tl.minimum(tl.cdiv(full_start, BLOCK_KV) * BLOCK_KV, end)
    full_end = tl.maximum(full_end // BLOCK_KV * BLOCK_KV, full_start)
    return start, full_start, full_end, end


@triton.jit
def visit(
    acc, row_sum, row_max, row_shift, q, k_ptrs, v_ptrs, k_strides, v_strides, start, full_start, full_end, end,
    draw, n0, n1, n2, n3, q_idx, q_len, kv_len, sizes, captured, captured_strides,
    SCORE_MASKED: tl.constexpr, SCORE_FULL: tl.constexpr, FACTOR_MASKED: tl.constexpr, FACTOR_FULL: tl.constexpr,
    LOG2_SCALE: tl.constexpr, LARGE_SCORES: tl.constexpr, NORMALISED: tl.constexpr, DROP_LEAST: tl.constexpr,
    KEEP_SCALE: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, PRODUCT_DTYPE: tl.constexpr,
    PROBS_DTYPE: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """The rows after the key tiles [start, end), of which those in [full_start, full_end) need no mask."""
    BLOCK_KV: tl.constexpr = k_ptrs.shape[0]
    for kv_start in tl.range(full_start, full_end, BLOCK_KV):
        acc, row_sum, row_max, row_shift = _attend(
            acc, row_sum, row_max, row_shift, q, k_ptrs, v_ptrs, k_strides, v_strides, kv_start, draw, n0, n1, n2, n3,
            q_idx, q_len, kv_len, sizes, captured, captured_strides, SCORE_FULL, FACTOR_FULL, False, LOG2_SCALE,
            LARGE_SCORES, NORMALISED, DROP_LEAST, KEEP_SCALE, KEY, VALUE, PRODUCT_DTYPE, PROBS_DTYPE, PRECISION,
            HEAD_DIM, VALUE_DIM,
        )  # fmt: skip

    tiles_before = (full_start - start) // BLOCK_KV
    tiles_behind = (end - full_end) // BLOCK_KV
    for i in tl.range(0, tiles_before + tiles_behind):
        kv_start = tl.where(i < tiles_before, start, full_end - tiles_before * BLOCK_KV) + i * BLOCK_KV
        acc, row_sum, row_max, row_shift = _attend(
            acc, row_sum, row_max, row_shift, q, k_ptrs, v_ptrs, k_strides, v_strides, kv_start, draw, n0, n1, n2, n3,
            q_idx, q_len, kv_len, sizes, captured, captured_strides, SCORE_MASKED, FACTOR_MASKED, True, LOG2_SCALE,
            LARGE_SCORES, NORMALISED, DROP_LEAST, KEEP_SCALE, KEY, VALUE, PRODUCT_DTYPE, PROBS_DTYPE, PRECISION,
            HEAD_DIM, VALUE_DIM,
        )  # fmt: skip
    return acc, row_sum, row_max, row_shift


@triton.jit
def visit_skipped(
    acc, row_sum, row_max, row_shift, q, k_ptrs, v_ptrs, k_strides, v_strides, start, end,
    draw, n0, n1, n2, n3, q_idx, q_len, kv_len, sizes, captured, captured_strides,
    SCORE_MASKED: tl.constexpr, FACTOR_MASKED: tl.constexpr, FILL_THRESHOLD: tl.constexpr, LOG2_SCALE: tl.constexpr,
    LARGE_SCORES: tl.constexpr, NORMALISED: tl.constexpr, DROP_LEAST: tl.constexpr, KEEP_SCALE: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, PRODUCT_DTYPE: tl.constexpr, PROBS_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """The rows after the keys outside [start, end) too, where a row has seen nothing above the fill: these count as
    much as those it saw. Rare.
    """
    BLOCK_KV: tl.constexpr = k_ptrs.shape[0]
    filled = tl.max((row_max <= FILL_THRESHOLD).to(tl.int32), 0)
    tiles_before = filled * (start // BLOCK_KV)
    tiles_behind = filled * tl.cdiv(tl.maximum(kv_len - end, 0), BLOCK_KV)
    for i in tl.range(0, tiles_before + tiles_behind):
        kv_start = tl.where(i < tiles_before, 0, end - tiles_before * BLOCK_KV) + i * BLOCK_KV
        acc, row_sum, row_max, row_shift = _attend(
            acc, row_sum, row_max, row_shift, q, k_ptrs, v_ptrs, k_strides, v_strides, kv_start, draw, n0, n1, n2, n3,
            q_idx, q_len, kv_len, sizes, captured, captured_strides, SCORE_MASKED, FACTOR_MASKED, True, LOG2_SCALE,
            LARGE_SCORES, NORMALISED, DROP_LEAST, KEEP_SCALE, KEY, VALUE, PRODUCT_DTYPE, PROBS_DTYPE, PRECISION,
            HEAD_DIM, VALUE_DIM,
        )  # fmt: skip
    return acc, row_sum, row_max, row_shift


@triton.jit
def finish(
    acc, row_sum, row_max, row_shift, out_ptrs, lse_ptrs, stored, n0, n1, n2, n3, q_idx, q_len, kv_len, sizes, captured,
    captured_strides, LOG2_SCALE: tl.constexpr, LARGE_SCORES: tl.constexpr, FILLS: tl.constexpr,
    ZERO_EMPTY_ROWS: tl.constexpr, NORMALISED: tl.constexpr, SINK: tl.constexpr, ROW_FACTOR: tl.constexpr,
    ROW_KEPT: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Store what rows that have seen all their keys give, those that are `stored` [rows].

    n0, .., q_idx: scalars or [rows]. out_ptrs: [rows, block_dv]; lse_ptrs: [rows], of the first number of the pair.
    """
    out, largest, lse_sum = finished_rows(
        acc, row_sum, row_max, row_shift, n0, n1, n2, n3, q_idx, q_len, kv_len, sizes, captured, captured_strides,
        LOG2_SCALE, LARGE_SCORES, FILLS, ZERO_EMPTY_ROWS, NORMALISED, SINK, ROW_FACTOR, ROW_KEPT,
    )  # fmt: skip
    tl.store(lse_ptrs, largest, mask=stored)
    tl.store(lse_ptrs + 1, lse_sum, mask=stored)
    elements = stored[:, None]
    BLOCK_DV: tl.constexpr = acc.shape[1]
    if VALUE_DIM != BLOCK_DV:
        elements &= tl.arange(0, BLOCK_DV)[None, :] < VALUE_DIM
    tl.store(out_ptrs, out.to(out_ptrs.dtype.element_ty), mask=elements)


@triton.jit
def finished_rows(
    acc, row_sum, row_max, row_shift, n0, n1, n2, n3, q_idx, q_len, kv_len, sizes, captured, captured_strides,
    LOG2_SCALE: tl.constexpr, LARGE_SCORES: tl.constexpr, FILLS: tl.constexpr, ZERO_EMPTY_ROWS: tl.constexpr,
    NORMALISED: tl.constexpr, SINK: tl.constexpr, ROW_FACTOR: tl.constexpr, ROW_KEPT: tl.constexpr,
):  # fmt: skip
    """(out, and the pair of the log-sum-exp) of rows that have seen all their keys."""
    # Rows without any key.
    empty = row_sum == 0
    largest, lse_sum = row_sum, row_sum
    if NORMALISED:
        largest, lost = _largest_score(row_max, row_shift, LOG2_SCALE, LARGE_SCORES, FILLS)
        if SINK is not None:
            sink = SINK(n0, n1, n2, n3, q_idx, q_len, kv_len, sizes, captured, captured_strides)
            if not ZERO_EMPTY_ROWS:
                # What eager code multiplies by a weight of 0 is NaN already.
                acc = tl.where(empty[:, None], float("nan"), acc)
            acc, row_sum, largest, lost = _with_sink(acc, row_sum, largest, lost, sink)
        lse_sum = row_sum * tl.exp2(lost)
        if not ZERO_EMPTY_ROWS:
            lse_sum = tl.where(empty, float("nan"), lse_sum)
    out = acc
    if NORMALISED:
        # A row without any key has row_sum 0: 0 * inf is the NaN that softmax gives.
        if ZERO_EMPTY_ROWS:
            row_sum = tl.where(row_sum == 0, 1.0, row_sum)
        out = acc * (1.0 / row_sum)[:, None]
    if ROW_FACTOR is not None:
        row_factor = ROW_FACTOR(n0, n1, n2, n3, q_idx, q_len, kv_len, sizes, captured, captured_strides)
        out = out * row_factor[:, None]
    if ROW_KEPT is not None:
        row_kept = ROW_KEPT(n0, n1, n2, n3, q_idx, q_len, kv_len, sizes, captured, captured_strides)
        out = tl.where(row_kept[:, None] != 0, out, 0.0)
    return out, largest, lse_sum


@triton.jit
def _attend(
    acc, row_sum, row_max, row_shift, q, k_ptrs, v_ptrs, k_strides, v_strides, kv_start, draw,
    n0, n1, n2, n3, q_idx, q_len, kv_len, sizes, captured, captured_strides,
    SCORE: tl.constexpr, FACTOR: tl.constexpr, KEYS_END: tl.constexpr, LOG2_SCALE: tl.constexpr,
    LARGE_SCORES: tl.constexpr, NORMALISED: tl.constexpr, DROP_LEAST: tl.constexpr, KEEP_SCALE: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, PRODUCT_DTYPE: tl.constexpr, PROBS_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """One key tile: acc and row_sum take in exp2(LOG2_SCALE * score - row_shift), row_shift = LOG2_SCALE * row_max.

    KEYS_END: whether the tile may reach behind the last key.
    """
    BLOCK_KV: tl.constexpr = k_ptrs.shape[0]
    BLOCK_D: tl.constexpr = k_ptrs.shape[1]
    BLOCK_DV: tl.constexpr = v_ptrs.shape[1]
    kv_idx = kv_start + tl.arange(0, BLOCK_KV)
    key = tl.cast(kv_start, tl.int64)

    # [block_kv, block_d]
    k = load_keys(k_ptrs + key * k_strides[4], kv_idx, kv_len, KEYS_END, HEAD_DIM, BLOCK_D)
    if KEY is not None:
        k = from_stored(
            k, n0, n1, n2, n3, kv_idx, q_len, kv_len, sizes, captured, captured_strides, KEY, KEYS_END, HEAD_DIM
        )  # fmt: skip
    k = k.to(PRODUCT_DTYPE)
    # [block_q, block_kv]
    score, qk = SCORE(
        q, tl.trans(k), PRECISION, n0, n1, n2, n3, q_idx[:, None], kv_idx[None, :], q_len, kv_len, sizes, captured,
        captured_strides,
    )  # fmt: skip

    if NORMALISED:
        # [block_q]
        new_max, new_shift, subtracted = shifts_with(score, row_max, LOG2_SCALE, LARGE_SCORES)
        # [block_q, block_kv]
        p, correction = exponentials(
            score, row_max, row_shift, subtracted, LOG2_SCALE, LARGE_SCORES, q.dtype == tl.float32
        )  # fmt: skip
        row_sum = row_sum * correction + tl.sum(p, 1)
    else:
        p = score
        correction = tl.full(row_max.shape, 1.0, acc.dtype)
        new_max, new_shift = row_max, row_shift
    if FACTOR is not None:
        weight = FACTOR(
            qk, n0, n1, n2, n3, q_idx[:, None], kv_idx[None, :], q_len, kv_len, sizes, captured, captured_strides
        )  # fmt: skip
        if KEYS_END:
            weight = tl.where(kv_idx[None, :] < kv_len, weight, 0.0)
        p *= weight
    if DROP_LEAST is not None:
        p *= kept_scales(draw, q_idx, kv_start, BLOCK_KV, DROP_LEAST, KEEP_SCALE)

    # [block_kv, block_dv]
    v = load_keys(v_ptrs + key * v_strides[4], kv_idx, kv_len, KEYS_END, VALUE_DIM, BLOCK_DV)
    if VALUE is not None:
        v = from_stored(
            v, n0, n1, n2, n3, kv_idx, q_len, kv_len, sizes, captured, captured_strides, VALUE, KEYS_END, VALUE_DIM
        )  # fmt: skip
    v = v.to(PROBS_DTYPE)
    # [block_q, block_dv]
    if PRECISION == "ieee" and v.dtype == tl.float32:
        # A sum a tile, then a sum over tiles: one chain through all keys rounds several times worse.
        acc = acc * correction[:, None] + product(p, v, PRECISION)
    else:
        acc = tl.dot(p.to(PROBS_DTYPE), v, acc * correction[:, None], input_precision=PRECISION, out_dtype=acc.dtype)
    return acc, row_sum, new_max, new_shift


@triton.jit
def shifts_with(score, row_max, LOG2_SCALE: tl.constexpr, LARGE_SCORES: tl.constexpr):
    """(row_max, row_shift, what is subtracted) of rows after one more tile of scores [rows, block_kv]."""
    row_max = tl.maximum(row_max, tl.max(score, 1))
    row_shift = row_max * LOG2_SCALE
    # -inf minus -inf is NaN: a row without any key so far subtracts nothing.
    subtracted = tl.where(row_max == float("-inf"), 0.0, row_max if LARGE_SCORES else row_shift)
    return row_max, row_shift, subtracted


@triton.jit
def exponentials(
    score, row_max, row_shift, subtracted, LOG2_SCALE: tl.constexpr, LARGE_SCORES: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """(p, what sums so far are multiplied by), of a tile's scores and of the largest before it.

    EXACT: whether an exponential may be off by no more than half a unit in the last place or so.
    """
    if LARGE_SCORES:
        # Rounded as the maximum is: a score that is a product would become one operation with the difference.
        score += 0.0
        # The difference first: it is exact, where the rounding of a large product would be in the exponent.
        below, lowered = score - subtracted[:, None], row_max - subtracted
        p = scaled_exp2(below, LOG2_SCALE) if EXACT else tl.exp2(below * LOG2_SCALE)
        correction = scaled_exp2(lowered, LOG2_SCALE) if EXACT else tl.exp2(lowered * LOG2_SCALE)
    else:
        p = tl.exp2(tl.fma(score, LOG2_SCALE, -subtracted[:, None]))
        correction = tl.exp2(row_shift - subtracted)
    return p, correction


@triton.jit
def _largest_score(row_max, row_shift, LOG2_SCALE: tl.constexpr, LARGE_SCORES: tl.constexpr, FILLS: tl.constexpr):
    """(largest, lost): the largest score of rows, and what its rounding has lost of what exponents subtracted.

    log2(e) largest + lost is the number subtracted, in base 2; where a unit in the last place of `largest` is no
    correction, `lost` is 0, and the backward pass finds the score again as it is. FILLS: see `codegen.ScoreProgram`.
    """
    if LARGE_SCORES:
        SCALE: tl.constexpr = LOG2_SCALE * LN2
        # By itself: what is subtracted from it would become one operation with the product.
        largest = tl.fma(row_max, SCALE, 0.0)
        for i in tl.static_range(len(FILLS)):
            largest = tl.where(row_max == FILLS[i][0], FILLS[i][1], largest)
        lost = tl.fma(row_max, SCALE, -largest) * LOG2_E
        return largest, tl.where(largest > -LARGE, tl.where(largest > LARGE, 0.0, lost), 0.0)
    else:
        largest = tl.fma(row_shift, LN2, 0.0)
        lost = tl.fma(largest, -LOG2_E, row_shift)
        return largest, tl.where(largest < HUGE, tl.where(largest > -LARGE, lost, 0.0), float("nan"))


@triton.jit
def _with_sink(acc, row_sum, largest, lost, sink):
    """What `_largest_score` and the sums of rows are after one more score without a value.

    Differences of scores first, so that equal ones differ by 0 however large they are.
    """
    decides = sink > largest
    known = tl.where(lost == lost, lost, 0.0)
    with_sink = tl.maximum(largest, sink)
    subtracted = tl.where(with_sink == float("-inf"), 0.0, with_sink)
    decay = tl.exp2((largest - subtracted) * LOG2_E + tl.where(decides, known, 0.0))
    row_sum = row_sum * decay + tl.exp2((sink - subtracted) * LOG2_E - tl.where(decides, 0.0, known))
    return acc * decay[:, None], row_sum, with_sink, tl.where(decides, 0.0, lost)
