"""Rows of the ATen operators that compute: the index form of each."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from flashfuse.kernels.expr import Const, Expr, Index, Load, Reduce, Softmax
from flashfuse.kernels.normal import cast, const, converted, index, number, pointwise, stored
from flashfuse.kernels.operators import OPS
from flashfuse.patterns.graph import shape, to_sympy
from flashfuse.patterns.indexing import ZERO, Indices
from flashfuse.patterns.lift import CannotLift, NodeView, Row
from flashfuse.patterns.rows import argument, replaced, row
from flashfuse.patterns.trace import AtenCall

aten = torch.ops.aten


# --------------------------------------------------------------------------------------------------------------------
# Numbers made from positions


@row(aten.arange.start_step, aten.arange.start, aten.arange.default)
def _arange(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    start, step = (0, 1) if call.func is aten.arange.default else (call.args[0], argument(call, 2, "step", 1))
    start, step = to_sympy(start), to_sympy(step)
    if not (start.is_integer and step.is_integer):
        raise CannotLift(view.node, "counts in steps that are not integers")
    return cast(index(start + step * position[0]), call.output.dtype)


def as_element(view: NodeView, x: Any, dtype: torch.dtype) -> Expr:
    """A number as an element of a tensor of `dtype`."""
    return stored(x, dtype) if isinstance(x, float) else cast(view.number(x), dtype)


def _filled(fill: Callable[[AtenCall], Any]) -> Row:
    def rule(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
        return as_element(view, fill(call), call.output.dtype)

    return rule


row(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)(_filled(lambda call: 0))
row(aten.ones.default, aten.ones_like.default, aten.new_ones.default)(_filled(lambda call: 1))
row(aten.full.default, aten.full_like.default, aten.fill.Scalar)(_filled(lambda call: call.args[1]))
row(aten.new_full.default)(_filled(lambda call: call.args[2]))
row(aten.scalar_tensor.default)(_filled(lambda call: call.args[0]))


@row(aten.tril.default, aten.triu.default)
def _triangle(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    diagonal = to_sympy(argument(call, 1, "diagonal", 0))
    lower = call.func is aten.tril.default
    kept = pointwise("le" if lower else "ge", index(position[-1]), index(position[-2] + diagonal))
    dtype = call.output.dtype
    return pointwise("where", kept, view.element(call.args[0], position), const(0, dtype), dtype=dtype)


@row(aten.cumsum.default)
def _cumsum(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """Of a constant: the constant times the count."""
    dim = call.args[1] % len(position)
    each = view.resolved(view.element(call.args[0], position))
    if isinstance(each, Index) and not each.value.free_symbols:
        return cast(index(each.value * (position[dim] + 1)), call.output.dtype)
    if each.dtype == torch.bool and isinstance(each, Const):
        return cast(index(int(each.value) * (position[dim] + 1)), call.output.dtype)
    raise CannotLift(view.node, "is a cumulative sum")


# --------------------------------------------------------------------------------------------------------------------
# Pointwise

_POINTWISE: dict[Any, str] = {
    aten.mul.Tensor: "mul", aten.mul.Scalar: "mul", aten.div.Tensor: "div", aten.div.Scalar: "div",
    aten.neg.default: "neg", aten.abs.default: "abs", aten.floor.default: "floor",
    aten.exp.default: "exp", aten.exp2.default: "exp2", aten.expm1.default: "expm1",
    aten.log.default: "log", aten.log2.default: "log2", aten.log1p.default: "log1p",
    aten.atan.default: "atan", aten.asinh.default: "asinh",
    aten.sqrt.default: "sqrt", aten.rsqrt.default: "rsqrt",
    aten.tanh.default: "tanh", aten.sigmoid.default: "sigmoid", aten.erf.default: "erf",
    aten.sin.default: "sin", aten.cos.default: "cos", aten.pow.Tensor_Scalar: "pow",
    aten.maximum.default: "maximum", aten.clamp_min.default: "max",
    aten.minimum.default: "minimum", aten.clamp_max.default: "min",
    aten.lt.Tensor: "lt", aten.lt.Scalar: "lt", aten.le.Tensor: "le", aten.le.Scalar: "le",
    aten.gt.Tensor: "gt", aten.gt.Scalar: "gt", aten.ge.Tensor: "ge", aten.ge.Scalar: "ge",
    aten.eq.Tensor: "eq", aten.eq.Scalar: "eq", aten.ne.Tensor: "ne", aten.ne.Scalar: "ne",
    aten.where.self: "where", aten.where.Scalar: "where",
    aten.where.ScalarOther: "where", aten.where.ScalarSelf: "where",
}  # fmt: skip


def _pointwise(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    op = _POINTWISE[call.func]
    if OPS[op].result == "bool":
        return _comparison(view, op, call.args, position)
    dtype = call.output.dtype
    # What `where` chooses from are elements of its result, the numbers among them too.
    number = functools.partial(as_element, dtype=dtype) if op == "where" else NodeView.number
    arguments = [view.element(a, position) if isinstance(a, torch.Tensor) else number(view, a) for a in call.args]
    return pointwise("and" if op == "mul" and dtype == torch.bool else op, *arguments, dtype=dtype)


def _comparison(view: NodeView, op: str, args: Any, position: Indices) -> Expr:
    """Both sides in their common type, as torch compares them: 257 equals 256 in bfloat16."""
    types = [a.dtype for a in args if isinstance(a, torch.Tensor)]
    common = torch.result_type(*args) if len(args) == 2 else types[0]
    sides = []
    for a in args:
        if isinstance(a, torch.Tensor):
            sides.append(converted(view.element(a, position), a.dtype, common))
        elif isinstance(a, (bool, int, float)) and math.isfinite(a):
            sides.append(stored(a, common) if common.is_floating_point else const(a))
        else:
            sides.append(view.element(a, position))
    return pointwise(op, *sides, dtype=torch.bool)


row(*_POINTWISE)(_pointwise)

_LOGICAL: dict[Any, str] = {
    aten.logical_and.default: "and", aten.bitwise_and.Tensor: "and", aten.bitwise_and.Scalar: "and",
    aten.logical_or.default: "or", aten.bitwise_or.Tensor: "or", aten.bitwise_or.Scalar: "or",
    aten.logical_not.default: "not", aten.bitwise_not.default: "not",
    aten.logical_xor.default: "ne", aten.bitwise_xor.Tensor: "ne",
}  # fmt: skip


@row(*_LOGICAL)
def _logical(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    if call.output.dtype != torch.bool:
        raise CannotLift(view.node, "combines integers bit by bit")
    arguments = [cast(view.element(a, position), torch.bool) for a in call.args]
    return pointwise(_LOGICAL[call.func], *arguments, dtype=torch.bool)


@row(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor)
def _sum(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    dtype = call.output.dtype
    a, b = (view.element(x, position) for x in call.args[:2])
    if dtype == torch.bool:
        return pointwise("or", a, b, dtype=dtype)
    alpha = argument(call, 2, "alpha", 1)
    if call.func in (aten.rsub.Scalar, aten.rsub.Tensor):
        a, b = b, a
    if alpha != 1:
        b = pointwise("mul", b, view.number(alpha), dtype=dtype)
    return pointwise("add" if call.func in (aten.add.Tensor, aten.add.Scalar) else "sub", a, b, dtype=dtype)


@row(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    kept, mask = (view.element(a, position) for a in call.args[:2])
    fill, dtype = call.args[2], call.output.dtype
    given = isinstance(fill, torch.Tensor)
    filled = cast(view.element(fill, position), dtype) if given else as_element(view, fill, dtype)
    return pointwise("where", mask, filled, kept, dtype=dtype)


@row(aten.clamp.default, aten.clamp.Tensor)
def _clamp(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    x, dtype = view.element(call.args[0], position), call.output.dtype
    low, high = argument(call, 1, "min"), argument(call, 2, "max")
    x = x if low is None else pointwise("max", x, view.element(low, position), dtype=dtype)
    return x if high is None else pointwise("min", x, view.element(high, position), dtype=dtype)


@row(aten.reciprocal.default)
def _reciprocal(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    return pointwise("div", const(1.0), view.element(call.args[0], position), dtype=call.output.dtype)


@row(aten.pow.Scalar, aten.pow.Tensor_Tensor)
def _power(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    base, exponent = (view.element(a, position) for a in call.args)
    dtype = call.output.dtype
    # A tensor of one number that the code itself made, as `torch.tensor(2.0)`.
    if isinstance(base, Load) and not base.indices:
        with contextlib.suppress(CannotLift):
            made = view.lifter.expand(base)
            base = base if number(made) is None else made
    return pointwise(*(("exp2",) if number(base) == 2 else ("pow", base)), exponent, dtype=dtype)


@row(aten.relu.default)
def _relu(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    return pointwise("max", const(0.0), view.element(call.args[0], position), dtype=call.output.dtype)


# --------------------------------------------------------------------------------------------------------------------
# Reductions, normalisers


def reduced(view: NodeView, call: AtenCall, position: Indices, dims: Any, keepdim: bool, kind: str, x: Any) -> Expr:
    sizes = shape(x)
    dims = list(range(len(sizes))) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    dims = sorted(dim % len(sizes) for dim in dims)
    for dim in () if keepdim else dims:
        position = (*position[:dim], ZERO, *position[dim:])
    axes = {dim: view.symbol(sizes[dim]) for dim in dims if sizes[dim] != 1}
    for dim, r in axes.items():
        position = replaced(position, dim, r)
    result = view.element(x, position)
    dtype = call.output[0].dtype if isinstance(call.output, tuple) else call.output.dtype
    for dim, r in reversed(axes.items()):
        result = Reduce(dtype, kind, result, r, sizes[dim])
    return result


@row(aten.amax.default, aten.sum.dim_IntList)
def _reduce(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    kind = "max" if call.func is aten.amax.default else "sum"
    return reduced(
        view, call, position, argument(call, 1, "dim"), argument(call, 2, "keepdim", False), kind, call.args[0]
    )


@row(aten.mean.dim)
def _mean(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    dims, keepdim, dtype = argument(call, 1, "dim"), argument(call, 2, "keepdim", False), call.output.dtype
    total = reduced(view, call, position, dims, keepdim, "sum", call.args[0])
    if not isinstance(total, Reduce) or isinstance(total.arg, Reduce):
        raise CannotLift(view.node, "is an average over no dimension or over several")
    return pointwise("div", total, index(total.extent), dtype=dtype)


@row(aten.max.default)
def _largest(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    return reduced(view, call, position, None, False, "max", call.args[0])


@row(aten.max.dim)
def _max_value(view: NodeView, call: AtenCall, position: Indices, number: int) -> Expr:
    if number != 0:
        raise CannotLift(view.node, "uses the position of a maximum")
    return reduced(view, call, position, call.args[1], argument(call, 2, "keepdim", False), "max", call.args[0])


@row(aten._softmax.default, aten._safe_softmax.default, aten._log_softmax.default)
def _softmax(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    x, dtype = call.args[0], call.output.dtype
    dim, extent = call.args[1] % len(x.shape), shape(x)[call.args[1] % len(x.shape)]
    if extent == 1:
        raise CannotLift(view.node, "is over a single element, and so is 1")
    j = view.symbol(extent)
    empty_row = "zero" if call.func is aten._safe_softmax.default else "nan"
    score = cast(view.element(x, replaced(position, dim, j)), dtype)
    probs = Softmax(dtype, score, j, position[dim], extent, empty_row)
    return pointwise("log", probs, dtype=dtype) if call.func is aten._log_softmax.default else probs


@row(aten.logsumexp.default)
def _logsumexp(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    summed = reduced(view, call, position, call.args[1], argument(call, 2, "keepdim", False), "sum", call.args[0])
    if not isinstance(summed, Reduce) or isinstance(summed.arg, Reduce):
        raise CannotLift(view.node, "sums exponentials over no dimension or over several")
    return pointwise("log", Reduce(summed.dtype, "sum", pointwise("exp", summed.arg), summed.axis, summed.extent))
