"""Rows of operators that make, ask about or bend single numbers: literals, NaN and infinity, activation functions."""

from __future__ import annotations

import math

import torch

from flashfuse.kernels.expr import Expr
from flashfuse.kernels.normal import const, pointwise, stored
from flashfuse.patterns.aten import reduced
from flashfuse.patterns.graph import tensor
from flashfuse.patterns.indexing import Indices
from flashfuse.patterns.lift import NODE_ROWS, CannotLift, NodeView
from flashfuse.patterns.rows import argument, row
from flashfuse.patterns.trace import AtenCall

aten = torch.ops.aten


@row(aten.isnan.default)
def _isnan(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """NaN is what differs from itself."""
    x = view.element(call.args[0], position)
    return pointwise("ne", x, x, dtype=torch.bool)


@row(aten.isinf.default)
def _isinf(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    x = view.element(call.args[0], position)
    return pointwise("eq", pointwise("abs", x), const(math.inf, x.dtype), dtype=torch.bool)


@row(aten.isneginf.default)
def _isneginf(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    x = view.element(call.args[0], position)
    return pointwise("eq", x, const(-math.inf, x.dtype), dtype=torch.bool)


@row(aten.any.dim, aten.all.dim)
def _any_or_all(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """The largest or the least of booleans."""
    x, kind = call.args[0], "max" if call.func is aten.any.dim else "min"
    if x.dtype != torch.bool:
        raise CannotLift(view.node, "asks whether numbers are zero")
    return reduced(view, call, position, argument(call, 1, "dim"), argument(call, 2, "keepdim", False), kind, x)


@row(aten.nan_to_num.default)
def _nan_to_num(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """NaN replaced, infinities brought to the ends of the type or to the numbers given, which must lie outside it."""
    x, dtype = view.element(call.args[0], position), call.output.dtype
    if not dtype.is_floating_point:
        return x
    limits = torch.finfo(dtype)
    nan, high, low = (argument(call, n, name) for n, name in ((1, "nan"), (2, "posinf"), (3, "neginf")))
    if high is not None or low is not None:
        raise CannotLift(view.node, "replaces infinities by numbers of its own")
    limited = pointwise("max", pointwise("min", x, const(limits.max, dtype)), const(limits.min, dtype), dtype=dtype)
    is_nan = pointwise("ne", x, x, dtype=torch.bool)
    return pointwise("where", is_nan, const(float(nan or 0.0), dtype), limited, dtype=dtype)


@row(aten.silu.default)
def _silu(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    x, dtype = view.element(call.args[0], position), call.output.dtype
    return pointwise("mul", x, pointwise("sigmoid", x), dtype=dtype)


@row(aten.leaky_relu.default)
def _leaky_relu(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    x, dtype = view.element(call.args[0], position), call.output.dtype
    below = pointwise("mul", x, view.number(argument(call, 1, "negative_slope", 0.01)), dtype=dtype)
    return pointwise("where", pointwise("gt", x, const(0.0)), x, below, dtype=dtype)


@row(aten.gelu.default)
def _gelu(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """x times the normal distribution's mass below it, or the approximation of https://arxiv.org/abs/1606.08415."""
    x, dtype = view.element(call.args[0], position), call.output.dtype
    if argument(call, 1, "approximate", "none") == "none":
        mass = pointwise("erf", pointwise("mul", x, const(math.sqrt(0.5))))
    else:
        cubed = pointwise("mul", pointwise("mul", pointwise("mul", x, x), x), const(0.044715))
        mass = pointwise("tanh", pointwise("mul", pointwise("add", x, cubed), const(math.sqrt(2 / math.pi))))
    half = pointwise("mul", x, const(0.5), dtype=dtype)
    return pointwise("mul", half, pointwise("add", mass, const(1.0)), dtype=dtype)


def _between(x: Expr, low: Expr, high: Expr, below: Expr, inside: Expr, above: Expr, dtype: torch.dtype) -> Expr:
    """What is flat at both ends, and on them."""
    upper = pointwise("where", pointwise("ge", x, high), above, inside, dtype=dtype)
    return pointwise("where", pointwise("le", x, low), below, upper, dtype=dtype)


@row(aten.hardtanh.default)
def _hardtanh(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    x, dtype = view.element(call.args[0], position), call.output.dtype
    limits = (argument(call, 1, "min_val", -1.0), argument(call, 2, "max_val", 1.0))
    low, high = (const(float(limit), dtype) for limit in limits)
    return _between(x, low, high, low, x, high, dtype)


@row(aten.hardsigmoid.default, aten.hardswish.default)
def _hardsigmoid(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """min(max(x + 3, 0), 6) / 6, and x times that, which at -inf is NaN."""
    x, dtype = view.element(call.args[0], position), call.output.dtype
    below, inside, above = const(0.0), pointwise("add", x, const(3.0)), const(1.0)
    if call.func is aten.hardswish.default:
        below, inside, above = pointwise("mul", x, below), pointwise("mul", x, inside), x
    inside = pointwise("div", inside, const(6.0))
    return _between(x, const(-3.0), const(3.0), below, inside, above, dtype)


@row(aten.fmax.default, aten.fmin.default)
def _not_nan(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """The larger or the smaller, or the one that is not NaN; of equal ones, the first."""
    a, b = (view.element(x, position) for x in call.args)
    first = pointwise("ge" if call.func is aten.fmax.default else "le", a, b)
    chosen = pointwise("or", first, pointwise("ne", b, b, dtype=torch.bool))
    return pointwise("where", chosen, a, b, dtype=call.output.dtype)


@row(aten.tan.default)
def _tan(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    x = view.element(call.args[0], position)
    return pointwise("div", pointwise("sin", x), pointwise("cos", x), dtype=call.output.dtype)


@row(aten.log10.default)
def _log10(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    logarithm = pointwise("log2", view.element(call.args[0], position))
    return pointwise("mul", logarithm, const(math.log10(2.0)), dtype=call.output.dtype)


def _tensor_literal(view: NodeView, position: Indices) -> Expr:
    """torch.tensor(8.0): a constant."""
    literal = view.node.args[0]
    if position or not isinstance(literal, (bool, int, float)):
        raise CannotLift(view.node, "is a literal tensor of several elements")
    t = tensor(view.node)
    assert t is not None
    return stored(literal, t.dtype)


NODE_ROWS[torch.tensor] = _tensor_literal
