"""Inserting nodes into a copy of a Dynamo graph, each with the fake value that Dynamo would have given it."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

from flashfuse.patterns.graph import tensor, to_sympy, value, wants_gradient

aten = torch.ops.aten

# How a size is computed from the sizes it is written in.
ARITHMETIC: dict[type, Callable[..., Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
    sympy.Pow: operator.pow,
    Max: torch.sym_max,
    Min: torch.sym_min,
}


def copy_graph(module: fx.GraphModule) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a module's graph, and the copy of each node but the output."""
    graph = fx.Graph(module)
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, copied)
    old_output = next(n for n in module.graph.nodes if n.op == "output")
    new_output = graph.output(output, getattr(old_output, "type", None))
    new_output.meta = copy.copy(old_output.meta)
    _copy_sources(module, copied)
    return graph, copied


def as_module(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """The module with a copy of its graph that has been changed; parameters, buffers and sub-modules are shared."""
    graph.lint()
    made = fx.GraphModule(module, graph, module.__class__.__name__)
    made.meta = dict(module.meta)
    if hasattr(module, "_param_name_to_source"):
        made._param_name_to_source = module._param_name_to_source
    return made


def _copy_sources(module: fx.GraphModule, copied: Mapping[fx.Node, fx.Node]) -> None:
    """Where inputs come from, which Dynamo keeps outside of `meta`; without it none counts as static in CUDA graphs."""
    for node in module.graph.find_nodes(op="placeholder"):
        if hasattr(node, "_dynamo_source"):
            copied[node]._dynamo_source = node._dynamo_source


class Inserter:
    """Inserts nodes before `before`, which they share source lines with. `made` lists them.

    history: whether a gradient of `before` is wanted.
    """

    def __init__(self, before: fx.Node) -> None:
        self.graph, self.before = before.graph, before
        self.history = wants_gradient(before)
        self.fake_mode: Any = getattr(tensor(before), "fake_mode", None)
        self.made: list[fx.Node] = []
        self._sizes: dict[sympy.Expr, fx.Node] = {}

    def add(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], example: Any) -> fx.Node:
        """A node whose fake value is known."""
        with self.graph.inserting_before(self.before):
            node = self.graph.create_node(op, target, args, kwargs)
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in self.before.meta:
                node.meta[key] = self.before.meta[key]
        node.meta["example_value"] = example
        self.made.append(node)
        return node

    def call(self, function: Callable[..., Any], *args: Any, **settings: Any) -> fx.Node:
        """A call of a function of tensors, run on their fakes as Dynamo would have."""
        with torch.set_grad_enabled(self.history), self.fake_mode:
            example = function(*fx.map_arg(args, value), **settings)
        return self.add("call_function", function, args, settings, example)

    def part(self, node: fx.Node, index: int, example: Any) -> fx.Node:
        """One value of a node that gives several."""
        return self.add("call_function", operator.getitem, (node, index), {}, example)

    def size(self, expr: sympy.Expr) -> Any:
        """A size as an integer, or as a node that computes it at run time from the graph's tensors.

        Raises LookupError where nothing in the graph has the size.
        """
        if expr.is_Integer:
            return int(expr)
        if expr not in self._sizes:
            self._sizes[expr] = self._size_node(expr)
        return self._sizes[expr]

    def scalar(self, expr: sympy.Expr) -> fx.Node:
        """The node whose value is a symbolic number. Raises LookupError."""
        for node in self._available():
            v = value(node)
            if isinstance(v, (torch.SymInt, torch.SymFloat)) and to_sympy(v) == expr:
                return node
        raise LookupError(f"no value of the graph is {expr}")

    def _size_node(self, expr: sympy.Expr) -> fx.Node:
        for node in self._available():
            v = value(node)
            if isinstance(v, torch.SymInt) and to_sympy(v) == expr:
                return node
        for node in self._available():
            t = tensor(node)
            for dim, s in enumerate(t.shape if t is not None and t.layout == torch.strided else ()):
                if isinstance(s, torch.SymInt) and to_sympy(s) == expr:
                    return self._compute(aten.sym_size.int, node, dim)
        function = ARITHMETIC.get(expr.func)
        if function is None:
            raise LookupError(f"no tensor of the graph has the size {expr}")
        result = self.size(expr.args[0])
        for a in expr.args[1:]:
            result = self._compute(function, result, self.size(a))
        return result

    def _compute(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self.add("call_function", function, args, {}, function(*fx.map_arg(args, value)))

    def _available(self) -> list[fx.Node]:
        found: list[fx.Node] = []
        for node in self.graph.nodes:
            if node is self.before:
                return found
            found.append(node)
        return found
