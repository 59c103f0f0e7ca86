"""What is known of the integers in a program: bounds of computed positions, and clamps that change nothing."""

from __future__ import annotations

import sympy
import torch

from flashfuse.kernels.expr import Expr, Gather, Index, Load, Pointwise
from flashfuse.kernels.normal import rewrite
from flashfuse.patterns.indexing import Ranges, bounds

_LARGER, _SMALLER = ("max", "maximum"), ("min", "minimum")


def at_least(expr: Expr, low: sympy.Expr, ranges: Ranges) -> bool:
    """Whether low <= expr can be proven."""
    match expr:
        case Index(value=value):
            limits = bounds(sympy.expand(value - low), ranges)
            return limits is not None and bool(limits[0].is_nonnegative)
        case Load(dtype=dtype) | Gather(dtype=dtype):
            return dtype in (torch.bool, torch.uint8) and bool(low.is_nonpositive)
        case Pointwise(op=op, args=args) if op in _LARGER:
            return any(at_least(a, low, ranges) for a in args)
        case Pointwise(op=op, args=args) if op in _SMALLER:
            return all(at_least(a, low, ranges) for a in args)
        case Pointwise(op="where", args=(_, yes, no)):
            return at_least(yes, low, ranges) and at_least(no, low, ranges)
    return False


def at_most(expr: Expr, high: sympy.Expr, ranges: Ranges) -> bool:
    """Whether expr <= high can be proven."""
    match expr:
        case Index(value=value):
            limits = bounds(sympy.expand(high - value), ranges)
            return limits is not None and bool(limits[0].is_nonnegative)
        case Pointwise(op=op, args=args) if op in _SMALLER:
            return any(at_most(a, high, ranges) for a in args)
        case Pointwise(op=op, args=args) if op in _LARGER:
            return all(at_most(a, high, ranges) for a in args)
        case Pointwise(op="where", args=(_, yes, no)):
            return at_most(yes, high, ranges) and at_most(no, high, ranges)
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
