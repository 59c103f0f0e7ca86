"""Take the softmax scale out of a score program, so that the kernel applies it where it costs nothing.

`score = scale * inner` with a constant scale > 0. The kernel needs exp(score - max) = exp2(inner * a - max(inner) * a)
with a = scale * log2(e): one fused multiply-add an element, whatever the scale. The row maximum is taken on `inner`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch

from flashfuse.kernels.expr import Const, Expr, Gather, Load, Pointwise, walk
from flashfuse.kernels.normal import number, pointwise
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.kernels.spec import AttentionSpec

# In float32 nothing of a score is left beside a number of this size.
ABSORBS = 2.0**31
# From about here the rounding of a score times log2(e) is more than one: float16 probabilities could overflow by it.
LARGE = 1e7
# More sums of constants than this are no handful of masks.
_MOST_FILLS = 16

# What a masked score may be, as (inner score, score), both as float32 has them.
Fill = tuple[float, float]


def inner_score(spec: AttentionSpec) -> tuple[float, Expr]:
    """(scale, inner) of a spec's score; without a softmax there is no exponential, and so no scale apart."""
    return peel_scale(spec.score) if spec.normaliser == "softmax" else (1.0, spec.score)


def peel_scale(score: Expr) -> tuple[float, Expr]:
    """(scale, inner) with score = scale * inner; (1.0, score) where no common factor stands out.

    Every branch and addend must hold the factor or be a constant. A finite constant is divided by it and kept finite,
    so a fill of finfo.min stays the smallest number and not minus infinity; `fills_of` tells what it stands for.
    """
    scale = _factor(score)
    if scale in (None, 1.0) or (math.frexp(scale)[0] != 0.5 and any(map(_rounds_at_constant, walk(score)))):
        return 1.0, score
    return (scale, unscaled(score, scale)) if _tells_fills_apart(score, scale) else (1.0, score)


def fills_of(score: Expr, scale: float) -> tuple[Fill, ...]:
    """The large numbers that constants make of a score from which `scale` was peeled, the lowest first.

    The score is the inner score times the scale only up to rounding, and not at all where dividing would overflow.
    """
    return () if scale == 1.0 else tuple(sorted(f for f in _fills(score, scale) if LARGE <= abs(f[0]) < math.inf))


def _tells_fills_apart(score: Expr, scale: float) -> bool:
    """Whether inner scores are equal, or infinite, just where scores are."""
    if scale > 1 and _adds_a_tensor(score):
        # It may hold what the source's multiplication makes infinite.
        return False
    fills = _fills(score, scale)
    inner, scores = ({fill[place] for fill in fills} for place in range(2))
    apart = len(inner) == len(scores) == len(fills) <= _MOST_FILLS
    return apart and all(math.isinf(x) == math.isinf(y) for x, y in fills)


def _adds_a_tensor(expr: Expr) -> bool:
    match expr:
        case Load(dtype=dtype) | Gather(dtype=dtype):
            return dtype.is_floating_point
        case Pointwise(op="add" | "sub", args=addends) | Pointwise(op="where", args=(_, *addends)):
            return any(map(_adds_a_tensor, addends))
        case Pointwise(op="mul" | "div", args=(rest, Const())) | Pointwise(op="mul", args=(Const(), rest)):
            return _adds_a_tensor(rest)
    return False


def _fills(expr: Expr, scale: float) -> frozenset[Fill]:
    """What large constants add up to in `expr` / `scale` and in `expr`, everything else taken for 0."""
    match expr:
        case Const(value=value):
            divided = number(unscaled(expr, scale))
            assert divided is not None
            return frozenset([(_float32(divided), _float32(value)) if abs(divided) >= LARGE else (0.0, 0.0)])
        case Pointwise(op="mul", args=(Const(value=value), rest) | (rest, Const(value=value))):
            return _scaled_fills(rest, scale, lambda x: x * _float32(value))
        case Pointwise(op="div", args=(rest, Const(value=value))) if value != 0:
            return _scaled_fills(rest, scale, lambda x: x / _float32(value))
        case Pointwise(op="where", args=(_, left, right)):
            return _fills(left, scale) | _fills(right, scale)
        case Pointwise(op="add" | "sub" as op, args=(left, right)):
            sign = -1.0 if op == "sub" else 1.0
            sums = itertools.product(_fills(left, scale), _fills(right, scale))
            return frozenset((_float32(a + sign * c), _float32(b + sign * d)) for (a, b), (c, d) in sums)
        case Pointwise(op=op, args=(rest,)) if op in ROUNDINGS and scale == 1.0:
            rounded = (torch.tensor(score).to(ROUNDINGS[op]).item() for _, score in _fills(rest, 1.0))
            return frozenset((score, score) for score in rounded)
    return frozenset([(0.0, 0.0)])


def _scaled_fills(rest: Expr, scale: float, multiplied: Callable[[float], float]) -> frozenset[Fill]:
    """The fills of `rest` multiplied; with a scale that is the factor, which inner scores are without."""
    if scale == 1.0:
        scores = {_float32(multiplied(score)) for _, score in _fills(rest, 1.0)}
        return frozenset((score, score) for score in scores)
    return frozenset((inner, _float32(multiplied(score))) for inner, score in _fills(rest, _factor(rest) or 1.0))


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


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
