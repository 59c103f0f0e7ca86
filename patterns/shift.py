"""Shifts that cannot change a softmax: a maximum subtracted from the scores, which eager code does to avoid overflow.

exp(x - m) / sum exp(x - m) is exp(x) / sum exp(x) wherever m is one finite number for the whole row. The maximum of a
row, or of more than the row, is that, or it is -inf and so is the whole row, which gives NaN either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet

import sympy
from torch import fx

from flashfuse.kernels.expr import Const, Expr, Index, Load, Pointwise, Reduce, free_symbols
from flashfuse.kernels.normal import number, pointwise, substitute
from flashfuse.patterns.indexing import same
from flashfuse.patterns.lift import CannotLift, Lifter

# A fill of at most this absorbs any score that a model computes, and any shift.
ABSORBING = -1e30
# A maximum that is kept above more than this absorbs the scores that it is subtracted from.
_HIGHEST_LIMIT = 2.0**10
# How many operators back two spellings of one value are compared.
_STEPS = 6

Look = Callable[[Lifter, Load], Expr]


def without_shift(lifter: Lifter, expr: Expr, axis: sympy.Symbol, leads: AbstractSet[fx.Node]) -> Expr | None:
    """A softmax's argument without the maxima that are subtracted on the way from the product; None where none is.

    On that way a shift may be scaled (https://arxiv.org/abs/2105.13290, section 2.4) or masked: a fill that absorbs any
    score absorbs the shift as well. `leads` are the nodes behind which a product lies.
    """
    if axis not in free_symbols(expr):
        return None
    match expr:
        case Load(tensor=tensor) if tensor in leads:
            opened = _expanded(lifter, expr)
            return None if opened is None else without_shift(lifter, opened, axis, leads)
        case Pointwise(op="sub", args=(x, m)) if axis not in free_symbols(m):
            inner = without_shift(lifter, x, axis, leads)
            if _is_maximum(lifter, m, x, axis):
                return x if inner is None else inner
            return None if inner is None else pointwise("sub", inner, m, dtype=expr.dtype)
        case Pointwise(op=op, args=args):
            for slot in _transparent(expr, axis):
                inner = without_shift(lifter, args[slot], axis, leads)
                if inner is not None:
                    return pointwise(op, *args[:slot], inner, *args[slot + 1 :], dtype=expr.dtype)
    return None


def _transparent(expr: Pointwise, axis: sympy.Symbol) -> Iterator[int]:
    """The arguments to which adding a number adds a number to the result, the same along the row."""
    match expr:
        case Pointwise(op="add"):
            yield from (0, 1)
        case Pointwise(op="sub"):
            yield 0
        case Pointwise(op="mul", args=args):
            yield from (slot for slot in (0, 1) if axis not in free_symbols(args[1 - slot]))
        case Pointwise(op="div", args=(_, below)) if axis not in free_symbols(below):
            yield 0
        case Pointwise(op="where", args=(_, *branches)):
            for slot in (0, 1):
                fill = branches[1 - slot]
                if isinstance(fill, Const) and fill.value <= ABSORBING:
                    yield slot + 1


def _is_maximum(lifter: Lifter, m: Expr, x: Expr, axis: sympy.Symbol) -> bool:
    """Whether m is the maximum of x over its row or over more; of x before its masks, too."""
    for reduced in _values(lifter, m):
        # A maximum that is kept above a number is as finite.
        while (limited := limited_by_number(reduced, "max")) is not None and limited[1] <= _HIGHEST_LIMIT:
            reduced = _opened(lifter, limited[0])
        bound: dict[sympy.Symbol, sympy.Expr] = {}
        while isinstance(reduced, Reduce) and reduced.kind == "max":
            bound[reduced.axis] = reduced.extent
            reduced = reduced.arg
        if bound:
            return any(
                axis in places.values() and _covers(lifter, bound, places)
                for inside in _values(lifter, reduced)
                for outside in _unmasked(lifter, x)
                if (places := same_element(inside, outside, bound.keys())) is not None
            )
    return False


def is_own_maximum(lifter: Lifter, m: Expr, x: Expr, axis: sympy.Symbol) -> bool:
    """Whether m is the maximum of all x along the axis, and of nothing else."""
    reduced = _opened(lifter, m)
    if not isinstance(reduced, Reduce) or reduced.kind != "max" or not same(reduced.extent, lifter.ranges[axis]):
        return False
    inside = list(_values(lifter, substitute(reduced.arg, {reduced.axis: axis})))
    return any(step in inside for step in _values(lifter, x))


def _covers(
    lifter: Lifter, bound: Mapping[sympy.Symbol, sympy.Expr], places: Mapping[sympy.Symbol, sympy.Expr]
) -> bool:
    """Whether a maximum over the bound symbols takes in every place: of a part of a row it may be -inf alone."""
    ranges = lifter.ranges
    return all(at in ranges and same(bound[symbol], ranges[at]) for symbol, at in places.items())


def limited_by_number(expr: Expr, *ops: str) -> tuple[Expr, float] | None:
    """(x, c) of an expression max(x, c) or min(x, c) with a number c, in either order."""
    if not isinstance(expr, Pointwise) or expr.op not in ops:
        return None
    for x, limit in (expr.args, expr.args[::-1]):
        if (c := number(limit)) is not None:
            return x, float(c)
    return None


def _unmasked(lifter: Lifter, x: Expr) -> Iterator[Expr]:
    """x, and what x is before something is added to it or masked in it."""
    for step in _values(lifter, x):
        yield step
        if isinstance(step, Pointwise) and step.op in ("where", "add"):
            left, right = step.args[-2:]
            for branch, other in ((left, right), (right, left)):
                if step.op == "add" or isinstance(other, Const):
                    yield from _values(lifter, branch)


def _steps(lifter: Lifter, expr: Expr, look: Look = Lifter.expand) -> Iterator[Expr]:
    """The expression, and what it is seen through one operator after the other."""
    yield expr
    for _ in range(_STEPS):
        opened = _expanded(lifter, expr, look) if isinstance(expr, Load) else None
        if opened is None:
            return
        expr = opened
        yield expr


def _values(lifter: Lifter, expr: Expr) -> Iterator[Expr]:
    """The same for the value alone: a shift has no gradient, so it may be detached."""
    return _steps(lifter, expr, Lifter.look_behind)


def _opened(lifter: Lifter, expr: Expr) -> Expr:
    *_, last = _values(lifter, expr)
    return last


def _expanded(lifter: Lifter, load: Load, look: Look = Lifter.expand) -> Expr | None:
    try:
        return look(lifter, load)
    except CannotLift:
        return None


def same_element(
    inside: Expr, outside: Expr, bound: AbstractSet[sympy.Symbol]
) -> dict[sympy.Symbol, sympy.Expr] | None:
    """Where the bound symbols of `inside` have to stand for it to be `outside`; None where nothing makes them equal."""
    places: dict[sympy.Symbol, sympy.Expr] = {}

    def at(i: sympy.Expr, o: sympy.Expr) -> bool:
        for symbol in i.free_symbols & bound:
            if not (rest := i - symbol).free_symbols & bound:
                there = sympy.expand(o - rest)
                return places.setdefault(symbol, there) == there
        return bool(i.xreplace(places) == o)

    def equal(i: Expr, o: Expr) -> bool:
        match i, o:
            case Load(), Load():
                same = i.tensor == o.tensor and len(i.indices) == len(o.indices)
                return same and all(at(a, b) for a, b in zip(i.indices, o.indices, strict=True))
            case Index(), Index():
                return at(i.value, o.value)
            case Pointwise(), Pointwise():
                return i.op == o.op and all(equal(a, b) for a, b in zip(i.args, o.args, strict=True))
        return i == o

    return places if equal(inside, outside) else None


def same_value(lifter: Lifter, a: Expr, b: Expr) -> bool:
    """Whether two expressions are the same element, seen through the operators that made them."""
    others = list(_steps(lifter, b))
    return any(step in others for step in _steps(lifter, a))
