"""The forward kernel: online softmax over key tiles, in base 2, with the score program and its mask compiled in.

The keys of a query tile fall into tiles that no mask touches, tiles that need the mask evaluated, and tiles that are
masked throughout. The first two kinds have a loop each; the last are skipped, except for rows that turn out to hold
nothing but a finite fill, whose probabilities are then spread over all keys as the source program spreads them.
"""

import triton
import triton.language as tl

# Below this a difference of one unit in the last place of a score is enough for a probability of exactly 0 or 1, and
# multiplying by log2(e) could overflow.
HUGE: tl.constexpr = tl.constexpr(-1e30)
LOWEST_FLOAT32: tl.constexpr = tl.constexpr(-3.4028234663852886e38)
# Queries that share a row of `ranges_ptr`; see `mask.MASK_BLOCK`.
MASK_BLOCK: tl.constexpr = tl.constexpr(128)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


# Lengths change from call to call and nothing is gained from knowing that they are 1 or a multiple of 16.
@triton.jit(do_not_specialize=["batch_0", "batch_1", "batch_2", "batch_3", "q_len", "kv_len", "sizes"])
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, ranges_ptr,
    q_strides, k_strides, v_strides, out_strides, ranges_strides,
    batch_0, batch_1, batch_2, batch_3, q_len, kv_len, sizes, captured, captured_strides,
    SCORE_MASKED: tl.constexpr, SCORE_FULL: tl.constexpr, KV_BOUNDS: tl.constexpr,
    LOG2_SCALE: tl.constexpr, FILL_THRESHOLD: tl.constexpr, HUGE_FACTOR: tl.constexpr, LOWEST: tl.constexpr,
    ZERO_EMPTY_ROWS: tl.constexpr, LONGEST_FIRST: tl.constexpr, SHARED_BATCH: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr, PROBS_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j exp(s_ij - lse_i) v_j,  lse_i = log(sum_j exp(s_ij)),  s_ij = score(q_i . k_j, n, i, j)

    Operands have four batch axes (size 1 where the attention has fewer) and strides (n0, n1, n2, n3, row, column), 0 on
    axes they are shared over; so has ranges_ptr [n.., blocks of queries, 4], where there is one. One program computes
    BLOCK_Q rows of one batch position; LOG2_SCALE turns inner scores into base-2 logarithms.
    """
    COMPUTE: tl.constexpr = lse_ptr.dtype.element_ty

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
    q_ptrs = _tile_pointers(_batch_pointer(q_ptr, q_strides, n0, n1, n2, n3), q_idx, offs_d, q_strides)
    q = _load_columns(q_ptrs, offs_d[None, :], HEAD_DIM, BLOCK_D).to(PRODUCT_DTYPE)
    # [block_kv, block_d], [block_kv, block_dv]: the first key tile
    k_ptrs = _tile_pointers(_batch_pointer(k_ptr, k_strides, n0, n1, n2, n3), offs_kv, offs_d, k_strides)
    v_ptrs = _tile_pointers(_batch_pointer(v_ptr, v_strides, n0, n1, n2, n3), offs_kv, offs_dv, v_strides)

    # Key positions at whole tiles: start <= full_start <= full_end <= end.
    q_stop = tl.minimum(q_start + BLOCK_Q, q_len)
    start, full_start, full_end, end = KV_BOUNDS(q_start, q_stop, n0, n1, n2, n3, q_len, kv_len, sizes)
    if ranges_ptr is not None:
        block_ptr = _batch_pointer(ranges_ptr, ranges_strides, n0, n1, n2, n3)
        block_ptr += (q_start // MASK_BLOCK).to(tl.int64) * ranges_strides[4]
        start, full_start, full_end, end = _narrowed(start, end, block_ptr, ranges_strides[5])
    start = start // BLOCK_KV * BLOCK_KV
    end = tl.cdiv(end, BLOCK_KV) * BLOCK_KV
    full_start = tl.minimum(tl.cdiv(full_start, BLOCK_KV) * BLOCK_KV, end)
    full_end = tl.maximum(full_end // BLOCK_KV * BLOCK_KV, full_start)

    row_max = tl.full([BLOCK_Q], float("-inf"), COMPUTE)
    row_shift = tl.full([BLOCK_Q], float("-inf"), COMPUTE)
    row_sum = tl.zeros([BLOCK_Q], COMPUTE)
    acc = tl.zeros([BLOCK_Q, BLOCK_DV], COMPUTE)

    for kv_start in tl.range(full_start, full_end, BLOCK_KV):
        acc, row_sum, row_max, row_shift = _attend(
            acc, row_sum, row_max, row_shift, q, k_ptrs, v_ptrs, k_strides, v_strides, kv_start, n0, n1, n2, n3, q_idx,
            q_len, kv_len, sizes, captured, captured_strides, SCORE_FULL, False, LOG2_SCALE, HUGE_FACTOR,
            PRODUCT_DTYPE, PROBS_DTYPE, PRECISION, HEAD_DIM, VALUE_DIM,
        )  # fmt: skip

    tiles_before = (full_start - start) // BLOCK_KV
    tiles_behind = (end - full_end) // BLOCK_KV
    for i in tl.range(0, tiles_before + tiles_behind):
        kv_start = tl.where(i < tiles_before, start, full_end - tiles_before * BLOCK_KV) + i * BLOCK_KV
        acc, row_sum, row_max, row_shift = _attend(
            acc, row_sum, row_max, row_shift, q, k_ptrs, v_ptrs, k_strides, v_strides, kv_start, n0, n1, n2, n3, q_idx,
            q_len, kv_len, sizes, captured, captured_strides, SCORE_MASKED, True, LOG2_SCALE, HUGE_FACTOR,
            PRODUCT_DTYPE, PROBS_DTYPE, PRECISION, HEAD_DIM, VALUE_DIM,
        )  # fmt: skip

    if FILL_THRESHOLD is not None:
        # Rare: a row saw nothing above the fill, so the skipped keys count as much as those it saw.
        filled = tl.max((row_max <= FILL_THRESHOLD).to(tl.int32), 0)
        tiles_before = filled * (start // BLOCK_KV)
        tiles_behind = filled * tl.cdiv(tl.maximum(kv_len - end, 0), BLOCK_KV)
        for i in tl.range(0, tiles_before + tiles_behind):
            kv_start = tl.where(i < tiles_before, 0, end - tiles_before * BLOCK_KV) + i * BLOCK_KV
            acc, row_sum, row_max, row_shift = _attend(
                acc, row_sum, row_max, row_shift, q, k_ptrs, v_ptrs, k_strides, v_strides, kv_start, n0, n1, n2, n3,
                q_idx, q_len, kv_len, sizes, captured, captured_strides, SCORE_MASKED, True, LOG2_SCALE, HUGE_FACTOR,
                PRODUCT_DTYPE, PROBS_DTYPE, PRECISION, HEAD_DIM, VALUE_DIM,
            )  # fmt: skip

    lse = row_shift * LN2 + tl.log(row_sum)
    if HUGE_FACTOR is not None:
        # log(row_sum) is lost in numbers of this size.
        huge = tl.where(row_max <= LOWEST_FLOAT32, LOWEST, row_max * (LOG2_SCALE * LN2))
        lse = tl.where(row_max > HUGE, lse, tl.where(row_sum == 0, float("-inf"), huge))
    position = ((n0 * batch_1 + n1) * batch_2 + n2) * batch_3 + n3
    lse_ptrs = lse_ptr + position.to(tl.int64) * q_len + offs_q
    tl.store(lse_ptrs, lse, mask=offs_q < q_len)

    # A row without any key has row_sum 0: 0 / 0 is the NaN that softmax gives.
    if ZERO_EMPTY_ROWS:
        row_sum = tl.where(row_sum == 0, 1.0, row_sum)
    out = acc / row_sum[:, None]
    out_ptrs = _tile_pointers(_batch_pointer(out_ptr, out_strides, n0, n1, n2, n3), offs_q, offs_dv, out_strides)
    stored = offs_q[:, None] < q_len
    if VALUE_DIM != BLOCK_DV:
        stored &= offs_dv[None, :] < VALUE_DIM
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _attend(
    acc, row_sum, row_max, row_shift, q, k_ptrs, v_ptrs, k_strides, v_strides, kv_start, n0, n1, n2, n3, q_idx,
    q_len, kv_len, sizes, captured, captured_strides,
    SCORE: tl.constexpr, KEYS_END: tl.constexpr, LOG2_SCALE: tl.constexpr, HUGE_FACTOR: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr, PROBS_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
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
    k = _load_keys(k_ptrs + key * k_strides[4], kv_idx, kv_len, KEYS_END, HEAD_DIM, BLOCK_D).to(PRODUCT_DTYPE)
    # [block_q, block_kv]
    qk = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=acc.dtype)
    score = SCORE(qk, n0, n1, n2, n3, q_idx[:, None], kv_idx[None, :], q_len, kv_len, sizes, captured, captured_strides)
    if KEYS_END:
        score = tl.where(kv_idx[None, :] < kv_len, score, float("-inf"))

    # [block_q]
    new_max = tl.maximum(row_max, tl.max(score, 1))
    if HUGE_FACTOR is not None:
        # A power of two keeps the product exact, so that the difference below is 0 at the maximum, fused or not.
        factor = tl.where(new_max > HUGE, LOG2_SCALE, HUGE_FACTOR).to(acc.dtype)
        new_shift = new_max * factor
        exponent = score * factor[:, None]
    else:
        new_shift = new_max * LOG2_SCALE
        exponent = score * LOG2_SCALE
    # -inf minus -inf is NaN: a row without any key so far subtracts nothing.
    subtracted = tl.where(new_max == float("-inf"), 0.0, new_shift)
    # [block_q, block_kv]
    p = tl.exp2(exponent - subtracted[:, None])
    correction = tl.exp2(row_shift - subtracted)
    row_sum = row_sum * correction + tl.sum(p, 1)

    # [block_kv, block_dv]
    v = _load_keys(v_ptrs + key * v_strides[4], kv_idx, kv_len, KEYS_END, VALUE_DIM, BLOCK_DV).to(PROBS_DTYPE)
    # [block_q, block_dv]
    if PRECISION == "ieee" and v.dtype == tl.float32:
        # A sum a tile, then a sum over tiles: one chain through all keys rounds several times worse.
        tile = tl.dot(p, v, input_precision=PRECISION, out_dtype=acc.dtype)
        acc = tl.fma(acc, tl.broadcast_to(correction[:, None], acc.shape), tile)
    else:
        acc = tl.dot(p.to(PROBS_DTYPE), v, acc * correction[:, None], input_precision=PRECISION, out_dtype=acc.dtype)
    return acc, row_sum, new_max, new_shift


@triton.jit
def _narrowed(start, end, ptr, stride):
    """The key range [start, end) within the range stored at `ptr`, and the stored full range within that."""
    end = tl.minimum(end, tl.load(ptr + 3 * stride))
    start = tl.minimum(tl.maximum(start, tl.load(ptr)), end)
    full_start = tl.minimum(tl.maximum(start, tl.load(ptr + stride)), end)
    full_end = tl.maximum(tl.minimum(end, tl.load(ptr + 2 * stride)), full_start)
    return start, full_start, full_end, end


@triton.jit
def _batch_pointer(ptr, strides, n0, n1, n2, n3):
    """The start of the operand's matrix at one batch position."""
    ptr += n0.to(tl.int64) * strides[0] + n1.to(tl.int64) * strides[1]
    return ptr + n2.to(tl.int64) * strides[2] + n3.to(tl.int64) * strides[3]


@triton.jit
def _tile_pointers(ptr, rows, columns, strides):
    """[rows, columns] pointers into a matrix."""
    return ptr + rows.to(tl.int64)[:, None] * strides[4] + columns.to(tl.int64)[None, :] * strides[5]


@triton.jit
def _load_columns(ptrs, columns, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Load a tile whose rows all exist, with zeros behind the last column."""
    if COLUMNS == BLOCK:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=columns < COLUMNS, other=0.0)


@triton.jit
def _load_keys(ptrs, kv_idx, kv_len, KEYS_END: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Load a key or value tile, with zeros behind the last column and, where KEYS_END says so, behind the last key."""
    columns = tl.arange(0, BLOCK)[None, :]
    if not KEYS_END:
        return _load_columns(ptrs, columns, COLUMNS, BLOCK)
    elif COLUMNS == BLOCK:
        return tl.load(ptrs, mask=kv_idx[:, None] < kv_len, other=0.0)
    else:
        return tl.load(ptrs, mask=(kv_idx[:, None] < kv_len) & (columns < COLUMNS), other=0.0)
