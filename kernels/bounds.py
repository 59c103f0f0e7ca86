"""Which keys of a query tile a predicate over positions concerns: loop bounds as expressions.

A predicate is read by one rule per operator. A comparison in which kv_idx occurs once is solved for it, step by step
from the outside: `kv_idx // 8 <= q_idx // 8` is `kv_idx <= q_idx // 8 * 8 + 7`. The right side's least and greatest
value over the tile's queries then say where the comparison is false throughout and where it is true throughout.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy

from flashfuse.kernels.evaluate import evaluate_index
from flashfuse.kernels.expr import Const, Expr, Index, Pointwise
from flashfuse.kernels.normal import FALSE, TRUE, index, pointwise
from flashfuse.kernels.solve import Extent, extremes, solved
from flashfuse.kernels.spec import KV_IDX, KV_LEN, Q_IDX

# The query tile [q_start, q_stop) that loop bounds are written for; never empty.
Q_START = sympy.Symbol("q_start", integer=True, nonnegative=True)
Q_STOP = sympy.Symbol("q_stop", integer=True, positive=True)

QUERY_TILE: Mapping[sympy.Symbol, Extent] = {Q_IDX: (Q_START, Q_STOP - 1)}


class KvRange(NamedTuple):
    """For one query tile: keys outside [start, end) are masked, keys in [full_start, full_end) are not.

    0 <= start <= full_start <= full_end <= end <= kv_len.
    """

    start: int
    full_start: int
    full_end: int
    end: int


@dataclass(frozen=True)
class Span:
    """The keys low <= kv_idx < high; None where nothing bounds them. The bounds may lie anywhere."""

    low: Expr | None = None
    high: Expr | None = None


@dataclass(frozen=True)
class Bounds:
    """Outside `visited` a predicate is false for every query of the tile, inside `full` true for every one.

    `full` is None where no key is known to be.
    """

    visited: Span
    full: Span | None


ALL = Bounds(Span(), Span())
NONE = Bounds(Span(high=index(0)), None)
UNKNOWN = Bounds(Span(), None)
_CONSTANT: Mapping[Expr, Bounds] = {TRUE: ALL, FALSE: NONE}

Steps = tuple[tuple[sympy.Symbol, Expr], ...]


def minimum(a: Expr, b: Expr) -> Expr:
    return _extreme("min", a, b)


def maximum(a: Expr, b: Expr) -> Expr:
    return _extreme("max", a, b)


def _extreme(op: str, a: Expr, b: Expr) -> Expr:
    if isinstance(a, Index) and isinstance(b, Index):
        difference = sympy.expand(a.value - b.value)
        if difference.is_nonnegative:
            return a if op == "max" else b
        if difference.is_nonpositive:
            return b if op == "max" else a
    return pointwise(op, a, b)


class Reader:
    """Reads predicates in normal form (`predicate.normal`). `steps` names the intermediate values, in order."""

    def __init__(self) -> None:
        self.steps: list[tuple[sympy.Symbol, Expr]] = []

    def read(self, predicate: Expr) -> Bounds:
        rule = _RULES.get(predicate.op) if isinstance(predicate, Pointwise) else None
        return _CONSTANT.get(predicate, UNKNOWN) if rule is None else rule(self, predicate)

    def named(self, value: Expr | None) -> Expr | None:
        """The value under a name of its own, unless it is a formula anyway."""
        if value is None or isinstance(value, Index):
            return value
        name = sympy.Symbol(f"b{len(self.steps)}", integer=True)
        self.steps.append((name, value))
        return index(name)

    def both(self, a: Span, b: Span) -> Span:
        """The keys in both spans."""
        low, high = _present(maximum, a.low, b.low), _present(minimum, a.high, b.high)
        return Span(self.named(low), self.named(high))

    def hull(self, a: Span, b: Span) -> Span:
        """A span around the keys of both."""
        low = None if a.low is None or b.low is None else minimum(a.low, b.low)
        high = None if a.high is None or b.high is None else maximum(a.high, b.high)
        return Span(self.named(low), self.named(high))

    def joined(self, a: Span, b: Span) -> Span:
        """The keys in either span where those touch, the longer span where they do not."""
        if Span() in (a, b):
            return Span()
        (a_low, a_high), (b_low, b_high) = (self._clamped(span) for span in (a, b))
        lengths = pointwise("sub", a_high, a_low), pointwise("sub", b_high, b_low)
        touching = pointwise("le", maximum(a_low, b_low), minimum(a_high, b_high))
        low, high = (
            pointwise("where", touching, outer, pointwise("where", pointwise("ge", *lengths), mine, other))
            for outer, mine, other in (
                (minimum(a_low, b_low), a_low, b_low),
                (maximum(a_high, b_high), a_high, b_high),
            )
        )
        return Span(self.named(low), self.named(high))

    def _clamped(self, span: Span) -> tuple[Expr, Expr]:
        zero, kv_len = index(0), index(KV_LEN)
        low = zero if span.low is None else self.named(maximum(span.low, zero))
        high = kv_len if span.high is None else self.named(minimum(span.high, kv_len))
        assert low is not None
        assert high is not None
        return low, high


def _present(combine: Callable[[Expr, Expr], Expr], a: Expr | None, b: Expr | None) -> Expr | None:
    return combine(a, b) if a is not None and b is not None else a if b is None else b


def _and(reader: Reader, predicate: Pointwise) -> Bounds:
    a, b = (reader.read(arg) for arg in predicate.args)
    full = None if a.full is None or b.full is None else reader.both(a.full, b.full)
    return Bounds(reader.both(a.visited, b.visited), full)


def _or(reader: Reader, predicate: Pointwise) -> Bounds:
    a, b = (reader.read(arg) for arg in predicate.args)
    full = reader.joined(a.full, b.full) if a.full is not None and b.full is not None else a.full or b.full
    return Bounds(reader.hull(a.visited, b.visited), full)


def _order(reader: Reader, predicate: Pointwise) -> Bounds:
    left, right = predicate.args
    if not (isinstance(left, Index) and isinstance(right, Index)):
        return UNKNOWN
    if not (left.value - right.value).has(KV_IDX):
        return _of_queries(reader, predicate.op, left.value, right.value)
    line = solved(predicate.op, left.value, right.value)
    extent = None if line is None else extremes(line.at, QUERY_TILE)
    if line is None or extent is None:
        return UNKNOWN
    least, greatest = extent
    if line.upper:
        return Bounds(Span(None, index(greatest + 1)), Span(None, index(least + 1)))
    return Bounds(Span(index(least), None), Span(index(greatest), None))


def _of_queries(reader: Reader, op: str, left: sympy.Expr, right: sympy.Expr) -> Bounds:
    """A comparison without kv_idx: all keys or none."""
    slack = _slack(op, left, right)
    extent = extremes(slack, QUERY_TILE)
    if extent is None:
        return UNKNOWN
    spans = []
    for value in reversed(extent):
        holds = pointwise("ge", index(value), index(0))
        spans.append(Span(reader.named(pointwise("where", holds, index(0), index(KV_LEN)))))
    return Bounds(*spans)


def by_positions(predicate: Expr) -> bool:
    """Whether positions tell in which tiles all of `predicate` holds."""
    return Reader().read(predicate).full is not None


def slack_of(predicate: Expr) -> sympy.Expr | None:
    """A comparison of positions holds where this is at least 0; None where `predicate` is something else."""
    match predicate:
        case Pointwise(op="lt" | "le" | "gt" | "ge" as op, args=(Index(value=left), Index(value=right))):
            return _slack(op, left, right)
    return None


def _slack(op: str, left: sympy.Expr, right: sympy.Expr) -> sympy.Expr:
    return sympy.expand(right - left if op in ("lt", "le") else left - right) - (1 if op in ("lt", "gt") else 0)


def _equal(reader: Reader, predicate: Pointwise) -> Bounds:
    return reader.read(pointwise("and", *(pointwise(op, *predicate.args) for op in ("le", "ge"))))


def _unequal(reader: Reader, predicate: Pointwise) -> Bounds:
    return reader.read(pointwise("or", *(pointwise(op, *predicate.args) for op in ("lt", "gt"))))


# What a predicate that no rule reads says about keys: nothing.
_RULES: Mapping[str, Callable[[Reader, Any], Bounds]] = {
    "and": _and,
    "or": _or,
    "lt": _order,
    "le": _order,
    "gt": _order,
    "ge": _order,
    "eq": _equal,
    "ne": _unequal,
}


# --------------------------------------------------------------------------------------------------------------------
# The bounds as a program

_NAMES = tuple(sympy.Symbol(name, integer=True) for name in KvRange._fields)


@dataclass(frozen=True)
class BoundsProgram:
    """Statements that compute a `KvRange`, the last four its fields. They read the query tile, sizes, batch positions.

    bounded: whether they may leave out any key.
    """

    steps: Steps
    bounded: bool

    @staticmethod
    def of(reader: Reader, visited: Span, full: Span | None) -> BoundsProgram:
        """The program of the spans that `reader` found."""
        zero, kv_len = index(0), index(KV_LEN)
        start, full_start, full_end, end = (index(name) for name in _NAMES)
        first = zero if visited.low is None else minimum(maximum(visited.low, zero), kv_len)
        last = kv_len if visited.high is None else maximum(minimum(visited.high, kv_len), start)
        if full is None:
            full = Span(high=start)
        full_first = start if full.low is None else minimum(maximum(full.low, start), end)
        full_last = end if full.high is None else maximum(minimum(full.high, end), full_start)
        values = {start: first, end: last, full_start: full_first, full_end: full_last}
        steps = (*reader.steps, *((_symbol(name), value) for name, value in values.items()))
        return BoundsProgram(steps, visited != Span())

    def kv_range(self, values: Mapping[sympy.Symbol, int]) -> KvRange:
        """The bounds as integers. `values` gives q_start, q_stop, kv_len and every other symbol of the program."""
        known = dict(values)
        for name, value in self.steps:
            known[name] = _integer(value, known)
        return KvRange(*(known[name] for name in _NAMES))

    def depends_on(self, symbols: set[sympy.Symbol], results: tuple[str, ...] = KvRange._fields) -> bool:
        """Whether any of the `results` is computed from any of the symbols."""
        reached = {name for name in _NAMES if name.name in results}
        for name, value in reversed(self.steps):
            if name in reached:
                reached |= _symbols(value)
        return bool(reached & symbols)


def _symbol(name: Index) -> sympy.Symbol:
    assert isinstance(name.value, sympy.Symbol)
    return name.value


def _symbols(value: Expr) -> set[sympy.Symbol]:
    if isinstance(value, Index):
        return set(value.value.free_symbols)
    return set().union(*(_symbols(child) for child in value.children))


_INTEGER: Mapping[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "min": min,
    "max": max,
    "le": operator.le,
    "ge": operator.ge,
    "where": lambda condition, yes, no: yes if condition else no,
}


def _integer(value: Expr, known: Mapping[sympy.Symbol, int]) -> Any:
    match value:
        case Index(value=number):
            return evaluate_index(number, known)
        case Const(value=number):
            return number
        case Pointwise(op=op, args=args):
            return _INTEGER[op](*(_integer(a, known) for a in args))
    raise TypeError(f"bounds hold no {type(value).__name__}")
