"""Rows of the ATen operators that shift, pad, overlap or interleave elements: positions with a choice or a division."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch

from flashfuse.kernels.expr import Expr
from flashfuse.kernels.normal import conjunction, index, pointwise, stored
from flashfuse.patterns.cases import less
from flashfuse.patterns.graph import shape, to_sympy
from flashfuse.patterns.indexing import ZERO, Indices, divide, same, unlinearize, within
from flashfuse.patterns.lift import CannotLift, NodeView
from flashfuse.patterns.rows import argument, replaced, row
from flashfuse.patterns.trace import AtenCall

aten = torch.ops.aten


@row(aten.constant_pad_nd.default)
def _pad(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """The source where the position lies in it, the fill elsewhere. A negative padding cuts off."""
    source, padding, dtype = call.args[0], [to_sympy(p) for p in call.args[1]], call.output.dtype
    sizes, kept, inside = shape(source), list(position), []
    for n, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True)):
        dim = len(sizes) - 1 - n
        kept[dim] = at = position[dim] - before
        if not before.is_nonpositive:
            inside.append(less(sympy.Integer(-1), at))
        if not after.is_nonpositive:
            inside.append(less(at, sizes[dim]))
    element = view.element(source, tuple(kept))
    fill = stored(argument(call, 2, "value", 0) or 0, dtype)
    return pointwise("where", conjunction(inside), element, fill, dtype=dtype)


@row(aten.roll.default)
def _roll(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    source, shifts, dims = call.args[0], call.args[1], argument(call, 2, "dims", ())
    sizes = shape(source)
    if not dims and len(sizes) != 1:
        raise CannotLift(view.node, "rolls all elements as one row")
    rolled = list(position)
    for shift, dim in zip(shifts, dims or (0,), strict=True):
        rolled[dim] = _rolled(view, rolled[dim], to_sympy(shift), sizes[dim])
    return view.element(source, tuple(rolled))


def _rolled(view: NodeView, at: sympy.Expr, shift: sympy.Expr, size: sympy.Expr) -> sympy.Expr:
    if size == 1:
        return at
    if not (shift.is_Integer and size.is_Integer):
        raise CannotLift(view.node, "rolls by a number of places that may be larger than the tensor")
    return divide(at + int(-shift) % int(size), size, view.ranges)[1]


@row(aten.unfold.default)
def _unfold(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """Windows of one dimension, which overlap where the step is smaller than the window."""
    source, dim, _size, step = call.args
    if not source.shape:
        return view.element(source, ())
    windows, inner = position[:-1], position[-1]
    dim = dim % len(windows)
    return view.element(source, replaced(windows, dim, windows[dim] * to_sympy(step) + inner))


@row(aten.diagonal.default)
def _diagonal(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    rank = len(call.args[0].shape)
    offset = to_sympy(argument(call, 1, "offset", 0))
    first, second = (argument(call, n, f"dim{n - 1}", n - 2) % rank for n in (2, 3))
    if not offset.is_Integer:
        raise CannotLift(view.node, "takes a diagonal whose place is not known")
    rest, along = iter(position[:-1]), position[-1]
    on = {first: along + max(-int(offset), 0), second: along + max(int(offset), 0)}
    return view.element(call.args[0], tuple(on[d] if d in on else next(rest) for d in range(rank)))


@row(aten.as_strided.default)
def _as_strided(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """Any strides over a contiguous tensor: the row-major offset names the element."""
    source, out = call.args[0], call.output
    sizes = shape(source)
    offset = to_sympy(out.storage_offset() - source.storage_offset())
    for at, stride in zip(position, out.stride(), strict=True):
        offset = offset + at * to_sympy(stride)
    if not _row_major(source, sizes) or not within(sympy.expand(offset), sympy.prod(sizes), view.ranges):
        raise CannotLift(view.node, "views memory that does not lie in rows")
    kept = [size for size in sizes if size != 1]
    moved = iter(unlinearize(sympy.expand(offset), kept, view.ranges))
    return view.element(source, tuple(ZERO if size == 1 else next(moved) for size in sizes))


def _row_major(source: torch.Tensor, sizes: Sequence[sympy.Expr]) -> bool:
    expected = sympy.Integer(1)
    for size, stride in zip(reversed(sizes), reversed(source.stride()), strict=True):
        if size != 1 and not same(to_sympy(stride), expected):
            return False
        expected = expected * size
    return True


@row(aten.stack.default)
def _stack(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """A choice by position."""
    dim = argument(call, 1, "dim", 0) % len(position)
    inner = (*position[:dim], *position[dim + 1 :])
    *parts, result = [view.element(part, inner) for part in call.args[0]]
    for number in range(len(parts) - 1, -1, -1):
        here = pointwise("lt", index(position[dim]), index(number + 1))
        result = pointwise("where", here, parts[number], result, dtype=call.output.dtype)
    return result
