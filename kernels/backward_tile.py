"""One tile of pairs in the backward kernels: its probabilities made again, and the gradients of scores and factors."""

import triton
import triton.language as tl

from flashfuse.kernels.elementary import through
from flashfuse.kernels.forward import LOG2_E


@triton.jit
def tile_weights(
    qk, kept, shifts, row_factor, q_idx, kv_idx, n0, n1, n2, n3, q_len, kv_len, sizes, captured, captured_strides,
    GRADS: tl.constexpr, FACTOR: tl.constexpr, KEYS_END: tl.constexpr,
    SCALE: tl.constexpr, SLACK: tl.constexpr, APART: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    """(w, p, slope, factor) of a tile of products: w is what v is multiplied by, s the inner score.

        p = exp(SCALE s - lse),  w = factor p,  SLOPE slope = d score / d product

    kept: what dropout multiplies w by, None without it. row_factor: the factor unless FACTOR gives one for each pair.
    Where the score is not NORMALISED, p = s. KEYS_END: whether p and factor have to be 0 behind the last key.
    """
    s, slope = GRADS(qk, n0, n1, n2, n3, q_idx, kv_idx, q_len, kv_len, sizes, captured, captured_strides)
    p = probabilities(s, shifts, SCALE, SLACK, APART) if NORMALISED else s
    if KEYS_END:
        p = tl.where(kv_idx < kv_len, p, 0.0)
    factor = row_factor
    if FACTOR is not None:
        factor = FACTOR(qk, n0, n1, n2, n3, q_idx, kv_idx, q_len, kv_len, sizes, captured, captured_strides)
        if KEYS_END:
            factor = tl.where(kv_idx < kv_len, factor, 0.0)
    w = (p if kept is None else p * kept) * factor
    return w, p, slope, factor


@triton.jit
def tile_gradients(
    dw, p, slope, factor, kept, delta, kv_idx, kv_len,
    KEYS_END: tl.constexpr, MASKED_WHERE: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    """(ds * slope, ds, p * dw), the gradients of the product but for SLOPE, of the score and of the factor, of a tile.

        ds = p (factor dw - delta)

    See `tile_weights`. Where the score is not NORMALISED, ds = factor dw. KEYS_END: whether the first two have to be 0
    behind the last key. MASKED_WHERE: see `DerivativeProgram.masked_where`, None where no mask is left.
    """
    if kept is not None:
        dw = dw * kept
    dp = dw * factor
    ds = p * (dp - delta) if NORMALISED else dp
    if KEYS_END:
        ds = tl.where(kv_idx < kv_len, ds, 0.0)
    if MASKED_WHERE == "product":
        dqk = through(ds, slope)
    else:
        dqk = tl.where(slope == 0, 0.0, ds * slope) if MASKED_WHERE == "slope" else ds * slope
    return dqk, ds, p * dw


@triton.jit
def probabilities(s, shifts, SCALE: tl.constexpr, SLACK: tl.constexpr, APART: tl.constexpr):
    """exp(SCALE s - lse), from what `load_shifts` gives.

    The difference from the shift is rounded once, so that scores far from 0 keep theirs. Large ones are subtracted as
    they are, and those within the slack of the largest count as equal to it; the sum's logarithm is taken from what is
    left, where the digits that this costs do not show.
    """
    minus_shift, share, slack = shifts
    if SLACK is None:
        below = tl.fma(s, SCALE * LOG2_E, minus_shift)
    else:
        below = s + minus_shift
        if SLACK > 0:
            below = tl.where(below >= slack, 0.0, below)
        below = below * (SCALE * LOG2_E) if APART else tl.fma(below, SCALE * LOG2_E, share)
    return tl.exp2(below) * share if APART else tl.exp2(below)


@triton.jit
def row_factor_of(
    q_idx, n0, n1, n2, n3, q_len, kv_len, sizes, captured, captured_strides, ROW_FACTOR: tl.constexpr
):  # fmt: skip
    """The factor of whole rows, as a number; 1 where there is none."""
    if ROW_FACTOR is None:
        return tl.full(q_idx.shape, 1.0, tl.float32)
    else:
        return ROW_FACTOR(n0, n1, n2, n3, q_idx, q_len, kv_len, sizes, captured, captured_strides).to(tl.float32)
