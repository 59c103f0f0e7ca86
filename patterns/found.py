"""What a search for products found in a score, and the scores of one product each that it is."""

from __future__ import annotations

import functools
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

import sympy
import torch
from torch import fx

from flashfuse.kernels.expr import Dot, Expr, Product, free_symbols, walk
from flashfuse.kernels.normal import rewrite
from flashfuse.patterns.lift import Lifter
from flashfuse.patterns.opener import Opener
from flashfuse.patterns.products import Term, as_one_product, summands
from flashfuse.patterns.refusal import Refused


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
