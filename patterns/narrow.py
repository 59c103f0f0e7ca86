"""Sums and products that the source makes in a narrow type, rounded as it does where a mask's number takes digits.

Scores are float32 whatever the source rounds them to, since that is nearer to what it means. Not so in a row without a
key: -65504 in float16 is a mask's number because the sum loses the score, and a row of such sums is an average. A
wider sum would keep the scores, and the row would be a softmax of them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from collections.abc import Set as AbstractSet

import torch
from torch import fx

from flashfuse.kernels.expr import Const, Expr, Load, Pointwise, Product, loads, walk
from flashfuse.kernels.normal import FALSE, TRUE, number, pointwise, rewrite
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.patterns.lift import CannotLift
from flashfuse.patterns.opened import open_up
from flashfuse.patterns.opener import Opener
from flashfuse.patterns.refusal import Refused

_ROUNDING = {torch.float16: "to_float16", torch.bfloat16: "to_bfloat16"}
# From here on float16 lacks every other whole number, and bfloat16 all but multiples of 16.
_LARGE = 2.0**11
# In float32, too, nothing of a score is left beside a number of this size.
_ABSORBS = 2.0**31


def masks_of(program: Expr, opener: Opener) -> frozenset[Hashable]:
    """The tensors of a program that may hold such a number: of float16, or made with one."""
    return frozenset(x.tensor for x in loads(program) if isinstance(x, Load) and _is_mask(x, opener))


def _is_mask(load: Load, opener: Opener) -> bool:
    if load.dtype not in _ROUNDING or not isinstance(load.tensor, fx.Node):
        return False
    if load.dtype == torch.float16:
        return True
    try:
        made = opener.read(open_up(opener.lifter, load))
    except (CannotLift, Refused):
        return False
    return any(map(_is_decisive, walk(made)))


def with_narrow_sums(program: Expr, masks: AbstractSet[Hashable]) -> Expr:
    """The program with its sums rounded to the narrow type that they are made in, where an addend is large.

    So are products, which may be infinite there. masks: tensors that may hold what is large.
    """
    return rewrite(program, lambda e: _rounded(e, masks))


def _rounded(expr: Expr, masks: AbstractSet[Hashable]) -> Expr | None:
    if not isinstance(expr, Pointwise) or expr.dtype not in _ROUNDING:
        return None
    if expr.op not in ("add", "sub") and not _may_grow(expr):
        return None
    large = _is_large(expr, masks)
    # What is added to every score masks none.
    if large in (FALSE, TRUE):
        return None
    return pointwise("where", large, pointwise(_ROUNDING[expr.dtype], expr, dtype=expr.dtype), expr, dtype=expr.dtype)


def _is_large(expr: Expr, masks: AbstractSet[Hashable]) -> Expr:
    """The condition under which a number of a mask is part of a sum."""

    def of(addend: Expr) -> Expr:
        return _is_large(addend, masks)

    match expr:
        case Const():
            return TRUE if _is_decisive(expr) else FALSE
        case Load(tensor=tensor) if tensor in masks:
            return _exceeds(expr)
        case Pointwise(op="where", args=(condition, Pointwise(op=op, args=(known,)), plain)) if (
            op in ROUNDINGS and known == plain
        ):
            return condition
        case Pointwise(op="where", args=(condition, yes, no)):
            chosen = pointwise("and", condition, of(yes))
            return pointwise("or", chosen, pointwise("and", pointwise("not", condition), of(no)))
        case Pointwise(op="add" | "sub", args=(left, right)):
            return pointwise("or", of(left), of(right))
        case Pointwise(op=op, args=(inner,)) if op == "neg" or op in ROUNDINGS:
            return of(inner)
        case Pointwise(op="mul", args=(inner, _) | (_, inner)) if _has_product(inner):
            return of(inner)
        case Pointwise(op="div", args=(inner, _)) if _has_product(inner):
            return of(inner)
        case Pointwise() if not _has_product(expr) and any(map(_is_decisive, walk(expr))):
            return _exceeds(expr)
    return FALSE


def _may_grow(expr: Pointwise) -> bool:
    """Whether a product may be larger than a score that it is a multiple of."""
    match expr:
        case Pointwise(op="mul", args=(inner, other) | (other, inner)) if _has_product(inner):
            return abs(number(other) or math.inf) > 1
        case Pointwise(op="div", args=(inner, other)) if _has_product(inner):
            return abs(number(other) or 0.0) < 1
    return False


def _is_decisive(expr: Expr) -> bool:
    return isinstance(expr, Const) and math.isfinite(expr.value) and _LARGE <= abs(expr.value) < _ABSORBS


def _exceeds(expr: Expr) -> Expr:
    return pointwise("ge", pointwise("abs", expr), Const(torch.float32, _LARGE))


def _has_product(expr: Expr) -> bool:
    return any(isinstance(e, Product) for e in walk(expr))
