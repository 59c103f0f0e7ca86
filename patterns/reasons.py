"""Why normalisers behind products are left alone: what their searches came to, and which reason of several is told."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet

from torch import fx

from flashfuse.patterns.blame import additive, scattered
from flashfuse.patterns.calls import name_of
from flashfuse.patterns.graph import Graph, location
from flashfuse.patterns.normaliser import PARTIAL
from flashfuse.patterns.refusal import Refused, mixing_layer
from flashfuse.patterns.seeds import Seeds, Upstream, is_contraction, unclaimed
from flashfuse.patterns.site import Refusal

# What is told where only a part of an attention was tried.
_COMPLETED = frozenset({"probabilities-used", "scores-used", "extra-columns", "single-key"})


class Reasons:
    """The reasons of one graph, each with the start that was tried, by the seed that it was tried for.

    Of several the first is told. But a sum may be the normaliser of another start, whose reason is the better one; and
    what uses probabilities again may be the division that completes the attention, or the sum with further values, and
    has a reason of its own.
    """

    def __init__(self, graph: Graph, up: Upstream) -> None:
        self.graph, self.up = graph, up
        self._refused: dict[fx.Node, tuple[Refused, fx.Node]] = {}
        self._of_sums: dict[fx.Node, tuple[Refused, fx.Node]] = {}

    def add(self, start: fx.Node, seeds: Seeds, error: Refused) -> None:
        is_sum = self.up.products.get(start) is start and not is_contraction(start)
        told = self._of_sums if is_sum else self._refused
        for seed in seeds:
            known, _ = told.setdefault(seed, (error, start))
            if known.code in _COMPLETED and (is_sum or self.up.products.get(start) is not start):
                told[seed] = error, start

    def refusals(self, claimed: AbstractSet[fx.Node], inside: AbstractSet[fx.Node]) -> Iterator[Refusal]:
        """What is told, where `claimed` seeds are part of a site, and kernels take over the nodes `inside`."""
        refused = self._of_sums | self._refused
        left = [*unclaimed(self.graph, self.up, claimed)]
        apart = (n for n, (why, tried) in refused.items() if n not in claimed and not {why.node, tried} & inside)
        left += [n for n in apart if self._is_curve(n)]
        for seed in dict.fromkeys(left):
            error = refused[seed][0] if seed in refused else self._unmet(seed)
            if error is not None and not self._is_of_features(seed, error):
                yield _told(error, seed)
        # A softmax that meets values, over no products of activations, is an attention in this case alone.
        for seed in (n for n in refused if n not in claimed and n not in left):
            error = None if seed in self.up.over_products or name_of(seed) in PARTIAL else additive(seed)
            if error is not None:
                yield _told(error, seed)

    def _is_curve(self, node: fx.Node) -> bool:
        """Whether a search started from a product without a normaliser."""
        normalised = self.up.normalisers.get(node, frozenset()) & self.up.over_products
        return self.up.curved.get(node) == frozenset((node,)) and not normalised

    def _unmet(self, seed: fx.Node) -> Refused | None:
        """Why a normaliser behind a product meets no values; None where it is no attention's.

        So it is with an exponential alone, with a softmax of what a layer makes of a product, as a classifier's, and of
        a product with weights, as a router's.
        """
        if name_of(seed) in PARTIAL:
            return scattered(seed)
        if any(self._is_layer(n) for n in seed.all_input_nodes):
            return None
        alone = Refused("no-value-product", "the probabilities are not multiplied with values in this graph")
        return mixing_layer(seed) or (None if seed in self.up.mixed else alone)

    def _is_of_features(self, seed: fx.Node, error: Refused) -> bool:
        """Whether a softmax over no product is of what a layer makes of one, as in linear attention."""
        return error.code == "no-product" and error.node is None and seed in self.up.mixed

    def _is_layer(self, node: fx.Node) -> bool:
        """Whether a node is made of a product with what is made of parameters alone."""
        product = self.up.products.get(node)
        return product is not None and not self.graph.weights.isdisjoint(product.all_input_nodes)


def _told(error: Refused, seed: fx.Node) -> Refusal:
    node = error.node or seed
    return Refusal(node, error.code, error.reason, location(node))
