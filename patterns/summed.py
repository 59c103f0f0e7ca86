"""Products that are written as a multiplication and a sum: `(q[.., :, None, :] * k[.., None, :, :]).sum(-1)`.

Broadcasting makes such a sum a contraction like any other, of what was broadcast. A sum of other things of two
tensors, as of their differences, is none, and is told from it here too.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from flashfuse.kernels.expr import Const, Dot, Expr, Load, Pointwise, Reduce, free_symbols
from flashfuse.kernels.normal import number, pointwise, substitute
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.patterns.calls import name_of
from flashfuse.patterns.graph import shape, tensor, to_sympy, value
from flashfuse.patterns.indexing import divide
from flashfuse.patterns.lift import CannotLift, Lifter
from flashfuse.patterns.opened import open_up, opened_or_none
from flashfuse.patterns.operand import exactly_promotes, reciprocal

_SUMS = frozenset({"sum", "mean"})
_NORMS = frozenset({"norm", "linalg_norm", "linalg_vector_norm"})
_PRODUCTS = frozenset({"mul", "__mul__", "__rmul__", "multiply"})
ADDITIONS = frozenset({"add", "add_", "iadd", "__add__", "__radd__", "__iadd__"})
DIFFERENCES = frozenset({"sub", "__sub__", "__rsub__", "rsub", "subtract", "sub_", "isub", "__isub__"})
# Sum along an axis of the tensors that they are given.
_BOTH = frozenset({"vecdot", "linalg_vecdot", "cosine_similarity"})
# Functions of every pair of rows.
_PAIRWISE = frozenset({"cdist"})
# What may stand between two tensors and the sum, and what makes a distance of their difference there.
_SCALES = _PRODUCTS | {"mul_", "imul", "truediv", "div", "__truediv__", "div_", "neg", "float", "to"}
_BENDS = frozenset({"pow", "__pow__", "pow_", "square", "abs"})


class Sum(enum.Enum):
    """Which elements of two tensors a node brings together and sums along an axis, as a product of them does.

    BROADCAST: one of them at least has each of its elements meet several of the other. ALIGNED: each meets its own, in
    rows along the last axis, which may be one repeated row.
    """

    NONE = enum.auto()
    ALIGNED = enum.auto()
    BROADCAST = enum.auto()


def sum_of(node: fx.Node) -> Sum:
    """What a node sums of two tensors that are multiplied, or of whose every pair of rows it takes a distance."""
    name = name_of(node)
    if name in _PAIRWISE:
        return Sum.BROADCAST
    source = node if name in _BOTH else node.args[0] if name in _SUMS | _NORMS and node.args else None
    linear = name not in _NORMS
    while isinstance(source, fx.Node):
        product, difference = name_of(source) in _PRODUCTS or source is node, name_of(source) in DIFFERENCES
        found = _pair(source.args[:2]) if difference or (product and linear) else None
        if found is not None:
            return _kind(node, *found, product)
        linear &= name_of(source) not in _BENDS
        source = source.args[0] if name_of(source) in _SCALES | _BENDS and source.args else None
    return Sum.NONE


def _kind(node: fx.Node, left: Sequence[sympy.Expr], right: Sequence[sympy.Expr], product: bool) -> Sum:
    broadcast = [any(a == 1 != b for a, b in zip(*sides, strict=True)) for sides in ((left, right), (right, left))]
    if all(broadcast) or (product and any(broadcast)):
        return Sum.BROADCAST
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
    return Sum.ALIGNED if product and dims in (-1, [-1], (-1,)) and not any(broadcast) else Sum.NONE


def adds_pairs(node: fx.Node) -> bool:
    """Whether a node adds a row of one tensor of activations to several rows of another, as a query to all keys."""
    found = _pair(node.args[:2]) if name_of(node) in ADDITIONS else None
    if found is None or any(isinstance(value(n), torch.nn.Parameter) for n in node.all_input_nodes):
        return False
    # What all rows share is a bias, and what all of a batch shares may be positions.
    rows = all(any(n != 1 for n in side[:-1]) for side in found)
    return rows and any(a != b for a, b in zip(*(side[1:-1] for side in found), strict=True))


def multiplies_pairs(node: fx.Node) -> bool:
    """Whether a node multiplies a number of each row of one tensor with one of each row of another: one feature."""
    found = _pair(node.args[:2]) if name_of(node) in _PRODUCTS else None
    of_layer = any(isinstance(value(n), torch.nn.Parameter) for n in node.all_input_nodes)
    if found is None or len(found[0]) < 2 or of_layer:
        return False
    (*_, rows, feature), (*_, one, columns) = found if found[0][-1] == 1 else found[::-1]
    return feature == one == 1 and 1 not in (rows, columns)


def _pair(args: Sequence[Any]) -> tuple[tuple[sympy.Expr, ...], tuple[sympy.Expr, ...]] | None:
    """The sizes of two tensors, as many of each; an expanded dimension has size 1. None for other arguments."""
    tensors = [t for a in args if isinstance(a, fx.Node) and (t := tensor(a)) is not None]
    dense = all(t.layout == torch.strided and not t.is_nested and t.is_floating_point() for t in tensors)
    if len(tensors) != 2 or not dense or args[0] is args[1]:
        return None
    one = sympy.Integer(1)
    sizes = [[one if to_sympy(s) == 0 else n for n, s in zip(shape(t), t.stride(), strict=True)] for t in tensors]
    rank = max(map(len, sizes))
    left, right = ((*[one] * (rank - len(s)), *s) for s in sizes)
    return left, right


def as_product(lifter: Lifter, expr: Expr) -> Expr:
    """A sum of products of two elements as the contraction that it is; any other expression as it is."""
    if isinstance(expr, Pointwise) and expr.op in ("div", "mul") and isinstance(expr.args[0], Reduce):
        return pointwise(expr.op, as_product(lifter, expr.args[0]), expr.args[1], dtype=expr.dtype)
    if not isinstance(expr, Reduce) or expr.kind != "sum" or not expr.dtype.is_floating_point:
        return expr
    total = _over_one_axis(lifter, expr)
    found = _two_factors(lifter, total)
    if found is None:
        return expr
    lhs, rhs, factors = found
    result: Expr = Dot(expr.dtype, lhs, rhs, total.axis, total.extent)
    for factor in factors:
        result = pointwise("mul", result, factor, dtype=expr.dtype)
    return result


def of_one_feature(lifter: Lifter, expr: Pointwise, j: sympy.Symbol) -> Dot | None:
    """An element of a tensor times one of another, at column j, as their product over one feature; None for others."""
    at_j = [j in free_symbols(side) for side in expr.args]
    if sum(at_j) != 1 or not all(isinstance(side, Load) for side in expr.args):
        return None
    queries, keys = expr.args if at_j[1] else expr.args[::-1]
    return Dot(expr.dtype, queries, keys, lifter.symbol("r", sympy.Integer(1)), sympy.Integer(1))


def as_sum(lifter: Lifter, expr: Expr) -> Expr:
    """A product with ones as the sum that it is; any other expression as it is."""
    if not isinstance(expr, Dot):
        return expr
    for terms, other in ((expr.lhs, expr.rhs), (expr.rhs, expr.lhs)):
        top = opened_or_none(lifter, other)
        if top is not None and number(top) == 1:
            return Reduce(expr.dtype, "sum", terms, expr.axis, expr.extent)
    return expr


def _over_one_axis(lifter: Lifter, total: Reduce) -> Reduce:
    """A sum over several axes as one over all of their positions, in order."""
    axes, arg = [(total.axis, total.extent)], total.arg
    while isinstance(arg, Reduce) and arg.kind == "sum":
        axes.append((arg.axis, arg.extent))
        arg = arg.arg
    if len(axes) == 1:
        return total
    extent = sympy.prod([extent for _, extent in axes])
    whole = lifter.symbol("r", extent)
    rest: sympy.Expr = whole
    places: dict[sympy.Symbol, sympy.Expr] = {}
    for axis, size in reversed(axes):
        rest, places[axis] = divide(rest, size, lifter.ranges)
    return Reduce(total.dtype, "sum", lifter.divided_again(substitute(arg, places)), whole, extent)


def _two_factors(lifter: Lifter, total: Reduce) -> tuple[Expr, Expr, tuple[Expr, ...]] | None:
    """The two factors of a sum's terms that differ along its axis, and those that do not; None where there are more."""
    expr = total.arg
    factors: list[Expr] = []
    while True:
        try:
            top = open_up(lifter, expr)
        except CannotLift:
            return None
        if not isinstance(top, Pointwise):
            return None
        varying = [a for a in top.args if total.axis in free_symbols(a)]
        if top.op == "mul" and len(varying) == 2:
            lhs, rhs = (_before_expansion(lifter, a) for a in top.args)
            of_more = any(_is_pair(lifter, side, total.axis) for side in (lhs, rhs))
            return None if of_more else (lhs, rhs, tuple(factors))
        if len(varying) != 1:
            return None
        if top.op == "mul":
            factors += [a for a in top.args if a is not varying[0]]
        elif top.op == "div" and varying[0] is top.args[0]:
            factors.append(reciprocal(top.args[1], top.dtype))
        elif top.op == "neg":
            factors.append(Const(top.dtype, -1.0))
        elif top.op not in ROUNDINGS or not exactly_promotes(top.args[0].dtype, ROUNDINGS[top.op]):
            return None
        expr = varying[0]


def _before_expansion(lifter: Lifter, expr: Expr) -> Expr:
    """The element where its tensor was not yet expanded, as a query to the number of the keys."""
    narrowest = expr
    while isinstance(expr, Load):
        try:
            expr = lifter.expand(expr)
        except CannotLift:
            break
        if isinstance(expr, Load) and free_symbols(expr) < free_symbols(narrowest):
            narrowest = expr
    return narrowest


def _is_pair(lifter: Lifter, expr: Expr, axis: sympy.Symbol) -> bool:
    """Whether a factor is itself a product of two that differ along the axis, of which each was broadcast."""
    try:
        top = open_up(lifter, expr)
    except CannotLift:
        return False
    if not isinstance(top, Pointwise) or top.op != "mul":
        return False
    left, right = (free_symbols(a) for a in top.args)
    return axis in left & right and not (left <= right or right <= left)
