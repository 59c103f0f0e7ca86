"""The score of one row and column as a program: one query-key product, and everything pointwise around it.

Loads are expanded while that removes a tensor as large as the score matrix, or leads to the product; anything smaller
stays a load of the user's own tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from torch import fx

from flashfuse.kernels.expr import Dot, Expr, Index, Load, Pointwise, Product, Reduce, Softmax, free_symbols, loads, pointwise
from flashfuse.patterns.graph import name_of
from flashfuse.patterns.lift import CannotLift, Lifter
from flashfuse.patterns.refusal import Refused


@dataclass(frozen=True)
class Score:
    """`program` over `Product(0)`; `dot` is the product with the query side as `lhs`; `node` made it (the site itself, where one operator is all)."""

    program: Expr
    dot: Dot
    node: fx.Node


def find_score(lifter: Lifter, expr: Expr, j: sympy.Symbol, leads: set[fx.Node], site: fx.Node) -> Score:
    """The score program of a normaliser's argument. `leads` are the nodes behind which a product lies.

    Raises Refused where there is no product, more than one, or an operator in between that has no index form.
    """
    found: list[tuple[Dot, fx.Node]] = []
    program = _with_product(lifter, expr, j, leads, found, site)
    if not found:
        raise Refused("no-product", "the softmax is not over products of queries and keys")
    if len(found) > 1:
        raise Refused("several-products", "the score is a sum of several products of activations")
    dot, node = found[0]
    i_symbols = free_symbols(dot.lhs) - free_symbols(dot.rhs)
    return Score(_with_program(lifter, program, i_symbols, j), dot, node)


def _with_product(
    lifter: Lifter, expr: Expr, j: sympy.Symbol, leads: set[fx.Node], found: list[tuple[Dot, fx.Node]], node: fx.Node
) -> Expr:
    """Expand along the path to the product and put `Product(n)` in its place."""
    match expr:
        case Dot():
            return _product(expr, j, found, node)
        case Pointwise():
            args = tuple(_with_product(lifter, a, j, leads, found, node) for a in expr.args)
            return pointwise(expr.op, *args, dtype=expr.dtype)
        case Load() if expr.tensor in leads and j in free_symbols(expr):
            return _through(lifter, expr, j, leads, found)
        case Softmax() | Reduce():
            raise Refused("row-dependent", "a score depends on other scores of its row or column", node)
    return expr


def _through(lifter: Lifter, load: Load, j: sympy.Symbol, leads: set[fx.Node], found: list[tuple[Dot, fx.Node]]) -> Expr:
    """Behind a load, unless what lies there is not a query-key product: then the load is one of the score's own tensors."""
    assert isinstance(load.tensor, fx.Node)
    before = len(found)
    try:
        return _with_product(lifter, lifter.expand(load), j, leads, found, load.tensor)
    except CannotLift as error:
        if before:
            return load
        label = name_of(error.node or load.tensor)
        raise Refused("unknown-operator", f"`{label}` between the product and the softmax {error.reason}", load.tensor) from error
    except NotAProduct:
        del found[before:]
        return load


class NotAProduct(Exception):
    """A contraction that is not of queries with keys."""


def _product(dot: Dot, j: sympy.Symbol, found: list[tuple[Dot, fx.Node]], node: fx.Node) -> Expr:
    left, right = j in free_symbols(dot.lhs), j in free_symbols(dot.rhs)
    if left == right:
        raise NotAProduct
    dot = dot if right else Dot(dot.dtype, dot.rhs, dot.lhs, dot.axis, dot.extent)
    known = [d for d, _ in found]
    if dot not in known:
        found.append((dot, node))
        known.append(dot)
    return Product(dot.dtype, known.index(dot))


def _with_program(lifter: Lifter, expr: Expr, i_symbols: frozenset[sympy.Symbol], j: sympy.Symbol) -> Expr:
    """Expand masks and biases as large as the score matrix, and anything made of positions alone."""
    match expr:
        case Pointwise():
            return pointwise(expr.op, *(_with_program(lifter, a, i_symbols, j) for a in expr.args), dtype=expr.dtype)
        case Load():
            return _opened(lifter, expr, i_symbols, j)
    return expr


def _opened(lifter: Lifter, load: Load, i_symbols: frozenset[sympy.Symbol], j: sympy.Symbol) -> Expr:
    symbols = free_symbols(load)
    square = j in symbols and bool(symbols & i_symbols)
    try:
        inner = lifter.expand(load)
    except CannotLift:
        return load
    if not _is_program(inner):
        return load
    opened = _with_program(lifter, inner, i_symbols, j)
    return opened if square or not loads(opened) or isinstance(inner, Load) else load


def _is_program(expr: Expr) -> bool:
    return all(_is_program(c) for c in expr.children) if isinstance(expr, Pointwise) else isinstance(expr, (Load, Index)) or not expr.children
