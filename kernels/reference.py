"""The definition of an attention, in plain PyTorch: every score is materialised, nothing is clever.

Tests hold every kernel to it. With `dtype=torch.float64` it is the exact result that the accuracy rule
measures against.
"""

from __future__ import annotations

import torch

from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.evaluate import Tile, evaluate, position_symbols, size_values
from flashfuse.kernels.expr import Expr
from flashfuse.kernels.spec import D_IDX


def attention_reference(
    call: AttentionCall, dtype: torch.dtype | None = None, kept: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` [N.., Tq, Dv] and `lse` [N.., Tq, 2].

    dtype: compute and return everything in this type, with no rounding in between; by default operands, probabilities
        and output are rounded to the spec's types and the arithmetic is in its `compute_dtype`.
    kept: which weights [N.., Tq, Tkv] dropout leaves, where the spec has dropout.
    """
    spec, batch, q_len, kv_len = call.spec, call.batch, call.q_len, call.kv_len
    compute = dtype or spec.compute_dtype

    def rounded(x: torch.Tensor, to: torch.dtype) -> torch.Tensor:
        return x.to(compute) if dtype else x.to(to).to(compute)

    *outer, q_axis, kv_axis = position_symbols(spec)
    sizes = size_values(spec, q_len, kv_len, call.sizes)

    def from_stored(x: torch.Tensor, program: Expr | None) -> torch.Tensor:
        if program is None:
            return x
        axes = tuple(zip((*outer, kv_axis, D_IDX), map(range, (*batch, *x.shape[-2:])), strict=True))
        x = x.to(compute)
        return evaluate(program, Tile(axes, sizes, (), call.captured, compute, call.device, x)) + torch.zeros_like(x)

    k, v = from_stored(call.k, spec.key), from_stored(call.v, spec.value)
    product = rounded(call.q, spec.product_dtype) @ rounded(k, spec.product_dtype).mT
    tile = Tile(
        axes=tuple(zip((*outer, q_axis, kv_axis), map(range, (*batch, q_len, kv_len)), strict=True)),
        sizes=sizes,
        products=(product,),
        captured=call.captured,
        dtype=compute,
        device=call.device,
    )

    def values(expr: Expr, columns: int) -> torch.Tensor:
        return evaluate(expr, tile).to(compute).expand(*batch, q_len, columns)

    scores = values(spec.score, kv_len)
    if spec.normaliser == "none":
        probs, lse = scores, scores.new_zeros((*batch, q_len, 2))
    else:
        columns = scores if spec.sink is None else torch.cat([scores, values(spec.sink, 1)], dim=-1)
        empty = (scores == -torch.inf).all(-1, keepdim=True)
        lse = _largest_and_sum(columns)
        if spec.empty_row == "zero":
            # Before the softmax as well, or its gradient would be NaN.
            columns = columns.masked_fill(empty, 0.0)
        probs = torch.softmax(columns, dim=-1)[..., :kv_len]
        if kv_len:
            gives = 0.0 if spec.empty_row == "zero" else torch.nan
            probs = probs.masked_fill(empty, gives)
            if spec.empty_row == "nan":
                lse = torch.stack([lse[..., 0], lse[..., 1].masked_fill(empty.squeeze(-1), gives)], -1)
    if spec.factor is not None:
        factor = values(spec.factor, kv_len)
        probs = probs.masked_fill(factor == 0, 0.0) if spec.factor.dtype == torch.bool else probs * factor
    if spec.dropout:
        assert kept is not None, "dropout is a function of the mask that it draws"
        probs = rounded(probs, spec.probs_dtype) * rounded(kept.to(compute) / (1 - spec.dropout), spec.probs_dtype)
    out = rounded(probs, spec.probs_dtype) @ rounded(v, spec.probs_dtype)
    out = out.expand(*batch, q_len, call.value_dim)
    return (out, lse) if dtype else (out.to(spec.out_dtype), lse)


def _largest_and_sum(columns: torch.Tensor) -> torch.Tensor:
    """The operator's pair [.., 2] of scores [.., columns]: the largest, and sum(exp(score - largest))."""
    largest = columns.amax(-1) if columns.shape[-1] else columns.new_full(columns.shape[:-1], -torch.inf)
    shift = largest.masked_fill(largest == -torch.inf, 0.0)
    return torch.stack([largest, torch.exp(columns - shift.unsqueeze(-1)).sum(-1)], -1)
