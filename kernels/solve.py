"""Index expressions over ranges of positions: least and greatest values, and comparisons solved for kv_idx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.spec import KV_IDX

Extent = tuple[sympy.Expr, sympy.Expr]


def extremes(value: sympy.Expr, extents: Mapping[sympy.Symbol, Extent]) -> Extent | None:
    """The least and greatest value of an index expression whose symbols range over `extents` (first and last value).

    Attained where every symbol occurs once, and never too narrow. None for an expression that it cannot read.
    """
    if not value.free_symbols & extents.keys():
        return value, value
    if isinstance(value, sympy.Symbol):
        return extents[value]
    if value.is_Add:
        parts = [extremes(a, extents) for a in value.args]
        if any(p is None for p in parts):
            return None
        low, high = zip(*(p for p in parts if p is not None), strict=True)
        return sympy.expand(sympy.Add(*low)), sympy.expand(sympy.Add(*high))
    factor, rest = value.as_independent(*extents)
    inner = None if rest == value else extremes(rest, extents)
    if value.is_Mul and inner is not None:
        if factor.is_nonnegative:
            return sympy.expand(factor * inner[0]), sympy.expand(factor * inner[1])
        return (sympy.expand(factor * inner[1]), sympy.expand(factor * inner[0])) if factor.is_negative else None
    if isinstance(value, (FloorDiv, Mod)):
        return _quotient_extremes(value, extents)
    return None


def _quotient_extremes(value: sympy.Expr, extents: Mapping[sympy.Symbol, Extent]) -> Extent | None:
    dividend, divisor = value.args
    if not divisor.is_positive or divisor.free_symbols & extents.keys():
        return None
    if isinstance(value, Mod):
        return sympy.Integer(0), divisor - 1
    inner = extremes(dividend, extents)
    return inner and (FloorDiv(inner[0], divisor), FloorDiv(inner[1], divisor))


@dataclass(frozen=True)
class Line:
    """kv_idx <= at where `upper`, kv_idx >= at otherwise; `at` holds no kv_idx."""

    upper: bool
    at: sympy.Expr


def solved(op: str, left: sympy.Expr, right: sympy.Expr) -> Line | None:
    """The comparison (lt, le, gt or ge) solved for kv_idx; None where that cannot be done."""
    slack = right - left if op in ("lt", "le") else left - right
    return _solve(sympy.expand(slack), False, sympy.Integer(1 if op in ("lt", "gt") else 0))


def _solve(value: sympy.Expr, upper: bool, target: sympy.Expr) -> Line | None:
    """value <= target where `upper`, value >= target otherwise, solved for kv_idx."""
    if value == KV_IDX:
        return Line(upper, sympy.expand(target))
    moving = [term for term in sympy.Add.make_args(value) if term.has(KV_IDX)]
    if len(moving) != 1:
        return None
    if moving[0] != value:
        return _solve(moving[0], upper, target - (value - moving[0]))
    factor, rest = value.as_coeff_Mul()
    if factor != 1:
        return _solve_multiple(factor, rest, upper, sympy.expand(target))
    if isinstance(value, FloorDiv) and value.args[1].is_positive and not value.args[1].has(KV_IDX):
        dividend, divisor = value.args
        return _solve(dividend, upper, target * divisor + (divisor - 1 if upper else 0))
    return None


def _solve_multiple(factor: sympy.Expr, rest: sympy.Expr, upper: bool, target: sympy.Expr) -> Line | None:
    if not factor.is_Integer:
        return None
    if factor < 0:
        factor, upper, target = -factor, not upper, -target
    quotient = target if factor == 1 else FloorDiv(target, factor) if upper else -FloorDiv(-target, factor)
    return _solve(rest, upper, quotient)
