"""What multiplies the values of a product: probabilities, seen through everything between normaliser and product.

Probabilities may be rounded, multiplied by what does not depend on them, set to zero where something is masked, cleared
of NaN, and dropped at random. A sum of several probabilities is several attentions of one output, since the product is
linear (https://arxiv.org/abs/2410.05258, equation 1). An extra column of the softmax that meets no value is a sink
(https://arxiv.org/abs/2309.17453, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

import sympy
import torch
from torch import fx

from flashfuse.kernels.expr import Const, Expr, Load, Pointwise, Reduce, Softmax
from flashfuse.kernels.normal import number, pointwise, substitute
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.patterns.blame import refuse_normaliser, refuse_opaque
from flashfuse.patterns.draw import DrawLoad, drawn
from flashfuse.patterns.lift import CannotLift, Lifter
from flashfuse.patterns.normaliser import Normalised, as_softmax
from flashfuse.patterns.opened import opened_or_none
from flashfuse.patterns.operand import exactly_promotes, reciprocal
from flashfuse.patterns.refusal import Refused, mixed
from flashfuse.patterns.shift import limited_by_number, same_value, without_shift


@dataclass(frozen=True)
class Weights:
    """The probabilities of one softmax at column j of the values, and what became of them.

    arg: the softmax's argument at column j; sinks: its arguments in columns that have no value. factors: what the
    probabilities are multiplied by. kept: conditions outside which they are replaced by 0. dropout: the random number
    that each is multiplied by. empty_row: what a row of only -inf gives. cleared: whether NaN is replaced by 0.
    subtracted, masked: see `Normalised`.
    """

    arg: Expr
    sinks: tuple[Expr, ...]
    empty_row: str
    subtracted: str = "maximum"
    factors: tuple[Expr, ...] = ()
    kept: tuple[Expr, ...] = ()
    dropout: DrawLoad | None = None
    cleared: bool = False
    masked: bool = False

    @property
    def largest(self) -> float:
        """What none of the weights exceeds without their factors."""
        return 1.0 if self.dropout is None else 1.0 / (1.0 - self.dropout.tensor.p)

    def times(self, factor: Expr) -> Weights:
        draws = drawn(factor)
        if not draws:
            return replace(self, factors=(*self.factors, factor))
        if draws != (factor,) or self.dropout is not None:
            raise Refused("dropout", "the probabilities are dropped at random twice", draws[0].tensor.node)
        return replace(self, dropout=draws[0])


@dataclass(frozen=True)
class Columns:
    """The axis that the weights are multiplied with the values over, and what lies behind it.

    j in [0, extent): the columns of the values. dtype: of the product. leads: nodes behind which a product lies.
    barren: what is known to hold no softmax.
    """

    lifter: Lifter
    j: sympy.Symbol
    extent: sympy.Expr
    dtype: torch.dtype
    leads: AbstractSet[fx.Node]
    barren: set[Expr] = field(default_factory=set)


class OtherAxis(Exception):
    """The softmax is not over the axis that is multiplied with the values."""

    def __init__(self, softmax: Softmax) -> None:
        super().__init__()
        self.softmax = softmax


def find_weights(columns: Columns, expr: Expr, passed: fx.Node | None = None) -> tuple[Weights, ...]:
    """The softmaxes whose sum the weights `expr` are; none where there is no softmax.

    passed: the node last looked through. Raises Refused, and OtherAxis.
    """
    if expr in columns.barren:
        return ()
    terms = _search(columns, expr, passed)
    if not terms:
        columns.barren.add(expr)
    return terms


def _search(columns: Columns, expr: Expr, passed: fx.Node | None) -> tuple[Weights, ...]:
    if isinstance(expr, Load):
        if not isinstance(expr.tensor, fx.Node):
            return ()
        try:
            return find_weights(columns, columns.lifter.expand(expr, draws=True), expr.tensor)
        except CannotLift as error:
            refuse_opaque(columns.lifter, error, expr.tensor, columns.leads)
            return ()
    if isinstance(expr, Softmax):
        return (_at_columns(columns, Normalised(expr)),)
    if isinstance(expr, Reduce):
        return _summed(columns, expr, passed)
    if not isinstance(expr, Pointwise):
        return ()
    if (found := as_softmax(columns.lifter, expr)) is not None:
        return (_at_columns(columns, found),)
    refuse_normaliser(columns.lifter, expr)
    if expr.op in ROUNDINGS:
        return _rounded(columns, expr, passed)
    return _RULES.get(expr.op, _other)(columns, expr, passed)


def _summed(columns: Columns, expr: Reduce, passed: fx.Node | None) -> tuple[Weights, ...]:
    """Refuse a sum or average of probabilities over another axis than their own, as over heads."""
    try:
        terms = find_weights(columns, expr.arg, passed)
    except OtherAxis:
        return ()
    if terms and passed is not None:
        raise mixed(passed, "probabilities", "before they meet the values")
    return ()


def _rounded(columns: Columns, expr: Pointwise, passed: fx.Node | None) -> tuple[Weights, ...]:
    terms = find_weights(columns, expr.args[0], passed)
    if terms and not exactly_promotes(columns.dtype, ROUNDINGS[expr.op]):
        raise Refused("rounded", f"the probabilities are rounded to {ROUNDINGS[expr.op]} on their way", passed)
    return terms


def _product(columns: Columns, expr: Pointwise, passed: fx.Node | None) -> tuple[Weights, ...]:
    left, right = (find_weights(columns, a, passed) for a in expr.args)
    if left and right:
        raise Refused("probability-factor", "the probabilities are multiplied with other probabilities", passed)
    return tuple(w.times(expr.args[1]) for w in left) or tuple(w.times(expr.args[0]) for w in right)


def _quotient(columns: Columns, expr: Pointwise, passed: fx.Node | None) -> tuple[Weights, ...]:
    terms = find_weights(columns, expr.args[0], passed)
    if not terms:
        return _other(columns, expr, passed)
    inverse = reciprocal(expr.args[1], expr.dtype)
    return tuple(w.times(inverse) for w in terms)


def _negated(columns: Columns, expr: Pointwise, passed: fx.Node | None) -> tuple[Weights, ...]:
    return tuple(w.times(Const(expr.dtype, -1.0)) for w in find_weights(columns, expr.args[0], passed))


def _sum(columns: Columns, expr: Pointwise, passed: fx.Node | None) -> tuple[Weights, ...]:
    left, right = (find_weights(columns, a, passed) for a in expr.args)
    if not left and not right:
        return ()
    if not left or not right:
        raise Refused("probability-term", "something is added to the probabilities before they meet the values", passed)
    sign = -1.0 if expr.op == "sub" else 1.0
    return (*left, *(w.times(Const(expr.dtype, sign)) for w in right))


def _choice(columns: Columns, expr: Pointwise, passed: fx.Node | None) -> tuple[Weights, ...]:
    """Probabilities replaced by 0: where they are NaN, or where a condition holds that does not depend on them."""
    condition, yes, no = expr.args
    for chosen, other, kept in ((yes, no, condition), (no, yes, pointwise("not", condition))):
        replacement = opened_or_none(columns.lifter, other)
        if replacement is None or number(replacement) != 0:
            continue
        terms = find_weights(columns, chosen, passed)
        if not terms:
            return ()
        if _is_not_nan(columns.lifter, kept, chosen):
            return _without_nan(terms, passed)
        return tuple(replace(w, kept=(*w.kept, kept)) for w in terms)
    return _other(columns, expr, passed)


def _is_not_nan(lifter: Lifter, condition: Expr, x: Expr) -> bool:
    """Whether the condition is that x, here possibly within the limits of its type, is not NaN."""
    while (limited := limited_by_number(x, "min", "max")) is not None:
        x = limited[0]
    opened, negated = opened_or_none(lifter, condition), False
    while isinstance(opened, Pointwise) and opened.op == "not":
        opened, negated = opened_or_none(lifter, opened.args[0]), not negated
    if not isinstance(opened, Pointwise) or opened.op != ("ne" if negated else "eq"):
        return False
    return opened.args[0] == opened.args[1] and same_value(lifter, opened.args[0], x)


def _without_nan(terms: tuple[Weights, ...], passed: fx.Node | None) -> tuple[Weights, ...]:
    """NaN is what a row without any key gives; such a row becomes zero."""
    if len(terms) > 1 or terms[0].factors:
        raise Refused("probability-factor", "the probabilities are cleared of NaN after another operation", passed)
    return (replace(terms[0], empty_row="zero", cleared=True),)


def _limit(columns: Columns, expr: Pointwise, passed: fx.Node | None) -> tuple[Weights, ...]:
    """A limit that no probability reaches."""
    if (limited := limited_by_number(expr, "min", "max")) is None:
        return _other(columns, expr, passed)
    terms = find_weights(columns, limited[0], passed)
    if len(terms) != 1 or terms[0].factors:
        return _other(columns, expr, passed)
    inside = limited[1] >= terms[0].largest if expr.op == "min" else limited[1] <= 0
    return terms if inside else _other(columns, expr, passed)


def _other(columns: Columns, expr: Pointwise, passed: fx.Node | None) -> tuple[Weights, ...]:
    """Refuse where a softmax is one of the arguments of a pointwise operator."""
    if any(find_weights(columns, a, passed) for a in expr.args):
        raise Refused(
            "probability-factor",
            f"the probabilities pass through `{expr.op}` with another value before they meet the values",
            passed,
        )
    return ()


_RULES = {
    "mul": _product, "div": _quotient, "neg": _negated, "add": _sum, "sub": _sum, "where": _choice, "min": _limit,
    "max": _limit,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Columns

_MOST_SINKS = 4


def _at_columns(columns: Columns, found: Normalised) -> Weights:
    """The softmax's argument at the values' column j, and in the columns that lie outside them."""
    softmax, lifter = found.softmax, columns.lifter
    before = sympy.expand(softmax.at - columns.j)
    moved = before.free_symbols & lifter.ranges.keys()
    if moved == {columns.j}:
        told = "the columns of the probabilities are put in another order before they meet the values"
        raise Refused("softmax-axis", f"{told}: the values can be put in that order instead")
    if moved:
        raise OtherAxis(softmax)
    behind = sympy.expand(softmax.extent - before - columns.extent)
    # A fully masked row gives NaN again once its maximum, -inf, is subtracted: only softmax's own rule may be read so.
    # A sink that is no column of the softmax is relative to its argument as it is.
    removable = softmax.empty_row == "nan" and not found.sinks
    shiftless = without_shift(lifter, softmax.arg, softmax.axis, columns.leads) if removable else None
    arg = shiftless or softmax.arg
    subtracted = "else" if shiftless and found.subtracted == "nothing" else found.subtracted
    masked = found.masked and subtracted == "else"
    if not (before.is_Integer and behind.is_Integer and before >= 0 and 0 <= behind <= _MOST_SINKS - before):
        raise Refused("extra-columns", f"the softmax has {softmax.extent} columns, and {columns.extent} meet values")
    outside = [*map(sympy.Integer, range(int(before))), *(before + columns.extent + n for n in range(int(behind)))]
    sinks = tuple(substitute(arg, {softmax.axis: at}) for at in outside)
    empty_row = "zero" if sinks else softmax.empty_row
    at_j, sinks = substitute(arg, {softmax.axis: softmax.at}), (*sinks, *found.sinks)
    return Weights(at_j, sinks, empty_row, subtracted, masked=masked)


def combined(sinks: tuple[Expr, ...]) -> Expr | None:
    """One score whose exponential is the sum of all of theirs; None where there are none."""
    if len(sinks) < 2:
        return sinks[0] if sinks else None
    values = [number(s) for s in sinks]
    if all(v is not None for v in values):
        largest = max(float(v) for v in values if v is not None)
        if math.isinf(largest):
            return Const(sinks[0].dtype, largest)
        total = sum(math.exp(float(v) - largest) for v in values if v is not None)
        return Const(sinks[0].dtype, largest + math.log(total))
    highest = sinks[0]
    for sink in sinks[1:]:
        highest = pointwise("max", highest, sink)
    # Sinks that are all -inf have no difference.
    highest = pointwise("max", highest, Const(highest.dtype, torch.finfo(highest.dtype).min))
    total_: Expr | None = None
    for sink in sinks:
        term = pointwise("exp", pointwise("sub", sink, highest))
        total_ = term if total_ is None else pointwise("add", total_, term)
    assert total_ is not None
    return pointwise("add", highest, pointwise("log", total_))
