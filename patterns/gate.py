"""An output rescaled behind the product with the values: normalised only there, or by what is left beside a sink.

sum_j exp(s_j) v_j / sum_j exp(s_j) is an attention whose division comes last (FlashAttention-2, section 3.1.1).
exp(s) / (exp(sink) + sum exp(s)) is softmax(s) * sigmoid(log(sum exp(s)) - sink): the form of a sink that needs only
what a fused kernel returns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
import torch

from flashfuse.kernels.expr import Const, Dot, Expr, Pointwise, Reduce, free_symbols
from flashfuse.kernels.normal import number, pointwise
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.patterns.blame import refuse_normaliser
from flashfuse.patterns.lift import CannotLift, Lifter
from flashfuse.patterns.normaliser import as_logsumexp, as_softmax, place, quotients
from flashfuse.patterns.opened import open_up, opened_or_none
from flashfuse.patterns.operand import exactly_promotes
from flashfuse.patterns.summed import as_product
from flashfuse.patterns.weights import Weights


@dataclass(frozen=True)
class Gated:
    """`product` * sigmoid(log(`total`) - `sink`), where `total` sums the exponentials of its argument."""

    product: Dot
    total: Reduce
    sink: Expr


def normalised_late(lifter: Lifter, expr: Expr) -> Dot | None:
    """The product of a softmax with values that an output divided by its row sums is; None for other quotients."""
    if not isinstance(expr, Pointwise):
        return None
    for numerator, denominator in quotients(lifter, expr):
        try:
            product, total = as_product(lifter, _open(lifter, numerator)), _open(lifter, denominator)
            if not isinstance(product, Dot) or product.axis in free_symbols(total):
                continue
            for weights, values in ((product.lhs, product.rhs), (product.rhs, product.lhs)):
                quotient = pointwise("div", _before_rounding(lifter, weights, product.dtype), total, dtype=total.dtype)
                if as_softmax(lifter, quotient) is not None:
                    return replace(product, lhs=quotient, rhs=values)
                if isinstance(quotient, Pointwise):
                    refuse_normaliser(lifter, quotient)
        except CannotLift:
            continue
    return None


def _before_rounding(lifter: Lifter, expr: Expr, dtype: torch.dtype) -> Expr:
    """The element before it is rounded to a type that the product's holds."""
    top = opened_or_none(lifter, expr)
    if isinstance(top, Pointwise) and top.op in ROUNDINGS and exactly_promotes(dtype, ROUNDINGS[top.op]):
        return _before_rounding(lifter, top.args[0], dtype)
    return expr


def as_gated(lifter: Lifter, expr: Expr) -> Gated | None:
    """The gated product with values that an output is, None where it is something else."""
    if not isinstance(expr, Pointwise) or expr.op != "mul":
        return None
    for output, gate in (expr.args, expr.args[::-1]):
        try:
            product, exponent = _open(lifter, output), _gate_argument(lifter, gate)
            if not isinstance(product, Dot) or exponent is None:
                continue
            total = as_logsumexp(lifter, _without_rounding(exponent[0]))
        except CannotLift:
            continue
        if total is not None:
            return Gated(product, total, exponent[1])
    return None


def _gate_argument(lifter: Lifter, gate: Expr) -> tuple[Expr, Expr] | None:
    """(a, b) of a gate sigmoid(a - b) or 1 / (1 + exp(b - a)); b is 0 where there is none."""
    top = _open(lifter, gate)
    if isinstance(top, Pointwise) and top.op == "sigmoid":
        return _difference(lifter, top.args[0])
    if not isinstance(top, Pointwise) or top.op != "div" or number(top.args[0]) != 1:
        return None
    below = _open(lifter, top.args[1])
    if not isinstance(below, Pointwise) or below.op != "add" or 1 not in map(number, below.args):
        return None
    power = _open(lifter, next(a for a in below.args if number(a) != 1))
    if not isinstance(power, Pointwise) or power.op != "exp":
        return None
    subtracted, from_ = _difference(lifter, power.args[0])
    return from_, subtracted


def _difference(lifter: Lifter, expr: Expr) -> tuple[Expr, Expr]:
    """(a, b) of a - b, either of which may be 0 that is not written."""
    inner = _open(lifter, expr)
    if isinstance(inner, Pointwise) and inner.op == "sub":
        return inner.args[0], inner.args[1]
    zero = Const(expr.dtype, 0.0)
    return (zero, inner.args[0]) if isinstance(inner, Pointwise) and inner.op == "neg" else (expr, zero)


def _open(lifter: Lifter, expr: Expr) -> Expr:
    """What an element is computed by, seen through layout and roundings."""
    expr = open_up(lifter, expr)
    while isinstance(expr, Pointwise) and expr.op in ROUNDINGS:
        expr = open_up(lifter, expr.args[0])
    return expr


def _without_rounding(expr: Expr) -> Expr:
    return expr.args[0] if isinstance(expr, Pointwise) and expr.op in ROUNDINGS else expr


def with_gate(lifter: Lifter, terms: tuple[Weights, ...], gated: Gated, j: sympy.Symbol) -> tuple[Weights, ...]:
    """The weights with the sink of a gate; none where its log-sum-exp is another row's or another softmax's."""
    if len(terms) > 1 or terms[0].sinks:
        return ()
    same_scores = place(lifter, terms[0].arg, gated.total.arg, gated.total.axis) == j
    return (replace(terms[0], sinks=(gated.sink,)),) if same_scores else ()
