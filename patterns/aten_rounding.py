"""Rows of operators that round: whole division of positions, and of floats what is cut off and what is left."""

from __future__ import annotations

import torch
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.expr import Expr, Index
from flashfuse.kernels.normal import cast, const, index, pointwise
from flashfuse.patterns.indexing import ZERO, Indices, Ranges, divide, never_negative
from flashfuse.patterns.lift import CannotLift, NodeView
from flashfuse.patterns.limits import at_least, at_most
from flashfuse.patterns.rows import row
from flashfuse.patterns.trace import AtenCall

aten = torch.ops.aten


# --------------------------------------------------------------------------------------------------------------------
# Positions

_REMAINDERS = (aten.remainder.Scalar, aten.remainder.Tensor)


def _is_remainder(a: Expr, b: Expr, ranges: Ranges) -> bool:
    """Whether 0 <= a < b can be proven."""
    return isinstance(b, Index) and at_least(a, ZERO, ranges) and at_most(a, b.value - 1, ranges)


@row(aten.floor_divide.default, aten.div.Tensor_mode, *_REMAINDERS)
def _divide_positions(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """Whole division of positions (chunks, blocks)."""
    if call.func in _REMAINDERS and call.output.dtype.is_floating_point:
        return _remainder(view, call, position)
    a, b = (view.resolved(view.element(x, position)) for x in call.args[:2])
    rounding = call.kwargs.get("rounding_mode", "floor")
    if call.func in _REMAINDERS and _is_remainder(a, b, view.ranges):
        return cast(a, call.output.dtype)
    if not isinstance(a, Index) or not isinstance(b, Index) or rounding is None or not b.value.is_positive:
        raise CannotLift(view.node, "divides with rounding")
    positive = never_negative(a.value, view.ranges)
    if call.func not in _REMAINDERS:
        whole = divide(a.value, b.value, view.ranges)[0] if positive else FloorDiv(a.value, b.value)
        if rounding == "trunc" and not positive:
            raise CannotLift(view.node, "rounds a negative position towards zero")
        return cast(index(whole), call.output.dtype)
    # torch's remainder has the sign of the divisor, as Mod has.
    remainder = divide(a.value, b.value, view.ranges)[1] if positive else Mod(a.value, b.value)
    return cast(index(remainder), call.output.dtype)


# --------------------------------------------------------------------------------------------------------------------
# Floats. Of positive and negative numbers alike, `floor` is the one step that the rest is made of.


def _of_floats(view: NodeView, call: AtenCall) -> torch.dtype:
    dtype: torch.dtype = call.output.dtype
    if not dtype.is_floating_point:
        raise CannotLift(view.node, "rounds integers")
    return dtype


def _up(x: Expr) -> Expr:
    return pointwise("neg", pointwise("floor", pointwise("neg", x)))


@row(aten.ceil.default)
def _ceil(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    return cast(_up(view.element(call.args[0], position)), _of_floats(view, call))


@row(aten.trunc.default)
def _trunc(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    x, dtype = view.element(call.args[0], position), _of_floats(view, call)
    return pointwise("where", pointwise("lt", x, const(0.0)), _up(x), pointwise("floor", x), dtype=dtype)


@row(aten.round.default)
def _round(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """To the nearest whole number, of two as near to the even one."""
    x, dtype = view.element(call.args[0], position), _of_floats(view, call)
    down = pointwise("floor", x)
    rest, half = pointwise("sub", x, down), const(0.5)
    odd = pointwise("ne", pointwise("mul", pointwise("floor", pointwise("mul", down, half)), const(2.0)), down)
    tie = pointwise("and", pointwise("eq", rest, half), odd)
    up = pointwise("or", pointwise("gt", rest, half), tie)
    return pointwise("where", up, pointwise("add", down, const(1.0)), down, dtype=dtype)


@row(aten.sign.default, aten.sgn.default)
def _sign(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    x = view.element(call.args[0], position)
    if call.output.dtype.is_floating_point:
        return pointwise("sign", x, dtype=call.output.dtype)
    below, above = pointwise("lt", x, index(0)), pointwise("gt", x, index(0))
    return cast(pointwise("where", above, index(1), pointwise("where", below, index(-1), index(0))), call.output.dtype)


@row(aten.fmod.Tensor, aten.fmod.Scalar)
def _fmod(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    return pointwise("fmod", *(view.element(a, position) for a in call.args), dtype=_of_floats(view, call))


def _remainder(view: NodeView, call: AtenCall, position: Indices) -> Expr:
    """What a division rounded down leaves, which has the sign of the divisor."""
    a, b = (view.element(x, position) for x in call.args)
    dtype, zero = call.output.dtype, const(0.0)
    rest = pointwise("fmod", a, b, dtype=dtype)
    below, above = pointwise("lt", rest, zero), pointwise("gt", rest, zero)
    other = pointwise("where", pointwise("lt", b, zero), above, below)
    return pointwise("where", other, pointwise("add", rest, b), rest, dtype=dtype)
