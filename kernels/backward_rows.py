"""What the backward does by rows.

The numbers that its kernels share come first: what a row subtracts, the inverse of its sum, its delta. Last, behind the
one pass of `hopper_backward`, its sums become gradients.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashfuse.kernels.forward import HUGE, LARGE, LARGEST_FLOAT32, LOG2_E
from flashfuse.kernels.tiles import all_in_units, batch_pointer, in_units, load_columns, product, tile_pointers

# The planes of `rows_ptr` [ROW_PLANES, batch positions, rows_len]: whole blocks of rows, so that tiles of them are read
# without a mask; those behind the last query give 0.
ROWS_BLOCK: tl.constexpr = tl.constexpr(128)
MINUS_SHIFT: tl.constexpr = tl.constexpr(0)
SHARE: tl.constexpr = tl.constexpr(1)
DELTA: tl.constexpr = tl.constexpr(2)
LARGEST: tl.constexpr = tl.constexpr(3)
SINK_GRAD: tl.constexpr = tl.constexpr(4)

# Tiles of keys of whose sums a program of `scaled_rows_kernel` adds up at a time.
LEFT_TILES: tl.constexpr = tl.constexpr(16)

# The numbers, not to be specialised, of kernels whose programs own positions and pass over those that share them.
LOOPED_NUMBERS = [*(f"{kind}_{axis}" for kind in ("batch", "loop") for axis in range(4)), "q_len", "kv_len", "sizes"]
# And of those among them that may own some of the pairs at a time.
PARTED_NUMBERS = [*LOOPED_NUMBERS, "q_first", "q_end"]


@triton.jit(do_not_specialize=["batch_0", "batch_1", "batch_2", "batch_3", "q_len", "kv_len", "sizes"])
def attention_rows_backward_kernel(
    grad_ptr, out_ptr, lse_ptr, rows_ptr, sums_ptr, grad_strides, out_strides,
    batch_0, batch_1, batch_2, batch_3, q_len, kv_len, sizes, captured, captured_strides,
    SINK: tl.constexpr, ROW_KEPT: tl.constexpr, SCALE: tl.constexpr, SLACK: tl.constexpr, FILLS: tl.constexpr,
    APART: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr, UNITS: tl.constexpr,
    CAPTURED_UNITS: tl.constexpr,
):  # fmt: skip
    """delta_i = sum_d grad_id out_id, and what makes a probability of a score; 0 unless ROW_KEPT.

    See `backward_tile.probabilities`. The gradient of SINK is -exp(sink - lse) delta. lse is a pair, see `ops`.
    APART: whether the sum stays a number, or its logarithm becomes part of the exponent: of the shift, if that is no
    inner score (SLACK).
    sums_ptr: where the sums of the one pass start at 0, float32 [positions, Tq, D]; None without it. It is launched
    while this kernel ends.
    """
    if sums_ptr is not None:
        gdc_launch_dependents()
    grad_strides, out_strides = all_in_units((grad_strides, out_strides), UNITS)
    captured_strides = all_in_units(captured_strides, CAPTURED_UNITS)
    q_tiles = rows_length(q_len) // BLOCK_Q
    position = tl.program_id(0) // q_tiles
    n0, n1, n2, n3 = batch_position(position, batch_0, batch_1, batch_2, batch_3)
    offs_q = tl.program_id(0) % q_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_dv = tl.arange(0, BLOCK_DV)
    q_idx = tl.minimum(offs_q, q_len - 1)

    # [block_q, block_dv]
    grad_ptrs = tile_pointers(batch_pointer(grad_ptr, grad_strides, n0, n1, n2, n3), q_idx, offs_dv, grad_strides)
    out_ptrs = tile_pointers(batch_pointer(out_ptr, out_strides, n0, n1, n2, n3), q_idx, offs_dv, out_strides)
    grad = load_columns(grad_ptrs, offs_dv[None, :], VALUE_DIM, BLOCK_DV)
    out = load_columns(out_ptrs, offs_dv[None, :], VALUE_DIM, BLOCK_DV)
    # [block_q, block_q]: the product of the tiles, so that a row that is one value has its delta to the last digit
    rows = tl.arange(0, BLOCK_Q)
    both = product(grad, tl.trans(out), PRECISION)
    # [block_q]
    delta = tl.sum(tl.where(rows[:, None] == rows[None, :], both, 0.0), 1)
    lse_ptrs = lse_ptr + 2 * (position.to(tl.int64) * q_len + q_idx)
    largest = tl.load(lse_ptrs)
    row_sum = tl.load(lse_ptrs + 1)

    # A sum of inf makes the probability 0 of a row without any key; NaN stays.
    empty = largest == float("-inf")
    row_sum = tl.where(row_sum == 0, float("inf"), row_sum)
    largest = tl.where(empty, 0.0, largest)
    if ROW_KEPT is not None:
        kept = ROW_KEPT(n0, n1, n2, n3, q_idx, q_len, kv_len, sizes, captured, captured_strides) != 0
        row_sum = tl.where(kept, row_sum, float("inf"))
        delta = tl.where(kept, delta, 0.0)
    # What the shift loses by its rounding is in the sum, see `forward._largest_score`.
    if SLACK is None:
        # Only a sink is as large as that, beside which every probability is 0.
        shift = _finite(largest * LOG2_E)
        lost = tl.fma(largest, tl.full(largest.shape, LOG2_E, tl.float32), -shift)
        lost = tl.where((largest > -LARGE) & (largest < HUGE), lost, 0.0)
    else:
        shift = inner_score(largest, SCALE, FILLS)
        lost = tl.fma(shift, tl.full(shift.shape, -SCALE, tl.float32), largest) * LOG2_E
        lost = tl.where(tl.abs(largest) < LARGE, lost, 0.0)

    planes = batch_0.to(tl.int64) * batch_1 * batch_2 * batch_3 * rows_length(q_len)
    rows_ptrs = rows_ptr + position.to(tl.int64) * rows_length(q_len) + offs_q
    exists = offs_q < q_len
    if sums_ptr is not None:
        offs_d = tl.arange(0, BLOCK_D)
        # [block_q, block_d]
        sums_ptrs = sums_ptr + (position.to(tl.int64) * q_len + offs_q)[:, None] * HEAD_DIM + offs_d[None, :]
        zeros = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        tl.store(sums_ptrs, zeros, mask=exists[:, None] & (offs_d < HEAD_DIM)[None, :])
    row_sum = tl.where(exists, row_sum, float("inf"))
    log_sum = tl.log2(row_sum) + lost
    tl.store(rows_ptrs + MINUS_SHIFT * planes, -(shift if APART or SLACK is not None else shift + log_sum))
    tl.store(rows_ptrs + SHARE * planes, tl.div_rn(tl.exp2(-lost), row_sum) if APART else -log_sum)
    tl.store(rows_ptrs + DELTA * planes, tl.where(exists, delta, 0.0))
    tl.store(rows_ptrs + LARGEST * planes, tl.where(exists, largest, float("inf")))
    if SINK is not None:
        sink = SINK(n0, n1, n2, n3, q_idx, q_len, kv_len, sizes, captured, captured_strides)
        prob = tl.div_rn(tl.exp2((sink - largest) * LOG2_E), row_sum)
        tl.store(rows_ptrs + SINK_GRAD * planes, tl.where(exists, -prob * delta, 0.0))


@triton.jit(do_not_specialize=["batch_0", "batch_1", "batch_2", "batch_3", "q_len", "kv_tiles"])
def scaled_rows_kernel(
    sums_ptr, left_ptr, rows_ptr, dq_ptr, dq_strides, batch_0, batch_1, batch_2, batch_3, q_len, kv_tiles,
    SLOPE: tl.constexpr, WITH_SINK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    """dq_i = SLOPE sums_i,  delta_i += sum_t left_ti + SINK_GRAD_i, the last WITH_SINK.

    sums_ptr: [positions, Tq, D]. left_ptr: [positions, kv_tiles, rows_length], or None to leave delta as it is: but for
    what rounding has left in it, the gradients of a row's scores add up to 0.
    """
    gdc_wait()
    dq_strides = in_units(dq_strides, UNITS[0])
    q_tiles = tl.cdiv(q_len, BLOCK_Q)
    position = tl.program_id(0) // q_tiles
    n0, n1, n2, n3 = batch_position(position, batch_0, batch_1, batch_2, batch_3)
    offs_q = tl.program_id(0) % q_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_d = tl.arange(0, BLOCK_D)
    exists = (offs_q < q_len)[:, None] & (offs_d < HEAD_DIM)[None, :]
    # [block_q, block_d]
    at = (position.to(tl.int64) * q_len + offs_q)[:, None] * HEAD_DIM + offs_d[None, :]
    dq_ptrs = tile_pointers(batch_pointer(dq_ptr, dq_strides, n0, n1, n2, n3), offs_q, offs_d, dq_strides)
    sums = tl.load(sums_ptr + at, mask=exists, other=0.0)
    tl.store(dq_ptrs, (sums * SLOPE).to(dq_ptr.dtype.element_ty), mask=exists)
    if left_ptr is not None:
        rows_len = rows_length(q_len)
        planes = batch_0.to(tl.int64) * batch_1 * batch_2 * batch_3 * rows_len
        rows_ptrs = rows_ptr + position.to(tl.int64) * rows_len + offs_q
        tiles = tl.arange(0, LEFT_TILES)
        # [left_tiles, block_q]
        left_ptrs = left_ptr + (position.to(tl.int64) * kv_tiles + tiles)[:, None] * rows_len + offs_q[None, :]
        left = tl.zeros([LEFT_TILES, BLOCK_Q], tl.float32)
        for first in tl.range(0, kv_tiles, LEFT_TILES):
            there = (first + tiles < kv_tiles)[:, None] & (offs_q < q_len)[None, :]
            left += tl.load(left_ptrs + tl.cast(first, tl.int64) * rows_len, mask=there, other=0.0)
        delta = tl.load(rows_ptrs + DELTA * planes, mask=offs_q < q_len) + tl.sum(left, 0)
        if WITH_SINK:
            delta += tl.load(rows_ptrs + SINK_GRAD * planes, mask=offs_q < q_len)
        tl.store(rows_ptrs + DELTA * planes, delta, mask=offs_q < q_len)


@triton.jit
def inner_score(largest, SCALE: tl.constexpr, FILLS: tl.constexpr):
    """The inner score that a row's largest score stands for, see `codegen.ScoreProgram`."""
    shift = _finite(largest * (1 / SCALE))
    for i in tl.static_range(len(FILLS)):
        if FILLS[i][0] == -LARGEST_FLOAT32:
            # A sink may lie between such a fill and the least score that can be divided: above all fills of the row.
            shift = tl.where((shift == FILLS[i][0]) & (largest > FILLS[i][1]), 0.5 * FILLS[i][0], shift)
        shift = tl.where(largest == FILLS[i][1], FILLS[i][0], shift)
    return shift


@triton.jit
def _finite(x):
    return tl.minimum(tl.maximum(x, -LARGEST_FLOAT32), LARGEST_FLOAT32)


@triton.jit
def rows_length(q_len):
    """The rows of a batch position that `rows_ptr` has."""
    return tl.cdiv(q_len, ROWS_BLOCK) * ROWS_BLOCK


@triton.jit
def load_shifts(
    rows_base, planes, offs_q, AXIS: tl.constexpr, SCALE: tl.constexpr, SLACK: tl.constexpr, APART: tl.constexpr,
    NORMALISED: tl.constexpr,
):  # fmt: skip
    """(minus_shift, share, slack) of rows at `offs_q`, which may lie behind the last one, with an axis of size 1.

    shift: the largest inner score where some are large (SLACK), else the largest score in base 2. share: what the
    exponential is multiplied by where they are APART, else its logarithm. From `slack` on a difference from the shift
    is 0.
    """
    minus_shift = tl.zeros(offs_q.shape, tl.float32)
    share, slack = minus_shift, minus_shift
    if NORMALISED:
        minus_shift = tl.load(rows_base + MINUS_SHIFT * planes + offs_q)
        if APART or SLACK is not None:
            share = tl.load(rows_base + SHARE * planes + offs_q)
        if SLACK is not None:
            slack = slack_of(minus_shift, SCALE, SLACK)
    return tl.expand_dims(minus_shift, AXIS), tl.expand_dims(share, AXIS), tl.expand_dims(slack, AXIS)


@triton.jit
def slack_of(minus_shift, SCALE: tl.constexpr, SLACK: tl.constexpr):
    """From where on a difference from the shift is 0."""
    size = tl.abs(minus_shift)
    return tl.where(size >= LARGE / SCALE, size * -SLACK, float("inf"))


@triton.jit
def load_delta(rows_base, planes, offs_q, AXIS: tl.constexpr, NORMALISED: tl.constexpr):
    """The delta of rows at `offs_q`, which may lie behind the last one, with an axis of size 1; 0 without a softmax."""
    if NORMALISED:
        return tl.expand_dims(tl.load(rows_base + DELTA * planes + offs_q), AXIS)
    else:
        return tl.expand_dims(tl.zeros(offs_q.shape, tl.float32), AXIS)


@triton.jit
def sees_every_key(rows_base, planes, q_idx, FILL_THRESHOLD: tl.constexpr):
    """1 where one of the rows saw nothing above the fill, or is NaN for want of a key; 0 elsewhere."""
    largest = tl.load(rows_base + LARGEST * planes + q_idx)
    share = tl.load(rows_base + SHARE * planes + q_idx)
    return tl.max(((largest <= FILL_THRESHOLD) | (share != share)).to(tl.int32), 0)


@triton.jit
def batch_position(position, batch_0, batch_1, batch_2, batch_3):
    """A number in [0, batch_0 * .. * batch_3) as a position on each axis."""
    n3 = position % batch_3
    n2 = position // batch_3 % batch_2
    n1 = position // (batch_3 * batch_2) % batch_1
    return position // (batch_3 * batch_2 * batch_1), n1, n2, n3
