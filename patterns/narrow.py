"""Sums that the source makes in a narrow type, rounded as it rounds them where a mask's number takes a score's digits.

Scores are float32 whatever the source rounds them to, since that is nearer to what it means. Not so in a row without a
key: -65504 in float16 is a mask's number because the sum loses the score, and a row of such sums is an average. A
wider sum would keep the scores, and the row would be a softmax of them.
"""

from __future__ import annotations

import math

import torch

from flashfuse.kernels.expr import Const, Expr, Load, Pointwise, Product, walk
from flashfuse.kernels.normal import FALSE, TRUE, pointwise, rewrite
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.patterns.table import Table

_ROUNDING = {torch.float16: "to_float16", torch.bfloat16: "to_bfloat16"}
# From here on float16 lacks every other whole number, and bfloat16 all but multiples of 16.
_LARGE = 2.0**11
# In float32, too, nothing of a score is left beside a number of this size.
_ABSORBS = 2.0**31


def with_narrow_sums(program: Expr) -> Expr:
    """The program with its sums rounded to the narrow type that they are made in, where an addend is large."""
    return rewrite(program, _rounded)


def _rounded(expr: Expr) -> Expr | None:
    if not isinstance(expr, Pointwise) or expr.op not in ("add", "sub") or expr.dtype not in _ROUNDING:
        return None
    large = _is_large(expr)
    # What is added to every score masks none.
    if large in (FALSE, TRUE):
        return None
    return pointwise("where", large, pointwise(_ROUNDING[expr.dtype], expr, dtype=expr.dtype), expr, dtype=expr.dtype)


def _is_large(expr: Expr) -> Expr:
    """The condition under which a number of a mask is part of a sum."""
    match expr:
        case Const():
            return TRUE if _is_decisive(expr) else FALSE
        case Load(dtype=torch.float16, tensor=tensor) if not isinstance(tensor, Table):
            return _exceeds(expr)
        case Pointwise(op="where", args=(condition, Pointwise(op=op, args=(known,)), plain)) if (
            op in ROUNDINGS and known == plain
        ):
            return condition
        case Pointwise(op="where", args=(condition, yes, no)):
            chosen = pointwise("and", condition, _is_large(yes))
            return pointwise("or", chosen, pointwise("and", pointwise("not", condition), _is_large(no)))
        case Pointwise(op="add" | "sub", args=(left, right)):
            return pointwise("or", _is_large(left), _is_large(right))
        case Pointwise(op=op, args=(inner,)) if op == "neg" or op in ROUNDINGS:
            return _is_large(inner)
        case Pointwise(op="mul", args=(inner, Const())) if _has_product(inner):
            return _is_large(inner)
        case Pointwise() if not _has_product(expr) and any(map(_is_decisive, walk(expr))):
            return _exceeds(expr)
    return FALSE


def _is_decisive(expr: Expr) -> bool:
    return isinstance(expr, Const) and math.isfinite(expr.value) and _LARGE <= abs(expr.value) < _ABSORBS


def _exceeds(expr: Expr) -> Expr:
    return pointwise("ge", pointwise("abs", expr), Const(torch.float32, _LARGE))


def _has_product(expr: Expr) -> bool:
    return any(isinstance(e, Product) for e in walk(expr))
