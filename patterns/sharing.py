"""Tensors that a graph computes more than once, as the mask that every layer makes of the same input.

What attentions read of them, and what is found of it once a forward, is then of one tensor.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import fx

from flashfuse.patterns.facts import Facts
from flashfuse.patterns.graph import Graph, shape, storage, tensor, to_sympy, value
from flashfuse.patterns.lift import CannotLift, Lifter
from flashfuse.patterns.site import AttentionSite

# How many operators it is looked behind: masks are made in a few steps, and hidden states in all steps of a model.
MOST_STEPS = 32


class Sharing:
    """The node that stands for all with the same value: the first that was asked for."""

    def __init__(self, graph: Graph, facts: Facts) -> None:
        self.graph, self.facts = graph, facts
        self.lifter = Lifter(graph)
        self._first: dict[Hashable, fx.Node] = {}
        self._known: dict[fx.Node, Hashable] = {}
        self._certain: dict[fx.Node, bool] = {}

    def site(self, site: AttentionSite) -> AttentionSite:
        """The site with such nodes captured; sites are asked for in the order of the graph."""
        captured = tuple(self._node(c) if isinstance(c, fx.Node) else c for c in site.captured)
        return replace(site, captured=captured, plus=tuple(map(self.site, site.plus)))

    def _node(self, node: fx.Node) -> fx.Node:
        found = self._value(node, MOST_STEPS)
        return found if isinstance(found, fx.Node) else node

    def _value(self, node: fx.Node, steps: int) -> Hashable:
        """What is equal for nodes of one value: for a tensor a node."""
        if node not in self._known:
            self._known[node] = self._found(node, steps)
        return self._known[node]

    def _found(self, node: fx.Node, steps: int) -> Hashable:
        size = value(node)
        if isinstance(size, (int, torch.SymInt)):
            return to_sympy(size)
        if node.op not in ("call_function", "call_method") or not steps:
            return node
        sources = [self.graph.current(n, node) for n in self.graph.inputs[node]]
        if None in sources or self.graph.writes.get(storage(node)):  # type: ignore[arg-type]
            return node
        made_of = (self._value(n, steps - 1) for n in sources if n is not None)
        first = self._first.setdefault((self.facts.opened(node), *made_of), node)
        return first if first is node or self._is_certain(first) else node

    def _is_certain(self, node: fx.Node) -> bool:
        """Whether the operator gives the same each time, and does nothing else: lifting knows what it computes."""
        if node not in self._certain:
            made = tensor(node)
            try:
                self._certain[node] = made is not None
                if made is not None:
                    self.lifter.expand(self.lifter.load(node, self.lifter.position(shape(made))))
            except CannotLift:
                self._certain[node] = False
        return self._certain[node]
