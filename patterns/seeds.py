"""Where a search starts: products of activations, the normalisers behind them, and what a layer's weights cut off."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from flashfuse.patterns.graph import Graph, is_weighted, name_of
from flashfuse.patterns.normaliser import NORMALISERS

# What starts a search. A contraction may be spelled with any of these; what it means is read from its ATen calls.
_CONTRACTIONS = frozenset({
    "matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "einsum", "baddbmm", "addmm", "addbmm", "mv", "dot", "inner",
    "tensordot", "chain_matmul", "linear",
})  # fmt: skip
WHOLE = frozenset({"scaled_dot_product_attention"})


def is_contraction(node: fx.Node) -> bool:
    """A product of activations, by any of its names."""
    return name_of(node) in _CONTRACTIONS and not is_weighted(node)


def upstream(graph: Graph) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, frozenset[fx.Node]]]:
    """For every node a product of activations behind it, and the normalisers behind it up to the next product.

    A layer with weights ends both, except that it may mix raw scores (talking heads); a product with values is not one.
    """
    products: dict[fx.Node, fx.Node] = {}
    values: set[fx.Node] = set()
    normalisers: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        name = name_of(node)
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        inputs = node.all_input_nodes
        seeds = frozenset().union(*(normalisers.get(n, frozenset()) for n in inputs))
        if is_contraction(node) or name in WHOLE:
            products[node] = node
            if seeds or name in WHOLE:
                values.add(node)
            continue
        behind = next((products[n] for n in inputs if n in products), None)
        if behind is not None and not (is_weighted(node) and behind in values):
            products[node] = behind
        if is_weighted(node):
            continue
        if name in NORMALISERS and not seeds:
            seeds = frozenset((node,))
        if seeds:
            normalisers[node] = seeds
    return products, normalisers


def seeds_of(node: fx.Node, normalisers: dict[fx.Node, frozenset[fx.Node]]) -> frozenset[fx.Node]:
    """The normalisers that a contraction takes part of its input from; of a whole attention, the node itself."""
    name = name_of(node)
    if name in WHOLE:
        return frozenset((node,))
    if not is_contraction(node):
        return frozenset()
    return frozenset().union(*(normalisers.get(n, frozenset()) for n in node.all_input_nodes))


def unclaimed(
    graph: Graph,
    products: dict[fx.Node, fx.Node],
    normalisers: dict[fx.Node, frozenset[fx.Node]],
    claimed: set[fx.Node],
) -> Iterable[fx.Node]:
    """Live softmaxes over products of activations that no site took."""
    for node in graph.nodes:
        whole = name_of(node) in WHOLE
        softmax = normalisers.get(node) == frozenset((node,)) and any(n in products for n in node.all_input_nodes)
        if (whole or softmax) and node in graph.live and node not in claimed:
            yield node
