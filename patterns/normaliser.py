"""Recognising the normaliser: softmax as one operator, or put together from exp, sum and div in any usual order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import sympy

from flashfuse.kernels.expr import Const, Expr, Index, Load, Pointwise, Reduce, Softmax, free_symbols
from flashfuse.kernels.normal import number, substitute
from flashfuse.patterns.exponential import as_exponential, is_normalised, masked_exponential, scaled
from flashfuse.patterns.indexing import never_negative, within
from flashfuse.patterns.lift import CannotLift, Lifter
from flashfuse.patterns.opened import open_up, opened_or_none, seen_through
from flashfuse.patterns.shift import is_own_maximum, limited_by_number, same_element, same_value
from flashfuse.patterns.summed import as_sum

POWERS = frozenset({"pow", "__pow__", "__rpow__", "float_power"})
# Operators that a normaliser starts from, by their bare names; so do powers of a number.
NORMALISERS = frozenset({
    "softmax", "_softmax", "_safe_softmax", "_masked_softmax", "softmin", "log_softmax", "special_softmax",
    "gumbel_softmax", "exp", "exp_", "exp2", "exp2_", "special_exp2", "logsumexp",
})  # fmt: skip
# Those of them that are no normaliser alone, beside powers of a number.
PARTIAL = frozenset({"exp", "exp_", "exp2", "exp2_", "special_exp2", "logsumexp", *POWERS})


@dataclass(frozen=True)
class Normalised:
    """exp(arg) / (sum over the softmax's axis of exp(arg) + the sum of exp(sink) over `sinks`).

    subtracted: what eager code takes from the scores before their exponentials: the row's own "maximum", after which no
    row's sum is 0; the "logarithm" of the sum, which large scores absorb; "nothing"; or something "else".
    masked: whether terms were set to 0 that another maximum may be of, so that data decide whether a row's sum is 0.
    """

    softmax: Softmax
    sinks: tuple[Expr, ...] = ()
    subtracted: str = "maximum"
    masked: bool = False


def as_softmax(lifter: Lifter, expr: Expr) -> Normalised | None:
    """The softmax that a quotient or an exponential stands for, None where it is neither.

    exp(x) / sum_j exp(x), exp(x) * (1 / sum_j exp(x)), exp(x - log(sum_j exp(x))) and exp(log_softmax(x)). Whatever is
    subtracted from x, usually the row maximum, changes nothing in the quotient if it is the same for all j.
    """
    if not isinstance(expr, Pointwise):
        return None
    if expr.op == "exp":
        return _exponential(lifter, expr.args[0])
    for numerator, denominator in quotients(lifter, expr):
        found = _quotient(lifter, numerator, denominator)
        if found is not None:
            return found
    return None


def quotients(lifter: Lifter, expr: Pointwise) -> Iterator[tuple[Expr, Expr]]:
    """What is divided by what."""
    if expr.op == "div":
        yield expr.args[0], expr.args[1]
    if expr.op != "mul":
        return
    for numerator, inverse in (expr.args, expr.args[::-1]):
        try:
            top = open_up(lifter, inverse)
        except CannotLift:
            continue
        if isinstance(top, Pointwise) and top.op == "div" and number(top.args[0]) == 1:
            yield numerator, top.args[1]


def _exponential(lifter: Lifter, exponent: Expr) -> Normalised | None:
    """exp of log_softmax(x), or of x - logsumexp(x)."""
    try:
        top = open_up(lifter, exponent)
        if not isinstance(top, Pointwise) or top.op not in ("log", "sub"):
            return None
        if top.op == "log":
            inner = open_up(lifter, top.args[0])
            return Normalised(inner) if isinstance(inner, Softmax) else None
        total, further = _logarithm_of_sum(lifter, top.args[1])
    except CannotLift:
        return None
    at = None if total is None else place(lifter, top.args[0], total.arg, total.axis)
    if total is None or at is None:
        return None
    sink = None if further is None else _relative_to(lifter, further, None, 1.0)
    if (sink is None) != (further is None):
        return None
    empty_row, sinks = ("nan", ()) if sink is None else ("zero", (sink,))
    softmax = Softmax(total.dtype, total.arg, total.axis, at, total.extent, empty_row)
    return Normalised(softmax, sinks, subtracted="logarithm")


def as_logsumexp(lifter: Lifter, expr: Expr) -> Reduce | None:
    """The sum over x whose log(sum exp(x)) an expression is, with x as its `arg`; None where it is none."""
    total, further = _logarithm_of_sum(lifter, expr)
    return total if further is None else None


def _logarithm_of_sum(lifter: Lifter, expr: Expr) -> tuple[Reduce | None, Expr | None]:
    """The same of log(sum exp(x) + rest), with what is added."""
    top = open_up(lifter, expr)
    if not isinstance(top, Pointwise) or top.op != "log":
        return None, None
    total, further = sum_and_rest(lifter, top.args[0])
    inner = None if total is None else open_up(lifter, total.arg)
    if total is None or not isinstance(inner, Pointwise) or inner.op != "exp":
        return None, None
    return Reduce(total.dtype, "sum", inner.args[0], total.axis, total.extent), further


def _quotient(lifter: Lifter, numerator: Expr, denominator: Expr) -> Normalised | None:
    """exp(x) over a sum of the same exp(x), and possibly of one more term that is the same for the whole row."""
    try:
        total, further = sum_and_rest(lifter, denominator)
        if total is None:
            return _limited_quotient(lifter, numerator, denominator)
        at = place(lifter, numerator, total.arg, total.axis)
        exponential = open_up(lifter, total.arg)
        exponent = masked_exponential(lifter, exponential, total.axis)
    except CannotLift:
        return None
    if at is None or exponent is None:
        return None
    whole, rate = exponent
    score, shift = _without_shift(lifter, whole, total.axis)
    again = is_normalised(lifter, total)
    if further is None:
        softmax = Softmax(total.dtype, scaled(score, rate), total.axis, at, total.extent)
        subtracted = "else" if again else _subtracted(lifter, shift, score, total.axis)
        return Normalised(softmax, subtracted=subtracted, masked=as_exponential(exponential) is None)
    if again:
        return None
    sink = _relative_to(lifter, further, shift, rate)
    if sink is None:
        score, shift = whole, None
        sink = _relative_to(lifter, further, None, rate)
    if sink is None:
        return None
    # exp(-inf - m) is 0 beside the further term, unless m is -inf as well.
    finite = shift is None or _has_lower_limit(lifter, shift)
    return Normalised(
        Softmax(total.dtype, scaled(score, rate), total.axis, at, total.extent, "zero" if finite else "nan"), (sink,)
    )


def _limited_quotient(lifter: Lifter, numerator: Expr, denominator: Expr) -> Normalised | None:
    """The quotient where a sum is kept above a number up to 1, as it is anyway: the row's own maximum adds a 1."""
    limited = limited_by_number(open_up(lifter, denominator), "max")
    found = None if limited is None or limited[1] > 1 else _quotient(lifter, numerator, limited[0])
    own = found is not None and found.subtracted == "maximum" and not found.masked and not found.sinks
    return found if own else None


def _subtracted(lifter: Lifter, shift: Expr | None, score: Expr, axis: sympy.Symbol) -> str:
    if shift is None:
        return "nothing"
    return "maximum" if is_own_maximum(lifter, shift, score, axis) else "else"


def _has_lower_limit(lifter: Lifter, shift: Expr) -> bool:
    """Whether a number keeps the shift finite where the whole row is -inf."""
    top = opened_or_none(lifter, shift)
    return top is not None and limited_by_number(top, "max") is not None


def sum_and_rest(lifter: Lifter, denominator: Expr) -> tuple[Reduce | None, Expr | None]:
    """The sum over a row in a denominator, and what is added to it."""
    top = as_sum(lifter, open_up(lifter, denominator))
    if isinstance(top, Reduce) and top.kind == "sum":
        return top, None
    if isinstance(top, Pointwise) and top.op == "add":
        for part, rest in (top.args, top.args[::-1]):
            inner = opened_or_none(lifter, part)
            inner = None if inner is None else as_sum(lifter, inner)
            if isinstance(inner, Reduce) and inner.kind == "sum" and inner.axis not in free_symbols(rest):
                return inner, rest
    return None, None


def _relative_to(lifter: Lifter, term: Expr, shift: Expr | None, rate: float) -> Expr | None:
    """The score whose exponential `term` is where `shift` was subtracted from all scores; None where it is none.

    rate: what scores and shift are multiplied by in their exponentials.
    Softmax-plus-one is the term 1 without a shift and exp(-shift) with one: the score 0.
    """
    top = opened_or_none(lifter, term)
    if top is None:
        return None
    value = number(top)
    if value is not None:
        return Const(top.dtype, math.log(value)) if value > 0 and shift is None else None
    exponential = as_exponential(top)
    if exponential is None:
        return None
    if shift is None:
        return scaled(*exponential)
    exponent = opened_or_none(lifter, exponential[0])
    match exponent:
        case Pointwise(op="neg", args=(m,)) if exponential[1] == rate and same_value(lifter, m, shift):
            return Const(exponent.dtype, 0.0)
        case Pointwise(op="sub", args=(score, m)) if exponential[1] == rate and same_value(lifter, m, shift):
            return scaled(score, rate)
    return None


def place(lifter: Lifter, above: Expr, below: Expr, axis: sympy.Symbol) -> sympy.Expr | None:
    """Where on the summed axis `above` stands, if it is `below` there, seen through the loads of either.

    It may be all of one part of what was put together along that axis, as scores beside a sink are.
    """
    for upper, (lower, chosen) in itertools.product(_steps(lifter, above), [*_parts(lifter, below, axis)]):
        at = _place(upper, lower, axis)
        if at is not None and all(_holds(choice, axis, at, lifter) for choice in chosen):
            return at
    return None


def _place(upper: Expr, lower: Expr, axis: sympy.Symbol) -> sympy.Expr | None:
    for at in free_symbols(upper) - free_symbols(lower):
        if substitute(lower, {axis: at}) == upper:
            return at
    places = same_element(lower, upper, {axis})
    return None if places is None else places.get(axis)


# (i, n, b) of a choice by a position: whether i < n is b.
Choice = tuple[sympy.Expr, sympy.Expr, bool]


def _parts(lifter: Lifter, expr: Expr, axis: sympy.Symbol) -> Iterator[tuple[Expr, tuple[Choice, ...]]]:
    """The steps of an expression and of its branches, with the choices that lead there."""
    for step in _steps(lifter, expr):
        yield step, ()
        match step:
            case Pointwise(op="where", args=(Pointwise(op="lt", args=(Index(value=i), Index(value=n))), yes, no)):
                for branch, kept in ((yes, True), (no, False)) if axis in i.free_symbols else ():
                    yield from ((part, ((i, n, kept), *more)) for part, more in _parts(lifter, branch, axis))


def _holds(choice: Choice, axis: sympy.Symbol, at: sympy.Expr, lifter: Lifter) -> bool:
    i, n, kept = choice
    i = i.xreplace({axis: at})
    return within(i, n, lifter.ranges) if kept else never_negative(i - n, lifter.ranges)


def _steps(lifter: Lifter, expr: Expr) -> Iterator[Expr]:
    """An expression, and it again for each load expanded, also as what an exponential is of."""
    return seen_through(lifter, expr, as_exponential)


def _without_shift(lifter: Lifter, score: Expr, axis: sympy.Symbol) -> tuple[Expr, Expr | None]:
    """(x, m) from x - m, where m is the same for the whole row; (score, None) where nothing is subtracted."""
    top = score
    while True:
        if isinstance(top, Pointwise) and top.op == "sub" and axis not in free_symbols(top.args[1]):
            return top.args[0], top.args[1]
        if not isinstance(top, Load):
            return score, None
        try:
            top = lifter.expand(top)
        except CannotLift:
            return score, None
