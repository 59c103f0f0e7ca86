"""Several products of activations in one score: which is the query-key product, and which are tensors of the graph.

A product of plain queries and plain keys is as large as the score matrix, so the kernel has to compute it. A sum of
such products is one product over concatenated features (the content and position parts of multi-head latent attention,
https://arxiv.org/abs/2405.04434, section 2.1.3). Any other product in a score, as of queries with a table of relative
positions (https://arxiv.org/abs/1901.02860), stays a tensor of the graph that the score program reads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.expr import Const, Dot, Expr, Load, Pointwise, Product, free_symbols, loads, walk
from flashfuse.kernels.normal import number, pointwise, rewrite
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.patterns.operand import exactly_promotes
from flashfuse.patterns.refusal import Refused


@dataclass(frozen=True)
class Term:
    """`factor` times a product of queries and keys, the first term's factor being 1."""

    dot: Dot
    factor: float


def side_products(dots: Sequence[Dot], rows: Sequence[sympy.Symbol], j: sympy.Symbol) -> frozenset[Dot]:
    """The products that are not of plain queries and plain keys; none where no product is."""
    i = _query_position(dots, rows)
    plain = [dot for dot in dots if _is_plain(dot, i, j)]
    return frozenset(dots) - frozenset(plain) if plain else frozenset(_smaller(dots))


def _query_position(dots: Sequence[Dot], rows: Sequence[sympy.Symbol]) -> sympy.Symbol | None:
    return next((o for o in reversed(rows) if any(_is_row(o, dot) for dot in dots)), None)


def _is_row(symbol: sympy.Symbol, dot: Dot) -> bool:
    return symbol in free_symbols(dot.lhs) and symbol not in free_symbols(dot.rhs)


def _is_plain(dot: Dot, i: sympy.Symbol | None, j: sympy.Symbol) -> bool:
    """Whether row i and column j of the result are one query's row and one key's row."""
    if not _is_straight(dot.rhs, j) or j in free_symbols(dot.lhs):
        return False
    return i is None or (_is_row(i, dot) and _is_straight(dot.lhs, i))


def _is_straight(operand: Expr, at: sympy.Symbol) -> bool:
    """Whether every step along `at` is one step along the operand, forwards."""
    for read in loads(operand):
        if at in free_symbols(read) and not isinstance(read, Load):
            return False
        for index in read.indices if isinstance(read, Load) else ():
            divided = any(at in part.free_symbols for part in index.atoms(FloorDiv, Mod))
            if at in index.free_symbols and (divided or not sympy.expand(index).coeff(at, 1).is_positive):
                return False
    return at in free_symbols(operand)


def _smaller(dots: Sequence[Dot]) -> Sequence[Dot]:
    """All but the product with the largest extent, where sizes can be compared."""
    return [dot for dot in dots if dot is not _main(dots)]


def _main(dots: Sequence[Dot]) -> Dot:
    return max(dots, key=lambda dot: int(dot.extent) if dot.extent.is_Integer else 0)


# --------------------------------------------------------------------------------------------------------------------


def as_one_product(program: Expr, dots: Sequence[Dot], nodes: Sequence[fx.Node]) -> tuple[Expr, tuple[Term, ...]]:
    """The program over one product, and the terms whose sum that is. Raises Refused where they are no sum."""
    if len(dots) == 1:
        return program, (Term(dots[0], 1.0),)
    weights = _weights(_smallest_with_all(program), dots)
    main = dots.index(_main(dots))
    if weights is None or not weights.get(main):
        raise Refused(
            "square-intermediate",
            "two products of queries and keys meet in the score and are not just added, so fusing would need a second "
            "score matrix in memory",
            nodes[-1],
        )
    order = [main, *(slot for slot in range(len(dots)) if slot != main)]
    terms = tuple(Term(dots[slot], weights[slot] / weights[main]) for slot in order)

    alone = rewrite(program, lambda e: Const(e.dtype, 0.0) if isinstance(e, Product) and e.slot != main else None)
    return rewrite(alone, lambda e: Product(e.dtype, 0) if isinstance(e, Product) else None), terms


def _smallest_with_all(program: Expr) -> Expr:
    """The smallest sub-expression that no product is outside of; a function such as gelu may read it more than once."""
    inside = [e for e in walk(program) if _products(e) == _products(program) and not _products(_without(program, e))]
    return inside[-1]


def _without(program: Expr, part: Expr) -> Expr:
    return rewrite(program, lambda e: Const(e.dtype, 0.0) if e == part else None)


def _products(expr: Expr) -> frozenset[int]:
    return frozenset(e.slot for e in walk(expr) if isinstance(e, Product))


def _weights(expr: Expr, dots: Sequence[Dot]) -> dict[int, float] | None:
    """What each product is multiplied by in a sum of products and other terms; None where it is another function."""
    if not _products(expr):
        return {}
    match expr:
        case Product(slot=slot):
            return {slot: 1.0}
        case Pointwise(op="add", args=(left, right)):
            return _sum(_weights(left, dots), _weights(right, dots), 1.0)
        case Pointwise(op="sub", args=(left, right)):
            return _sum(_weights(left, dots), _weights(right, dots), -1.0)
        case Pointwise(op="neg", args=(arg,)):
            return _sum({}, _weights(arg, dots), -1.0)
        case Pointwise(op="mul", args=(left, right)) if (factor := number(right)) is not None:
            return _sum({}, _weights(left, dots), float(factor))
        case Pointwise(op="mul", args=(left, right)) if (factor := number(left)) is not None:
            return _sum({}, _weights(right, dots), float(factor))
        case Pointwise(op="div", args=(left, right)) if number(right):
            return _sum({}, _weights(left, dots), 1.0 / float(number(right) or 1.0))
        case Pointwise(op=op, args=(arg,)) if op in ROUNDINGS:
            exact = all(exactly_promotes(dots[slot].dtype, ROUNDINGS[op]) for slot in _products(arg))
            return _weights(arg, dots) if exact else None
    return None


def _sum(left: dict[int, float] | None, right: dict[int, float] | None, times: float) -> dict[int, float] | None:
    """left + times * right."""
    if left is None or right is None:
        return None
    return left | {slot: left.get(slot, 0.0) + times * weight for slot, weight in right.items()}


# --------------------------------------------------------------------------------------------------------------------
# Weights that are a sum


def summands(program: Expr, dots: Sequence[Dot]) -> list[Expr]:
    """Programs that add up to the program, no two of which share a product."""
    parts: list[Expr] = []
    for term in _terms(program, dots):
        slots = _products(term)
        # What has no product goes with the first.
        together = [p for p in parts if _products(p) & slots] or ([] if slots else parts[:1])
        whole = functools.reduce(_added, (*together, term))
        parts = [*(p for p in parts if p not in together), whole]
    return parts


def _added(a: Expr, b: Expr) -> Expr:
    return pointwise("add", a, b, dtype=a.dtype)


def _terms(expr: Expr, dots: Sequence[Dot]) -> list[Expr]:
    """What adds up to the expression; factors and masks are those of every term."""
    dtype = expr.dtype
    match expr:
        case Pointwise(op="add" | "sub", args=(left, right)):
            behind = _terms(right, dots)
            return _terms(left, dots) + (behind if expr.op == "add" else [pointwise("neg", t) for t in behind])
        case Pointwise(op="neg", args=(arg,)):
            return [pointwise("neg", t, dtype=dtype) for t in _terms(arg, dots)]
        case Pointwise(op="mul", args=(left, right)) if not _products(right):
            return [pointwise("mul", t, right, dtype=dtype) for t in _terms(left, dots)]
        case Pointwise(op="mul", args=(left, right)) if not _products(left):
            return [pointwise("mul", left, t, dtype=dtype) for t in _terms(right, dots)]
        case Pointwise(op="div", args=(left, right)) if not _products(right):
            return [pointwise("div", t, right, dtype=dtype) for t in _terms(left, dots)]
        case Pointwise(op="where", args=(kept, yes, no)) if number(no) == 0 and not _products(kept):
            return [pointwise("where", kept, t, no, dtype=dtype) for t in _terms(yes, dots)]
        case Pointwise(op="where", args=(dropped, yes, no)) if number(yes) == 0 and not _products(dropped):
            return [pointwise("where", dropped, yes, t, dtype=dtype) for t in _terms(no, dots)]
        case Pointwise(op=op, args=(arg,)) if op in ROUNDINGS:
            if all(exactly_promotes(dot.dtype, ROUNDINGS[op]) for dot in dots):
                return _terms(arg, dots)
    return [expr]
