"""Products of spans of the weights, each with values of its own, that are added: one product with all of the values.

p[:, :n] @ v1 + p[:, n:] @ v2 is p @ cat([v1, v2]), as where scores beside scores were one softmax.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import sympy

from flashfuse.kernels.expr import Dot, Expr, Load, Pointwise
from flashfuse.kernels.normal import substitute
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.patterns.joined import Span, in_order, merged, put_together, steps
from flashfuse.patterns.lift import Lifter
from flashfuse.patterns.opened import opened_or_none
from flashfuse.patterns.shift import same_element


def joined_products(lifter: Lifter, expr: Expr) -> Dot | None:
    """The product of all columns of weights that a sum of products of spans of them is; None for other sums."""
    dots = _addends(lifter, expr) if isinstance(expr, Pointwise) else None
    if dots is None or len({dot.dtype for dot in dots}) != 1:
        return None
    first = next((dot for dot in dots if dot.extent != 1), None)
    if first is None:
        return None
    others = [dot for dot in dots if dot is not first]
    for weights, values in ((first.lhs, first.rhs), (first.rhs, first.lhs)):
        for span, element in _spans_of(lifter, weights, first):
            found = [x for dot in others if (x := _alike(lifter, dot, element, first.axis)) is not None]
            if len(found) == len(others):
                whole = _sum_of_parts(lifter, first, element, [(span, first, values), *found])
                if whole is not None:
                    return whole
    return None


def _addends(lifter: Lifter, expr: Expr) -> list[Dot] | None:
    """The products that are added; None where something else is."""
    top = opened_or_none(lifter, expr)
    if isinstance(top, Dot):
        return [top]
    if not isinstance(top, Pointwise) or top.op != "add":
        return None
    left, right = (_addends(lifter, a) for a in top.args)
    return None if left is None or right is None else [*left, *right]


def _spans_of(lifter: Lifter, weights: Expr, dot: Dot) -> Iterator[tuple[Span, Expr]]:
    """The spans that a product's weights may be of something's columns, and their element at column `dot.axis`."""
    for step in steps(lifter, weights):
        inner = step.args[0] if isinstance(step, Pointwise) and step.op in ROUNDINGS else step
        if isinstance(inner, Load) and (at := _counted(inner, dot.axis)) is not None:
            start = sympy.expand(at - dot.axis)
            yield Span(start, dot.extent), substitute(step, {dot.axis: sympy.expand(dot.axis - start)})


def _counted(load: Load, axis: sympy.Symbol) -> sympy.Expr | None:
    """The one index of a load that an axis is in, which it counts through."""
    found = [at for at in load.indices if axis in at.free_symbols]
    return found[0] if len(found) == 1 and axis not in (found[0] - axis).free_symbols else None


def _alike(lifter: Lifter, dot: Dot, element: Expr, axis: sympy.Symbol) -> tuple[Span, Dot, Expr] | None:
    """The span of the same weights that another product has, and its values. element: of the weights, at `axis`."""
    for weights, values in ((dot.lhs, dot.rhs), (dot.rhs, dot.lhs)):
        if dot.extent == 1:
            columns = (_column(step, element, axis) for step in steps(lifter, weights))
            at = next((c for c in columns if c is not None), None)
            if at is not None:
                return Span(at, dot.extent), dot, values
        for span, mine in _spans_of(lifter, weights, dot):
            if substitute(mine, {dot.axis: axis}) == element:
                return span, dot, values
    return None


def _column(one: Expr, element: Expr, axis: sympy.Symbol) -> sympy.Expr | None:
    """The column in which an element is `element`."""
    places = same_element(element, one, frozenset((axis,)))
    return None if places is None else places.get(axis)


def _sum_of_parts(lifter: Lifter, first: Dot, element: Expr, parts: Sequence[tuple[Span, Dot, Expr]]) -> Dot | None:
    """The product of all columns; element: of the weights, at column `first.axis`."""
    ordered = in_order([(span, (dot, values)) for span, dot, values in parts])
    if ordered is None:
        return None
    start = ordered[0][0].start
    total = sympy.expand(ordered[-1][0].end - start)
    j = lifter.symbol("j", total)
    spans = []
    for span, (dot, values) in ordered:
        here = Span(sympy.expand(span.start - start), span.length)
        spans.append((here, lifter.divided_again(substitute(values, {dot.axis: sympy.expand(j - here.start)}))))
    at_j = lifter.divided_again(substitute(element, {first.axis: sympy.expand(j + start)}))
    return Dot(first.dtype, at_j, put_together(merged(lifter, spans), j, first.dtype), j, total)
