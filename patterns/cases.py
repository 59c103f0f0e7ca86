"""Choices in a score program: divisions with two outcomes become one, and what is known about positions decides others.

A relative shift by padding and reshaping reads element (i + x // d, x % d) where x stays below 2 d: that is one element
where x < d and another one elsewhere, both at affine positions. Where a mask drops one of the cases, the other is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.expr import Expr, Index, Load, Pointwise
from flashfuse.kernels.normal import FALSE, TRUE, index, pointwise, rewrite
from flashfuse.patterns.indexing import Ranges, bounds, resimplify, within
from flashfuse.patterns.limits import without_clamps

# (x, d): a division of x by d.
Division = tuple[sympy.Expr, sympy.Expr]

_MOST_CASES = 3


def without_cases(program: Expr, ranges: Ranges) -> Expr:
    """The program with two-case divisions as choices, without what ranges or outer choices decide."""
    program = without_clamps(program, ranges)
    for _ in range(_MOST_CASES):
        program = _decided(program, ranges)
        division = next((d for d in _divisions(program) if within(d[0], 2 * d[1], ranges)), None)
        if division is None:
            break
        program = _split(program, division, ranges)
    return _implied(_decided(program, ranges), (), {})


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
    return pointwise("where", less(value, divisor), first, second, dtype=expr.dtype)


def less(left: sympy.Expr, right: sympy.Expr) -> Expr:
    """left < right, with every term on the side where it is positive."""
    terms = sympy.Add.make_args(sympy.expand(right - left))
    below = sympy.Add(*(-t for t in terms if t.could_extract_minus_sign()))
    above = sympy.Add(*(t for t in terms if not t.could_extract_minus_sign()))
    return pointwise("lt", index(below), index(above))


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
                return replace(e, indices=tuple(change(i) for i in e.indices))
            case Index():
                return Index(e.dtype, change(e.value))
        return None

    return rewrite(expr, rule)


# A comparison holds where this is not negative.
_SLACK: dict[str, Callable[[sympy.Expr, sympy.Expr], sympy.Expr]] = {
    "lt": lambda a, b: b - a - 1,
    "le": lambda a, b: b - a,
    "gt": lambda a, b: a - b - 1,
    "ge": lambda a, b: a - b,
}


def _slack(expr: Expr) -> sympy.Expr | None:
    """The number that is not negative where a comparison of positions holds."""
    match expr:
        case Pointwise(op=op, args=(Index(value=left), Index(value=right))) if op in _SLACK:
            return sympy.expand(_SLACK[op](left, right))
    return None


def _decided(expr: Expr, ranges: Ranges) -> Expr:
    """The expression without the comparisons of positions that the ranges decide."""

    def rule(e: Expr) -> Expr | None:
        slack = _slack(e)
        limits = bounds(slack, ranges) if slack is not None else None
        if limits is not None and limits[0].is_nonnegative:
            return TRUE
        return FALSE if limits is not None and limits[1].is_negative else None

    return rewrite(expr, rule)


def _implied(expr: Expr, known: tuple[sympy.Expr, ...], truths: Mapping[Expr, Expr]) -> Expr:
    """The expression inside the branches of choices, which know what their conditions are.

    Every number in `known` is not negative; `truths` gives conditions that are known to hold or not to.
    """
    if expr in truths:
        return truths[expr]
    match expr:
        case Pointwise(op="where", args=(condition, yes, no)):
            condition = _implied(condition, known, truths)
            branches = (
                _implied(branch, (*known, *_facts(condition, holds)), {**truths, **_verdicts(condition, holds)})
                for branch, holds in ((yes, True), (no, False))
            )
            return pointwise("where", condition, *branches, dtype=expr.dtype)
        case Pointwise() if (slack := _slack(expr)) is not None:
            if any(sympy.expand(slack - fact).is_nonnegative for fact in known):
                return TRUE
            return FALSE if any(sympy.expand(-slack - 1 - fact).is_nonnegative for fact in known) else expr
        case Pointwise():
            return pointwise(expr.op, *(_implied(a, known, truths) for a in expr.args), dtype=expr.dtype)
    return expr


# Each holds exactly where the other does not, NaN included.
_COMPLEMENT = {"eq": "ne", "ne": "eq"}


def _verdicts(condition: Expr, holds: bool) -> dict[Expr, Expr]:
    """The condition and its complement, where it holds or where it does not."""
    yes, no = (TRUE, FALSE) if holds else (FALSE, TRUE)
    match condition:
        case Pointwise(op=op, args=args) if op in _COMPLEMENT:
            return {condition: yes, Pointwise(torch.bool, _COMPLEMENT[op], args): no}
    return {condition: yes}


def _facts(condition: Expr, holds: bool) -> tuple[sympy.Expr, ...]:
    """Numbers that are not negative where a condition holds, or where it does not."""
    slack = _slack(condition)
    if slack is not None:
        return (slack if holds else sympy.expand(-slack - 1),)
    match condition:
        case Pointwise(op="not", args=(arg,)):
            return _facts(arg, not holds)
        case Pointwise(op=op, args=args) if op == ("and" if holds else "or"):
            return tuple(fact for a in args for fact in _facts(a, holds))
    return ()
