"""Where a search starts: products of activations, the normalisers behind them, and what a layer's weights cut off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import fx

from flashfuse.patterns.calls import name_of
from flashfuse.patterns.graph import WEIGHTED, Graph, is_weighted, tensor
from flashfuse.patterns.normaliser import NORMALISERS, PARTIAL, POWERS
from flashfuse.patterns.summed import ADDITIONS, DIFFERENCES, Sum, multiplies_pairs, sum_of

Seeds = frozenset[fx.Node]
NONE: Seeds = frozenset()

# What starts a search. A contraction may be spelled with any of these; what it means is read from its ATen calls.
_CONTRACTIONS = frozenset({
    "matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "einsum", "baddbmm", "baddbmm_", "addmm", "addmm_", "addbmm",
    "addbmm_", "addmv", "addmv_", "addr", "addr_", "mv", "dot", "inner", "tensordot", "chain_matmul", "multi_dot",
    "linalg_multi_dot", "linear", "outer", "ger",
})  # fmt: skip
WHOLE = frozenset({"scaled_dot_product_attention"})
# What may rescale an attention's output: either factor, and what is divided.
_FACTORS = frozenset({"mul", "mul_", "imul", "__mul__", "__rmul__", "__imul__", "multiply"})
_QUOTIENTS = frozenset({"div", "div_", "truediv", "itruediv", "__truediv__", "__itruediv__", "divide", "true_divide"})
_GATES = _FACTORS | _QUOTIENTS
# What may add up products of parts of the weights.
ADDED = ADDITIONS | DIFFERENCES
# What makes a product of activations more than a product: a chain of linear operators is left to the matrix products.
_CURVED = frozenset({
    "sigmoid", "expit", "relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "silu", "gelu", "mish",
    "softplus", "logsigmoid", "log_sigmoid", "softsign", "tanhshrink", "softshrink", "hardshrink", "threshold",
    "hardtanh", "hardsigmoid", "hardswish", "tanh", "erf", "atan", "arctan", "asinh", "arcsinh", "sin", "cos",
    "tan", "square", "pow", "__pow__", "__rpow__", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p",
    "logaddexp", "logaddexp2", "sqrt", "rsqrt", "reciprocal", "clamp", "clip", "clamp_min", "clamp_max", "abs",
    "absolute", "maximum", "minimum", "fmax", "fmin", "lerp", "sign", "sgn", "floor", "ceil", "round", "trunc",
    "fix", "frac", "fmod", "remainder", "__mod__", "mod", "mul", "__mul__", "multiply", "addcmul", "addcdiv",
})  # fmt: skip


def is_contraction(node: fx.Node) -> bool:
    """A product of activations, by any of its names."""
    return name_of(node) in _CONTRACTIONS and not is_weighted(node)


def _may_normalise(node: fx.Node) -> bool:
    """Whether a normaliser may start here; a power does where it is one of a number."""
    name, base = name_of(node), node.args[0] if node.args else None
    given = tensor(base) if isinstance(base, fx.Node) else base
    single = isinstance(given, (int, float)) or (isinstance(given, torch.Tensor) and given.dim() == 0)
    return name in NORMALISERS or (name in POWERS and single)


def is_curved(name: str) -> bool:
    """By the name of the operator or of its form in place."""
    return name in _CURVED or name.removesuffix("_") in _CURVED


def _rescaled(node: fx.Node) -> list[fx.Node]:
    """The inputs of one of `_GATES` that it may be an output rescaled of."""
    return [n for n in node.args[:1] if isinstance(n, fx.Node)] if name_of(node) in _QUOTIENTS else node.all_input_nodes


@dataclass(frozen=True)
class Upstream:
    """What lies behind the nodes of a graph.

    starts: what a search may start from: contractions, whole attentions, and what may rescale one.
    products: a product of activations. normalisers: the normalisers up to the next product. curved: operators that may
    make a product of activations non-linear, up to the next product. values: products with what was normalised, and
    the normalisers. weights: the same, and products with what was bent, and those operators.
    over_products: the normalisers behind which a product of activations lies.
    A layer with weights ends all, except that it may mix raw scores (talking heads); a product with values is not one.
    mixed: what lies behind a product and such a layer, and behind a product with values.
    """

    starts: tuple[fx.Node, ...]
    products: Mapping[fx.Node, fx.Node]
    normalisers: Mapping[fx.Node, Seeds]
    curved: Mapping[fx.Node, Seeds]
    values: Mapping[fx.Node, Seeds]
    weights: Mapping[fx.Node, Seeds]
    over_products: Seeds
    mixed: AbstractSet[fx.Node]

    def seeds(self, node: fx.Node) -> Seeds:
        """What one of `starts` takes part of its input from; of a whole attention, the node itself."""
        name = name_of(node)
        if name in WHOLE:
            return frozenset((node,))
        if name in _GATES:
            return self._gated(node)
        inputs = node.all_input_nodes
        if name in ADDED:
            return _added(node, self.products, self.weights)
        normalisers = _union(self.normalisers, inputs)
        # Weights of a curved product may hold an exponential too, as of a temperature.
        if normalisers & self.over_products:
            return normalisers
        return _union(self.curved, inputs) or normalisers

    def _gated(self, node: fx.Node) -> Seeds:
        """Of an attention's output rescaled by something that was made from scores: the normalisers of both.

        That may be a second product of the same weights, as with ones.
        """
        behind = {n: self.products.get(n, n) for n in node.all_input_nodes}
        outputs = {behind[n] for n in _rescaled(node)} & self.values.keys()
        others = {*behind.values()} & self.values.keys()
        gates = _union(self.normalisers, node.all_input_nodes) if outputs else NONE
        return gates.union(*(self.values[n] for n in others)) if gates or (outputs and len(others) > 1) else NONE


def upstream(graph: Graph) -> Upstream:
    """One pass over the graph in its order."""
    products: dict[fx.Node, fx.Node] = {}
    values: dict[fx.Node, Seeds] = {}
    weights: dict[fx.Node, Seeds] = {}
    normalisers: dict[fx.Node, Seeds] = {}
    curved: dict[fx.Node, Seeds] = {}
    over_products: Seeds = frozenset()
    mixed: set[fx.Node] = set()
    starts: list[fx.Node] = []
    for node, inputs in graph.inputs.items():
        name = name_of(node)
        if not name:
            continue
        weighted = name in WEIGHTED and is_weighted(node)
        seeds = _union(normalisers, inputs)
        contracts = name in _CONTRACTIONS and not weighted
        summed = Sum.BROADCAST if contracts or name in WHOLE else sum_of(node)
        # Of two tensors of one shape a sum may be scores, whose query was repeated, but no product with values.
        if summed is Sum.BROADCAST or (summed is Sum.ALIGNED and not seeds and not _union(curved, inputs)):
            if summed is Sum.BROADCAST:
                starts.append(node)
            products[node] = node
            if weighs := seeds or _union(curved, inputs):
                weights[node] = weighs
            if seeds or name in WHOLE:
                values[node] = seeds or frozenset((node,))
            continue
        if name in _GATES:
            starts.append(node)
            # What is left of its own normaliser is none of the next product's.
            outputs = (n for n in _rescaled(node) if products.get(n) in values)
            if any(seeds <= values[products[n]] for n in outputs):
                seeds = NONE
        if name in ADDED and _added(node, products, weights):
            starts.append(node)
        behind = next((products[n] for n in inputs if n in products), None)
        if behind is None and name in NORMALISERS - PARTIAL:
            path = _to_one_feature(graph, node)
            products.update(dict.fromkeys(path, path[-1]) if path else {})
            behind = path[-1] if path else None
        if behind is not None and not (weighted and behind in values):
            products[node] = behind
            if weighted or behind in values or any(n in mixed for n in inputs):
                mixed.add(node)
        if weighted:
            continue
        # An exponential of other things, as of a temperature, starts nothing where it meets the scores.
        if _may_normalise(node) and (not seeds or (behind is not None and not seeds & over_products)):
            seeds = frozenset((node,))
            over_products |= seeds if behind is not None else frozenset()
        if seeds:
            normalisers[node] = seeds
        bends = _union(curved, inputs)
        if not bends and is_curved(name) and behind is not None and behind not in values:
            bends = frozenset((node,))
        if bends:
            curved[node] = bends
    return Upstream(tuple(starts), products, normalisers, curved, values, weights, over_products, mixed)


def _to_one_feature(graph: Graph, softmax: fx.Node, limit: int = 8) -> list[fx.Node]:
    """The way back from a softmax to a product of queries and keys of one feature, which is a multiplication."""
    ways = [[n] for n in graph.inputs[softmax]]
    for way in ways:
        if multiplies_pairs(way[-1]):
            return way
        fresh = () if is_weighted(way[-1]) else graph.inputs.get(way[-1], ())
        ways += [[*way, n] for n in fresh][: limit - len(ways)] if len(ways) < limit else []
    return []


def _added(node: fx.Node, products: Mapping[fx.Node, fx.Node], weights: Mapping[fx.Node, Seeds]) -> Seeds:
    """Of a sum or a difference of two products of the same weights, what made these."""
    behind = [products.get(n) for n in node.all_input_nodes]
    if len(behind) != 2 or behind[0] is behind[1]:
        return NONE
    left, right = (weights.get(product, NONE) if product is not None else NONE for product in behind)
    return left if left == right else NONE


def _union(known: Mapping[fx.Node, Seeds], nodes: Sequence[fx.Node]) -> Seeds:
    found = [known[n] for n in nodes if n in known]
    if len(found) < 2:
        return found[0] if found else NONE
    return NONE.union(*found)


def unclaimed(graph: Graph, up: Upstream, claimed: AbstractSet[fx.Node]) -> Iterable[fx.Node]:
    """Live softmaxes over products of activations that no site took."""
    for node in graph.nodes:
        whole = node in up.values and name_of(node) in WHOLE
        first = up.normalisers.get(node) == {node}
        softmax = first and any(n in up.products for n in node.all_input_nodes)
        if (whole or softmax) and node in graph.live and node not in claimed:
            yield node
