"""Making a table in the graph: the user's own operators once more, on the elements that the table holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from flashfuse.insert import ARITHMETIC, Inserter
from flashfuse.kernels.expr import Const, Expr, Gather, Index, Load, Pointwise
from flashfuse.patterns.calls import functional_target, mutated_inputs
from flashfuse.patterns.graph import tensor, value, wants_gradient
from flashfuse.patterns.table import PLACE_OPS, Applied, Table

aten = torch.ops.aten


class Tables:
    """The tables of a graph, each made once for all sites that read it. copied: its node for each of the user's."""

    def __init__(self, copied: Mapping[fx.Node, fx.Node]) -> None:
        self.copied = copied
        self.made: dict[Table, fx.Node] = {}

    def node(self, table: Table) -> fx.Node:
        """The table's node, [its extents..], which stands before its source."""
        if table not in self.made:
            self.made[table] = _Maker(table, self.copied).build(table.element)
        return self.made[table]


class _Maker(Inserter):
    """Makes expressions as tensors with a dimension for each axis of the table, of size 1 where they do not vary."""

    def __init__(self, table: Table, copied: Mapping[fx.Node, fx.Node]) -> None:
        super().__init__(copied[table.source])
        self.table, self.copied = table, copied
        source = tensor(table.source)
        assert source is not None
        self.device, self.fake_mode, self.history = source.device, source.fake_mode, wants_gradient(table.source)  # type: ignore[attr-defined]
        self.known: dict[Expr | sympy.Expr, fx.Node] = {}

    def build(self, expr: Expr) -> fx.Node:
        if expr not in self.known:
            self.known[expr] = self._build(expr)
        return self.known[expr]

    def _build(self, expr: Expr) -> fx.Node:
        match expr:
            case Const(value=number):
                return self._filled(number, expr.dtype)
            case Index(value=formula):
                made = self._formula(formula)
                return made if expr.dtype == torch.int64 else self._call(torch.Tensor.to, made, expr.dtype)
            case Load(tensor=fx.Node() as node, indices=indices):
                return self._element(node, [self._formula(i) for i in indices])
            case Gather(tensor=fx.Node() as node, at=at):
                return self._element(node, [self._call(torch.Tensor.to, self.build(a), torch.int64) for a in at])
            case Applied():
                return self._applied(expr)
            case Pointwise(op="to_float", args=(arg,)):
                return self._call(torch.Tensor.to, self.build(arg), expr.dtype)
            case Pointwise(op=op, args=args):
                return self._call(PLACE_OPS[op], *map(self.build, args))
        raise LookupError(f"a table holds no {type(expr).__name__}")

    def _applied(self, expr: Applied) -> fx.Node:
        node, inputs = expr.node, dict(zip(expr.inputs, map(self.build, expr.args), strict=True))
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: inputs.get(n) or self.copied[n])
        target = functional_target(node) if mutated_inputs(node) else node.target
        if isinstance(target, str):
            return self._call(getattr(torch.Tensor, target), *args, **kwargs)
        return self._call(target, *args, **kwargs)

    def _element(self, node: fx.Node, at: list[fx.Node]) -> fx.Node:
        """The elements of a tensor at positions; a number as it is."""
        return self._call(aten.index.Tensor, self.copied[node], at) if at else self.copied[node]

    def _formula(self, formula: sympy.Expr) -> fx.Node:
        """An int64 tensor of positions."""
        if formula not in self.known:
            varies = formula.free_symbols & set(self.table.axes)
            self.known[formula] = self._positions(formula) if varies else self._filled(self.size(formula), torch.int64)
        return self.known[formula]

    def _positions(self, formula: sympy.Expr) -> fx.Node:
        if formula in self.table.axes:
            axis = self.table.axes.index(formula)
            counted = self._call(torch.arange, self.size(self.table.extents[axis]), device=self.device)
            shape = [-1 if a == axis else 1 for a in range(len(self.table.axes))]
            return self._call(torch.Tensor.view, counted, shape)
        parts = [self._formula(a) for a in formula.args]
        result = parts[0]
        for part in parts[1:]:
            result = self._call(ARITHMETIC[formula.func], result, part)
        return result

    def _filled(self, number: Any, dtype: torch.dtype) -> fx.Node:
        """A number as a tensor of as many dimensions as any other, so that types promote as in the user's code."""
        return self._call(torch.full, [1] * len(self.table.axes), number, dtype=dtype, device=self.device)

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        values, named = fx.map_arg((args, kwargs), value)
        with torch.set_grad_enabled(self.history), self.fake_mode:
            example = function(*values, **named)
        return self.add("call_function", function, args, kwargs, example)
