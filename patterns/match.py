"""The attention pattern: out[.., i, d] = sum_j softmax_j(score(q[.., i, :] . k[.., j, :]))[i, j] * v[.., j, d].

One statement for every spelling. A contraction whose one side lifts to a normaliser over the contracted axis, whose
argument lifts to a score program over one product of queries and keys, is an attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

import flashfuse.patterns.aten
import flashfuse.patterns.aten_layout
import flashfuse.patterns.sdpa  # noqa: F401
from flashfuse.kernels.expr import Dot, Expr, Load, Pointwise, Softmax, free_symbols
from flashfuse.kernels.normal import substitute
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.patterns.assemble import assemble
from flashfuse.patterns.chain import private_chain
from flashfuse.patterns.graph import Graph, is_weighted, location, name_of, shape, tensor
from flashfuse.patterns.indexing import same
from flashfuse.patterns.lift import CannotLift, Lifter
from flashfuse.patterns.normaliser import NORMALISERS, as_softmax
from flashfuse.patterns.operand import exactly_promotes
from flashfuse.patterns.refusal import Refused
from flashfuse.patterns.score import Score, find_score
from flashfuse.patterns.site import AttentionSite, Refusal

# What starts a search. A contraction may be spelled with any of these; what it means is read from its ATen calls.
_CONTRACTIONS = frozenset({
    "matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "einsum", "baddbmm", "addmm", "addbmm", "mv", "dot", "inner",
    "tensordot", "chain_matmul", "linear",
})  # fmt: skip
_WHOLE = frozenset({"scaled_dot_product_attention"})


@dataclass(frozen=True)
class MatchResult:
    """Every attention of a graph, and every softmax over products that was left alone, with the reason."""

    sites: tuple[AttentionSite, ...]
    refusals: tuple[Refusal, ...]


def find_attention(module: fx.GraphModule) -> MatchResult:
    """Find every attention in a Dynamo graph (its nodes carry fake tensors in `meta`). The graph is not changed."""
    graph = Graph(module)
    products, normalisers = _upstream(graph)
    lifter = Lifter(graph)
    sites: list[AttentionSite] = []
    refused: dict[fx.Node, Refused] = {}
    claimed: set[fx.Node] = set()
    for node in graph.nodes:
        seeds = _seeds(node, normalisers)
        if node not in graph.live or not seeds:
            continue
        try:
            site = _match(lifter, node, set(products))
        except Refused as error:
            for seed in seeds:
                refused.setdefault(seed, error)
            continue
        if site is not None:
            sites.append(site)
            claimed.update(seeds)
    refusals = [
        _refusal(seed, refused.get(seed))
        for seed in _unclaimed(graph, products, normalisers, claimed)
        if name_of(seed) != "exp" or seed in refused
    ]
    return MatchResult(tuple(sites), tuple(refusals))


def _is_contraction(node: fx.Node) -> bool:
    """A product of activations, by any of its names."""
    return name_of(node) in _CONTRACTIONS and not is_weighted(node)


def _upstream(graph: Graph) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, frozenset[fx.Node]]]:
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
        if _is_contraction(node) or name in _WHOLE:
            products[node] = node
            if seeds or name in _WHOLE:
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


def _seeds(node: fx.Node, normalisers: dict[fx.Node, frozenset[fx.Node]]) -> frozenset[fx.Node]:
    """The normalisers that a contraction takes part of its input from; of a whole attention, the node itself."""
    name = name_of(node)
    if name in _WHOLE:
        return frozenset((node,))
    if not _is_contraction(node):
        return frozenset()
    return frozenset().union(*(normalisers.get(n, frozenset()) for n in node.all_input_nodes))


def _unclaimed(
    graph: Graph,
    products: dict[fx.Node, fx.Node],
    normalisers: dict[fx.Node, frozenset[fx.Node]],
    claimed: set[fx.Node],
) -> Iterable[fx.Node]:
    """Live softmaxes over products of activations that no site took."""
    for node in graph.nodes:
        whole = name_of(node) in _WHOLE
        softmax = normalisers.get(node) == frozenset((node,)) and any(n in products for n in node.all_input_nodes)
        if (whole or softmax) and node in graph.live and node not in claimed:
            yield node


def _refusal(seed: fx.Node, error: Refused | None) -> Refusal:
    if error is None:
        error = Refused("no-value-product", "the probabilities are not multiplied with values in this graph")
    node = error.node or seed
    return Refusal(node, error.code, error.reason, location(node))


# --------------------------------------------------------------------------------------------------------------------


def _match(lifter: Lifter, node: fx.Node, leads: set[fx.Node]) -> AttentionSite | None:
    """The attention whose output `node` is; None where it is some other contraction. Raises Refused."""
    out = tensor(node)
    if out is None:
        return None
    if free_unbacked_symbols([tensor(n) for n in (node, *node.all_input_nodes)]):
        raise Refused("data-dependent-shape", "a length depends on data, so it is not known even as a symbol", node)
    if any(0 in shape(t) for n in (node, *node.all_input_nodes) if (t := tensor(n)) is not None):
        raise Refused("empty", "a dimension has size 0, so there is nothing to compute", node)
    position = lifter.position(shape(out), "o")
    try:
        expr = lifter.expand(lifter.load(node, position))
    except CannotLift as error:
        raise Refused("unknown-operator", f"`{name_of(node)}` {error.reason}", node) from error
    if not isinstance(expr, Dot):
        raise Refused(
            "value-product", "the product with the values is combined with something else in one operator", node
        )
    problems: list[Refused] = []
    for probs_side, value_side in ((expr.lhs, expr.rhs), (expr.rhs, expr.lhs)):
        try:
            softmax = _find_softmax(lifter, probs_side, expr.axis, expr.dtype)
        except Refused as error:
            problems.append(error)
            continue
        if softmax is None:
            continue
        if softmax.at != expr.axis:
            problems.append(_wrong_axis(lifter, softmax, expr.axis, leads, node))
            continue
        if not same(softmax.extent, expr.extent):
            problems.append(Refused("extra-columns", "the softmax runs over more columns than there are keys"))
            continue
        score = _score(lifter, softmax, expr.axis, set() if name_of(node) in _WHOLE else leads, node)
        chain = private_chain(lifter.graph, score.node, node) if score.node is not node else ()
        site = assemble(lifter, node, position, expr, value_side, softmax, score, chain)
        for used in (*site.captured, site.q.node, site.k.node, site.v.node):
            if used in chain:
                raise Refused("row-dependent", f"the scores are needed as a whole by `{name_of(used)}`", used)
        return site
    if problems:
        raise problems[0]
    return None


def _wrong_axis(
    lifter: Lifter, softmax: Softmax, contracted: sympy.Symbol, leads: set[fx.Node], node: fx.Node
) -> Refused:
    """Why a product over another axis than the softmax's is no attention: rows, or heads, are mixed."""
    try:
        dot = find_score(lifter, softmax.arg, softmax.axis, leads, node).dot
    except Refused as error:
        if error.code != "no-product":
            return error
    else:
        if contracted in free_symbols(dot.lhs) and contracted in free_symbols(dot.rhs):
            return Refused("head-mixing", f"`{name_of(node)}` mixes the probabilities across heads", node)
    return Refused("softmax-axis", "the softmax is not over the axis that is multiplied with the values")


def _find_softmax(lifter: Lifter, expr: Expr, j: sympy.Symbol, dtype: torch.dtype) -> Softmax | None:
    """The normaliser on the probabilities' side of a product, through casts and layout; None where there is none."""
    passed: fx.Node | None = None
    while True:
        match expr:
            case Softmax():
                return expr
            case Pointwise(op=op) if op in ROUNDINGS:
                if not exactly_promotes(dtype, ROUNDINGS[op]):
                    raise Refused("rounded", f"the probabilities are rounded to {ROUNDINGS[op]} on their way", passed)
                expr = expr.args[0]
            case Pointwise():
                found = as_softmax(lifter, expr)
                if found is None:
                    _refuse_other_factor(lifter, expr, j, dtype, passed)
                    return None
                expr = found
            case Load():
                assert isinstance(expr.tensor, fx.Node)
                passed = expr.tensor
                try:
                    expr = lifter.expand(expr)
                except CannotLift as error:
                    _refuse_opaque_probs(error, passed)
                    return None
            case _:
                return None


def _refuse_other_factor(
    lifter: Lifter, expr: Pointwise, j: sympy.Symbol, dtype: torch.dtype, passed: fx.Node | None
) -> None:
    """Refuse where a softmax is one of the arguments of a pointwise operator."""
    for a in expr.args:
        if _find_softmax(lifter, a, j, dtype) is not None:
            raise Refused(
                "probability-factor",
                f"the probabilities pass through `{expr.op}` with another value before they meet the values",
                passed,
            )


def _refuse_opaque_probs(error: CannotLift, passed: fx.Node) -> None:
    """Refuse where a normaliser lies behind the operator that cannot be lifted."""
    node = error.node or passed
    if not _behind(node, NORMALISERS):
        return
    name = name_of(node)
    if "dropout" in name or "dropout" in error.reason or "bernoulli" in error.reason:
        raise Refused("dropout", "probabilities are dropped at random, which needs the training kernels", node)
    if _is_contraction(node) or is_weighted(node):
        raise Refused(
            "head-mixing", f"the probabilities are mixed across heads by `{name}` before they meet the values", node
        )
    raise Refused("unknown-operator", f"`{name}` between the softmax and the values {error.reason}", node)


def _behind(node: fx.Node, names: frozenset[str], limit: int = 32) -> bool:
    """Whether an operator of one of these names lies shortly behind a node."""
    seen, queue = {node}, [node]
    while queue and len(seen) < limit:
        current = queue.pop()
        if name_of(current) in names:
            return True
        fresh = [n for n in current.all_input_nodes if n not in seen and n.op not in ("placeholder", "get_attr")]
        seen.update(fresh)
        queue += fresh
    return False


def _score(lifter: Lifter, softmax: Softmax, j: sympy.Symbol, leads: set[fx.Node], site: fx.Node) -> Score:
    argument = softmax.arg if softmax.axis == j else substitute(softmax.arg, {softmax.axis: j})
    return find_score(lifter, argument, j, leads, site)
