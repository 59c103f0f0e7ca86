"""Why a site is refused: raised inside matching, turned into a `Refusal` with a source line at its edge."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from flashfuse.patterns.calls import label_of, name_of
from flashfuse.patterns.distances import is_pointwise
from flashfuse.patterns.graph import is_weighted, shape, tensor
from flashfuse.patterns.lift import CannotLift, Lifter
from flashfuse.patterns.region import Region


class Refused(Exception):
    """A site that must be left alone. `code` is stable, `reason` one plain sentence, `node` where it shows."""

    def __init__(self, code: str, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.code, self.reason, self.node = code, reason, node


# Operators that need a whole row of scores at once, with the code and sentence of the refusal.
_WHOLE_ROW = {
    "topk": ("top-k", "the largest scores of each row are chosen"),
    "kthvalue": ("top-k", "the largest scores of each row are chosen"),
    "sort": ("sort", "the scores of each row are sorted"),
    "argsort": ("sort", "the scores of each row are sorted"),
    "msort": ("sort", "the scores of each row are sorted"),
    "cumsum": ("cumulative", "the scores of each row are summed up cumulatively"),
    "cumprod": ("cumulative", "the scores of each row are multiplied up cumulatively"),
    "logcumsumexp": ("cumulative", "the scores of each row are summed up cumulatively"),
    "cummax": ("cumulative", "the running maximum of each row of scores is taken"),
    "cummin": ("cumulative", "the running minimum of each row of scores is taken"),
}
# Functions of every query and key.
_PAIRWISE = frozenset({"cdist", "cosine_similarity", "pairwise_distance", "norm", "linalg_norm", "linalg_vector_norm"})
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_MAXIMA = frozenset({"amax", "max"})
# Operators that take a part of what another one made.
_PARTS = frozenset({"getitem", "__getitem__", "unsqueeze", "select", "narrow"})


def _over_rows(node: fx.Node) -> Refused | None:
    """The refusal where the node is an operator over whole rows of scores."""
    known = _WHOLE_ROW.get(name_of(node))
    return known and Refused(known[0], f"{known[1]} by `{name_of(node)}`", node)


def read_as_whole(lifter: Lifter, used: fx.Node, chain: Sequence[fx.Node]) -> Refused:
    """Why a tensor on the way from the product to the output cannot be read by the kernel, which takes their place."""
    lifter.region.open(*chain)
    t = tensor(used)
    assert t is not None
    try:
        lifter.expand(lifter.load(used, lifter.position(shape(t))))
    except CannotLift as error:
        if is_pointwise(lifter, error.node or used):
            return blocked(lifter.region, error.node or used, error.reason)
    behind = used
    while name_of(behind) in _PARTS and behind.all_input_nodes[0] in chain:
        behind = behind.all_input_nodes[0]
    told = f"the scores are needed as a whole by `{name_of(used)}`"
    if name_of(behind) in _MAXIMA:
        told += (
            ": a row's maximum is known only where the normaliser takes it out again, which it does not "
            "where a number is added to the sum of the exponentials"
        )
    return _over_rows(behind) or Refused("row-dependent", told, used)


def mixed(node: fx.Node, what: str = "scores", when: str = "before the softmax") -> Refused:
    return Refused("head-mixing", f"the {what} are mixed across heads by `{name_of(node)}` {when}", node)


def no_product(region: Region, node: fx.Node) -> Refused:
    """The refusal where a score is another function of the features of a query and a key than their product."""
    region.open(node)
    told = f"`{label_of(node)}` makes scores of queries and keys in another way than by their product"
    return Refused("no-product", told, node)


def no_value_product(node: fx.Node) -> Refused:
    return Refused("value-product", f"`{name_of(node)}` sums more than products of probabilities and values", node)


def blocked(region: Region, node: fx.Node, reason: str) -> Refused:
    """Why an operator between the product and the softmax cannot be part of a score program."""
    candidates = (node, *(m for n in node.all_input_nodes for m in (n, *n.all_input_nodes[:1])))
    region.open(*candidates)
    if name_of(node) in _CONVOLUTIONS:
        return mixed(node)
    if name_of(node) in _PAIRWISE:
        return no_product(region, node)
    known = next((found for n in candidates if (found := _over_rows(n)) is not None), None)
    return known or Refused("unknown-operator", f"`{label_of(node)}` before the softmax {reason}", node)


def mixing_layer(softmax: fx.Node, limit: int = 8) -> Refused | None:
    """The refusal where a layer takes the probabilities, through layout and casts, before they meet any values."""
    node = softmax
    for _ in range(limit):
        if len(node.users) != 1:
            return None
        (node,) = node.users
        if is_weighted(node):
            return mixed(node, "probabilities", "before they meet the values")
    return None
