"""Products of spans of the weights, each with values of its own, that are added: one product with all of the values.

p[:, :n] @ v1 + p[:, n:] @ v2 is p @ cat([v1, v2]), as where scores beside scores were one softmax. Products that are
multiplied by numbers or subtracted are scaled weights.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from itertools import accumulate

import sympy
import torch

from flashfuse.kernels.expr import Const, Dot, Expr, Load, Pointwise
from flashfuse.kernels.normal import number, pointwise, substitute
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.patterns.joined import Span, in_order, merged, put_together, steps
from flashfuse.patterns.lift import Lifter
from flashfuse.patterns.opened import opened_or_none
from flashfuse.patterns.operand import reciprocal
from flashfuse.patterns.shift import same_element

Factors = tuple[Expr, ...]

# Of factors that weights take, and of those beside float16 values.
_SIZES = ((2.0**-60, 2.0**60), (1.0, 2.0**15))


def joined_products(lifter: Lifter, expr: Expr) -> Dot | None:
    """The product of all columns of weights that a sum of products of spans of them is; None for other sums.

    What one of the products is multiplied by is a factor of its weights.
    """
    addends = _addends(lifter, expr) if isinstance(expr, Pointwise) else None
    if addends is None or len(addends) < 2 or len({dot.dtype for dot, _ in addends}) != 1:
        return None
    at = next((n for n, (dot, _) in enumerate(addends) if dot.extent != 1), None)
    if at is None:
        return None
    first, factors = addends.pop(at)
    for weights, values in ((first.lhs, first.rhs), (first.rhs, first.lhs)):
        for span, element in _spans_of(lifter, weights, first):
            parts = [(x, f) for dot, f in addends if (x := _alike(lifter, dot, element, first.axis)) is not None]
            if len(parts) != len(addends):
                continue
            if not all(scales(known, first.dtype) for known in (factors, *(known for _, known in parts))):
                return None
            whole = _sum_of_parts(lifter, first, element, [((span, first, values), factors), *parts])
            if whole is not None:
                return whole
    return None


def _addends(lifter: Lifter, expr: Expr) -> list[tuple[Dot, Factors]] | None:
    """The products that are added, each with what it is multiplied by; None where something else is."""
    top = opened_or_none(lifter, expr)
    match top:
        case Dot():
            return [(top, ())]
        case Pointwise(op="add" | "sub", args=(left, right)):
            one, other = _addends(lifter, left), _addends(lifter, right)
            if top.op == "sub":
                other = _times(other, Const(top.dtype, -1.0))
            return None if one is None or other is None else [*one, *other]
        case Pointwise(op="neg", args=(arg,)):
            return _times(_addends(lifter, arg), Const(top.dtype, -1.0))
        case Pointwise(op="mul", args=(left, right)):
            found = _times(_addends(lifter, left), right)
            return _times(_addends(lifter, right), left) if found is None else found
        case Pointwise(op="div", args=(left, right)):
            return _times(_addends(lifter, left), reciprocal(right, top.dtype))
    return None


def _times(addends: list[tuple[Dot, Factors]] | None, factor: Expr) -> list[tuple[Dot, Factors]] | None:
    return None if addends is None else [(dot, (*known, factor)) for dot, known in addends]


def scales(factors: Factors, dtype: torch.dtype) -> bool:
    """Whether factors of a product may be one of its weights: numbers, by which no weight and no sum overflows.

    A tensor may hold an infinity, which the product is multiplied by and no weight that is 0; and weights of float16
    that were made smaller would lose digits that the product keeps.
    """
    sizes = (abs(value) if (value := number(factor)) is not None else math.inf for factor in factors)
    least, most = _SIZES[dtype == torch.float16]
    return all(least <= size <= most for size in accumulate(sizes, operator.mul))


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


def _sum_of_parts(
    lifter: Lifter, first: Dot, element: Expr, parts: Sequence[tuple[tuple[Span, Dot, Expr], Factors]]
) -> Dot | None:
    """The product of all columns; element: of the weights, at column `first.axis`."""
    ordered = in_order([(span, (dot, values, factors)) for (span, dot, values), factors in parts])
    if ordered is None:
        return None
    start = ordered[0][0].start
    total = sympy.expand(ordered[-1][0].end - start)
    j = lifter.symbol("j", total)
    spans, scales = [], []
    for span, (dot, values, factors) in ordered:
        here = Span(sympy.expand(span.start - start), span.length)
        spans.append((here, lifter.divided_again(substitute(values, {dot.axis: sympy.expand(j - here.start)}))))
        scale: Expr = Const(first.dtype, 1.0)
        for factor in factors:
            scale = pointwise("mul", scale, factor, dtype=first.dtype)
        scales.append((here, scale))
    at_j = lifter.divided_again(substitute(element, {first.axis: sympy.expand(j + start)}))
    if any(factors for _, factors in parts):
        at_j = pointwise("mul", at_j, put_together(scales, j, first.dtype), dtype=at_j.dtype)
    return Dot(first.dtype, at_j, put_together(merged(lifter, spans), j, first.dtype), j, total)
