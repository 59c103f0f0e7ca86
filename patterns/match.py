"""The attention pattern: out[.., i, d] = sum_j softmax_j(score(q[.., i, :] . k[.., j, :]))[i, j] * v[.., j, d].

One statement for every spelling. A contraction whose one side lifts to a normaliser over the contracted axis, whose
argument lifts to a score program over one product of queries and keys, is an attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import sympy
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

import flashfuse.patterns.aten
import flashfuse.patterns.aten_layout
import flashfuse.patterns.aten_numbers
import flashfuse.patterns.aten_products
import flashfuse.patterns.aten_rounding
import flashfuse.patterns.aten_windows
import flashfuse.patterns.decompose
import flashfuse.patterns.direct
import flashfuse.patterns.lookup
import flashfuse.patterns.sdpa
import flashfuse.patterns.writes  # noqa: F401
from flashfuse.kernels.expr import Dot, Expr, Reduce, free_symbols, loads, walk
from flashfuse.kernels.normal import substitute
from flashfuse.patterns.added import joined_products
from flashfuse.patterns.assemble import assemble
from flashfuse.patterns.blame import check_transforms, refuse_single_key, wrong_axis
from flashfuse.patterns.calls import name_of
from flashfuse.patterns.chain import private_chain
from flashfuse.patterns.dropout import before_dropout, check_draws
from flashfuse.patterns.ending import Ending, ending, is_linear
from flashfuse.patterns.found import Products, Score, as_scores
from flashfuse.patterns.gate import Gated, as_gated, normalised_late, with_gate
from flashfuse.patterns.graph import Graph, shape, tensor, wants_gradient
from flashfuse.patterns.indexing import Indices
from flashfuse.patterns.lift import CannotLift, Lifter
from flashfuse.patterns.parts import refuse_parts
from flashfuse.patterns.reasons import Reasons
from flashfuse.patterns.refusal import Refused, no_value_product, read_as_whole
from flashfuse.patterns.replay import Analyses
from flashfuse.patterns.score import find_products, find_score
from flashfuse.patterns.seeds import ADDED, WHOLE, is_contraction, upstream
from flashfuse.patterns.sharing import Sharing
from flashfuse.patterns.site import AttentionSite, Refusal, outermost
from flashfuse.patterns.summed import as_product
from flashfuse.patterns.vanishing import with_infinite_fills
from flashfuse.patterns.weights import Columns, OtherAxis, Weights, find_weights


@dataclass(frozen=True)
class MatchResult:
    """Every attention of a graph, and every softmax over products that was left alone, with the reason."""

    sites: tuple[AttentionSite, ...]
    refusals: tuple[Refusal, ...]


def find_attention(module: fx.GraphModule) -> MatchResult:
    """Find every attention in a Dynamo graph (its nodes carry fake tensors in `meta`). The graph is not changed."""
    graph = Graph(module)
    up = upstream(graph)
    analyses = Analyses(graph, up.products, lambda lifter, node: _match(lifter, node, up.products.keys()))
    sites: list[AttentionSite] = []
    reasons = Reasons(graph, up)
    claimed: set[fx.Node] = set()
    for node in up.starts:
        seeds = up.seeds(node)
        # An output that was taken already is not rescaled by anything that belongs to its attention.
        taken = seeds <= claimed if up.products.get(node) is node else bool(seeds & claimed)
        if node not in graph.live or not seeds or taken:
            continue
        try:
            site = analyses.site(node, history=wants_gradient(node))
        except Refused as error:
            reasons.add(node, seeds, error)
            continue
        if site is not None:
            sites.append(site)
            # What other scores are made of too, as the curve of a temperature, is not taken.
            claimed.update(seeds & {node, *site.chain})
    sites, inside = outermost(sites)
    sharing = Sharing(graph, analyses.facts)
    sites = [sharing.site(site) for site in sorted(sites, key=lambda site: graph.position[site.node])]
    return MatchResult(tuple(sites), tuple(reasons.refusals(claimed, inside)))


# --------------------------------------------------------------------------------------------------------------------


def _match(lifter: Lifter, node: fx.Node, leads: AbstractSet[fx.Node]) -> AttentionSite | None:
    """The attention whose output `node` is; None where it is some other contraction. Raises Refused."""
    out = tensor(node)
    if out is None:
        return None
    check_transforms(lifter.graph, node)
    if free_unbacked_symbols([tensor(n) for n in (node, *node.all_input_nodes)]):
        raise Refused("data-dependent-shape", "a length depends on data, so it is not known even as a symbol", node)
    if any(0 in shape(t) for n in (node, *node.all_input_nodes) if (t := tensor(n)) is not None):
        raise Refused("empty", "a dimension has size 0, so there is nothing to compute", node)
    position = lifter.position(shape(out), "o")
    try:
        expr = lifter.expand(lifter.load(node, position), draws=True)
    except CannotLift as error:
        raise Refused("unknown-operator", f"`{name_of(node)}` {error.reason}", node) from error
    whole = name_of(node) in WHOLE
    gated = as_gated(lifter, expr)
    if gated is not None:
        return _terms(lifter, node, position, gated.product, leads, gated)
    whole_product = normalised_late(lifter, expr) or joined_products(lifter, expr)
    if whole_product is not None:
        return _terms(lifter, node, position, whole_product, leads)
    if name_of(node) in ADDED:
        refuse_parts(lifter, expr, leads, node)
    if isinstance(expr, Reduce) and node in leads:
        expr = as_product(lifter, expr)
        if isinstance(expr, Reduce):
            raise no_value_product(node)
    if not isinstance(expr, Dot) and not is_contraction(node) and not whole:
        return None
    if isinstance(expr, Dot):
        return _terms(lifter, node, position, expr, frozenset() if whole else leads)
    # Queries that a function bends a little are no weights, and this is a product of scores.
    if not any(_terms(lifter, node, position, dot, leads) for dot in walk(expr) if isinstance(dot, Dot)):
        return None
    raise Refused("value-product", "the product with the values is combined with something else in one operator", node)


def _terms(
    lifter: Lifter,
    node: fx.Node,
    position: Indices,
    product: Dot,
    leads: AbstractSet[fx.Node],
    gated: Gated | None = None,
) -> AttentionSite | None:
    """The attention with these values, which may be a sum of several. Raises Refused."""
    if product.extent == 1:
        refuse_single_key(lifter, node, leads)
    problems: list[Refused] = []
    for probs_side, value_side in ((product.lhs, product.rhs), (product.rhs, product.lhs)):
        columns = Columns(lifter, product.axis, product.extent, product.dtype, leads)
        try:
            terms = find_weights(columns, probs_side)
            if gated is not None and terms:
                terms = with_gate(lifter, terms, gated, product.axis)
        except Refused as error:
            problems.append(error)
            continue
        except OtherAxis as error:
            problems.append(wrong_axis(lifter, error.softmax, product.axis, value_side, leads, node))
            continue
        if terms:
            return _added(lifter, [_site(lifter, node, position, product, value_side, w, leads) for w in terms])
    if problems:
        raise problems[0]
    if gated is not None:
        return None
    _check_not_inside(lifter, node, product, leads)
    for weights_side, value_side in ((product.lhs, product.rhs), (product.rhs, product.lhs)):
        try:
            site = _unnormalised(lifter, node, position, product, weights_side, value_side, leads)
        except Refused as error:
            problems.append(error)
            continue
        if site is not None:
            return site
    if problems:
        raise problems[0]
    return None


def _check_not_inside(lifter: Lifter, node: fx.Node, product: Dot, leads: AbstractSet[fx.Node]) -> None:
    """Refuse a product of three and more, as of probabilities, values and an output projection, in one operator."""
    for inner in (side for side in (product.lhs, product.rhs) if isinstance(side, Dot)):
        columns = Columns(lifter, inner.axis, inner.extent, inner.dtype, leads)
        if any(find_weights(columns, side) for side in (inner.lhs, inner.rhs)):
            told = f"`{name_of(node)}` multiplies the attention's output with something more, and only gives the result"
            raise Refused("value-product", told, node)
        _check_not_inside(lifter, node, inner, leads)


def _added(lifter: Lifter, sites: list[AttentionSite]) -> AttentionSite:
    """Attentions whose outputs are added, each kept as wide as it was computed until then."""
    if len(sites) == 1:
        return sites[0]
    chain = tuple(sorted({n for site in sites for n in site.chain}, key=lifter.graph.position.__getitem__))
    for site in sites:
        _check_apart(lifter, site, chain)
    check_draws(sites)
    wide = [replace(s, spec=replace(s.spec, out_dtype=s.spec.compute_dtype), chain=chain) for s in sites]
    return replace(wide[0], plus=tuple(wide[1:]))


def _site(
    lifter: Lifter,
    node: fx.Node,
    position: Indices,
    product: Dot,
    value_side: Expr,
    weights: Weights,
    leads: AbstractSet[fx.Node],
) -> AttentionSite:
    there = free_symbols(weights.arg) | free_symbols(value_side)
    if any(product.axis in free_symbols(f) and not free_symbols(f) <= there for f in weights.factors):
        raise no_value_product(node)
    score = find_score(lifter, weights.arg, product.axis, leads, node, _rows(position, value_side))
    if weights.subtracted == "nothing" and not weights.sinks:
        score = replace(score, program=with_infinite_fills(score.program, score.opener))
    end = ending(lifter, weights, score, product.axis, leads)
    return _assembled(lifter, node, position, product, value_side, score, end)


def _rows(position: Indices, value_side: Expr) -> Sequence[sympy.Symbol]:
    """The output's symbols that the values lack."""
    return [o for o in position if isinstance(o, sympy.Symbol) and o not in free_symbols(value_side)]


def _assembled(
    lifter: Lifter, node: fx.Node, position: Indices, product: Dot, value_side: Expr, score: Score, end: Ending
) -> AttentionSite:
    chain = private_chain(lifter.graph, lifter.region, score.nodes, node) if node not in score.nodes else ()
    site = assemble(lifter, node, position, product, value_side, end, score, chain)
    _check_apart(lifter, site, chain)
    return site


def _check_apart(lifter: Lifter, site: AttentionSite, chain: tuple[fx.Node, ...]) -> None:
    """Refuse where the kernel would read what it takes the place of."""
    for used in site.nodes_read:
        if used in chain:
            raise read_as_whole(lifter, used, chain)


def _unnormalised(
    lifter: Lifter,
    node: fx.Node,
    position: Indices,
    product: Dot,
    weights_side: Expr,
    value_side: Expr,
    leads: AbstractSet[fx.Node],
) -> AttentionSite | None:
    """Weights that are a function of the product alone, as in sigmoid attention (https://arxiv.org/abs/2409.04431).

    None for products of activations that are no such function, or a linear one, and for layers with weights.
    """
    weights, draw = before_dropout(lifter, weights_side)
    try:
        found = find_products(lifter, weights, product.axis, leads, node, _rows(position, value_side))
    except Refused:
        return None
    reads = [read for expr in (*found.dots, value_side) for read in loads(expr)]
    wide = any(dot.extent.is_Integer and dot.extent > _WIDEST for dot in found.dots)
    if wide or any(read.tensor in lifter.graph.weights for read in reads):
        return None
    if is_linear(found.program):
        return None
    try:
        scores = as_scores(found)
    except Refused as error:
        if error.code == "square-intermediate" and not _is_gated_layer(found):
            raise
        return None
    if any(node in score.nodes for score in scores):
        return None
    end = Ending("none", dropout=draw)
    sites = [_assembled(lifter, node, position, product, value_side, score, end) for score in scores]
    value_dim = sites[0].value_dim
    return None if value_dim.is_Integer and value_dim > _WIDEST else _added(lifter, sites)


def _is_gated_layer(found: Products) -> bool:
    """Whether all products have the same queries and keys that no batch axis tells apart: weights given as tensors."""
    first = found.dots[0]
    rows = (substitute(dot.lhs, {dot.axis: first.axis}) for dot in found.dots)
    keys = (free_symbols(dot.rhs) - {dot.axis, found.j} for dot in found.dots)
    return all(row == first.lhs for row in rows) and not any(keys)


# Beyond this no tile holds a row, and two matrix products are the faster program.
_WIDEST = 512
