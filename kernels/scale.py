"""Take the softmax scale out of a score program, so that the kernel applies it where it costs nothing.

`score = scale * inner` with a constant scale > 0. The kernel needs exp(score - max) = exp2(inner * a - max(inner) * a)
with a = scale * log2(e): one fused multiply-add an element, whatever the scale. The row maximum is taken on `inner`.
"""

from __future__ import annotations

import math

import torch

from flashfuse.kernels.expr import Const, Expr, Pointwise, walk
from flashfuse.kernels.normal import pointwise
from flashfuse.kernels.spec import AttentionSpec

# In float32 nothing of a score is left beside a number of this size.
ABSORBS = 2.0**31


def inner_score(spec: AttentionSpec) -> tuple[float, Expr]:
    """(scale, inner) of a spec's score; without a softmax there is no exponential, and so no scale apart."""
    return peel_scale(spec.score) if spec.normaliser == "softmax" else (1.0, spec.score)


def peel_scale(score: Expr) -> tuple[float, Expr]:
    """(scale, inner) with score = scale * inner; (1.0, score) where no common factor stands out.

    Every branch and addend must hold the factor or be a constant. A finite constant is divided by it and kept finite,
    so a fill of finfo.min stays the smallest number and not minus infinity.
    """
    scale = _factor(score)
    if scale is None or (math.frexp(scale)[0] != 0.5 and any(map(_rounds_at_constant, walk(score)))):
        return 1.0, score
    return scale, unscaled(score, scale)


def _rounds_at_constant(expr: Expr) -> bool:
    """Whether a sum leaves an addend some of its digits: divided by no power of two, it would leave it others."""
    if not isinstance(expr, Pointwise) or expr.op not in ("add", "sub"):
        return False
    return any(0 < abs(c) < ABSORBS for addend in expr.args for c in _constants(addend))


def _constants(addend: Expr) -> list[float]:
    match addend:
        case Const(value=value):
            return [value]
        case Pointwise(op="where", args=(_, left, right)):
            return [*_constants(left), *_constants(right)]
    return []


def _factor(expr: Expr) -> float | None:
    """The positive constant factor of an expression: 1.0 when there is none, None for a constant, which has any."""
    match expr:
        case Const():
            return None
        case Pointwise(op="mul", args=(Const(value=value), rest) | (rest, Const(value=value))):
            return value * (_factor(rest) or 1.0) if 0 < value < math.inf else 1.0
        case Pointwise(op="div", args=(rest, Const(value=value))):
            return (_factor(rest) or 1.0) / value if 0 < value < math.inf else 1.0
        case Pointwise(op="where", args=(_, left, right)) | Pointwise(op="add" | "sub", args=(left, right)):
            factors = {_factor(left), _factor(right)} - {None}
            return factors.pop() if len(factors) == 1 else (1.0 if factors else None)
    return 1.0


def unscaled(expr: Expr, scale: float) -> Expr:
    """`expr / scale`, for the score that `scale` was peeled from or what is left of it where it is not masked."""
    if scale == 1.0:
        return expr
    match expr:
        case Const(dtype=dtype, value=value):
            largest = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max
            return expr if math.isinf(value) else Const(dtype, min(max(value / scale, -largest), largest))
        case Pointwise(op="mul", args=(Const(value=value), rest) | (rest, Const(value=value))):
            inner = _factor(rest)
            return rest if inner is None or inner == 1.0 else unscaled(rest, inner)
        case Pointwise(op="div", args=(rest, Const())):
            inner = _factor(rest)
            return rest if inner is None or inner == 1.0 else unscaled(rest, inner)
        case Pointwise(op=op, args=(*condition, left, right), dtype=dtype):
            return pointwise(op, *condition, unscaled(left, scale), unscaled(right, scale), dtype=dtype)
    raise AssertionError(f"{expr} has no factor {scale}")
