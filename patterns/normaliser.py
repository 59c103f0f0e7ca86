"""Recognising the normaliser: softmax as one operator, or put together from exp, sum and div in any usual order."""

from __future__ import annotations

import sympy

from flashfuse.kernels.expr import Const, Expr, Load, Pointwise, Reduce, Softmax, free_symbols
from flashfuse.kernels.normal import substitute
from flashfuse.patterns.lift import CannotLift, Lifter

# Operators that a normaliser starts from, by their bare names.
NORMALISERS = frozenset({"softmax", "_softmax", "_safe_softmax", "log_softmax", "exp", "special_softmax"})


def open_up(lifter: Lifter, expr: Expr) -> Expr:
    """Expand a load until something other than a load is on top. Raises CannotLift."""
    while isinstance(expr, Load):
        expr = lifter.expand(expr)
    return expr


def as_softmax(lifter: Lifter, expr: Expr) -> Softmax | None:
    """The softmax that exp(x) / sum_j exp(x) or exp(x) * (1 / sum_j exp(x)) stands for, None where it is neither.

    Whatever is subtracted from x, usually the row maximum, changes nothing in the quotient if it is the same for all j.
    """
    if not isinstance(expr, Pointwise) or expr.op not in ("div", "mul"):
        return None
    for numerator, below in (expr.args, expr.args[::-1]) if expr.op == "mul" else (expr.args,):
        denominator = below if expr.op == "div" else _reciprocal_of(lifter, below)
        if denominator is None:
            continue
        found = _quotient(lifter, numerator, denominator)
        if found is not None:
            return found
    return None


def _reciprocal_of(lifter: Lifter, expr: Expr) -> Expr | None:
    try:
        top = open_up(lifter, expr)
    except CannotLift:
        return None
    if isinstance(top, Pointwise) and top.op == "div" and isinstance(top.args[0], Const) and top.args[0].value == 1:
        return top.args[1]
    return None


def _quotient(lifter: Lifter, numerator: Expr, denominator: Expr) -> Softmax | None:
    """Compare exp(x) above and below, opening both in step until they are the same element at two places of the row."""
    try:
        total = open_up(lifter, denominator)
        if not isinstance(total, Reduce) or total.kind != "sum":
            return None
        above, below = numerator, total.arg
        at = _place(above, below, total.axis)
        while at is None:
            above, below = _one_step(lifter, above), _one_step(lifter, below)
            at = _place(above, below, total.axis)
        exponential = open_up(lifter, below)
    except CannotLift:
        return None
    if not isinstance(exponential, Pointwise) or exponential.op != "exp":
        return None
    score = _without_shift(lifter, exponential.args[0], total.axis)
    return Softmax(total.dtype, score, total.axis, at, total.extent)


def _one_step(lifter: Lifter, expr: Expr) -> Expr:
    if isinstance(expr, Load):
        return lifter.expand(expr)
    if isinstance(expr, Pointwise) and expr.op == "exp" and isinstance(expr.args[0], Load):
        return Pointwise(expr.dtype, "exp", (lifter.expand(expr.args[0]),))
    raise CannotLift(None, "is not an exponential")


def _place(above: Expr, below: Expr, axis: sympy.Symbol) -> sympy.Symbol | None:
    """Where on the summed axis `above` stands, if it is `below` there."""
    for at in free_symbols(above) - free_symbols(below):
        if substitute(below, {axis: at}) == above:
            return at
    return None


def _without_shift(lifter: Lifter, score: Expr, axis: sympy.Symbol) -> Expr:
    """x from x - m, where m is the same for every element of the row."""
    top = score
    while True:
        if isinstance(top, Pointwise) and top.op == "sub" and axis not in free_symbols(top.args[1]):
            return top.args[0]
        if not isinstance(top, Load):
            return score
        try:
            top = lifter.expand(top)
        except CannotLift:
            return score
