"""An attention's output rescaled by what its softmax would have left to a sink: out * sigmoid(lse - sink).

exp(s) / (exp(sink) + sum exp(s)) is softmax(s) * sigmoid(log(sum exp(s)) - sink): the form of a sink that needs only
what a fused kernel returns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from flashfuse.kernels.expr import Dot, Expr, Pointwise, Reduce
from flashfuse.kernels.normal import number
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.patterns.lift import CannotLift, Lifter
from flashfuse.patterns.normaliser import as_logsumexp, place
from flashfuse.patterns.opened import open_up
from flashfuse.patterns.weights import Weights


@dataclass(frozen=True)
class Gated:
    """`product` * sigmoid(log(`total`) - `sink`), where `total` sums the exponentials of its argument."""

    product: Dot
    total: Reduce
    sink: Expr


def as_gated(lifter: Lifter, expr: Expr) -> Gated | None:
    """The gated product with values that an output is, None where it is something else."""
    if not isinstance(expr, Pointwise) or expr.op != "mul":
        return None
    for output, gate in (expr.args, expr.args[::-1]):
        try:
            product, exponent = _open(lifter, output), _gate_argument(lifter, gate)
            if not isinstance(product, Dot) or exponent is None:
                continue
            total = as_logsumexp(lifter, _without_rounding(exponent.args[0]))
        except CannotLift:
            continue
        if total is not None:
            return Gated(product, total, exponent.args[1])
    return None


def _gate_argument(lifter: Lifter, gate: Expr) -> Pointwise | None:
    """a - b of a gate sigmoid(a - b) or 1 / (1 + exp(b - a))."""
    top = _open(lifter, gate)
    if isinstance(top, Pointwise) and top.op == "sigmoid":
        inner = _open(lifter, top.args[0])
        return inner if isinstance(inner, Pointwise) and inner.op == "sub" else None
    if not isinstance(top, Pointwise) or top.op != "div" or number(top.args[0]) != 1:
        return None
    below = _open(lifter, top.args[1])
    if not isinstance(below, Pointwise) or below.op != "add" or 1 not in map(number, below.args):
        return None
    power = _open(lifter, next(a for a in below.args if number(a) != 1))
    if not isinstance(power, Pointwise) or power.op != "exp":
        return None
    inner = _open(lifter, power.args[0])
    if not isinstance(inner, Pointwise) or inner.op != "sub":
        return None
    return Pointwise(inner.dtype, "sub", (inner.args[1], inner.args[0]))


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
