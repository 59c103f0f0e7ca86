"""An operand as a view: which reshape, slice and permute of a graph tensor puts its dimensions on the attention's axes.

An index map such as x[b, i, h * 64 + d] is read back as "unflatten dimension 2 into (heads, 64), permute". Only maps
that need no copy have a plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy

from flashfuse.patterns.indexing import ZERO, Indices, Ranges, bounds, quotient, same, within


@dataclass(frozen=True)
class Split:
    """Unflatten `dim` into (outer, inner)."""

    dim: int
    outer: sympy.Expr
    inner: sympy.Expr


@dataclass(frozen=True)
class Narrow:
    """Take `length` elements of `dim` from `start`, every `step`-th."""

    dim: int
    start: sympy.Expr
    length: sympy.Expr
    step: sympy.Expr


@dataclass(frozen=True)
class Select:
    """Drop `dim`, keeping its element `at`."""

    dim: int
    at: sympy.Expr


@dataclass(frozen=True)
class Arrange:
    """Permute, then insert dimensions of size 1: for every axis of the result the source dimension, or None."""

    dims: tuple[int | None, ...]


Step = Split | Narrow | Select | Arrange


def view_plan(
    indices: Indices, sizes: Sequence[sympy.Expr], axes: Sequence[sympy.Symbol | None], ranges: Ranges
) -> tuple[Step, ...] | None:
    """Steps that turn a tensor of `sizes`, read at `indices`, into one with a dimension for each of `axes`.

    None where no view does it: an index that is not a mixed-radix number of axes, or an axis used twice.
    """
    steps: list[Step] = []
    found: list[sympy.Symbol] = []
    dim = 0
    for at, size in zip(indices, sizes, strict=True):
        parts = _dimension(dim, at, size, ranges)
        if parts is None:
            return None
        more, made = parts
        steps += more
        found += made
        dim += len(made)
    if len(set(found)) != len(found) or not set(found) <= set(axes):
        return None
    return (*steps, Arrange(tuple(found.index(a) if a in found else None for a in axes)))


def _dimension(
    dim: int, at: sympy.Expr, size: sympy.Expr, ranges: Ranges
) -> tuple[list[Step], list[sympy.Symbol]] | None:
    """Steps for one dimension of the source, and the axes it becomes, outermost first."""
    terms = _affine(at, ranges)
    if terms is None:
        return None
    coefficients, offset = terms
    if not coefficients:
        return [Select(dim, offset)], []
    if len(coefficients) == 1:
        ((axis, step),) = coefficients.items()
        extent = ranges[axis]
        if not (step.is_positive and offset.is_nonnegative):
            return None
        whole = offset == 0 and step == 1 and same(extent, size)
        return ([] if whole else [Narrow(dim, offset, extent, step)]), [axis]
    block = _inner_block(coefficients)
    if block is None:
        return None
    outer_size = quotient(size, block)
    if outer_size is None:
        return _shortened(dim, at, size, ranges) if offset == 0 else None
    outer = {a: q for a, c in coefficients.items() if (q := quotient(c, block)) is not None}
    inner = {a: c for a, c in coefficients.items() if a not in outer}
    shift = _divide_offset(offset, block)
    if not outer or not inner or shift is None or not within(_expression(inner, shift[1]), block, ranges):
        return None
    first = _dimension(dim, _expression(outer, shift[0]), outer_size, ranges)
    if first is None:
        return None
    second = _dimension(dim + len(first[1]), _expression(inner, shift[1]), block, ranges)
    if second is None:
        return None
    return [Split(dim, outer_size, block), *first[0], *second[0]], first[1] + second[1]


def _shortened(
    dim: int, at: sympy.Expr, size: sympy.Expr, ranges: Ranges
) -> tuple[list[Step], list[sympy.Symbol]] | None:
    """The same for a dimension of which it is not known that it ends with the last element that is read."""
    limits = bounds(at, ranges)
    read = None if limits is None else sympy.expand(limits[1] + 1)
    if read is None or same(read, size):
        return None
    parts = _dimension(dim, at, read, ranges)
    return None if parts is None else ([Narrow(dim, ZERO, read, sympy.Integer(1)), *parts[0]], parts[1])


def _affine(at: sympy.Expr, ranges: Ranges) -> tuple[Mapping[sympy.Symbol, sympy.Expr], sympy.Expr] | None:
    """Coefficients of the axes and the constant term, or None where the index is not affine in them."""
    at = sympy.expand(at)
    axes = sorted(at.free_symbols & set(ranges), key=str)
    rest, coefficients = at, {}
    for axis in axes:
        c = at.coeff(axis, 1)
        if c == 0 or c.free_symbols & set(ranges):
            return None
        coefficients[axis] = c
        rest = rest - c * axis
    rest = sympy.expand(rest)
    return None if rest.free_symbols & set(ranges) else (coefficients, rest)


def _inner_block(coefficients: Mapping[sympy.Symbol, sympy.Expr]) -> sympy.Expr | None:
    """The stride of the second innermost axis: everything inside it is one block."""
    for candidate in coefficients.values():
        inner = [a for a, c in coefficients.items() if quotient(c, candidate) is None]
        if len(inner) == 1:
            return candidate
    return None


def _divide_offset(offset: sympy.Expr, block: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr] | None:
    if offset == 0:
        return ZERO, ZERO
    if offset.is_Integer and block.is_Integer:
        return sympy.Integer(int(offset) // int(block)), sympy.Integer(int(offset) % int(block))
    whole = quotient(offset, block)
    return (whole, ZERO) if whole is not None else None


def _expression(coefficients: Mapping[sympy.Symbol, sympy.Expr], offset: sympy.Expr) -> sympy.Expr:
    return sympy.Add(offset, *(c * a for a, c in coefficients.items()))
