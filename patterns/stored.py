"""Keys and values behind a program of their stored elements: how a quantised or narrower cache is read.

A cache of a narrow type is dequantised before it is multiplied: converted, and multiplied by scales that many elements
share. Where one tensor holds an element for each of the operand, and what else its program reads is small, the
operand is that tensor and the program a part of the spec: nothing as large as the operand is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from flashfuse.kernels.expr import (
    Const,
    Dot,
    Element,
    Expr,
    Index,
    Load,
    Pointwise,
    Reduce,
    Softmax,
    free_symbols,
    loads,
    walk,
)
from flashfuse.kernels.normal import converted, rewrite
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.kernels.stored import holds, readable
from flashfuse.patterns.graph import shape, tensor
from flashfuse.patterns.indexing import within
from flashfuse.patterns.lift import CannotLift, Lifter

_CONVERSIONS = (*ROUNDINGS, "to_float")


@dataclass(frozen=True)
class Side:
    """An operand of a product whose stored elements are looked for.

    own: its row and column. axes: these and the batch axes, all that its elements may depend on. dtype: the product's
    element type. site: where the kernel reads it.
    """

    own: frozenset[sympy.Symbol]
    axes: frozenset[sympy.Symbol]
    dtype: torch.dtype
    site: fx.Node


def stored_readings(lifter: Lifter, expr: Expr, side: Side, element_bytes: int) -> Iterator[tuple[Load, Expr | None]]:
    """Stored tensors from which `expr`, an element of the operand, can be computed in the kernel, nearest first.

    Each with its program over `Element`, None where the element itself is the operand's. element_bytes: of the operand
    where a plain tensor is read; what is read instead has to be less, or as much behind nothing but conversions.
    """
    while not any(isinstance(e, (Dot, Reduce, Softmax)) for e in walk(expr)):
        expr = _small_reads_seen_through(lifter, expr, side)
        read = _main_read(expr, side)
        if read is None:
            return
        if _fits(lifter, expr, read, side) and _pays(expr, read, side, element_bytes):
            yield read, _program(expr, read, side.dtype)
        try:
            behind = lifter.expand(read)
        except CannotLift:
            return
        expr = _replaced(expr, read, behind)


def _replaced(expr: Expr, read: Expr, by: Expr) -> Expr:
    return rewrite(expr, lambda e: by if e == read else None)


def _is_wide(read: Expr, side: Side) -> bool:
    return side.own <= free_symbols(read)


def _small_reads_seen_through(lifter: Lifter, expr: Expr, side: Side) -> Expr:
    """Reads of scales that were expanded to the operand's shape, as reads of the scales."""
    for read in loads(expr):
        base = _seen_through(lifter, read) if isinstance(read, Load) else read
        if base != read and not _is_wide(base, side):
            expr = _replaced(expr, read, base)
    return expr


def _seen_through(lifter: Lifter, read: Load) -> Load:
    """The read of the tensor that this one's is a view of, the furthest back in which it provably stays inside."""
    base, found = read, read
    try:
        while isinstance(behind := lifter.expand(base), Load):
            base = behind
            found = base if _stays_inside(lifter, base) else found
    except CannotLift:
        pass
    return found


def _main_read(expr: Expr, side: Side) -> Load | None:
    """The read of a tensor with an element for each of the operand: of several the one of most elements."""
    wide = [read for read in loads(expr) if _is_wide(read, side)]
    for read in wide:
        if isinstance(read, Load) and all(_part(other, read) is not None for other in wide if other != read):
            return read
    return None


def _part(read: Expr, of: Expr) -> float | None:
    """The number of elements of the tensor that is read, as a part of another's: below 1, or None."""
    if not isinstance(read, Load) or not isinstance(of, Load):
        return None
    ratio = _elements(read) / _elements(of)
    return float(ratio) if ratio.is_Rational and ratio < 1 else None


def _elements(read: Load) -> sympy.Expr:
    return sympy.Mul(*_sizes(read))


def _sizes(read: Load) -> tuple[sympy.Expr, ...]:
    """The sizes of the tensor that is read; a symbolic float has none."""
    t = tensor(read.tensor) if isinstance(read.tensor, fx.Node) else None
    return () if t is None else shape(t)


def _fits(lifter: Lifter, expr: Expr, read: Load, side: Side) -> bool:
    """Whether the kernel can compute the expression from the tensors as they are where it runs."""
    if not all(_is_arithmetic(e) for e in walk(expr)) or not free_symbols(expr) & lifter.ranges.keys() <= side.axes:
        return False
    for other in loads(expr):
        if not isinstance(other, Load) or not isinstance(other.tensor, fx.Node):
            return False
        taken = _is_stored(other) if other == read else _is_number(other.dtype)
        if not taken or not _stays_inside(lifter, other) or lifter.writer_before(other.tensor, side.site) is not None:
            return False
    return True


def _stays_inside(lifter: Lifter, read: Load) -> bool:
    """Whether every position is one of the tensor: others, as in a concatenation, are discarded by a choice."""
    return all(within(i, size, lifter.ranges) for i, size in zip(read.indices, _sizes(read), strict=True))


def _is_stored(read: Load) -> bool:
    t = tensor(read.tensor) if isinstance(read.tensor, fx.Node) else None
    return t is not None and readable(read.dtype, t.device)


def _is_number(dtype: torch.dtype) -> bool:
    """Whether scales and zero points of this type are read by programs."""
    return dtype.itemsize >= 2 if dtype.is_floating_point else dtype != torch.bool


def _is_arithmetic(expr: Expr) -> bool:
    """Whether a node of a program is one of numbers, so that no integer wraps around."""
    if isinstance(expr, Pointwise):
        return expr.dtype.is_floating_point or expr.dtype == torch.bool
    return isinstance(expr, (Load, Const, Index))


def _pays(expr: Expr, read: Load, side: Side, element_bytes: int) -> bool:
    parts = [(e.dtype.itemsize, _part(e, read)) for e in loads(expr) if e != read and _is_wide(e, side)]
    read_bytes = read.dtype.itemsize + sum(size * part for size, part in parts if part is not None)
    operators = [e.op for e in walk(expr) if isinstance(e, Pointwise)]
    return read_bytes < element_bytes or (read_bytes == element_bytes and set(operators) <= set(_CONVERSIONS))


def _program(expr: Expr, read: Load, dtype: torch.dtype) -> Expr | None:
    """The expression over the stored element; what rounds to the operand's own type at the end is the kernel's."""
    element = Element(torch.float64 if dtype == torch.float64 else torch.float32)

    def rule(e: Expr) -> Expr | None:
        if e == read:
            return element
        if not isinstance(e, Pointwise) or e.args != (element,):
            return None
        exact = e.op == "to_float" or (e.op in ROUNDINGS and holds(ROUNDINGS[e.op], read.dtype))
        return element if exact else None

    program = rewrite(expr, rule)
    while isinstance(program, Pointwise) and ROUNDINGS.get(program.op) == dtype and program.args != (element,):
        program = program.args[0]
    if program != element:
        return program
    return None if holds(dtype, read.dtype) else converted(element, read.dtype, dtype)
