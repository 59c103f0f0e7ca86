"""The nodes whose work the kernel takes over: everything between the product of queries and keys and the output.

They will not exist after the rewrite, so nothing outside may need what they compute or write.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import fx
from torch.utils import _pytree as pytree

from flashfuse.patterns.calls import after_write, is_foreign, name_of
from flashfuse.patterns.graph import Graph, storage, value
from flashfuse.patterns.normaliser import NORMALISERS
from flashfuse.patterns.refusal import Refused
from flashfuse.patterns.region import Region


def private_chain(graph: Graph, region: Region, products: Sequence[fx.Node], site: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes from the products to the site, in order. Raises Refused where something else needs one of them.

    region: is told what is looked at.
    """
    between = _between(graph, region, products, site)
    chain = tuple(sorted(between, key=graph.position.__getitem__))
    first_softmax = next((n for n in chain if name_of(n) in NORMALISERS), None)
    what = "scores"
    for node in (*chain, site):
        what = "probabilities" if node is first_softmax else what
        written = (n for n in graph.mutated[node] if n not in between)
        foreign = [n for n in written if _is_read_outside(graph, region, n, node, {*between, site})]
        if foreign:
            raise Refused(
                "mutation",
                f"`{name_of(node)}` writes the scores into `{foreign[0].name}`, which is read elsewhere",
                node,
            )
        for user in node.users if node is not site else ():
            if user in between or user is site or user not in graph.live or not _uses_values(graph, user):
                continue
            reader = _reader(user)
            where = "are returned" if reader.op == "output" else f"are used again by `{name_of(reader)}`"
            raise Refused(
                f"{what}-used",
                f"the {what} {where}, so they have to exist in memory",
                node if reader.op == "output" else user,
            )
    return chain


def _between(graph: Graph, region: Region, starts: Sequence[fx.Node], end: fx.Node) -> set[fx.Node]:
    """Nodes on a path from one of `starts` to `end`, starts included, and in-place edits of what is on it."""
    reached = dict.fromkeys(starts)
    pending = list(reached)
    for node in pending:
        fresh = [u for u in node.users if u not in reached and graph.position[u] < graph.position[end]]
        reached.update(dict.fromkeys(fresh))
        pending += fresh
    region.open(*reached)
    region.use(reached)
    wanted = {end}
    for node in sorted(reached, key=graph.position.__getitem__, reverse=True):
        if any(u in wanted for u in node.users) or any(n in reached for n in graph.mutated[node]):
            wanted.add(node)
    return wanted - {end}


def _is_read_outside(
    graph: Graph, region: Region, memory: fx.Node, writer: fx.Node, within: AbstractSet[fx.Node]
) -> bool:
    """Whether others than `within` may read what is written to a node's memory: it was given, or is read later."""
    where, views = storage(memory), [memory]
    for node in views:
        region.open(node)
        region.use((node,))
        views += [n for n in (*node.all_input_nodes, *node.users) if n not in views and storage(n) == where]
    if where is None or any(n.op in ("placeholder", "get_attr") or is_foreign(n.target) for n in views):
        return True
    readers = {user for n in views for user in n.users} & graph.live - within
    return any(graph.position[n] > graph.position[writer] and _uses_values(graph, n) for n in readers)


def _reader(user: fx.Node) -> fx.Node:
    """What reads the tensor, where `user` only says which version of it that is."""
    while user.target is after_write and user.users:
        user = next(iter(user.users))
    return user


def _uses_values(graph: Graph, user: fx.Node) -> bool:
    """Asking for a size, type or device does not need the values; writing them anywhere does."""
    if user.op == "output" or graph.mutated[user]:
        return True
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value(user)))
