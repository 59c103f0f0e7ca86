"""Comparisons of positions that the known ranges decide: a concatenation read where only one of its parts lies."""

from __future__ import annotations

from collections.abc import Callable

import sympy

from flashfuse.kernels.expr import Expr, Index, Pointwise
from flashfuse.kernels.normal import FALSE, TRUE, rewrite
from flashfuse.patterns.indexing import Ranges, bounds

# A comparison holds where this is not negative.
_SLACK: dict[str, Callable[[sympy.Expr, sympy.Expr], sympy.Expr]] = {
    "lt": lambda a, b: b - a - 1,
    "le": lambda a, b: b - a,
    "gt": lambda a, b: a - b - 1,
    "ge": lambda a, b: a - b,
}


def decided(expr: Expr, ranges: Ranges) -> Expr:
    """The expression without the comparisons of positions that the ranges decide."""

    def rule(e: Expr) -> Expr | None:
        match e:
            case Pointwise(op=op, args=(Index(value=left), Index(value=right))) if op in _SLACK:
                limits = bounds(sympy.expand(_SLACK[op](left, right)), ranges)
                if limits is not None and limits[0].is_nonnegative:
                    return TRUE
                return FALSE if limits is not None and limits[1].is_negative else None
        return None

    return rewrite(expr, rule)
