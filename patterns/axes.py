"""The axes of one attention: a site's index symbols as batch, query, key and value axes, and folded ones split.

An index such as h // 4 says that a batch symbol is two axes folded into one: h = group_head * 4 + member. Splitting it
makes every operand a plain view, grouped heads and folded batches alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.expr import Expr, Index, Load
from flashfuse.kernels.normal import rewrite
from flashfuse.patterns.indexing import Indices, Ranges, quotient, resimplify


@dataclass(frozen=True)
class Roles:
    """What each symbol of a site is. `i` and `d` are None where that dimension has size 1."""

    batch: tuple[sympy.Symbol, ...]
    i: sympy.Symbol | None
    j: sympy.Symbol
    r: sympy.Symbol
    d: sympy.Symbol | None


def folds(indices: Iterable[sympy.Expr], symbol: sympy.Symbol) -> list[sympy.Expr]:
    """The strides at which `symbol` is divided in these indices: c from symbol // c, symbol % c and their nestings."""
    found: dict[sympy.Expr, None] = {}
    for expr in indices:
        for atom in expr.atoms(FloorDiv, Mod):
            value, divisor = atom.args
            if value == symbol:
                found[divisor] = None
            elif isinstance(value, FloorDiv) and value.args[0] == symbol:
                found[value.args[1]] = None
                found[sympy.expand(value.args[1] * divisor)] = None
            elif isinstance(value, Mod) and value.args[0] == symbol:
                found[value.args[1]] = None
                found[divisor] = None
    return list(found)


def radix(extent: sympy.Expr, strides: Sequence[sympy.Expr]) -> tuple[sympy.Expr, ...] | None:
    """Sizes, outermost first, of the axes folded into one of `extent` at these strides; None where they do not nest."""
    remaining, sizes, bound = [s for s in strides if s != 1 and s != extent], [], extent
    while remaining:
        outer = next((s for s in remaining if all(quotient(s, t) is not None for t in remaining)), None)
        size = quotient(bound, outer) if outer is not None else None
        if outer is None or size is None:
            return None
        sizes.append(size)
        bound = outer
        remaining = [s for s in remaining if s != outer]
    return (*sizes, bound)


def fold(symbols: Sequence[sympy.Symbol], ranges: Ranges) -> sympy.Expr:
    """The folded index of split axes, row-major."""
    value: sympy.Expr = sympy.Integer(0)
    for symbol in symbols:
        value = value * ranges[symbol] + symbol
    return sympy.expand(value)


def substituted(indices: Indices, mapping: Mapping[sympy.Symbol, sympy.Expr], ranges: Ranges) -> Indices:
    return tuple(resimplify(i.xreplace(mapping), ranges) for i in indices)


def moved(expr: Expr, mapping: Mapping[sympy.Symbol, sympy.Expr], ranges: Ranges) -> Expr:
    """The expression with other positions in the place of its symbols, its indices simplified again."""

    def rule(e: Expr) -> Expr | None:
        match e:
            case Load():
                return replace(e, indices=substituted(e.indices, mapping, ranges))
            case Index():
                return replace(e, value=resimplify(e.value.xreplace(mapping), ranges))
        return None

    return rewrite(expr, rule)
