"""The score of one row and column as a program: one query-key product, and everything pointwise around it.

Loads are expanded while that removes a tensor as large as the score matrix, or leads to the product; anything smaller
stays a load of the user's own tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import fx

from flashfuse.kernels.expr import (
    Const,
    Dot,
    Expr,
    Index,
    Load,
    Pointwise,
    Product,
    Reduce,
    Softmax,
    free_symbols,
    loads,
    walk,
)
from flashfuse.kernels.normal import number, pointwise
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.patterns.graph import is_weighted, name_of
from flashfuse.patterns.lift import CannotLift, Lifter, may_wrap, small_position
from flashfuse.patterns.operand import exactly_promotes
from flashfuse.patterns.refusal import Refused


@dataclass(frozen=True)
class Score:
    """`program` over `Product(0)`; `dot` is the product with the query side as `lhs`; `node` made it.

    `node` is the site itself where one operator is the whole attention.
    """

    program: Expr
    dot: Dot
    node: fx.Node


def find_score(lifter: Lifter, expr: Expr, j: sympy.Symbol, leads: set[fx.Node], site: fx.Node) -> Score:
    """The score program of a normaliser's argument. `leads` are the nodes behind which a product lies.

    Raises Refused where there is no product, more than one, or an operator in between that has no index form.
    """
    search = _Search(lifter, j, leads)
    program = search.opened(expr, site)
    if not search.found:
        raise search.trouble or Refused("no-product", "the softmax is not over products of queries and keys")
    if len(search.found) > 1:
        raise Refused("several-products", "the score is a sum of several products of activations")
    dot, node = search.found[0]
    i_symbols = free_symbols(dot.lhs) - free_symbols(dot.rhs)
    try:
        return Score(_with_program(lifter, program, i_symbols, j), dot, node)
    except _Inexact:
        raise Refused("inexact", "a mask compares numbers that would be computed in another type") from None


class _NoIndexForm(Exception):
    """Behind a load lies something that is not a score program: the load is one of the score's own tensors."""


class _Search:
    """Expands a score along every path that leads to a product, and puts `Product(n)` in the product's place."""

    def __init__(self, lifter: Lifter, j: sympy.Symbol, leads: set[fx.Node]) -> None:
        self.lifter, self.j, self.leads = lifter, j, leads
        self.found: list[tuple[Dot, fx.Node]] = []
        self.trouble: Refused | None = None

    def opened(self, expr: Expr, node: fx.Node) -> Expr:
        """`expr`, which `node` computes, with its products found."""
        match expr:
            case Dot():
                return self._product(expr, node)
            case Pointwise():
                return pointwise(expr.op, *(self.opened(a, node) for a in expr.args), dtype=expr.dtype)
            case Load() if expr.tensor in self.leads and self.j in free_symbols(expr):
                return self._through(expr)
            case Softmax() | Reduce():
                self._note(Refused("row-dependent", "a score depends on other scores of its row or column", node))
                raise _NoIndexForm
        return expr

    def _through(self, load: Load) -> Expr:
        """Behind a load, or the load itself where no score program lies there."""
        node = load.tensor
        assert isinstance(node, fx.Node)
        before = len(self.found)
        try:
            return self.opened(self.lifter.expand(load), node)
        except CannotLift as error:
            label = name_of(error.node or node)
            self._note(Refused("unknown-operator", f"`{label}` before the softmax {error.reason}", error.node or node))
        except _NoIndexForm:
            pass
        del self.found[before:]
        return load

    def _product(self, dot: Dot, node: fx.Node) -> Expr:
        left, right = self.j in free_symbols(dot.lhs), self.j in free_symbols(dot.rhs)
        if left == right or is_weighted(node):
            raise _NoIndexForm
        dot = dot if right else Dot(dot.dtype, dot.rhs, dot.lhs, dot.axis, dot.extent)
        known = [d for d, _ in self.found]
        if dot not in known:
            self.found.append((dot, node))
            known.append(dot)
        return Product(dot.dtype, known.index(dot))

    def _note(self, trouble: Refused) -> None:
        self.trouble = self.trouble or trouble


# Where an argument's last bit may decide the result, so that it must be computed as written.
_STEPS = frozenset({"floor", "to_int", "to_bool", "lt", "le", "gt", "ge", "eq", "ne"})


def settled(expr: Expr, dtype: torch.dtype) -> Expr:
    """The program with the scale of its product gathered: x / c is x * (1 / c), and factors of factors are one.

    Roundings of the scores to a type that holds their own element type `dtype` go too: wider is nearer to the source's
    meaning. Masks and biases stay exactly as written.
    """
    if not isinstance(expr, Pointwise) or expr.op in _STEPS or not any(isinstance(e, Product) for e in walk(expr)):
        return expr
    args = tuple(settled(a, dtype) for a in expr.args)
    if expr.op in ROUNDINGS and exactly_promotes(dtype, ROUNDINGS[expr.op]):
        return args[0]
    if expr.op == "div" and number(args[1]):
        return _times(args[0], 1.0 / float(number(args[1]) or 1.0), expr.dtype)
    if expr.op == "mul":
        for x, c in (args, args[::-1]):
            if (factor := number(c)) is not None:
                return _times(x, float(factor), expr.dtype)
    return pointwise(expr.op, *args, dtype=expr.dtype)


def _times(expr: Expr, factor: float, dtype: torch.dtype) -> Expr:
    """expr * factor, where expr may have a factor already."""
    if isinstance(expr, Pointwise) and expr.op == "mul":
        for x, c in (expr.args, expr.args[::-1]):
            if (known := number(c)) is not None:
                return pointwise("mul", x, Const(dtype, factor * float(known)), dtype=dtype)
    return pointwise("mul", expr, Const(dtype, factor), dtype=dtype)


class _Inexact(Exception):
    """A mask compares, rounds or truncates numbers that the kernel would compute in another type than the source."""


def _with_program(lifter: Lifter, expr: Expr, i_symbols: frozenset[sympy.Symbol], j: sympy.Symbol) -> Expr:
    """Expand masks and biases as large as the score matrix, and anything made of positions alone."""
    match expr:
        case Pointwise(op=op):
            args = tuple(_with_program(lifter, a, i_symbols, j) for a in expr.args)
            if op in _STEPS:
                args = tuple(_exact(new, old) for new, old in zip(args, expr.args, strict=True))
            return pointwise(op, *args, dtype=expr.dtype)
        case Load():
            return _opened(lifter, expr, i_symbols, j)
    return expr


def _exact(opened: Expr, written: Expr) -> Expr:
    """An argument of a step, opened as far as its value stays exactly the source's; scores are as wide as can be."""
    for candidate in (opened, written):
        if _is_exact(candidate) or any(isinstance(e, Product) for e in walk(candidate)):
            return candidate
    raise _Inexact


# Give one of their arguments, or its opposite.
_SELECTING = ("where", "neg", "abs", "min", "max", "minimum", "maximum")


def _is_exact(expr: Expr) -> bool:
    """Whether the kernel's float32 holds exactly what the source computed: no arithmetic on floats, no wide types."""
    match expr:
        case Index() | Const():
            return True
        case Load(dtype=dtype):
            return dtype != torch.float64
        case Pointwise(op="to_float", args=(Index(value=value),)):
            return small_position(value)
        case Pointwise(op=op, dtype=dtype):
            whole = op in _SELECTING or op in ROUNDINGS or not dtype.is_floating_point
            return whole and all(_is_exact(c) for c in expr.children)
    return False


def _opened(lifter: Lifter, load: Load, i_symbols: frozenset[sympy.Symbol], j: sympy.Symbol) -> Expr:
    symbols = free_symbols(load)
    square = j in symbols and bool(symbols & i_symbols)
    try:
        inner = lifter.expand(load)
    except CannotLift:
        return load
    if not _is_program(inner):
        return load
    try:
        opened = _with_program(lifter, inner, i_symbols, j)
    except _Inexact:
        return load
    if may_wrap(opened, load.dtype, lifter.ranges):
        return load
    return opened if square or not loads(opened) or isinstance(inner, Load) else load


def _is_program(expr: Expr) -> bool:
    if isinstance(expr, Pointwise):
        return all(_is_program(c) for c in expr.children)
    return isinstance(expr, (Load, Index)) or not expr.children
