"""Products of spans of the weights, each with values of its own, that are added: one product with all of the values.

p[:, :n] @ v1 + p[:, n:] @ v2 is p @ cat([v1, v2]), as where scores beside scores were one softmax.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import sympy

from flashfuse.kernels.expr import Dot, Expr, Load, Pointwise, free_symbols
from flashfuse.kernels.normal import substitute
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.patterns.joined import Span, in_order, merged, one_step, put_together
from flashfuse.patterns.lift import Lifter
from flashfuse.patterns.opened import opened_or_none


def joined_products(lifter: Lifter, expr: Expr) -> Dot | None:
    """The product of all columns of weights that a sum of products of spans of them is; None for other sums."""
    dots = _addends(lifter, expr) if isinstance(expr, Pointwise) else None
    if dots is None or len({dot.dtype for dot in dots}) != 1:
        return None
    first, *others = dots
    for weights, values in ((first.lhs, first.rhs), (first.rhs, first.lhs)):
        for part in _spans_of(lifter, weights, first):
            parts = [(*part, first, values), *(x for dot in others if (x := _alike(lifter, dot, part)) is not None)]
            if len(parts) == len(dots) and (whole := _sum_of_parts(lifter, parts)) is not None:
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
    step: Expr | None = weights
    while step is not None:
        inner = step.args[0] if isinstance(step, Pointwise) and step.op in ROUNDINGS else step
        if isinstance(inner, Load) and (at := _counted(inner, dot.axis)) is not None:
            start = sympy.expand(at - dot.axis)
            yield Span(start, dot.extent), substitute(step, {dot.axis: sympy.expand(dot.axis - start)})
        step = one_step(lifter, step)


def _counted(load: Load, axis: sympy.Symbol) -> sympy.Expr | None:
    """The one index of a load that an axis is in, which it counts through."""
    found = [at for at in load.indices if axis in at.free_symbols]
    return found[0] if len(found) == 1 and axis not in (found[0] - axis).free_symbols else None


def _alike(lifter: Lifter, dot: Dot, part: tuple[Span, Expr]) -> tuple[Span, Expr, Dot, Expr] | None:
    """Another product's part of the same weights, and its values."""
    for weights, values in ((dot.lhs, dot.rhs), (dot.rhs, dot.lhs)):
        for span, element in _spans_of(lifter, weights, dot):
            moved = {dot.axis: next(iter(free_symbols(part[1]) - free_symbols(element)), dot.axis)}
            if substitute(element, moved) == part[1]:
                return span, element, dot, values
    return None


def _sum_of_parts(lifter: Lifter, parts: Sequence[tuple[Span, Expr, Dot, Expr]]) -> Dot | None:
    ordered = in_order([(span, (element, dot, values)) for span, element, dot, values in parts])
    if ordered is None:
        return None
    base, (weights, first, _) = ordered[0]
    total = sympy.expand(ordered[-1][0].end - base.start)
    j = lifter.symbol("j", total)
    spans = []
    for span, (_, dot, values) in ordered:
        here = Span(sympy.expand(span.start - base.start), span.length)
        spans.append((here, lifter.divided_again(substitute(values, {dot.axis: sympy.expand(j - here.start)}))))
    at_j = lifter.divided_again(substitute(weights, {first.axis: sympy.expand(j + base.start)}))
    return Dot(first.dtype, at_j, put_together(merged(lifter, spans), j, first.dtype), j, total)
