"""Facts of single nodes as values: two nodes with equal ones are alike in all that an analysis can read of them.

What is compared with nothing but itself, such as a tensor in a transform, gives a value that only its own node has.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from flashfuse.patterns.calls import name_of
from flashfuse.patterns.graph import Graph, raw_value

_VALUES = (torch.dtype, torch.device, torch.layout, torch.memory_format, str, type(None), type(...))
_CALLS = ("call_function", "call_method", "call_module")


class Facts:
    """The facts of one graph's nodes, as numbers that are equal where the facts are.

    leads: the nodes behind which a product lies.
    """

    def __init__(self, graph: Graph, leads: Mapping[fx.Node, fx.Node]) -> None:
        self.graph, self.leads = graph, leads
        self._numbers: dict[Hashable, int] = {}
        self._seen: dict[fx.Node, int] = {}
        self._opened: dict[fx.Node, int] = {}

    def seen(self, node: fx.Node) -> int:
        """Of its value, where it comes from, and whether a product lies behind it."""
        return self._known(self._seen, node, self._as_seen)

    def opened(self, node: fx.Node) -> int:
        """The same, and of what it calls: everything but which nodes its inputs are."""
        return self._known(self._opened, node, self._as_opened)

    def _known(self, known: dict[fx.Node, int], node: fx.Node, facts: Callable[[fx.Node], Hashable]) -> int:
        if node not in known:
            known[node] = self._numbers.setdefault(facts(node), len(self._numbers))
        return known[node]

    def _as_seen(self, node: fx.Node) -> Hashable:
        calls = node.op if node.op in _CALLS else ""
        given = node.op in ("placeholder", "get_attr")
        return given, bool(calls), node in self.leads, node in self.graph.weights, _of_value(raw_value(node), node)

    def _as_opened(self, node: fx.Node) -> Hashable:
        graph, inputs = self.graph, {n: i for i, n in enumerate(node.all_input_nodes)}
        written = tuple(inputs[n] for n in graph.mutated[node] if n in inputs)
        where = graph.autocast.get(node, ()), node in graph.no_grad, node in graph.live
        called = (node.op, type(node.target), node.target) if name_of(node) else node.op
        return self.seen(node), called, _of_argument((node.args, node.kwargs), inputs, node), written, where


def _of_value(value: Any, node: fx.Node) -> Hashable:
    if isinstance(value, torch.Tensor):
        return _of_tensor(value, node)
    if isinstance(value, (tuple, list)):
        return type(value), *(_of_value(v, node) for v in value)
    return _of_number(value, node)


def _of_tensor(t: torch.Tensor, node: fx.Node) -> Hashable:
    """A fake tensor on strided memory; any other, and one that knows its elements, is like no other."""
    if type(t) is not FakeTensor or t.layout != torch.strided or t.is_nested or t.constant is not None:
        return node
    layout = tuple(_of_size(n, node) for n in (*t.shape, *t.stride(), t.storage_offset()))
    flags = isinstance(t, torch.nn.Parameter), t.requires_grad, t.is_conj(), t.is_neg()
    return torch.Tensor, t.dtype, t.device, flags, layout


def _of_size(size: Any, node: fx.Node) -> Hashable:
    return size if type(size) is int else _of_number(size, node)


def _of_number(value: Any, node: fx.Node) -> Hashable:
    """Numbers of different types may be equal, and a NaN or a signed zero is told by its text alone."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        expr = getattr(value.node, "expr", node)
        return type(value), repr(value.node.hint) if is_own_symbol(value) else expr
    if isinstance(value, (bool, int, float, complex)):
        return type(value), repr(value)
    return value if isinstance(value, _VALUES) else node


def is_own_symbol(value: Any) -> bool:
    """Whether this is a symbolic float that stands for an input: which one it is decides nothing but what is equal."""
    return isinstance(value, torch.SymFloat) and value.node.expr.is_Symbol and value.node.hint is not None


def _of_argument(argument: Any, inputs: Mapping[fx.Node, int], node: fx.Node) -> Hashable:
    """An argument with its nodes as numbers of the node's inputs."""
    match argument:
        case fx.Node():
            return fx.Node, inputs[argument]
        case tuple() | list():
            return type(argument), *(_of_argument(a, inputs, node) for a in argument)
        case dict():
            return type(argument), *((k, _of_argument(a, inputs, node)) for k, a in argument.items())
        case slice(start=start, stop=stop, step=step):
            return slice, *(_of_argument(a, inputs, node) for a in (start, stop, step))
    return _of_number(argument, node)
