"""Divisions in a score program that have only two outcomes, written as a choice of two affine cases.

A relative shift by padding and reshaping reads element (i + x // d, x % d) where x stays below 2 d: that is one element
where x < d and another one elsewhere, both at affine positions. What a comparison decides under the known ranges goes.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.expr import FALSE, TRUE, Expr, Index, Load, Pointwise, index, pointwise, rewrite
from flashfuse.patterns.indexing import Ranges, bounds, resimplify, within

# (x, d): a division of x by d.
Division = tuple[sympy.Expr, sympy.Expr]

_MOST_CASES = 3


def without_cases(program: Expr, ranges: Ranges) -> Expr:
    """The program with two-case divisions as choices, and comparisons decided by the ranges decided."""
    for _ in range(_MOST_CASES):
        program = decided(program, ranges)
        division = next((d for d in _divisions(program) if within(d[0], 2 * d[1], ranges)), None)
        if division is None:
            return program
        program = _split(program, division, ranges)
    return decided(program, ranges)


def _indices(expr: Expr) -> tuple[sympy.Expr, ...]:
    match expr:
        case Load(indices=indices):
            return indices
        case Index(value=value):
            return (value,)
    return ()


def _divisions(expr: Expr) -> list[Division]:
    """The divisions in the expression's indices of something that varies with two positions."""
    found: dict[Division, None] = {}
    for i in _indices(expr):
        parts = sorted(i.atoms(FloorDiv, Mod), key=str)
        found |= dict.fromkeys((p.args[0], p.args[1]) for p in parts if p.args[0].is_Add)
    for child in expr.children:
        found |= dict.fromkeys(_divisions(child))
    return list(found)


def _split(expr: Expr, division: Division, ranges: Ranges) -> Expr:
    """The smallest sub-expression that holds all of a division, as a choice of its two outcomes."""
    holders = [child for child in expr.children if division in _divisions(child)]
    if isinstance(expr, Pointwise) and len(holders) == 1:
        return pointwise(
            expr.op, *(_split(a, division, ranges) if a is holders[0] else a for a in expr.args), dtype=expr.dtype
        )
    value, divisor = division
    first, second = (_with_outcome(expr, division, n, ranges) for n in (0, 1))
    return pointwise("where", pointwise("lt", index(value), index(divisor)), first, second, dtype=expr.dtype)


def _with_outcome(expr: Expr, division: Division, outcome: int, ranges: Ranges) -> Expr:
    value, divisor = division
    known = {FloorDiv(value, divisor): sympy.Integer(outcome), Mod(value, divisor): value - outcome * divisor}

    def replaced(i: sympy.Expr) -> sympy.Expr:
        return resimplify(i.xreplace(known), ranges)

    return _mapped(expr, replaced)


def _mapped(expr: Expr, change: Callable[[sympy.Expr], sympy.Expr]) -> Expr:
    def rule(e: Expr) -> Expr | None:
        match e:
            case Load():
                return Load(e.dtype, e.tensor, tuple(change(i) for i in e.indices))
            case Index():
                return Index(e.dtype, change(e.value))
        return None

    return rewrite(expr, rule)


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


# A comparison holds where this is not negative.
_SLACK: dict[str, Callable[[sympy.Expr, sympy.Expr], sympy.Expr]] = {
    "lt": lambda a, b: b - a - 1,
    "le": lambda a, b: b - a,
    "gt": lambda a, b: a - b - 1,
    "ge": lambda a, b: a - b,
}
