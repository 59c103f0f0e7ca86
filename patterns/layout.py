"""How the operands of one attention are laid out: which tensor each is read from, over which batch axes.

Models fold axes together, as in `(batch * heads, length, dim)`, or let several query heads share one key head. An
operand is a plain view of its tensor only over the axes before they were folded, so a layout starts from the axes of
the output and splits a batch axis wherever the score program or an operand divides it. Of the places an operand can be
read at, the furthest back from which a view still leads to those axes is taken: it leaves the fewest copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import fx

from flashfuse.kernels.expr import Expr, Index, Load, free_symbols, walk
from flashfuse.kernels.spec import MAX_BATCH_AXES
from flashfuse.kernels.stored import holds
from flashfuse.patterns.axes import Roles, fold, folds, moved, radix, substituted
from flashfuse.patterns.indexing import resimplify
from flashfuse.patterns.lift import Lifter
from flashfuse.patterns.operand import Reading, sizes_of
from flashfuse.patterns.refusal import Refused
from flashfuse.patterns.site import Operand
from flashfuse.patterns.views import Step, view_plan

Option = tuple[list[Reading], tuple[sympy.Symbol | None, sympy.Symbol | None]]


class Layout:
    """Chooses how far back each operand is read, and splits folded batch axes so that each is a view.

    options: for each operand its readings, nearest first, and its own axes (rows and columns).
    chosen: the reading taken for each. parts: for every batch axis of the output the axes it was split into.
    Raises Refused where an operand has no reading that is a view.
    """

    def __init__(self, lifter: Lifter, roles: Roles, programs: Sequence[Expr], options: Sequence[Option]) -> None:
        self.lifter, self.roles = lifter, roles
        self.ranges = lifter.ranges
        self.mapping: dict[sympy.Symbol, sympy.Expr] = {}
        self.parts: dict[sympy.Symbol, tuple[sympy.Symbol, ...]] = {b: (b,) for b in roles.batch}
        self._split_for([i for program in programs for i in _indices(program)])
        self.chosen = tuple(self._choose(found, own) for found, own in options)

    @property
    def batch(self) -> tuple[sympy.Symbol, ...]:
        """The batch axes after splitting."""
        return tuple(p for b in self.roles.batch for p in self.parts[b])

    def operand(
        self, reading: Reading, axes: Sequence[sympy.Symbol | None], dtype: torch.dtype, factor: float = 1.0
    ) -> Operand:
        """The tensor that is read, as a view with a dimension for each of `axes`."""
        assert isinstance(reading.load.tensor, fx.Node)
        steps = self._plan(reading.load, axes)
        if steps is None:
            raise _no_view(reading)
        as_read = reading.program is not None or holds(dtype, reading.load.dtype)
        return Operand(reading.load.tensor, steps, reading.load.dtype if as_read else dtype, factor)

    def substitute(self, expr: Expr) -> Expr:
        """The expression over the axes after splitting."""
        return moved(expr, self.mapping, self.ranges)

    def _choose(self, found: list[Reading], own_axes: tuple[sympy.Symbol | None, ...]) -> Reading:
        # One row cannot stand for all: batch axes broadcast, an operand's own do not.
        own = {a for a in own_axes if a is not None and self.ranges.get(a, 1) != 1}
        for reading in reversed(found):
            if not own <= free_symbols(reading.load):
                continue
            before = self.mapping, self.parts
            indices = [*reading.load.indices, *([] if reading.program is None else _indices(reading.program))]
            if self._split_for(indices) and self._plan(reading.load, (*self.batch, *own_axes)) is not None:
                return reading
            self.mapping, self.parts = before
        raise _no_view(found[0])

    def _split_for(self, indices: Sequence[sympy.Expr]) -> bool:
        """Split batch axes until no index divides one; False where they cannot be split so."""
        for _ in range(2 * MAX_BATCH_AXES):
            current = [resimplify(i.xreplace(self.mapping), self.ranges) for i in indices]
            pending = [(s, f) for s in self.batch if (f := folds(current, s))]
            if not pending:
                return True
            symbol, strides = pending[0]
            sizes = radix(self.ranges[symbol], strides)
            if sizes is None or len(self.batch) + len(sizes) - 1 > MAX_BATCH_AXES:
                return False
            self._split(symbol, sizes)
        return False

    def _split(self, symbol: sympy.Symbol, sizes: Sequence[sympy.Expr]) -> None:
        made = tuple(self.lifter.symbol("n", size) for size in sizes)
        replacement = {symbol: fold(made, self.ranges)}
        self.mapping = {k: sympy.expand(v.xreplace(replacement)) for k, v in self.mapping.items()} | replacement
        self.parts = {
            b: tuple(q for p in parts for q in (made if p == symbol else (p,))) for b, parts in self.parts.items()
        }

    def _plan(self, load: Load, axes: Sequence[sympy.Symbol | None]) -> tuple[Step, ...] | None:
        return view_plan(substituted(load.indices, self.mapping, self.ranges), sizes_of(load), axes, self.ranges)


def _indices(program: Expr) -> list[sympy.Expr]:
    """Where a program reads, and what it computes from positions."""
    inside = list(walk(program))
    reads = [i for e in inside if isinstance(e, Load) for i in e.indices]
    return reads + [e.value for e in inside if isinstance(e, Index)]


def _no_view(reading: Reading) -> Refused:
    told = (
        f"no view of `{reading.load.tensor}` has the layout of an attention operand: "
        "its elements would have to be copied in another order"
    )
    return Refused("operand-layout", told)
