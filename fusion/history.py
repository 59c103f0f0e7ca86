"""What autograd reaches from a tensor: an input that a gradient comes to in the source gets one from the rewrite too.

Autograd follows tensors through functions whose derivative is 0 (`round`), choices that never fall on them and sums
that leave them out (`baddbmm` with a beta of 0). Their gradients are zeros then, and `None` where it does not follow
them. A program has no term for any of these, so such inputs are tied to the output by nothing: a sum of none of their
elements.

Fake tensors of a graph that is traced for training have their histories, as the tensors of a run have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.autograd.graph import get_gradient_edge

from flashfuse.insert import Inserter
from flashfuse.patterns.graph import tensor, wants_gradient

aten = torch.ops.aten


class Histories:
    """The inputs that each tensor's history ends in, as the bits of a number; what is told once is kept."""

    def __init__(self) -> None:
        self.ends: dict[Any, int] = {}
        self.found: dict[Any, int] = {}

    def of(self, t: torch.Tensor) -> int:
        start = get_gradient_edge(t).node
        waiting = [start]
        while waiting:
            step = waiting[-1]
            before = [node for node, _ in step.next_functions if node is not None]
            unknown = [node for node in before if node not in self.found]
            if unknown and step not in self.found:
                waiting += unknown
                continue
            waiting.pop()
            if step not in self.found:
                self.found[step] = self._joined(step, before)
        return self.found[start]

    def _joined(self, step: Any, before: list[Any]) -> int:
        if not before:
            return 1 << self.ends.setdefault(step, len(self.ends))
        reached = 0
        for node in before:
            reached |= self.found[node]
        return reached


def tied(out: fx.Node, seen: torch.Tensor, insert: Inserter, histories: Histories) -> fx.Node:
    """`out`, with the inputs of the graph that autograd reaches from `seen`, which it stands for."""
    if not seen.requires_grad:
        return out
    for node in _forgotten(out, seen, insert, histories):
        out = _tie(out, node, insert)
    return out


def _forgotten(out: fx.Node, seen: torch.Tensor, insert: Inserter, histories: Histories) -> Iterator[fx.Node]:
    wanted, made = histories.of(seen), tensor(out)
    assert made is not None
    missing = wanted & ~(histories.of(made) if made.requires_grad else 0)
    given = (n for n in insert.graph.nodes if n.op in ("placeholder", "get_attr")) if missing else ()
    for node in filter(wants_gradient, given):
        t = tensor(node)
        assert t is not None
        reached = histories.of(t)
        if reached & missing and not reached & ~wanted:
            missing &= ~reached
            yield node


def _tie(out: fx.Node, node: fx.Node, insert: Inserter) -> fx.Node:
    """`out` less the sum of no element of the tensor, which leaves every number as it is, zeros' signs too."""
    t = tensor(node)
    assert t is not None
    vector = node if t.dim() else insert.call(aten.unsqueeze.default, node, 0)
    nothing = insert.call(aten.sum.default, insert.call(aten.slice.Tensor, vector, 0, 0, 0))
    return insert.call(aten.sub.Tensor, out, nothing)
