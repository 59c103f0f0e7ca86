"""Tables of distances: a bias that depends on key minus query position is made at each distance once, not at each pair.

A bucketed relative bias is bias[h, i, j] = weight[bucket(j - i), h] (https://arxiv.org/abs/1910.10683, section 2.1).
The graph makes it of the positions of all pairs. What the kernel needs of it has q_len + kv_len - 1 distances, and the
graph's own operators, applied to those, give the same numbers: also at a bucket's edges, where a logarithm decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.expr import Const, Expr, Gather, Index, Load, Pointwise, free_symbols
from flashfuse.patterns.axes import moved
from flashfuse.patterns.graph import shape, tensor
from flashfuse.patterns.lift import CannotLift, Lifter, aligned
from flashfuse.patterns.table import PLACE_OPS, Applied, Table
from flashfuse.patterns.trace import CannotTrace

aten = torch.ops.aten

# What a formula of positions may be made of, to be computed by operators of the graph.
_FORMULAS = (sympy.Add, sympy.Mul, sympy.Symbol, sympy.Integer, FloorDiv, Mod)


def as_table(lifter: Lifter, load: Load, queries: Iterable[sympy.Symbol], j: sympy.Symbol) -> Load | None:
    """The element of a floating-point tensor over query and key positions, read from a table of distances.

    queries: the symbols of which one is the query position; j: the key position. None where the tensor depends on them
    other than through their difference, or where it is not made by operators that may be applied to fewer elements.
    """
    source = load.tensor
    assert isinstance(source, fx.Node)
    if not load.dtype.is_floating_point:
        return None
    try:
        element = _Maker(lifter, source).made(load)
    except CannotLift:
        return None
    for i in sorted(free_symbols(element) & set(queries), key=str):
        last = lifter.ranges[i] - 1
        distance = lifter.symbol("t", last + lifter.ranges[j])
        over = moved(element, {j: distance - last + i}, lifter.ranges)
        if i not in free_symbols(over):
            return _read(lifter, source, over, {distance: j - i + last})
    return None


def _read(lifter: Lifter, source: fx.Node, element: Expr, at: Mapping[sympy.Symbol, sympy.Expr]) -> Load:
    """The read of a new table that holds `element`, each of whose symbols stands at the position `at` says."""
    used = sorted(free_symbols(element) & lifter.ranges.keys(), key=lambda s: (s in at, str(s)))
    # Named by their place, so that what two sites read of one tensor is one table.
    axes = tuple(sympy.Symbol(f"axis{n}", integer=True, nonnegative=True) for n in range(len(used)))
    extents = tuple(lifter.ranges[s] for s in used)
    element = moved(element, dict(zip(used, axes, strict=True)), dict(zip(axes, extents, strict=True)))
    table = Table(source, element, axes, extents)
    return Load(element.dtype, table, tuple(at.get(s, s) for s in used))


class _Maker:
    """Follows an element back to formulas of positions and to tensors that are read as they are.

    Raises CannotLift where an operator in between may not be applied to fewer elements.
    """

    def __init__(self, lifter: Lifter, source: fx.Node) -> None:
        self.lifter, self.source = lifter, source
        self.known: dict[Load, Expr] = {}

    def made(self, load: Load) -> Expr:
        if load not in self.known:
            self.known[load] = self._made(load)
        return self.known[load]

    def _made(self, load: Load) -> Expr:
        formula = self.lifter.resolved(load)
        if isinstance(formula, (Index, Const)):
            return self._checked(replace(formula, dtype=load.dtype))
        try:
            inner = self.lifter.expand(load)
        except CannotLift:
            return self._as_it_is(load)
        if inner.dtype == load.dtype and isinstance(inner, Load):
            return self.made(inner)
        if isinstance(inner, (Const, Index)):
            return self._checked(replace(inner, dtype=load.dtype))
        if isinstance(inner, Gather):
            return Gather(inner.dtype, inner.tensor, tuple(self._place(a) for a in inner.at))
        match inner:
            case Pointwise(op="to_float", args=(Index() as value,)):
                self._checked(value)
                return inner
            case Pointwise() | Load() if load.indices:
                return self._applied(load)
        return self._as_it_is(load)

    def _as_it_is(self, load: Load) -> Load:
        """A tensor that is read where the table is made."""
        node = load.tensor
        assert isinstance(node, fx.Node)
        if tensor(node) is None or self.lifter.writer_before(node, self.source) is not None:
            raise CannotLift(node, "is not the same where the table is made")
        return load

    def _place(self, at: Expr) -> Expr:
        """A computed position of a look-up: integers only."""
        match at:
            case Load():
                return self.made(at)
            case Index() | Const():
                return self._checked(at)
            case Pointwise() if at.op in PLACE_OPS and not any(a.dtype.is_floating_point for a in (at, *at.args)):
                return replace(at, args=tuple(self._place(a) for a in at.args))
        raise CannotLift(self.source, "looks up at positions that are computed in between")

    def _applied(self, load: Load) -> Expr:
        node = load.tensor
        assert isinstance(node, fx.Node)
        if not is_pointwise(self.lifter, node) or self._region(node) != self._region(self.source):
            raise CannotLift(node, "is no pointwise operator")
        inputs = tuple(n for n in node.all_input_nodes if tensor(n) is not None)
        return Applied(load.dtype, node, inputs, tuple(self._input(n, load) for n in inputs))

    def _region(self, node: fx.Node) -> tuple[Any, ...]:
        return self.lifter.graph.autocast.get(node, ())

    def _input(self, node: fx.Node, load: Load) -> Expr:
        """The element of an input that stands beside the output's; a number is read as it is."""
        reader = load.tensor
        assert isinstance(reader, fx.Node)
        current = self.lifter.read(node, reader)
        t = tensor(current)
        if t is None or t.dim() > len(load.indices):
            raise CannotLift(reader, "has an input of more dimensions than its output")
        beside = self.lifter.load(current, aligned(load.indices, shape(t)))
        return self.made(beside) if beside.indices else self._as_it_is(beside)

    def _checked(self, formula: Index | Const) -> Expr:
        parts = sympy.preorder_traversal(formula.value) if isinstance(formula, Index) else ()
        if not all(isinstance(e, _FORMULAS) for e in parts):
            raise CannotLift(self.source, "computes positions with other operators than the graph has")
        return formula


# Pointwise as well, though torch does not tag them so.
_COPIES = frozenset({
    aten._to_copy.default, aten.alias.default, aten.detach.default, aten.lift_fresh.default,
    aten.scalar_tensor.default, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf,
})  # fmt: skip


def is_pointwise(lifter: Lifter, node: fx.Node) -> bool:
    """Whether all that the node does is to compute each element from those beside it in its inputs."""
    try:
        calls = lifter.traced(node).calls
    except CannotTrace:
        return False
    return all(call.func in _COPIES or torch.Tag.pointwise in call.func.tags for call in calls)
