"""What the terms of a normaliser are e to the power of: exponentials to a base up to e, masked ones, probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator

import sympy
import torch

from flashfuse.kernels.expr import Const, Expr, Pointwise, Reduce, Softmax
from flashfuse.kernels.normal import const, number, pointwise, substitute
from flashfuse.patterns.lift import Lifter
from flashfuse.patterns.opened import open_up, opened_or_none


def as_exponential(expr: Expr) -> tuple[Expr, float] | None:
    """(x, c) of exp(c x) for 0 < c <= 1, also to a smaller base than e; None for any other expression.

    A factor above 1 would take the lowest number of a mask, which rows without a key share, to -inf.
    """
    match expr:
        case Pointwise(op="exp", args=(x,)):
            return x, 1.0
        case Pointwise(op="exp2", args=(x,)):
            return x, math.log(2.0)
        case Pointwise(op="pow", args=(base, x)) if 1 < (number(base) or 0) <= math.e:
            return x, math.log(number(base) or 0)
    return None


def scaled(x: Expr, rate: float) -> Expr:
    return pointwise("mul", x, const(rate), dtype=x.dtype)


def masked_exponential(lifter: Lifter, expr: Expr, axis: sympy.Symbol) -> tuple[Expr, float] | None:
    """`as_exponential` of a term that a mask makes 0, which is e to -inf, and of probabilities normalised once more.

    The sum that a softmax has divided by is one for all of its axis, and so none of the quotient.
    """
    match expr:
        case Softmax(arg=arg, axis=over, at=at) if at == axis:
            return substitute(arg, {over: axis}), 1.0
        case Pointwise(op="where" | "mul"):
            return _product(lifter, expr) or _zeroed(lifter, expr, axis)
    return as_exponential(expr)


def _product(lifter: Lifter, expr: Pointwise) -> tuple[Expr, float] | None:
    """Of two exponentials."""
    if expr.op != "mul":
        return None
    tops = [opened_or_none(lifter, a) for a in expr.args]
    both = [scaled(*x) for top in tops if top is not None and (x := as_exponential(top)) is not None]
    return (pointwise("add", *both), 1.0) if len(both) == 2 else None


def _zeroed(lifter: Lifter, expr: Pointwise, axis: sympy.Symbol) -> tuple[Expr, float] | None:
    """Of a term that is 0 where a mask says so."""
    for kept, x, other in _choices(lifter, expr):
        inner = masked_exponential(lifter, open_up(lifter, x), axis) if _number(lifter, other) == 0 else None
        if inner is not None:
            score, rate = inner
            return pointwise("where", kept, score, Const(score.dtype, -math.inf), dtype=score.dtype), rate
    return None


def _choices(lifter: Lifter, expr: Pointwise) -> Iterator[tuple[Expr, Expr, Expr]]:
    """A condition, what an expression is where it holds, and what elsewhere."""
    if expr.op == "where":
        kept, yes, no = expr.args
        yield from ((kept, yes, no), (pointwise("not", kept), no, yes))
        return
    for x, mask in (expr.args, expr.args[::-1]):
        condition = _kept_by(lifter, mask)
        if condition is not None:
            yield condition, x, const(0.0, expr.dtype)


def _kept_by(lifter: Lifter, mask: Expr) -> Expr | None:
    """The condition where a mask of ones and zeros is one; None for what may hold other numbers."""
    if mask.dtype == torch.bool:
        return mask
    match opened_or_none(lifter, mask):
        case Pointwise(op="where", args=(kept, yes, no)):
            numbers = _number(lifter, yes), _number(lifter, no)
            if numbers in ((1, 0), (0, 1)):
                return kept if numbers[0] == 1 else pointwise("not", kept)
    return None


def _number(lifter: Lifter, expr: Expr) -> float | int | None:
    """The number that every element of a tensor is."""
    top = opened_or_none(lifter, expr)
    return None if top is None else number(top)


def is_normalised(lifter: Lifter, total: Reduce) -> bool:
    """Whether what is summed are probabilities, masked perhaps."""
    pending = [total.arg]
    while pending:
        top = opened_or_none(lifter, pending.pop())
        if isinstance(top, Softmax):
            return top.at == total.axis
        if isinstance(top, Pointwise) and top.op in ("mul", "where"):
            pending += top.args
    return False
