"""Index maps read backwards: at which position of a view an element of its tensor stands, and whether it is in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import sympy
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.expr import Expr
from flashfuse.kernels.normal import FALSE, index, pointwise
from flashfuse.patterns.cases import less
from flashfuse.patterns.indexing import ZERO, Indices, Ranges, divide, never_negative, same, unlinearize, within
from flashfuse.patterns.lift import CannotLift, Lifter

Found = dict[sympy.Symbol, sympy.Expr]


def inverse(
    lifter: Lifter, writer: fx.Node, places: Indices, target: Indices, own: Indices
) -> tuple[Indices, list[Expr]]:
    """The position `own`, a symbol for each dimension, at which `places` is `target`, and the conditions that there is
    one: never where a dimension is of size 0.

    Raises CannotLift where the map is not made of steps and of digits that can be told apart, and where several
    positions are one place.
    """
    symbols = {s for s in own if isinstance(s, sympy.Symbol)}
    if any(lifter.ranges[s] == 0 for s in symbols):
        return tuple(ZERO for _ in own), [FALSE]
    found, conditions = _solved(lifter, writer, places, target, symbols)
    if symbols - found.keys():
        raise CannotLift(writer, "writes an element more than once")
    return tuple(found[s] if isinstance(s, sympy.Symbol) else s for s in own), conditions


def _solved(
    lifter: Lifter, writer: fx.Node, places: Indices, target: Indices, own: AbstractSet[sympy.Symbol]
) -> tuple[Found, list[Expr]]:
    found: Found = {}
    conditions: list[Expr] = []
    pending = list(zip(map(sympy.expand, places), target, strict=True))
    while pending:
        place, at = min(pending, key=lambda pair: len(_unknown(pair[0], own, found)))
        pending.remove((place, at))
        unknown = _unknown(place, own, found)
        if not unknown:
            known = place.xreplace(found)
            conditions += [] if same(known, at) else [pointwise("eq", index(at), index(known))]
            continue
        values = _along(place, at, unknown, found, lifter.ranges)
        if values is None:
            raise CannotLift(writer, "writes positions that are no steps along the tensor's dimensions")
        found |= values[0]
        conditions += values[1]
    return found, conditions


def _unknown(place: sympy.Expr, own: AbstractSet[sympy.Symbol], found: Found) -> list[sympy.Symbol]:
    return sorted((place.free_symbols & own) - found.keys(), key=str)


def _along(
    place: sympy.Expr, at: sympy.Expr, unknown: Sequence[sympy.Symbol], found: Found, ranges: Ranges
) -> tuple[Found, list[Expr]] | None:
    """The unknown symbols of one dimension, which is a sum of steps along them and something known."""
    steps = {symbol: place.coeff(symbol, 1) for symbol in unknown}
    rest = sympy.expand(place - sympy.Add(*(symbol * step for symbol, step in steps.items())))
    if any(x.free_symbols & steps.keys() for x in (rest, *steps.values())):
        return None
    distance = sympy.expand(at - rest.xreplace(found))
    return _one(distance, steps, ranges) if len(steps) == 1 else _digits(distance, steps, ranges)


def _one(
    distance: sympy.Expr, steps: Mapping[sympy.Symbol, sympy.Expr], ranges: Ranges
) -> tuple[Found, list[Expr]] | None:
    """distance = symbol * step"""
    ((symbol, step),) = steps.items()
    if not step.is_Integer:
        return None
    distance, step = (-distance, -step) if step.is_negative else (distance, step)
    inside = _inside(distance, step * ranges[symbol], ranges)
    if step == 1:
        return {symbol: distance}, inside
    value, left = _divided(distance, step, ranges)
    return {symbol: value}, [*inside, pointwise("eq", index(left), index(0))]


def _divided(value: sympy.Expr, divisor: sympy.Expr, ranges: Ranges) -> tuple[sympy.Expr, sympy.Expr]:
    if never_negative(value, ranges):
        return divide(value, divisor, ranges)
    return FloorDiv(value, divisor), Mod(value, divisor)


def _digits(
    distance: sympy.Expr, steps: Mapping[sympy.Symbol, sympy.Expr], ranges: Ranges
) -> tuple[Found, list[Expr]] | None:
    """A dimension that is several: the symbols are the digits of a number without gaps."""
    digits: list[sympy.Symbol] = []
    block = sympy.Integer(1)
    for _ in steps:
        symbol = next((s for s, step in steps.items() if s not in digits and same(step, block)), None)
        if symbol is None:
            return None
        digits.insert(0, symbol)
        block = block * ranges[symbol]
    values = unlinearize(distance, [ranges[s] for s in digits], ranges)
    return dict(zip(digits, values, strict=True)), _inside(distance, block, ranges)


def _inside(value: sympy.Expr, extent: sympy.Expr, ranges: Ranges) -> list[Expr]:
    """0 <= value < extent, as far as it is not known."""
    if within(value, extent, ranges):
        return []
    low = [] if never_negative(value, ranges) else [less(ZERO - 1, value)]
    below = never_negative(sympy.expand(extent - 1 - value), ranges)
    return low if below else [*low, less(value, extent)]
