"""What a contraction is told by that takes something from a normaliser and is no attention."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import sympy
from torch import fx

from flashfuse.kernels.expr import Expr, Pointwise, Softmax, free_symbols, loads
from flashfuse.kernels.normal import number
from flashfuse.patterns.calls import name_of
from flashfuse.patterns.exponential import is_normalised, masked_exponential
from flashfuse.patterns.graph import Graph, is_weighted, raw_value, tensor
from flashfuse.patterns.lift import CannotLift, Lifter
from flashfuse.patterns.normaliser import NORMALISERS, place, quotients, sum_and_rest
from flashfuse.patterns.opened import open_up, opened_or_none
from flashfuse.patterns.refusal import Refused, mixed
from flashfuse.patterns.score import find_score
from flashfuse.patterns.seeds import is_contraction, is_curved
from flashfuse.patterns.shift import limited_by_number
from flashfuse.patterns.summed import adds_pairs
from flashfuse.patterns.transforms import gradient_levels, is_wrapped


def refuse_opaque(lifter: Lifter, error: CannotLift, passed: fx.Node, leads: AbstractSet[fx.Node]) -> None:
    """Refuse where a normaliser of what a product lies behind is behind the operator that cannot be lifted."""
    node = error.node or passed
    if _normaliser_behind(lifter, node, leads) is None:
        return
    name = name_of(node)
    if "dropout" in name or "dropout" in error.reason or "bernoulli" in error.reason:
        reason = f"probabilities are dropped at random in a way that has no kernel: `{name}` {error.reason}"
        raise Refused("dropout", reason, node)
    if is_contraction(node) or is_weighted(node):
        raise mixed(node, "probabilities", "before they meet the values")
    raise Refused("unknown-operator", f"`{name}` between the softmax and the values {error.reason}", node)


def refuse_normaliser(lifter: Lifter, expr: Pointwise) -> None:
    """Refuse a quotient by a sum that is no softmax that kernels have, of powers to another base for one."""
    for numerator, denominator in quotients(lifter, expr):
        try:
            limited = limited_by_number(open_up(lifter, denominator), "max")
            total, further = sum_and_rest(lifter, denominator if limited is None else limited[0])
            top = None if total is None else opened_or_none(lifter, total.arg)
        except CannotLift:
            continue
        if total is None or place(lifter, numerator, total.arg, total.axis) is None:
            continue
        if further is not None and is_normalised(lifter, total):
            told = "the probabilities are normalised again, by a sum with something relative to the first one"
            raise Refused("row-dependent", told)
        if limited is not None and _is_exponential(lifter, total.arg, total.axis):
            told = "the sum of a row's weights is kept above a number, which decides some rows and not others"
            raise Refused("row-dependent", told)
        match top:
            case Pointwise(op="mul", args=factors) if any(_is_exponential(lifter, f, total.axis) for f in factors):
                told = "exponentials are multiplied with numbers that need not be ones and zeros before they are summed"
                raise Refused("row-dependent", told)
            case Pointwise(op="pow", args=(base, x)) if _varies_by(total.axis, x, base):
                told = "no number of the code" if number(base) is None else f"{number(base):g}"
                raise Refused("base", f"the base of the softmax is {told}; kernels take bases from 1 to e")


def _is_exponential(lifter: Lifter, expr: Expr, axis: sympy.Symbol) -> bool:
    top = opened_or_none(lifter, expr)
    return top is not None and masked_exponential(lifter, top, axis) is not None


def _varies_by(axis: sympy.Symbol, exponent: Expr, base: Expr) -> bool:
    return axis in free_symbols(exponent) and axis not in free_symbols(base)


def refuse_single_key(lifter: Lifter, node: fx.Node, leads: AbstractSet[fx.Node]) -> None:
    """Refuse a product over one key where probabilities are multiplied: each is 1, and nothing is left to fuse."""
    softmax = _normaliser_behind(lifter, node, leads)
    if softmax is None:
        return
    t, dim = tensor(softmax), softmax.kwargs.get("dim", softmax.args[1] if len(softmax.args) > 1 else None)
    if t is not None and (t.shape[dim] != 1 if isinstance(dim, int) else 1 not in t.shape):
        raise Refused("extra-columns", "the softmax has several columns, and one meets a value", node)
    raise Refused("single-key", "there is one key, whose probability is 1: the output is its value", node)


def _normaliser_behind(lifter: Lifter, node: fx.Node, leads: AbstractSet[fx.Node], limit: int = 32) -> fx.Node | None:
    """A normaliser shortly behind a node that is not of other things than a product, as of decays."""
    seen, queue = {node}, [node]
    while queue and len(seen) < limit:
        current = queue.pop()
        lifter.region.open(current)
        if name_of(current) in NORMALISERS and not leads.isdisjoint(current.all_input_nodes):
            return current
        # What lies behind another product or a layer belongs to that.
        if current is not node and (is_contraction(current) or is_weighted(current)):
            continue
        fresh = [n for n in current.all_input_nodes if n not in seen and n.op not in ("placeholder", "get_attr")]
        seen.update(fresh)
        queue += fresh
    return None


def wrong_axis(
    lifter: Lifter,
    softmax: Softmax,
    contracted: sympy.Symbol,
    values: Expr,
    leads: AbstractSet[fx.Node],
    node: fx.Node,
) -> Refused:
    """Why a product over another axis than the softmax's is no attention: rows, or heads, are mixed."""
    mixes = _is_made_of_parameters(lifter, values)
    try:
        dot = find_score(lifter, softmax.arg, softmax.axis, leads, node).dot
    except Refused as error:
        if error.code != "no-product":
            return error
    else:
        # Scores that another matrix has mixed look like its product with them.
        mixes = mixes and _is_made_of_parameters(lifter, dot.lhs)
        if contracted in free_symbols(dot.lhs) and contracted in free_symbols(dot.rhs):
            return Refused("head-mixing", f"`{name_of(node)}` mixes the probabilities across heads", node)
    if mixes:
        return mixed(node, "probabilities", "before they meet the values")
    return Refused("softmax-axis", "the softmax is not over the axis that is multiplied with the values")


def _is_made_of_parameters(lifter: Lifter, expr: Expr) -> bool:
    return all(read.tensor in lifter.graph.weights for read in loads(expr))


def check_transforms(graph: Graph, node: fx.Node) -> None:
    """Refuse what a `torch.func` transform asks of the output, and the operator does not give."""
    if graph.forward_mode:
        raise Refused("transform", "a forward-mode derivative is taken here, and the operator has none", node)
    if not is_wrapped(raw_value(node)):
        return
    if gradient_levels(raw_value(node)) > 1:
        raise Refused("transform", "a gradient of a gradient is wanted, and the operator has none", node)


def additive(softmax: fx.Node, limit: int = 8) -> Refused | None:
    """The refusal where scores are what a layer makes of sums of queries and keys (https://arxiv.org/abs/1409.0473).

    Between the layer and the softmax masks and scales may stand, between it and the sum a function and dropout.
    """
    layer = next((n for n in _shortly_behind(softmax, limit) if is_weighted(n)), None)
    if layer is None or not layer.all_input_nodes:
        return None
    features, scores = tensor(layer.all_input_nodes[0]), tensor(layer)
    if features is None or scores is None or not features.dim() or features.shape[-1] == scores.shape[-1]:
        return None
    behind = _shortly_behind(layer, limit)
    if not any(map(adds_pairs, behind)) or not any(is_curved(name_of(n)) for n in behind):
        return None
    told = (
        f"`{name_of(layer)}` makes the scores of sums of queries and keys (additive attention), not of their products"
    )
    return Refused("no-product", told, layer)


def _shortly_behind(node: fx.Node, limit: int) -> list[fx.Node]:
    """So many nodes at most behind a node, the nearest first, up to layers with weights."""
    found: dict[fx.Node, None] = {}
    pending = [node]
    for at in pending:
        if at is not node and (at in found or len(found) == limit or at.op in ("placeholder", "get_attr")):
            continue
        if at is not node:
            found[at] = None
        if at is node or not is_weighted(at):
            pending += [n for n in at.all_input_nodes if tensor(n) is not None]
    return list(found)


_SCATTERED = frozenset({"scatter_add", "index_add", "scatter_reduce", "index_reduce", "segment_reduce", "bincount"})


def scattered(exponential: fx.Node, limit: int = 8) -> Refused | None:
    """The refusal where exponentials are added up in rows that data choose, as in a softmax over a graph's edges."""
    reached = [exponential]
    for node in reached:
        if name_of(node).removesuffix("_") in _SCATTERED:
            told = f"exponentials are added up by `{name_of(node)}` in rows that data choose, as over a graph's edges"
            return Refused("scattered", told, node)
        fresh = [user for user in node.users if user not in reached and not is_contraction(user)]
        reached += fresh[: limit - len(reached)]
    return None
