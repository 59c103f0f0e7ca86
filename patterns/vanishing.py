"""Softmaxes written without their row's own maximum: exponentials of large fills are 0, and so may a row's sum be.

exp(fill) = 0 is exp(-inf), so such a fill is -inf: a row of nothing else is 0 / 0, which is NaN, and may be cleared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import sympy

from flashfuse.kernels.expr import Const, Expr, Load, Pointwise, free_symbols, loads, walk
from flashfuse.kernels.normal import number, pointwise, rewrite
from flashfuse.patterns.lift import CannotLift
from flashfuse.patterns.opened import open_up
from flashfuse.patterns.opener import Opener
from flashfuse.patterns.refusal import Refused
from flashfuse.patterns.shift import ABSORBING

# No type has an exponential of less that is not 0: float64's smallest is that of -745.
_NONE_BELOW = -750.0
# float16 has no room for the exponential of less.
_VANISHES = -16.0


def with_infinite_fills(program: Expr, opener: Opener) -> Expr:
    """The program of scores that exponentials are taken of as they are, with -inf for fills whose exponential is 0."""
    program = _with_masks(program, opener)
    opened = _opened(program)
    if not opened.vanishes:
        return program
    result = opened.rest
    for condition, fill in reversed(opened.fills):
        value = Const(program.dtype, -math.inf if fill <= _NONE_BELOW else fill)
        result = pointwise("where", condition, value, result, dtype=program.dtype)
    return result


def _with_masks(program: Expr, opener: Opener) -> Expr:
    """The program with what the graph makes of masks that are added in their place."""
    return rewrite(program, lambda e: _mask(e, opener) if isinstance(e, Load) else None)


def _mask(load: Load, opener: Opener) -> Expr | None:
    """What the graph makes a mask of that is to be added; None for any other tensor."""
    if not load.dtype.is_floating_point:
        return None
    try:
        made = opener.read(open_up(opener.lifter, load))
    except (CannotLift, Refused):
        return None
    return made if _opened(made).vanishes else None


def may_vanish(program: Expr, j: sympy.Symbol) -> bool:
    """Whether a mask may leave a row only finite scores whose exponentials are 0."""
    return is_biased(program, j) or any(fill < _VANISHES for fill in finite_numbers(program))


def finite_numbers(program: Expr) -> Iterator[float]:
    return (e.value for e in walk(program) if isinstance(e, Const) and math.isfinite(e.value))


def is_biased(program: Expr, j: sympy.Symbol) -> bool:
    """Whether tensors of floats that differ between keys are in a score."""
    return any(x.dtype.is_floating_point and j in free_symbols(x) for x in loads(program))


# --------------------------------------------------------------------------------------------------------------------


# Conditions, and the number that each chooses.
_Fills = tuple[tuple[Expr, float], ...]


@dataclass(frozen=True)
class _Opened:
    """A program as the first of `fills` whose condition holds, and as `rest` where none does."""

    rest: Expr
    fills: _Fills = ()

    @property
    def vanishes(self) -> bool:
        return any(fill <= _NONE_BELOW for _, fill in self.fills)

    def where(self, condition: Expr) -> _Fills:
        """The fills, each only where a condition holds too."""
        return tuple((pointwise("and", condition, own), fill) for own, fill in self.fills)


def _opened(expr: Expr) -> _Opened:
    """The program with its fills on the outside, where operators on the way leave them numbers."""
    match expr:
        case Pointwise(op="where", args=(condition, yes, no)):
            return _choice(expr, condition, yes, no)
        case Pointwise(op=op, args=args):
            sides = [_opened(a) for a in args]
            found = [_through(expr, slot, side.fills) for slot, side in enumerate(sides) if side.fills]
            fills = tuple(pair for pairs in found for pair in pairs or ())
            rest = pointwise(op, *(side.rest for side in sides), dtype=expr.dtype)
            return _Opened(expr) if None in found else _Opened(rest, fills)
    return _Opened(expr)


def _choice(expr: Pointwise, condition: Expr, yes: Expr, no: Expr) -> _Opened:
    otherwise = pointwise("not", condition)
    for own, branch, other in ((condition, yes, no), (otherwise, no, yes)):
        fill = number(branch)
        if fill is not None and fill <= _NONE_BELOW:
            inner = _opened(other)
            return _Opened(inner.rest, ((own, float(fill)), *inner.fills))
    left, right = _opened(yes), _opened(no)
    rest = pointwise("where", condition, left.rest, right.rest, dtype=expr.dtype)
    return _Opened(rest, (*left.where(condition), *right.where(otherwise)))


def _through(expr: Pointwise, slot: int, fills: _Fills) -> _Fills | None:
    """What an operator makes of fills in one of its arguments; None where that is no number."""
    args = expr.args
    if all(number(a) is not None for n, a in enumerate(args) if n != slot):
        results = [
            number(pointwise(expr.op, *args[:slot], Const(args[slot].dtype, fill), *args[slot + 1 :], dtype=expr.dtype))
            for _, fill in fills
        ]
        found = [(own, float(x)) for (own, _), x in zip(fills, results, strict=True) if x is not None]
        return tuple(found) if len(found) == len(fills) else None
    absorbs = expr.op == "add" or (expr.op == "sub" and slot == 0)
    return fills if absorbs and all(fill <= ABSORBING for _, fill in fills) else None
