"""Facts of single nodes as values: two nodes with equal ones are alike in all that an analysis can read of them.

What is compared with nothing but itself, such as a tensor in a transform, gives a value that only its own node has.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from flashfuse.patterns.calls import name_of
from flashfuse.patterns.graph import Graph, raw_value

# Of a constant that is compared element by element.
_MOST_ELEMENTS = 16
_VALUES = (torch.dtype, torch.device, torch.layout, torch.memory_format, str, type(None), type(...))


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
        if node not in self._seen:
            self._seen[node] = self._number(self._as_seen(node))
        return self._seen[node]

    def opened(self, node: fx.Node) -> int:
        """The same, and of what it calls: everything but which nodes its inputs are."""
        if node not in self._opened:
            self._opened[node] = self._number(self._as_opened(node))
        return self._opened[node]

    def _number(self, facts: Hashable) -> int:
        return self._numbers.setdefault(facts, len(self._numbers))

    def _as_seen(self, node: fx.Node) -> Hashable:
        kind = node.op in ("placeholder", "get_attr"), node.op == "output"
        return kind, node in self.leads, node in self.graph.weights, _of_value(raw_value(node), node)

    def _as_opened(self, node: fx.Node) -> Hashable:
        graph = self.graph
        inputs = {n: i for i, n in enumerate(graph.inputs[node])}
        written = tuple(inputs[n] for n in graph.mutated[node])
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
    """A fake tensor on strided memory, with its elements where it knows a few; any other is like no other."""
    known = getattr(t, "constant", None)
    if type(t) is not FakeTensor or t.layout != torch.strided or t.is_nested:
        return node
    if known is not None and (type(known) is not torch.Tensor or known.numel() > _MOST_ELEMENTS):
        return node
    layout: tuple[Hashable, ...] = (*t.shape, *t.stride(), t.storage_offset())
    if t._has_symbolic_sizes_strides:
        layout = tuple(_of_number(n, node) for n in layout)
    flags = isinstance(t, torch.nn.Parameter), t.requires_grad, t.is_neg(), t.dtype.is_complex and t.is_conj()
    elements = None if known is None else repr(known.tolist())
    return torch.Tensor, t.dtype, t.device, flags, layout, elements


def _of_number(value: Any, node: fx.Node) -> Hashable:
    """Numbers of different types may be equal, and a NaN or a signed zero is told by its text alone."""
    if isinstance(value, _VALUES):
        return value
    if isinstance(value, (bool, int, float, complex)):
        return type(value), repr(value)
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return node
    return type(value), repr(value.node.hint) if is_own_symbol(value) else getattr(value.node, "expr", node)


def is_own_symbol(value: Any) -> bool:
    """Whether this is a symbolic float that stands for an input: which one it is decides nothing but what is equal."""
    return isinstance(value, torch.SymFloat) and value.node.expr.is_Symbol and value.node.hint is not None


def _of_argument(argument: Any, inputs: Mapping[fx.Node, int], node: fx.Node) -> Hashable:
    """An argument, in which a bare number stands for an input of the node."""
    if isinstance(argument, fx.Node):
        return inputs[argument]
    if isinstance(argument, (tuple, list)):
        return type(argument), *[_of_argument(a, inputs, node) for a in argument]
    if isinstance(argument, slice):
        return slice, *[_of_argument(a, inputs, node) for a in (argument.start, argument.stop, argument.step)]
    if isinstance(argument, dict):
        return type(argument), *[(k, _of_argument(a, inputs, node)) for k, a in argument.items()]
    return _of_number(argument, node)
