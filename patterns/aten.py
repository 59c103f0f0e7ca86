"""Rows: the index form of each ATen operator. Layout operators are substitutions in the position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from flashfuse.kernels.expr import Const, Dot, Expr, Index, Reduce, Softmax, cast, const, index, pointwise, substitute
from flashfuse.patterns.graph import shape, to_sympy
from flashfuse.patterns.indexing import ZERO, Indices, divide, reshape
from flashfuse.patterns.lift import ATEN_ROWS, CannotLift, NodeView, Row
from flashfuse.patterns.trace import AtenCall

aten = torch.ops.aten


def row(*functions: Any) -> Callable[[Row], Row]:
    def add(rule: Row) -> Row:
        ATEN_ROWS.update(dict.fromkeys(functions, rule))
        return rule

    return add


def _argument(call: AtenCall, number: int, name: str, default: Any = None) -> Any:
    """An argument by number or name, or the schema's default."""
    if number < len(call.args):
        return call.args[number]
    return call.kwargs.get(name, default)


def _replaced(position: Indices, dim: int, at: sympy.Expr) -> Indices:
    return (*position[:dim], at, *position[dim + 1 :])


# --------------------------------------------------------------------------------------------------------------------
# Layout


_SAME_ELEMENT = (
    aten.alias.default, aten.detach.default, aten.detach_.default, aten.clone.default, aten.contiguous.default,
    aten.lift_fresh.default, aten.lift_fresh_copy.default, aten._to_copy.default, aten.to.dtype, aten.positive.default,
)  # fmt: skip


@row(*_SAME_ELEMENT)
def _same_element(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    return cast(view.element(call.args[0], position), call.output.dtype)


@row(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _reshape(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    source = call.args[0]
    return view.element(source, reshape(position, shape(call.output), shape(source), view.ranges))


@row(aten.expand.default)
def _expand(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    return view.element(call.args[0], position)


@row(aten.permute.default)
def _permute(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    source = [ZERO] * len(position)
    for at, dim in zip(position, call.args[1], strict=True):
        source[dim % len(position)] = at
    return view.element(call.args[0], tuple(source))


@row(aten.transpose.int, aten.t.default)
def _transpose(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    a, b = call.args[1:] if len(call.args) == 3 else (0, -1)
    swapped = list(position)
    if swapped:
        swapped[a], swapped[b] = swapped[b], swapped[a]
    return view.element(call.args[0], tuple(swapped))


@row(aten.unsqueeze.default)
def _unsqueeze(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    dim = call.args[1] % len(position)
    return view.element(call.args[0], position[:dim] + position[dim + 1 :])


@row(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    sizes = shape(call.args[0])
    dims = _argument(call, 1, "dim", range(len(sizes)))
    dims = {d % max(len(sizes), 1) for d in ([dims] if isinstance(dims, int) else dims)}
    kept = iter(position)
    source = tuple(ZERO if d in dims and size == 1 else next(kept) for d, size in enumerate(sizes))
    return view.element(call.args[0], source)


@row(aten.slice.Tensor)
def _slice(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    dim = _argument(call, 1, "dim", 0) % len(position)
    start, step = _argument(call, 2, "start"), _argument(call, 4, "step", 1)
    begin = _clamped_start(to_sympy(0 if start is None else start), shape(call.args[0])[dim])
    return view.element(call.args[0], _replaced(position, dim, begin + to_sympy(step) * position[dim]))


def _clamped_start(start: sympy.Expr, size: sympy.Expr) -> sympy.Expr:
    if start.is_negative:
        start = start + size
        return start if start.is_nonnegative is not False else ZERO
    return start


@row(aten.select.int)
def _select(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    source = call.args[0]
    dim = call.args[1] % len(source.shape)
    at = to_sympy(call.args[2])
    at = at + shape(source)[dim] if at.is_negative else at
    return view.element(source, (*position[:dim], at, *position[dim:]))


@row(aten.split.Tensor, aten.split_with_sizes.default)
def _split(view: NodeView, call: AtenCall, position: Indices, number: int) -> Expr:
    dim = _argument(call, 2, "dim", 0) % len(position)
    start = sum((shape(part)[dim] for part in call.output[:number]), ZERO)
    return view.element(call.args[0], _replaced(position, dim, start + position[dim]))


@row(aten.unbind.int)
def _unbind(view: NodeView, call: AtenCall, position: Indices, number: int) -> Expr:
    dim = _argument(call, 1, "dim", 0) % (len(position) + 1)
    return view.element(call.args[0], (*position[:dim], sympy.Integer(number), *position[dim:]))


@row(aten.repeat.default)
def _repeat(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    sizes = shape(call.args[0])
    kept = position[len(position) - len(sizes) :]
    return view.element(
        call.args[0], tuple(divide(at, size, view.ranges)[1] for at, size in zip(kept, sizes, strict=True))
    )


@row(aten.flip.default)
def _flip(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    sizes, dims = shape(call.args[0]), {d % len(position) for d in call.args[1]}
    return view.element(call.args[0], tuple(sizes[d] - 1 - at if d in dims else at for d, at in enumerate(position)))


@row(aten.cat.default)
def _cat(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """A choice by position. Parts that are one formula of the position merge: cat([-1], arange) is position - 1."""
    dim = _argument(call, 1, "dim", 0) % len(position)
    parts = [p for p in call.args[0] if len(p.shape) == len(position)]
    start, pieces = ZERO, []
    for part in parts:
        piece = view.element(part, _replaced(position, dim, position[dim] - start))
        pieces.append((start, piece if piece.dtype.is_floating_point else view.resolved(piece)))
        start = start + shape(part)[dim]
    result = pieces[-1][1]
    for (begin, piece), (end, _next) in zip(reversed(pieces[:-1]), reversed(pieces[1:]), strict=True):
        if not _continues(piece, result, position[dim], begin, end):
            result = pointwise(
                "where", pointwise("lt", index(position[dim]), index(end)), piece, result, dtype=call.output.dtype
            )
    return result


def _continues(piece: Expr, rest: Expr, at: sympy.Expr, begin: sympy.Expr, end: sympy.Expr) -> bool:
    """Whether `rest`, read where `piece` stands, is `piece`: the same formula, or one element that agrees."""
    if not isinstance(piece, Index) or not isinstance(rest, Index) or not isinstance(at, sympy.Symbol):
        return False
    if piece == rest:
        return True
    return end - begin == 1 and substitute(piece, {at: begin}) == substitute(rest, {at: begin})


@row(aten.index.Tensor)
def _index(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """x[.., tensor, ..] where the index tensors are formulas of the position."""
    source, given = call.args[0], list(call.args[1])
    given += [None] * (len(source.shape) - len(given))
    slots = [d for d, t in enumerate(given) if t is not None]
    if any(given[d].dtype == torch.bool for d in slots):
        raise CannotLift(view.node, "selects elements by a boolean mask, so its size depends on data")
    rank = max(len(given[d].shape) for d in slots)
    together = slots == list(range(slots[0], slots[-1] + 1))
    first = slots[0] if together else 0
    picked, rest = position[first : first + rank], iter(position[:first] + position[first + rank :])
    sizes = shape(source)
    source_position: list[sympy.Expr] = []
    for d, t in enumerate(given):
        if t is None:
            source_position.append(next(rest))
            continue
        at = view.resolved(view.element(t, tuple(picked)))
        if not isinstance(at, Index) or at.value.is_negative:
            raise CannotLift(view.node, "looks elements up at positions that depend on data")
        source_position.append(ZERO if sizes[d] == 1 else at.value)
    return view.element(source, tuple(source_position))


# --------------------------------------------------------------------------------------------------------------------
# Numbers made from positions


@row(aten.arange.start_step, aten.arange.start, aten.arange.default)
def _arange(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    start, step = (0, 1) if call.func is aten.arange.default else (call.args[0], _argument(call, 2, "step", 1))
    start, step = to_sympy(start), to_sympy(step)
    if not (start.is_integer and step.is_integer):
        raise CannotLift(view.node, "counts in steps that are not integers")
    return cast(index(start + step * position[0]), call.output.dtype)


def _filled(fill: Callable[[AtenCall], Any]) -> Row:
    def rule(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
        number = view.number(fill(call))
        return const(number.value, call.output.dtype) if isinstance(number, Const) else cast(number, call.output.dtype)

    return rule


row(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)(_filled(lambda call: 0))
row(aten.ones.default, aten.ones_like.default, aten.new_ones.default)(_filled(lambda call: 1))
row(aten.full.default, aten.full_like.default)(_filled(lambda call: call.args[1]))
row(aten.new_full.default)(_filled(lambda call: call.args[2]))
row(aten.scalar_tensor.default)(_filled(lambda call: call.args[0]))


@row(aten.tril.default, aten.triu.default)
def _triangle(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    diagonal = to_sympy(_argument(call, 1, "diagonal", 0))
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
    aten.exp.default: "exp", aten.log.default: "log", aten.sqrt.default: "sqrt", aten.rsqrt.default: "rsqrt",
    aten.tanh.default: "tanh", aten.sigmoid.default: "sigmoid", aten.erf.default: "erf",
    aten.sin.default: "sin", aten.cos.default: "cos", aten.pow.Tensor_Scalar: "pow", aten.pow.Tensor_Tensor: "pow",
    aten.maximum.default: "max", aten.clamp_min.default: "max",
    aten.minimum.default: "min", aten.clamp_max.default: "min",
    aten.lt.Tensor: "lt", aten.lt.Scalar: "lt", aten.le.Tensor: "le", aten.le.Scalar: "le",
    aten.gt.Tensor: "gt", aten.gt.Scalar: "gt", aten.ge.Tensor: "ge", aten.ge.Scalar: "ge",
    aten.eq.Tensor: "eq", aten.eq.Scalar: "eq", aten.ne.Tensor: "ne", aten.ne.Scalar: "ne",
    aten.where.self: "where", aten.where.Scalar: "where",
    aten.where.ScalarOther: "where", aten.where.ScalarSelf: "where",
}  # fmt: skip


def _pointwise(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    arguments = [view.element(a, position) for a in call.args]
    return pointwise(_POINTWISE[call.func], *arguments, dtype=call.output.dtype)


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
    alpha = _argument(call, 2, "alpha", 1)
    if call.func in (aten.rsub.Scalar, aten.rsub.Tensor):
        a, b = b, a
    if alpha != 1:
        b = pointwise("mul", b, view.number(alpha), dtype=dtype)
    return pointwise("add" if call.func in (aten.add.Tensor, aten.add.Scalar) else "sub", a, b, dtype=dtype)


@row(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    kept, mask, fill = (view.element(a, position) for a in call.args)
    dtype = call.output.dtype
    return pointwise("where", mask, cast(fill, dtype), kept, dtype=dtype)


@row(aten.clamp.default, aten.clamp.Tensor)
def _clamp(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    x, dtype = view.element(call.args[0], position), call.output.dtype
    low, high = _argument(call, 1, "min"), _argument(call, 2, "max")
    x = x if low is None else pointwise("max", x, view.element(low, position), dtype=dtype)
    return x if high is None else pointwise("min", x, view.element(high, position), dtype=dtype)


@row(aten.reciprocal.default)
def _reciprocal(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    return pointwise("div", const(1.0), view.element(call.args[0], position), dtype=call.output.dtype)


@row(aten.relu.default)
def _relu(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    return pointwise("max", view.element(call.args[0], position), const(0.0), dtype=call.output.dtype)


@row(aten.floor_divide.default, aten.div.Tensor_mode, aten.remainder.Scalar, aten.remainder.Tensor)
def _divide_positions(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """Whole division of positions (chunks, blocks)."""
    a, b = (view.resolved(view.element(x, position)) for x in call.args[:2])
    rounding = call.kwargs.get("rounding_mode", "floor")
    if not isinstance(a, Index) or not isinstance(b, Index) or rounding is None or not b.value.is_positive:
        raise CannotLift(view.node, "divides with rounding")
    if call.func not in (aten.remainder.Scalar, aten.remainder.Tensor):
        whole = divide(a.value, b.value, view.ranges)[0] if a.value.is_nonnegative else FloorDiv(a.value, b.value)
        if rounding == "trunc" and not a.value.is_nonnegative:
            raise CannotLift(view.node, "rounds a negative position towards zero")
        return cast(index(whole), call.output.dtype)
    if not a.value.is_nonnegative:
        raise CannotLift(view.node, "takes a remainder of a negative position")
    return cast(index(divide(a.value, b.value, view.ranges)[1]), call.output.dtype)


# --------------------------------------------------------------------------------------------------------------------
# Contractions, reductions, normalisers


@row(aten.bmm.default, aten.mm.default, aten.mv.default, aten.dot.default)
def _contraction(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    a, b = call.args[:2]
    extent = shape(a)[-1]
    r = ZERO if extent == 1 else view.symbol(extent)
    rows = len(a.shape) - 1
    left = (*position[:rows], r)
    right = (*position[: len(b.shape) - 2], r, *position[rows:]) if len(b.shape) > 1 else (r,)
    return _dot(call.output.dtype, view.element(a, left), view.element(b, right), r, extent)


def _dot(dtype: torch.dtype, lhs: Expr, rhs: Expr, axis: sympy.Expr, extent: sympy.Expr) -> Expr:
    if not isinstance(axis, sympy.Symbol):
        axis = sympy.Symbol("unit", integer=True, nonnegative=True)
    return Dot(dtype, lhs, rhs, axis, extent)


@row(aten.baddbmm.default, aten.addmm.default)
def _added_contraction(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """beta * added + alpha * (a @ b); torch ignores `added` altogether where beta is 0."""
    dtype = call.output.dtype
    contraction = _contraction(view, AtenCall(aten.bmm.default, call.args[1:], {}, call.output), position, 0)
    beta, alpha = call.kwargs.get("beta", 1), call.kwargs.get("alpha", 1)
    result = pointwise("mul", contraction, view.number(alpha), dtype=dtype)
    if beta == 0:
        return result
    added = pointwise("mul", view.element(call.args[0], position), view.number(beta), dtype=dtype)
    return pointwise("add", added, result, dtype=dtype)


def _reduced(view: NodeView, call: AtenCall, position: Indices, dims: Any, keepdim: bool, kind: str, x: Any) -> Expr:
    sizes = shape(x)
    dims = list(range(len(sizes))) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    if len(dims) != 1:
        raise CannotLift(view.node, "reduces several dimensions at once")
    dim = dims[0] % len(sizes)
    if not keepdim:
        position = (*position[:dim], ZERO, *position[dim:])
    if sizes[dim] == 1:
        return view.element(x, position)
    r = view.symbol(sizes[dim])
    return Reduce(
        call.output[0].dtype if isinstance(call.output, tuple) else call.output.dtype,
        kind,
        view.element(x, _replaced(position, dim, r)),
        r,
        sizes[dim],
    )


@row(aten.amax.default, aten.sum.dim_IntList)
def _reduce(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    kind = "max" if call.func is aten.amax.default else "sum"
    return _reduced(
        view, call, position, _argument(call, 1, "dim"), _argument(call, 2, "keepdim", False), kind, call.args[0]
    )


@row(aten.max.dim)
def _max_value(view: NodeView, call: AtenCall, position: Indices, number: int) -> Expr:
    if number != 0:
        raise CannotLift(view.node, "uses the position of a maximum")
    return _reduced(view, call, position, call.args[1], _argument(call, 2, "keepdim", False), "max", call.args[0])


@row(aten._softmax.default, aten._safe_softmax.default, aten._log_softmax.default)
def _softmax(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    x, dtype = call.args[0], call.output.dtype
    dim, extent = call.args[1] % len(x.shape), shape(x)[call.args[1] % len(x.shape)]
    if extent == 1:
        raise CannotLift(view.node, "is a softmax over a single element")
    j = view.symbol(extent)
    empty_row = "zero" if call.func is aten._safe_softmax.default else "nan"
    score = cast(view.element(x, _replaced(position, dim, j)), dtype)
    probs = Softmax(dtype, score, j, position[dim], extent, empty_row)
    return pointwise("log", probs, dtype=dtype) if call.func is aten._log_softmax.default else probs


@row(aten.logsumexp.default)
def _logsumexp(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    summed = _reduced(view, call, position, call.args[1], _argument(call, 2, "keepdim", False), "sum", call.args[0])
    assert isinstance(summed, Reduce)
    return pointwise("log", Reduce(summed.dtype, "sum", pointwise("exp", summed.arg), summed.axis, summed.extent))
