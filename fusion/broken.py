"""Attention that a graph break divides: its scores leave one graph, and the rest of it is in the next."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from flashfuse.patterns.graph import Graph, location, tensor
from flashfuse.patterns.seeds import is_contraction, upstream
from flashfuse.report import GraphBreak, Refused

# Queries and keys have a batch, a length and features; a layer's weights have two axes.
LEAST_DIMS = 3


def divided(gm: fx.GraphModule, graph_break: GraphBreak) -> Iterator[Refused]:
    """A refusal for each product of activations that leaves the graph at a break before any values are met."""
    up = upstream(Graph(gm))
    outputs = gm.graph.output_node().all_input_nodes
    behind = dict.fromkeys(up.products[node] for node in outputs if node in up.products)
    for product in behind:
        if is_contraction(product) and product not in up.values and _has_batch(product):
            why, _, _ = graph_break.reason.partition("\n")
            text = (
                f"a graph break stands between this product and what its scores are for: {why} [{graph_break.location}]"
            )
            yield Refused("graph-break", text, location(product), product.name)


def _has_batch(product: fx.Node) -> bool:
    operands = [tensor(x) for x in product.all_input_nodes]
    return all(x is None or x.dim() >= LEAST_DIMS for x in operands)
