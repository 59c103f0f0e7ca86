"""Scores put together along the keys: parts of the same queries are one product with the keys put together.

cat([q @ k1.T, q @ k2.T], -1) is q @ cat([k1, k2]).T, as of memory or prefix tokens beside a sequence. Each part of the
keys is an operand, and all of them are one tensor before the attention: a copy of the keys' size, in the place of one
of the scores'.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import sympy
import torch
from torch import fx

from flashfuse.kernels.expr import Const, Dot, Expr, Index, Load, Pointwise, Product, loads
from flashfuse.kernels.normal import FALSE, index, pointwise, rewrite, substitute
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.patterns.indexing import same, within
from flashfuse.patterns.lift import Lifter
from flashfuse.patterns.opened import seen_through
from flashfuse.patterns.operand import sizes_of
from flashfuse.patterns.refusal import Refused
from flashfuse.patterns.shift import same_value


@dataclass(frozen=True)
class Span:
    """The columns [start, start + length) of a row."""

    start: sympy.Expr
    length: sympy.Expr

    @property
    def end(self) -> sympy.Expr:
        return sympy.expand(self.start + self.length)

    def cut(self, at: sympy.Expr) -> tuple[Span, Span]:
        """The columns before one, and the others."""
        return Span(self.start, sympy.expand(at - self.start)), Span(at, sympy.expand(self.end - at))


@dataclass(frozen=True)
class Part:
    """What an element is in a span of columns, at column `span.start + at`."""

    span: Span
    at: sympy.Symbol
    element: Expr


def reaches_outside(lifter: Lifter, load: Load) -> bool:
    """Whether an index takes more values than its dimension has: only a choice around it keeps it inside."""
    ranges = lifter.ranges
    return any(
        (ranges[symbol] - size).is_positive
        for index, size in zip(load.indices, sizes_of(load), strict=True)
        for symbol in index.free_symbols & ranges.keys()
        if index.coeff(symbol, 1) == 1
    )


def stays_inside(lifter: Lifter, dot: Dot) -> bool:
    """Whether a product is one of queries and keys that there are, whatever a choice around it keeps."""
    read = (load for load in loads(dot) if isinstance(load, Load))
    return all(
        within(index, size, lifter.ranges)
        for load in read
        for index, size in zip(load.indices, sizes_of(load), strict=True)
    )


def cut_of(condition: Expr, j: sympy.Symbol) -> sympy.Expr | None:
    """The column from which on a condition of columns no longer holds; None for others."""
    match condition:
        case Pointwise(op="lt", args=(Index(value=at), Index(value=end))):
            cut = sympy.expand(end - at + j)
            return cut if j in at.free_symbols and j not in cut.free_symbols else None
    return None


def span_in(lifter: Lifter, dot: Dot, load: Load, j: sympy.Symbol) -> Span | None:
    """The columns j in which a load, of what makes a product, reads what there is; None where that is no span."""
    along = [(at, size) for at, size in zip(load.indices, sizes_of(load), strict=True) if j in at.free_symbols]
    if len(along) != 1:
        return None
    ((at, size),) = along
    start = sympy.expand(j - at)
    if j in start.free_symbols:
        return None
    span = Span(start, size)
    _, part = within_span(lifter, dot, span, j)
    return span if isinstance(part, Dot) and stays_inside(lifter, part) else None


def within_span(lifter: Lifter, expr: Expr, span: Span, j: sympy.Symbol) -> tuple[sympy.Symbol, Expr]:
    """A symbol that runs over a span, and the expression there."""
    at = lifter.symbol("j", span.length)
    return at, lifter.divided_again(substitute(expr, {j: sympy.expand(span.start + at)}))


def put_together(parts: Sequence[tuple[Span, Expr]], j: sympy.Symbol, dtype: torch.dtype) -> Expr:
    """The element at column j of what its spans, in order, are."""
    *before, (_, result) = parts
    for span, element in reversed(before):
        result = Pointwise(dtype, "where", (pointwise("lt", index(j), index(span.end)), element, result))
    return result


def parts_of(lifter: Lifter, expr: Expr, j: sympy.Symbol) -> tuple[Part, ...]:
    """What was put together, in order: an expression of all columns is one part."""
    spans: list[tuple[Span, Expr]] = []
    start: sympy.Expr = sympy.Integer(0)
    rest = expr
    while (choice := _first_of(rest, j)) is not None:
        end, first, rest = choice
        spans.append((Span(start, sympy.expand(end - start)), first))
        start = end
    if not spans:
        return (Part(Span(start, lifter.ranges[j]), j, expr),)
    spans.append((Span(start, sympy.expand(lifter.ranges[j] - start)), rest))
    return tuple(Part(span, *within_span(lifter, element, span, j)) for span, element in spans)


def elements(expr: Expr, j: sympy.Symbol) -> Iterator[Expr]:
    """What the parts of an expression are, at column j."""
    while (choice := _first_of(expr, j)) is not None:
        _, first, expr = choice
        yield first
    yield expr


def _first_of(expr: Expr, j: sympy.Symbol) -> tuple[sympy.Expr, Expr, Expr] | None:
    """(n, x, y) of an expression that is x in columns before n and y behind; None for others."""
    match expr:
        case Pointwise(op="where", args=(Pointwise(op="lt", args=(Index(value=at), Index(value=end))), first, rest)):
            return (end, first, rest) if at == j else None
    return None


def with_joined(
    lifter: Lifter, program: Expr, found: Sequence[tuple[Dot, fx.Node]], spans: Mapping[Dot, Span], j: sympy.Symbol
) -> tuple[Expr, list[tuple[Dot, fx.Node]], list[fx.Node]]:
    """The program over products of whole rows, those products, and the nodes that make further parts of one.

    spans: where products of a part of the columns are read. Raises Refused where parts make no whole.
    """
    groups: list[list[int]] = []
    for slot, (dot, _) in enumerate(found):
        group = next((g for g in groups if _are_parts(lifter, found[g[0]][0], dot, spans)), None)
        if group is None:
            groups.append([slot])
        else:
            group.append(slot)
    if len(groups) == len(found) and not any(dot in spans for dot, _ in found):
        return program, [*found], []
    new = {slot: number for number, group in enumerate(groups) for slot in group}
    whole = [(_whole(lifter, [found[slot] for slot in group], spans, j), found[group[0]][1]) for group in groups]
    further = [found[slot][1] for group in groups for slot in group[1:]]
    program = rewrite(program, lambda e: Product(e.dtype, new[e.slot]) if isinstance(e, Product) else None)
    return rewrite(program, _with_one_mask), whole, further


def _with_one_mask(expr: Expr) -> Expr | None:
    """where(in the first part, x, where(masked, fill, x)), and its like, as where(masked behind that part, fill, x)."""
    if not isinstance(expr, Pointwise) or expr.op != "where":
        return None
    first, *sides = expr.args
    for (one, fill, x), (other, again, same_x) in itertools.product(*map(_masked, sides)):
        if x == same_x and (fill == again or None in (fill, again)) and (fill or again) is not None:
            behind = pointwise("and", pointwise("not", first), other)
            masked = pointwise("or", pointwise("and", first, one), behind)
            return pointwise("where", masked, fill or again or x, x, dtype=expr.dtype)
    return None


def _masked(expr: Expr) -> Iterator[tuple[Expr, Expr | None, Expr]]:
    """The ways in which an expression is a number where something holds, and a score elsewhere."""
    if isinstance(expr, Pointwise) and expr.op == "where":
        masked, yes, no = expr.args
        if isinstance(yes, Const):
            yield masked, yes, no
        if isinstance(no, Const):
            yield pointwise("not", masked), no, yes
    yield FALSE, None, expr


def _are_parts(lifter: Lifter, one: Dot, other: Dot, spans: Mapping[Dot, Span]) -> bool:
    """Whether two products are of the same queries, each with some of the keys."""
    if one not in spans or other not in spans or (one.dtype, one.extent) != (other.dtype, other.extent):
        return False
    return same_value(lifter, substitute(other.lhs, {other.axis: one.axis}), one.lhs)


def _whole(lifter: Lifter, parts: Sequence[tuple[Dot, fx.Node]], spans: Mapping[Dot, Span], j: sympy.Symbol) -> Dot:
    first, node = parts[0]
    if first not in spans:
        return first
    ordered = in_order([(spans[dot], dot) for dot, _ in parts])
    if ordered is None or ordered[0][0].start != 0 or not same(ordered[-1][0].end, lifter.ranges[j]):
        told = "the softmax is over rows or columns beside the product's own, as of a second product"
        raise Refused("extra-columns", told, node)
    keys = [(span, substitute(dot.rhs, {dot.axis: first.axis})) for span, dot in ordered]
    return replace(first, rhs=put_together(merged(lifter, keys), j, first.rhs.dtype))


def merged(lifter: Lifter, parts: Sequence[tuple[Span, Expr]]) -> list[tuple[Span, Expr]]:
    """The parts, of which neighbours that are spans of one tensor are one."""
    found = [parts[0]]
    for span, element in parts[1:]:
        before, known = found[-1]
        common = next((step for step in steps(lifter, element) if step in [*steps(lifter, known)]), None)
        if common is None:
            found.append((span, element))
        else:
            found[-1] = Span(before.start, sympy.expand(span.end - before.start)), common
    return found


def steps(lifter: Lifter, expr: Expr) -> Iterator[Expr]:
    """An element, and it again for each load expanded, also within a rounding."""
    return seen_through(lifter, expr, lambda e: e.op in ROUNDINGS, draws=True)


T = TypeVar("T")


def in_order(parts: Sequence[tuple[Span, T]]) -> list[tuple[Span, T]] | None:
    """The parts, each beginning where the one before it ends; None where they do not follow each other."""
    firsts = [part for part in parts if not any(same(part[0].start, other.end) for other, _ in parts)]
    if len(firsts) != 1:
        return None
    left, ordered = [part for part in parts if part is not firsts[0]], firsts
    while left:
        following = [part for part in left if same(part[0].start, ordered[-1][0].end)]
        if len(following) != 1:
            return None
        left.remove(following[0])
        ordered += following
    return ordered
