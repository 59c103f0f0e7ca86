"""What a score is made of besides the product: masks and biases, expanded into the program or read as they are.

Loads are expanded while that removes a tensor as large as the score matrix; anything smaller stays a load of the user's
own tensor. So do look-ups in a table that the whole batch shares: the graph makes the table of biases once, as eager
code does, and layers and batch share it; over distances alone where only those decide (`distances`).
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import sympy
import torch
from torch import fx

from flashfuse.kernels.expr import (
    Const,
    Expr,
    Gather,
    Index,
    Load,
    Pointwise,
    Product,
    free_symbols,
    gather,
    loads,
    walk,
)
from flashfuse.kernels.normal import pointwise
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.patterns.cases import without_cases
from flashfuse.patterns.distances import as_table
from flashfuse.patterns.graph import tensor, to_sympy
from flashfuse.patterns.indexing import same
from flashfuse.patterns.lift import CannotLift, Lifter
from flashfuse.patterns.limits import may_wrap, small_position
from flashfuse.patterns.operand import sizes_of
from flashfuse.patterns.refusal import Refused

# Where an argument's last bit may decide the result, so that it must be computed as written.
STEPS = frozenset({"floor", "sign", "fmod", "to_int", "to_bool", "lt", "le", "gt", "ge", "eq", "ne"})


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
                if op in STEPS:
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
            return self._stored(load)
        try:
            opened = self.program(inner)
        except _Inexact:
            return self._stored(load)
        if may_wrap(opened, load.dtype, self.lifter.ranges):
            return load
        if any(self._is_gone(read, load) for read in loads(opened)):
            return load
        if self._is_theirs_by_shape(load, opened):
            return opened
        if isinstance(opened, Load) and self._is_better_laid_out(load, opened):
            return load
        return opened if square or not loads(opened) or isinstance(inner, Load) else load

    def _is_gone(self, read: Load | Gather, load: Load) -> bool:
        """Whether what a tensor was made from has been written over by then."""
        if not isinstance(read.tensor, fx.Node) or not isinstance(load.tensor, fx.Node):
            return False
        return self.lifter.is_overwritten(read.tensor, load.tensor)

    def _is_theirs_by_shape(self, load: Load, opened: Expr) -> bool:
        """Whether a tensor takes but a shape from the scores, as `mask.expand_as(scores)` does: it goes with them."""
        return load.tensor in self.leads and not any(read.tensor in self.leads for read in loads(opened))

    def _stored(self, load: Load) -> Load:
        """What stays a tensor of the graph: where that suffices, of distances instead of pairs of positions."""
        symbols = free_symbols(load)
        square = self.j in symbols and bool(symbols & self.i_symbols)
        return (as_table(self.lifter, load, self.i_symbols, self.j) if square else None) or load

    def _is_better_laid_out(self, copy: Load, source: Load) -> bool:
        """Whether the user's own copy, no larger than its source, has neighbouring keys side by side in memory."""
        if not isinstance(source.tensor, fx.Node):
            return False
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


# Give one of their arguments, its opposite, or what any type holds that holds it.
_SELECTING = ("where", "neg", "abs", "min", "max", "minimum", "maximum", "floor", "sign")


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
