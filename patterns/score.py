"""The score of one row and column as a program: one query-key product, and everything pointwise around it.

Loads are expanded along every path that leads to the product; what else the score is made of, `opener` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import sympy
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
from flashfuse.kernels.normal import pointwise, substitute
from flashfuse.patterns.found import Products, Score, as_score
from flashfuse.patterns.graph import is_weighted
from flashfuse.patterns.joined import Span, cut_of, reaches_outside, span_in, stays_inside, with_joined
from flashfuse.patterns.lift import CannotLift, Lifter
from flashfuse.patterns.products import side_products
from flashfuse.patterns.refusal import Refused, blocked, mixed, no_product
from flashfuse.patterns.shift import same_value
from flashfuse.patterns.summed import as_product, of_one_feature


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
    others = side_products([dot for dot, _ in search.found if j in free_symbols(dot.rhs)], rows, j)
    if others:
        search = _Search(lifter, j, leads, rows, others)
        program = search.read(expr, site)
    if not search.found:
        search = _Search(lifter, j, leads, rows, outer=True)
        program = search.read(expr, site)
    if not search.found:
        raise search.trouble or Refused("no-product", "the softmax is not over products of queries and keys")
    program, found, further = with_joined(lifter, program, search.found, search.spans, j)
    dots, nodes = zip(*found, strict=True)
    return Products(program, dots, nodes, (*search.again, *further), lifter, j, leads)


class _NoIndexForm(Exception):
    """Behind a load lies something that is not a score program: the load is one of the score's own tensors."""


class _Search:
    """Expands a score along every path that leads to a product, and puts `Product(n)` in the product's place.

    A product among `others` stays the tensor that the graph makes of it. rows: of the output, which the values lack.
    outer: whether a number for each query times one for each key is their product over one feature.
    """

    def __init__(
        self,
        lifter: Lifter,
        j: sympy.Symbol,
        leads: AbstractSet[fx.Node],
        rows: Sequence[sympy.Symbol],
        others: AbstractSet[Dot] = frozenset(),
        outer: bool = False,
    ) -> None:
        self.lifter, self.j, self.leads, self.rows, self.others = lifter, j, leads, rows, others
        self.outer = outer
        self.found: list[tuple[Dot, fx.Node]] = []
        self.again: list[fx.Node] = []
        self.spans: dict[Dot, Span] = {}
        self.columns = self.whole = Span(sympy.Integer(0), lifter.ranges.get(j, sympy.Integer(1)))
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
            case Pointwise(op="mul") if self.outer and (dot := self._of_one_feature(expr)) is not None:
                return self._product(dot, node)
            case Pointwise(op="where") if (cut := cut_of(expr.args[0], self.j)) is not None:
                sides = zip(expr.args[1:], self.columns.cut(cut), strict=True)
                return pointwise(
                    "where", expr.args[0], *(self._within(*x, node, followed) for x in sides), dtype=expr.dtype
                )
            case Pointwise():
                return pointwise(expr.op, *(self.opened(a, node, followed) for a in expr.args), dtype=expr.dtype)
            case Load() if expr.tensor in self.leads and (self.j in free_symbols(expr) or self._in_one_column):
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

    def _within(self, expr: Expr, columns: Span, node: fx.Node, followed: bool) -> Expr:
        """`opened` of what is chosen in some columns."""
        outer, self.columns = self.columns, columns
        try:
            return self.opened(expr, node, followed)
        finally:
            self.columns = outer

    @property
    def _in_one_column(self) -> bool:
        return bool(self.columns.length == 1 != self.whole.length)

    def _of_one_feature(self, expr: Pointwise) -> Dot | None:
        dot = of_one_feature(self.lifter, expr, self.j)
        if dot is None or not self._has_queries(dot) or not free_symbols(dot.rhs).isdisjoint(self.rows):
            return None
        return dot

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
            if not reaches_outside(self.lifter, load) or all(
                self._is_there(dot, load) for dot, _ in self.found[before:]
            ):
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

    def _is_there(self, dot: Dot, load: Load) -> bool:
        """Whether the load reads a product of queries and keys that there are, of all columns or of a span of them."""
        if dot in self.spans or stays_inside(self.lifter, dot):
            return True
        span = span_in(self.lifter, dot, load, self.j)
        if span is not None:
            self.spans[dot] = span
        return span is not None

    def _product(self, dot: Dot, node: fx.Node) -> Expr:
        left, right = self.j in free_symbols(dot.lhs), self.j in free_symbols(dot.rhs)
        alone = not (left or right) and self._in_one_column
        if alone:
            rows = [free_symbols(side) & {*self.rows} for side in (dot.lhs, dot.rhs)]
            left, right = bool(rows[1] - rows[0]), bool(rows[0] - rows[1])
        if is_weighted(node) and any(self._are_scores(side) for side in (dot.lhs, dot.rhs)):
            self._note(mixed(node))
        if left == right or is_weighted(node):
            raise _NoIndexForm
        dot = dot if right else Dot(dot.dtype, dot.rhs, dot.lhs, dot.axis, dot.extent)
        if any(self._is_again(dot, other) for other in self.others):
            raise _NoIndexForm
        if alone:
            self.spans[dot] = self.columns
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
        """Whether a product is one that is known already, perhaps written a second time.

        Of two spans of the columns each is its own.
        """
        if dot == known or (dot.dtype, dot.extent) != (known.dtype, known.extent):
            return dot == known
        if not all(stays_inside(self.lifter, x) for x in (dot, known)):
            return False
        moved = {dot.axis: known.axis}
        pairs = ((dot.lhs, known.lhs), (dot.rhs, known.rhs))
        return all(same_value(self.lifter, substitute(mine, moved), theirs) for mine, theirs in pairs)

    def _note(self, trouble: Refused) -> None:
        self.trouble = self.trouble or trouble
