"""The score of one row and column as a program: one query-key product, and everything pointwise around it.

Loads are expanded while that removes a tensor as large as the score matrix, or leads to the product; anything smaller
stays a load of the user's own tensor. So do look-ups in a table that the whole batch shares: the graph makes the table
of biases once, as eager code does, and layers and batch share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

from flashfuse.kernels.expr import (
    Const,
    Dot,
    Expr,
    Gather,
    Index,
    Load,
    Pointwise,
    Product,
    Reduce,
    Softmax,
    free_symbols,
    gather,
    loads,
    walk,
)
from flashfuse.kernels.normal import number, pointwise
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.patterns.cases import without_cases
from flashfuse.patterns.graph import is_weighted, tensor, to_sympy
from flashfuse.patterns.indexing import same
from flashfuse.patterns.lift import CannotLift, Lifter, may_wrap, small_position
from flashfuse.patterns.operand import exactly_promotes, sizes_of
from flashfuse.patterns.products import Term, as_one_product, side_products
from flashfuse.patterns.refusal import Refused, blocked, mixed


@dataclass(frozen=True)
class Score:
    """`program` over `Product(0)`: the sum of the terms' products. Each has the query side as `lhs`; the first is main.

    `nodes` made them: the site itself where one operator is the whole attention. `opener` reads further programs.
    """

    program: Expr
    terms: tuple[Term, ...]
    nodes: tuple[fx.Node, ...]
    opener: Opener = field(compare=False)

    @property
    def dot(self) -> Dot:
        return self.terms[0].dot


def find_score(
    lifter: Lifter,
    expr: Expr,
    j: sympy.Symbol,
    leads: AbstractSet[fx.Node],
    site: fx.Node,
    rows: Sequence[sympy.Symbol] = (),
) -> Score:
    """The score program of a normaliser's argument. `leads` are the nodes behind which a product lies.

    rows: the output's symbols that the values lack; the query position is one of them.
    Raises Refused where there is no product, where several cannot be one, or where an operator in between has no index
    form.
    """
    search = _Search(lifter, j, leads)
    program = search.read(expr, site)
    others = side_products([dot for dot, _ in search.found], rows, j)
    if others:
        search = _Search(lifter, j, leads, others)
        program = search.read(expr, site)
    if not search.found:
        raise search.trouble or Refused("no-product", "the softmax is not over products of queries and keys")
    dots, nodes = zip(*search.found, strict=True)
    program, terms = as_one_product(program, dots, nodes)
    i_symbols = free_symbols(terms[0].dot.lhs) - free_symbols(terms[0].dot.rhs)
    opener = Opener(lifter, i_symbols, j, leads)
    return Score(opener.read(program), terms, nodes, opener)


class _NoIndexForm(Exception):
    """Behind a load lies something that is not a score program: the load is one of the score's own tensors."""


class _Search:
    """Expands a score along every path that leads to a product, and puts `Product(n)` in the product's place.

    A product among `others` stays the tensor that the graph makes of it.
    """

    def __init__(
        self, lifter: Lifter, j: sympy.Symbol, leads: AbstractSet[fx.Node], others: AbstractSet[Dot] = frozenset()
    ) -> None:
        self.lifter, self.j, self.leads, self.others = lifter, j, leads, others
        self.found: list[tuple[Dot, fx.Node]] = []
        self.trouble: Refused | None = None

    def read(self, expr: Expr, node: fx.Node) -> Expr:
        """`opened` from the top, where nothing is left that could stay a load."""
        try:
            return self.opened(expr, node)
        except _NoIndexForm:
            self.found.clear()
            return expr

    def opened(self, expr: Expr, node: fx.Node) -> Expr:
        """`expr`, which `node` computes, with its products found."""
        match expr:
            case Dot():
                return self._product(expr, node)
            case Pointwise():
                return pointwise(expr.op, *(self.opened(a, node) for a in expr.args), dtype=expr.dtype)
            case Load() if expr.tensor in self.leads and self.j in free_symbols(expr):
                return self._through(expr)
            case Gather() if expr.tensor in self.leads:
                self._note(Refused("look-up", "the scores are looked up at positions that depend on data", node))
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
            program = self.opened(self.lifter.expand(load), node)
            if len(self.found) == before or not self._reaches_outside(load):
                return program
            self._note(Refused("extra-columns", "the softmax has rows or columns that are no products", node))
        except CannotLift as error:
            self._note(blocked(error.node or node, error.reason))
        except _NoIndexForm:
            pass
        del self.found[before:]
        return load

    def _reaches_outside(self, load: Load) -> bool:
        """Whether an index takes more values than its dimension has: only a choice around it keeps it inside."""
        ranges = self.lifter.ranges
        return any(
            (ranges[symbol] - size).is_positive
            for index, size in zip(load.indices, sizes_of(load), strict=True)
            for symbol in index.free_symbols & ranges.keys()
            if index.coeff(symbol, 1) == 1
        )

    def _product(self, dot: Dot, node: fx.Node) -> Expr:
        left, right = self.j in free_symbols(dot.lhs), self.j in free_symbols(dot.rhs)
        if is_weighted(node) and any(x.tensor in self.leads for x in loads(dot)):
            self._note(mixed(node))
        if left == right or is_weighted(node):
            raise _NoIndexForm
        dot = dot if right else Dot(dot.dtype, dot.rhs, dot.lhs, dot.axis, dot.extent)
        if dot in self.others:
            raise _NoIndexForm
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


class Opener:
    """Expands masks and biases as large as the score matrix, and anything made of positions alone."""

    def __init__(
        self, lifter: Lifter, i_symbols: frozenset[sympy.Symbol], j: sympy.Symbol, leads: AbstractSet[fx.Node]
    ) -> None:
        self.lifter, self.i_symbols, self.j, self.leads = lifter, i_symbols, j, leads

    def read(self, expr: Expr) -> Expr:
        """The program of an expression. Raises Refused."""
        try:
            return without_cases(self.program(expr), self.lifter.ranges)
        except _Inexact:
            raise Refused("inexact", "a mask compares numbers that would be computed in another type") from None

    def program(self, expr: Expr) -> Expr:
        match expr:
            case Pointwise(op=op):
                args = tuple(self.program(a) for a in expr.args)
                if op in _STEPS:
                    args = tuple(_exact(new, old) for new, old in zip(args, expr.args, strict=True))
                return pointwise(op, *args, dtype=expr.dtype)
            case Gather():
                return gather(expr.dtype, expr.tensor, tuple(_exact(self.program(a), a) for a in expr.at))
            case Load():
                return self._opened(expr)
        return expr

    def _opened(self, load: Load) -> Expr:
        symbols = free_symbols(load)
        square = self.j in symbols and bool(symbols & self.i_symbols)
        try:
            inner = self.lifter.expand(load)
        except CannotLift:
            return load
        if not _is_program(inner) or not all(self._read_through(e) for e in walk(inner) if isinstance(e, Gather)):
            return load
        try:
            opened = self.program(inner)
        except _Inexact:
            return load
        if may_wrap(opened, load.dtype, self.lifter.ranges):
            return load
        if isinstance(opened, Load) and self._is_better_laid_out(load, opened):
            return load
        return opened if square or not loads(opened) or isinstance(inner, Load) else load

    def _is_better_laid_out(self, copy: Load, source: Load) -> bool:
        """Whether the user's own copy, no larger than its source, has neighbouring keys side by side in memory."""
        if not same(sympy.prod(sizes_of(copy)), sympy.prod(sizes_of(source))):
            return False
        return self._key_stride(copy) == 1 and self._key_stride(source) not in (-1, 0, 1)

    def _key_stride(self, load: Load) -> sympy.Expr:
        assert isinstance(load.tensor, fx.Node)
        t = tensor(load.tensor)
        assert t is not None
        steps = (sympy.expand(i).coeff(self.j, 1) for i in load.indices)
        return sympy.expand(sum(step * to_sympy(stride) for step, stride in zip(steps, t.stride(), strict=True)))

    def _read_through(self, look_up: Gather) -> bool:
        """Whether the result of a look-up would be as large as the score matrix of every batch element.

        It is where a product is looked up, or where positions that depend on data differ over the batch.
        """
        if look_up.tensor in self.leads:
            return True
        data = frozenset().union(*(free_symbols(a) for a in look_up.at if not isinstance(a, Index)))
        return bool((data & self.lifter.ranges.keys()) - self.i_symbols - {self.j})


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
        case Load(dtype=dtype) | Gather(dtype=dtype):
            return dtype != torch.float64 and all(_is_exact(c) for c in expr.children)
        case Pointwise(op="to_float", args=(Index(value=value),)):
            return small_position(value)
        case Pointwise(op=op, dtype=dtype):
            whole = op in _SELECTING or op in ROUNDINGS or not dtype.is_floating_point
            return whole and all(_is_exact(c) for c in expr.children)
    return False


def _is_program(expr: Expr) -> bool:
    if isinstance(expr, (Pointwise, Gather)):
        return all(_is_program(c) for c in expr.children)
    return isinstance(expr, (Load, Index)) or not expr.children
