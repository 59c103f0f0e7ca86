"""The score of one row and column as a program: one query-key product, and everything pointwise around it.

Loads are expanded along every path that leads to the product; what else the score is made of, `opener` reads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

import sympy
import torch
from torch import fx

from flashfuse.kernels.expr import (
    Dot,
    Expr,
    Gather,
    Load,
    Pointwise,
    Product,
    Reduce,
    Softmax,
    free_symbols,
    loads,
    walk,
)
from flashfuse.kernels.normal import pointwise, rewrite, substitute
from flashfuse.patterns.graph import is_weighted
from flashfuse.patterns.indexing import within
from flashfuse.patterns.lift import CannotLift, Lifter
from flashfuse.patterns.opener import Opener
from flashfuse.patterns.operand import sizes_of
from flashfuse.patterns.products import Term, as_one_product, side_products, summands
from flashfuse.patterns.refusal import Refused, blocked, mixed, no_product
from flashfuse.patterns.shift import same_value
from flashfuse.patterns.summed import as_product


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

    @property
    def dtype(self) -> torch.dtype:
        """The type of the sum, which holds what each product holds."""
        return functools.reduce(torch.promote_types, (term.dot.dtype for term in self.terms))


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
    return as_score(find_products(lifter, expr, j, leads, site, rows))


@dataclass(frozen=True)
class Products:
    """`program` over `Product(n)`, product n being `dots[n]`, which `nodes[n]` makes; what it was found with.

    again: nodes that make one of the products once more.
    """

    program: Expr
    dots: tuple[Dot, ...]
    nodes: tuple[fx.Node, ...]
    again: tuple[fx.Node, ...]
    lifter: Lifter = field(compare=False)
    j: sympy.Symbol
    leads: AbstractSet[fx.Node] = field(compare=False)

    def part(self, program: Expr) -> Products:
        """A program over some of the products."""
        slots = sorted({e.slot for e in walk(program) if isinstance(e, Product)})
        new = {slot: number for number, slot in enumerate(slots)}
        program = rewrite(program, lambda e: Product(e.dtype, new[e.slot]) if isinstance(e, Product) else None)
        return replace(
            self, program=program, dots=tuple(self.dots[s] for s in slots), nodes=tuple(self.nodes[s] for s in slots)
        )


def find_products(
    lifter: Lifter,
    expr: Expr,
    j: sympy.Symbol,
    leads: AbstractSet[fx.Node],
    site: fx.Node,
    rows: Sequence[sympy.Symbol] = (),
) -> Products:
    """An expression over the products of queries and keys behind it. Raises Refused where there is none."""
    search = _Search(lifter, j, leads, rows)
    program = search.read(expr, site)
    others = side_products([dot for dot, _ in search.found], rows, j)
    if others:
        search = _Search(lifter, j, leads, rows, others)
        program = search.read(expr, site)
    if not search.found:
        raise search.trouble or Refused("no-product", "the softmax is not over products of queries and keys")
    dots, nodes = zip(*search.found, strict=True)
    return Products(program, dots, nodes, tuple(search.again), lifter, j, leads)


def as_score(found: Products) -> Score:
    """The program as a score of one product. Raises Refused."""
    program, terms = as_one_product(found.program, found.dots, found.nodes)
    i_symbols = free_symbols(terms[0].dot.lhs) - free_symbols(terms[0].dot.rhs)
    opener = Opener(found.lifter, i_symbols, found.j, found.leads)
    return Score(opener.read(program), terms, (*found.nodes, *found.again), opener)


def as_scores(found: Products) -> tuple[Score, ...]:
    """Scores of one product each that add up to the program. Raises Refused."""
    try:
        return (as_score(found),)
    except Refused:
        parts = summands(found.program, found.dots)
        if len(parts) < 2:
            raise
    return tuple(as_score(found.part(part)) for part in parts)


class _NoIndexForm(Exception):
    """Behind a load lies something that is not a score program: the load is one of the score's own tensors."""


class _Search:
    """Expands a score along every path that leads to a product, and puts `Product(n)` in the product's place.

    A product among `others` stays the tensor that the graph makes of it. rows: of the output, which the values lack.
    """

    def __init__(
        self,
        lifter: Lifter,
        j: sympy.Symbol,
        leads: AbstractSet[fx.Node],
        rows: Sequence[sympy.Symbol],
        others: AbstractSet[Dot] = frozenset(),
    ) -> None:
        self.lifter, self.j, self.leads, self.rows, self.others = lifter, j, leads, rows, others
        self.found: list[tuple[Dot, fx.Node]] = []
        self.again: list[fx.Node] = []
        self.trouble: Refused | None = None

    def read(self, expr: Expr, node: fx.Node) -> Expr:
        """`opened` from the top, where nothing is left that could stay a load."""
        try:
            return self.opened(expr, node)
        except _NoIndexForm:
            self.found.clear()
            self.again.clear()
            return expr

    def opened(self, expr: Expr, node: fx.Node, followed: bool = True) -> Expr:
        """`expr`, which `node` computes, with its products found.

        followed: whether a gradient comes here; none passes a comparison.
        """
        followed = followed and expr.dtype.is_floating_point
        match expr:
            case Dot():
                return self._product(expr, node)
            case Pointwise():
                return pointwise(expr.op, *(self.opened(a, node, followed) for a in expr.args), dtype=expr.dtype)
            case Load() if expr.tensor in self.leads and self.j in free_symbols(expr):
                return self._through(expr, followed)
            case Gather() if expr.tensor in self.leads:
                self._note(Refused("look-up", "the scores are looked up at positions that depend on data", node))
            case Reduce() if (product := as_product(self.lifter, expr)) is not expr:
                if not all(self._has_queries(dot) for dot in walk(product) if isinstance(dot, Dot)):
                    self._note(no_product(self.lifter.region, node))
                    raise _NoIndexForm
                return self.opened(product, node, followed)
            case Reduce() if not any(read.tensor in self.leads for read in loads(expr)):
                self._note(no_product(self.lifter.region, node))
                raise _NoIndexForm
            case Softmax() | Reduce():
                self._note(Refused("row-dependent", "a score depends on other scores of its row or column", node))
                raise _NoIndexForm
        return expr

    def _has_queries(self, dot: Dot) -> bool:
        """Whether a product's one side has a row for every row of the scores.

        A sum without, as of `weight * tanh(query + key)`, is one loop over its terms, which a product would store.
        """
        queries = dot.rhs if self.j in free_symbols(dot.lhs) else dot.lhs
        return free_symbols(queries).issuperset(self.rows)

    def _through(self, load: Load, followed: bool) -> Expr:
        """Behind a load, or the load itself where no score program lies there."""
        node = load.tensor
        assert isinstance(node, fx.Node)
        before, again = len(self.found), len(self.again)
        try:
            program = self.opened(self.lifter.expand(load, followed=followed), node, followed)
            if len(self.found) == before and self._is_gone(program, node):
                return load
            if not self._reaches_outside(load) or all(self._stays_inside(dot) for dot, _ in self.found[before:]):
                return program
            told = "the softmax is over rows or columns beside the product's own, as of a second product"
            self._note(Refused("extra-columns", told, node))
        except CannotLift as error:
            self._note(blocked(self.lifter.region, error.node or node, error.reason))
        except _NoIndexForm:
            pass
        del self.found[before:], self.again[again:]
        return load

    def _is_gone(self, program: Expr, node: fx.Node) -> bool:
        """Whether a program without products reads what the node, which it computes, was written over."""
        read = (x.tensor for x in loads(program) if isinstance(x.tensor, fx.Node))
        return any(self.lifter.is_overwritten(tensor, node) for tensor in read)

    def _reaches_outside(self, load: Load) -> bool:
        """Whether an index takes more values than its dimension has: only a choice around it keeps it inside."""
        ranges = self.lifter.ranges
        return any(
            (ranges[symbol] - size).is_positive
            for index, size in zip(load.indices, sizes_of(load), strict=True)
            for symbol in index.free_symbols & ranges.keys()
            if index.coeff(symbol, 1) == 1
        )

    def _stays_inside(self, dot: Dot) -> bool:
        """Whether a product is one of queries and keys that there are, whatever a choice around it keeps."""
        read = (load for load in loads(dot) if isinstance(load, Load))
        return all(
            within(index, size, self.lifter.ranges)
            for load in read
            for index, size in zip(load.indices, sizes_of(load), strict=True)
        )

    def _product(self, dot: Dot, node: fx.Node) -> Expr:
        left, right = self.j in free_symbols(dot.lhs), self.j in free_symbols(dot.rhs)
        if is_weighted(node) and any(self._are_scores(side) for side in (dot.lhs, dot.rhs)):
            self._note(mixed(node))
        if left == right or is_weighted(node):
            raise _NoIndexForm
        dot = dot if right else Dot(dot.dtype, dot.rhs, dot.lhs, dot.axis, dot.extent)
        if any(self._is_again(dot, other) for other in self.others):
            raise _NoIndexForm
        for slot, (known, made_by) in enumerate(self.found):
            if self._is_again(dot, known):
                self.again += [node] if node is not made_by else []
                return Product(dot.dtype, slot)
        self.found.append((dot, node))
        return Product(dot.dtype, len(self.found) - 1)

    def _are_scores(self, side: Expr) -> bool:
        """Whether what a layer takes has the rows and columns of the scores, and a product behind it."""
        there = free_symbols(side)
        return self.j in there and there.issuperset(self.rows) and any(x.tensor in self.leads for x in loads(side))

    def _is_again(self, dot: Dot, known: Dot) -> bool:
        """Whether a product is one that is known already, perhaps written a second time."""
        if dot == known or (dot.dtype, dot.extent) != (known.dtype, known.extent):
            return dot == known
        moved = {dot.axis: known.axis}
        pairs = ((dot.lhs, known.lhs), (dot.rhs, known.rhs))
        return all(same_value(self.lifter, substitute(mine, moved), theirs) for mine, theirs in pairs)

    def _note(self, trouble: Refused) -> None:
        self.trouble = self.trouble or trouble
