"""Rows of the ATen operators that multiply matrices, some of them with something added."""

from __future__ import annotations

import sympy
import torch

from flashfuse.kernels.expr import Dot, Expr
from flashfuse.kernels.normal import pointwise
from flashfuse.patterns.graph import shape
from flashfuse.patterns.indexing import ZERO, Indices, divide
from flashfuse.patterns.lift import NodeView
from flashfuse.patterns.rows import row
from flashfuse.patterns.trace import AtenCall

aten = torch.ops.aten


@row(aten.bmm.default, aten.mm.default, aten.mv.default, aten.dot.default)
def _product(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    return _contraction(view, call.args[0], call.args[1], position, call.output.dtype)


def _contraction(view: NodeView, a: torch.Tensor, b: torch.Tensor, position: Indices, dtype: torch.dtype) -> Expr:
    """sum_r a[.., i, r] * b[.., r, j]; of vectors there is no row or column in the result."""
    extent = shape(a)[-1]
    r = ZERO if extent == 1 else view.symbol(extent)
    rows = len(a.shape) - 1
    left = (*position[:rows], r)
    right = (*position[: len(b.shape) - 2], r, *position[rows:]) if len(b.shape) > 1 else (r,)
    return _dot(dtype, view.element(a, left), view.element(b, right), r, extent)


def _dot(dtype: torch.dtype, lhs: Expr, rhs: Expr, axis: sympy.Expr, extent: sympy.Expr) -> Expr:
    if not isinstance(axis, sympy.Symbol):
        axis = sympy.Symbol("unit", integer=True, nonnegative=True)
    return Dot(dtype, lhs, rhs, axis, extent)


@row(aten.baddbmm.default, aten.addmm.default, aten.addmv.default)
def _added(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    _x, a, b = call.args
    return _beside(view, call, position, _contraction(view, a, b, position, call.output.dtype))


@row(aten.addbmm.default)
def _added_over_batch(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """The products of all of the batch are added up too."""
    _x, a, b = call.args
    batch, _rows, length = shape(a)
    extent = batch * length
    r = ZERO if extent == 1 else view.symbol(extent)
    n, at = divide(r, length, view.ranges)
    lhs, rhs = view.element(a, (n, position[0], at)), view.element(b, (n, at, position[1]))
    return _beside(view, call, position, _dot(call.output.dtype, lhs, rhs, r, extent))


@row(aten.addr.default)
def _added_outer(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """A product over one feature."""
    _x, a, b = call.args
    lhs, rhs = view.element(a, position[:1]), view.element(b, position[1:])
    return _beside(view, call, position, _dot(call.output.dtype, lhs, rhs, ZERO, sympy.Integer(1)))


def _beside(view: NodeView, call: AtenCall, position: Indices, product: Expr) -> Expr:
    """beta * added + alpha * product; torch ignores `added` altogether where beta is 0."""
    dtype = call.output.dtype
    beta, alpha = call.kwargs.get("beta", 1), call.kwargs.get("alpha", 1)
    result = pointwise("mul", product, view.number(alpha), dtype=dtype)
    if beta == 0:
        return result
    added = pointwise("mul", view.element(call.args[0], position), view.number(beta), dtype=dtype)
    return pointwise("add", added, result, dtype=dtype)
