"""Rows of nodes that need not be run to be read: layout and matrix products, which most of a graph is.

Running a node on fake tensors takes longer than all that is made of it, most of all where sizes are symbols. Each row
says what the ATen calls of the node would; None where an argument is not of the kind it knows, and the node is run.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from flashfuse.kernels.expr import Dot, Expr
from flashfuse.patterns.graph import shape, tensor
from flashfuse.patterns.indexing import ZERO, Indices, reshape
from flashfuse.patterns.lift import DIRECT_ROWS, DirectRow, NodeView
from flashfuse.patterns.trace import autocasts


def _direct(*targets: Any) -> Callable[[DirectRow], DirectRow]:
    """Make the decorated rule the row of these functions and methods."""

    def add(rule: DirectRow) -> DirectRow:
        DIRECT_ROWS.update(dict.fromkeys(targets, rule))
        return rule

    return add


def _plain(node: Any, dtype: torch.dtype) -> torch.Tensor | None:
    """The value of an argument that is a dense tensor of real numbers of this type."""
    t = tensor(node) if isinstance(node, fx.Node) else None
    plain = t is not None and t.layout == torch.strided and not t.is_nested and t.dtype == dtype
    return t if plain and not dtype.is_complex else None


def _moved(view: NodeView) -> tuple[fx.Node, torch.Tensor, torch.Tensor] | None:
    """The tensor that a layout operator takes first, its value and the result's."""
    node, out = view.node, tensor(view.node)
    given = node.args[0] if node.args and not node.kwargs else None
    source = None if out is None else _plain(given, out.dtype)
    return (given, source, out) if isinstance(given, fx.Node) and source is not None and out is not None else None


@_direct("view", "reshape", "flatten", torch.reshape, torch.flatten)
def _reshaped(view: NodeView, position: Indices) -> Expr | None:
    moved = _moved(view)
    if moved is None or any(isinstance(a, torch.dtype) for a in view.node.args):
        return None
    source, before, after = moved
    return view.input(source, reshape(position, shape(after), shape(before), view.ranges))


@_direct("expand", "contiguous")
def _same_element(view: NodeView, position: Indices) -> Expr | None:
    moved = _moved(view)
    return None if moved is None else view.input(moved[0], position)


@_direct("transpose", torch.transpose)
def _transposed(view: NodeView, position: Indices) -> Expr | None:
    moved, dims = _moved(view), [d for d in view.node.args[1:] if type(d) is int]
    if moved is None or not position or len(dims) != 2:
        return None
    swapped, (a, b) = list(position), dims
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return view.input(moved[0], tuple(swapped))


@_direct("permute", torch.permute)
def _permuted(view: NodeView, position: Indices) -> Expr | None:
    moved, dims = _moved(view), view.node.args[1:]
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = tuple(dims[0])
    order = [d % len(position) for d in dims if type(d) is int]
    if moved is None or len(order) != len(dims) or len(dims) != len(position):
        return None
    source: list[sympy.Expr] = [ZERO] * len(position)
    for at, dim in zip(position, order, strict=True):
        source[dim] = at
    return view.input(moved[0], tuple(source))


@_direct("unsqueeze", torch.unsqueeze)
def _unsqueezed(view: NodeView, position: Indices) -> Expr | None:
    moved, dims = _moved(view), view.node.args[1:]
    if moved is None or len(dims) != 1 or not isinstance(dims[0], int):
        return None
    dim = dims[0] % len(position)
    return view.input(moved[0], position[:dim] + position[dim + 1 :])


@_direct("matmul", "bmm", torch.matmul, torch.bmm, operator.matmul)
def _product(view: NodeView, position: Indices) -> Expr | None:
    """sum_r a[.., i, r] * b[.., r, j]. Autocast would convert both."""
    node, out = view.node, tensor(view.node)
    assert out is not None
    if node.kwargs or len(node.args) != 2 or autocasts(view.lifter.graph, node):
        return None
    a, b = (_plain(given, out.dtype) for given in node.args)
    if a is None or b is None or min(a.dim(), b.dim()) < 1 or shape(a)[-1] == 1:
        return None
    left, right = (given for given in node.args if isinstance(given, fx.Node))
    extent = shape(a)[-1]
    r = view.symbol(extent)
    # A vector has no row and no column in the result.
    columns = position[-1:] if b.dim() > 1 else ()
    rest = position[: len(position) - len(columns)]
    rows = rest[-1:] if a.dim() > 1 else ()
    batch = rest[: len(rest) - len(rows)]
    lhs = (*batch, *rows, r) if a.dim() > 1 else (r,)
    rhs = (*batch, r, *columns) if b.dim() > 1 else (r,)
    return Dot(out.dtype, view.input(left, lhs), view.input(right, rhs), r, extent)


@_direct(operator.getitem)
def _sliced(view: NodeView, position: Indices) -> Expr | None:
    """x[a:, .., None, n]: every other kind of index is left to be run."""
    moved = _moved(view)
    if moved is None or len(view.node.args) != 2 or not isinstance(view.node.args[0], fx.Node):
        return None
    source, before, _ = moved
    given = view.node.args[1]
    items = _in_full(given if isinstance(given, tuple) else (given,), before.dim())
    if items is None:
        return None
    result, places, size = iter(position), [], iter(zip(shape(before), before.stride(), strict=True))
    for item in items:
        if item is None:
            next(result)
            continue
        begin = _begin(item, *next(size))
        if begin is None:
            return None
        places.append(begin + next(result) if isinstance(item, slice) else begin)
    return view.input(source, tuple(places))


def _in_full(items: tuple[Any, ...], rank: int) -> list[Any] | None:
    """An item for every dimension of the tensor, and None for new ones; None where an item is of another kind."""
    if not all(i is None or i is ... or isinstance(i, slice) or type(i) is int for i in items) or items.count(...) > 1:
        return None
    taken = sum(i is not None and i is not ... for i in items)
    at = items.index(...) if ... in items else len(items)
    return [*items[:at], *[slice(None)] * (rank - taken), *items[at + 1 :]]


def _begin(item: slice | int, size: sympy.Expr, stride: Any) -> sympy.Expr | None:
    """Where a slice with step 1 begins or an index is; None where that takes more than numbers to say."""
    first = item.start if isinstance(item, slice) else item
    if isinstance(item, slice) and (item.step not in (None, 1) or not (first is None or type(first) is int)):
        return None
    if first in (None, 0) or size == 1:
        return ZERO
    if not size.is_Integer or stride == 0:
        return None
    return sympy.Integer(min(max(first + size, 0), size) if first < 0 else min(first, size))
