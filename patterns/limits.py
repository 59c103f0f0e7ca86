"""What is known of integers in a program: bounds of computed positions, clamps without effect, what types hold."""

from __future__ import annotations

import sympy
import torch

from flashfuse.kernels.expr import Expr, Gather, Index, Load, Pointwise
from flashfuse.kernels.normal import rewrite
from flashfuse.patterns.indexing import Ranges, bounds

_LARGER, _SMALLER = ("max", "maximum"), ("min", "minimum")


def at_least(expr: Expr, low: sympy.Expr, ranges: Ranges) -> bool:
    """Whether low <= expr can be proven."""
    return _beyond(expr, low, ranges, 1)


def at_most(expr: Expr, high: sympy.Expr, ranges: Ranges) -> bool:
    """Whether expr <= high can be proven."""
    return _beyond(expr, high, ranges, -1)


def _beyond(expr: Expr, limit: sympy.Expr, ranges: Ranges, sign: int) -> bool:
    """Whether sign * limit <= sign * expr can be proven."""
    one_suffices, all_needed = (_LARGER, _SMALLER) if sign > 0 else (_SMALLER, _LARGER)
    match expr:
        case Index(value=value):
            limits = bounds(sympy.expand(sign * (value - limit)), ranges)
            return limits is not None and bool(limits[0].is_nonnegative)
        case Load(dtype=dtype) | Gather(dtype=dtype):
            return sign > 0 and dtype in (torch.bool, torch.uint8) and bool(limit.is_nonpositive)
        case Pointwise(op="add", args=(a, Index(value=shift)) | (Index(value=shift), a)):
            return _beyond(a, limit - shift, ranges, sign)
        case Pointwise(op=op, args=args) if op in one_suffices:
            return any(_beyond(a, limit, ranges, sign) for a in args)
        case Pointwise(op=op, args=args) if op in all_needed:
            return all(_beyond(a, limit, ranges, sign) for a in args)
        case Pointwise(op="where", args=(_, yes, no)):
            return all(_beyond(a, limit, ranges, sign) for a in (yes, no))
    return False


def without_clamps(expr: Expr, ranges: Ranges) -> Expr:
    """The expression without minima and maxima of integers that never take effect."""

    def rule(e: Expr) -> Expr | None:
        match e:
            case Pointwise(op=op, args=(arg, Index(value=low))) if op in _LARGER:
                return arg if _is_integer(arg) and at_least(arg, low, ranges) else None
            case Pointwise(op=op, args=(arg, Index(value=high))) if op in _SMALLER:
                return arg if _is_integer(arg) and at_most(arg, high, ranges) else None
        return None

    return rewrite(expr, rule)


def _is_integer(expr: Expr) -> bool:
    return not expr.dtype.is_floating_point and expr.dtype != torch.bool


_ARITHMETIC = ("add", "sub", "mul", "neg", "abs", "pow")


def may_wrap(expr: Expr, dtype: torch.dtype, ranges: Ranges) -> bool:
    """Whether integer arithmetic may leave the range of its type; what int64 tensors hold is taken to be small."""
    if dtype == torch.bool or dtype.is_floating_point or dtype.is_complex:
        return False
    if isinstance(expr, Pointwise):
        return expr.op == "pow" or (expr.op in _ARITHMETIC and dtype != torch.int64)
    if not isinstance(expr, Index) or (isinstance(expr.value, (sympy.Integer, sympy.Symbol)) and dtype == torch.int32):
        return False
    limits = bounds(expr.value, ranges)
    if limits is None or not all(limit.is_Integer for limit in limits):
        limit = {torch.int32: (16, 2**30), torch.int64: (2**31, 2**62)}.get(dtype)
        return limit is None or not _small(expr.value, *limit)
    info = torch.iinfo(dtype)
    return not (info.min <= limits[0] and limits[1] <= info.max)


def _small(value: sympy.Expr, most: int, constant: int) -> bool:
    """Whether a position is a sum of positions and sizes, each far below 2**31, that stays small.

    `most` bounds the sum of the coefficients, `constant` the constant term.
    """
    terms = [term.as_coeff_Mul() for term in sympy.Add.make_args(sympy.expand(value))]
    if most <= 16 and not all(rest.is_Symbol or rest == 1 for _, rest in terms):
        return False
    return all(abs(c) <= (constant if r == 1 else most) for c, r in terms) and sum(1 for _, r in terms if r != 1) <= 16


def small_position(value: sympy.Expr) -> bool:
    """Whether float32 holds the position exactly: a sum of a few positions and sizes, below 2**24 in any model."""
    return _small(value, 16, 2**20)
