"""Rows of the ATen operators that only move elements: each is a substitution in the position."""

from __future__ import annotations

import sympy
import torch

from flashfuse.kernels.expr import Expr, Index
from flashfuse.kernels.normal import converted, index, pointwise, substitute
from flashfuse.patterns.graph import shape, to_sympy
from flashfuse.patterns.indexing import ZERO, Indices, divide, quotient, reshape
from flashfuse.patterns.lift import CannotLift, NodeView
from flashfuse.patterns.rows import argument, replaced, row
from flashfuse.patterns.trace import AtenCall

aten = torch.ops.aten

_SAME_ELEMENT = (
    aten.alias.default, aten.detach.default, aten.detach_.default, aten.clone.default, aten.contiguous.default,
    aten.lift_fresh.default, aten.lift_fresh_copy.default, aten._to_copy.default, aten.to.dtype, aten.positive.default,
)  # fmt: skip


@row(*_SAME_ELEMENT)
def _same_element(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    return copied(view, view.element(call.args[0], position), call.args[0].dtype, call.output.dtype)


def copied(view: NodeView, element: Expr, source: torch.dtype, dtype: torch.dtype) -> Expr:
    """An element of a tensor of type `source` in one of type `dtype` that it is copied to."""
    integer = not (dtype.is_floating_point or dtype == torch.bool)
    if integer and not isinstance(element, Index) and source not in (dtype, torch.bool) and _wraps(source, dtype):
        raise CannotLift(view.node, f"turns {source} into {dtype}, which may wrap around")
    if dtype.is_floating_point and dtype.itemsize < 2 and dtype != source:
        raise CannotLift(view.node, f"rounds to {dtype}")
    return converted(element, source, dtype)


def _wraps(source: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether some value of `source` has no counterpart in the integer type `dtype`; int64 holds what scores hold."""
    return dtype != torch.int64 and torch.promote_types(source, dtype) != dtype


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
    dims = argument(call, 1, "dim", range(len(sizes)))
    dims = {d % max(len(sizes), 1) for d in ([dims] if isinstance(dims, int) else dims)}
    kept = iter(position)
    source = tuple(ZERO if d in dims and size == 1 else next(kept) for d, size in enumerate(sizes))
    return view.element(call.args[0], source)


@row(aten.slice.Tensor)
def _slice(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    dim, step = argument(call, 1, "dim", 0) % len(position), to_sympy(argument(call, 4, "step", 1))
    begin = _begins_at(view, call, dim)
    return view.element(call.args[0], replaced(position, dim, begin + step * position[dim]))


@row(aten.select.int)
def _select(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    dim = call.args[1] % len(call.args[0].shape)
    return view.element(call.args[0], (*position[:dim], _begins_at(view, call, dim), *position[dim:]))


def _begins_at(view: NodeView, call: AtenCall, dim: int) -> sympy.Expr:
    """Where a slice or selection begins, read off the view itself: torch has wrapped and clamped the given number."""
    source = call.args[0]
    stride = to_sympy(source.stride(dim))
    if stride == 0 or shape(source)[dim] == 1:
        return ZERO
    begin = quotient(to_sympy(call.output.storage_offset() - source.storage_offset()), stride)
    if begin is None:
        raise CannotLift(view.node, "takes a slice at a place that is not known even as a symbol")
    return begin


@row(aten.split.Tensor, aten.split_with_sizes.default)
def _split(view: NodeView, call: AtenCall, position: Indices, number: int) -> Expr:
    dim = argument(call, 2, "dim", 0) % len(position)
    start = sum((shape(part)[dim] for part in call.output[:number]), ZERO)
    return view.element(call.args[0], replaced(position, dim, start + position[dim]))


@row(aten.unbind.int)
def _unbind(view: NodeView, call: AtenCall, position: Indices, number: int) -> Expr:
    dim = argument(call, 1, "dim", 0) % (len(position) + 1)
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
    dim = argument(call, 1, "dim", 0) % len(position)
    parts = [p for p in call.args[0] if len(p.shape) == len(position)]
    # A part without elements is none, whatever it is made of.
    parts = [p for p in parts if shape(p)[dim] != 0] or parts[:1]
    start, pieces = ZERO, []
    for part in parts:
        piece = view.element(part, replaced(position, dim, position[dim] - start))
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
