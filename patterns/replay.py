"""Analyses done once: what one layer is found to be, every layer like it is.

An analysis starts at a node, and its result follows from what it reads of the graph, its region. Another node has the
same result, over its own nodes, if both regions can be walked in step and every fact is the same: what nodes call,
values and sizes, which inputs are one node, which memory is one and who writes it, and the order of all that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from flashfuse.patterns.facts import Facts, is_own_symbol
from flashfuse.patterns.graph import Graph, raw_value, storage
from flashfuse.patterns.lift import Lifter
from flashfuse.patterns.refusal import Refused
from flashfuse.patterns.region import Region
from flashfuse.patterns.renamed import Renaming, renamed_refusal, renamed_site
from flashfuse.patterns.site import AttentionSite

Result = AttentionSite | Refused | None
Analysis = Callable[[Lifter, fx.Node], AttentionSite | None]

# Analyses from like nodes that are compared with: layers come in few kinds.
_MOST_KINDS = 16


@dataclass(frozen=True)
class _Step:
    """A node of a region on a walk through it.

    called: whether what it calls was read, not its value alone. inputs, users: whether the walk goes on to those.
    following: where it goes on, those who write its memory last; None parts one kind from the next.
    """

    node: fx.Node
    called: bool
    inputs: bool
    users: bool
    following: tuple[fx.Node | None, ...]


@dataclass(frozen=True)
class _Done:
    """An analysis: the walk through its region, from the node it started at; what it came to.

    order: the nodes whose order was asked, in that order. same: which nodes of the walk have one memory, and one value.
    """

    walk: tuple[_Step, ...]
    order: tuple[fx.Node, ...]
    same: tuple[tuple[int, int], ...]
    result: Result


class Analyses:
    """The analyses of one graph.

    leads: the nodes behind which a product lies.
    """

    def __init__(self, graph: Graph, leads: Mapping[fx.Node, fx.Node], analysis: Analysis) -> None:
        self.graph, self.analysis = graph, analysis
        self.facts = Facts(graph, leads)
        self.lifters = {history: Lifter(graph, history) for history in (False, True)}
        self.done: dict[tuple[bool, int], list[_Done]] = {}
        self._identities: dict[fx.Node, tuple[int | None, Hashable]] = {}

    def site(self, root: fx.Node, history: bool) -> AttentionSite | None:
        """The attention whose output `root` is, None where it is none. Raises Refused."""
        alike = self.done.setdefault((history, self.facts.opened(root)), [])
        for done in alike:
            nodes = self._in_step(done, root)
            if nodes is None:
                continue
            try:
                return _given(_renamed(done.result, nodes))
            except KeyError:
                continue
        result, region = self._analysed(self.lifters[history], root)
        found = self._walked(region, root, result)
        if found is not None and len(alike) < _MOST_KINDS:
            alike.append(found)
        return _given(result)

    def _analysed(self, lifter: Lifter, root: fx.Node) -> tuple[Result, Region]:
        lifter.region, lifter.versions = Region(self.graph.position), 0
        lifter.region.open(root)
        try:
            return self.analysis(lifter, root), lifter.region
        except Refused as error:
            return error, lifter.region

    def _walked(self, region: Region, root: fx.Node, result: Result) -> _Done | None:
        """The analysis as one that others are compared with; None where its root does not lead to all of its region."""
        called = {*region.opened, *(user for node in region.used for user in node.users)}
        nodes, reached, ways = [root], {root}, []
        for node in nodes:
            inputs, users = node in region.opened, node in region.used
            following = self._following(node, inputs, users)
            called.update(self._writers(node))
            fresh = [n for n in dict.fromkeys(following) if n is not None and n not in reached]
            reached.update(fresh)
            nodes += fresh
            ways.append((inputs, users, following))
        if region.specialised or not reached >= called.union(region.seen):
            return None
        walk = tuple(_Step(node, node in called, *way) for node, way in zip(nodes, ways, strict=True))
        return _Done(walk, self._ordered(region, root, nodes), self._same(nodes), result)

    def _ordered(self, region: Region, root: fx.Node, nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        """The nodes whose order was asked: the root's and what becomes of scores; where memory is written, all."""
        written = any(map(self._writers, nodes))
        asked = {*nodes} if written else {root, *region.used, *(user for node in region.used for user in node.users)}
        return tuple(sorted(asked, key=self.graph.position.__getitem__))

    def _in_step(self, done: _Done, root: fx.Node) -> Renaming | None:
        """The node in the place of each that `done` read, if all facts are the same from `root` on."""
        facts = self.facts
        pairs: dict[fx.Node | None, fx.Node | None] = {None: None, done.walk[0].node: root}
        for step in done.walk:
            node = pairs[step.node]
            assert node is not None
            following = step.following
            if node is not step.node:
                of = facts.opened if step.called else facts.seen
                if of(node) != of(step.node):
                    return None
                following = self._following(node, step.inputs, step.users)
            if len(following) != len(step.following):
                return None
            for one, other in zip(step.following, following, strict=True):
                if pairs.setdefault(one, other) is not other:
                    return None
        if len(set(pairs.values())) != len(pairs):
            return None
        nodes = {one: other for one, other in pairs.items() if one is not None and other is not None}
        positions = [self.graph.position[nodes[one]] for one in done.order]
        ordered = all(a < b for a, b in itertools.pairwise(positions))
        return nodes if ordered and self._same(nodes.values()) == done.same else None

    def _following(self, node: fx.Node, inputs: bool, users: bool) -> tuple[fx.Node | None, ...]:
        found: list[fx.Node | None] = [*self.graph.inputs[node]] if inputs else []
        found.append(None)
        if users:
            found += sorted(node.users, key=self.graph.position.__getitem__)
        return *found, None, *self._writers(node)

    def _writers(self, node: fx.Node) -> Sequence[fx.Node]:
        """Who writes the memory behind a node."""
        where, _ = self._identity(node)
        return () if where is None else self.graph.writes.get(where, ())

    def _same(self, nodes: Iterable[fx.Node]) -> tuple[tuple[int, int], ...]:
        """For each node the first that has the same memory, and the first whose value is the same tensor or symbol."""
        memory: dict[Hashable, int] = {}
        values: dict[Hashable, int] = {}
        known = enumerate(map(self._identity, nodes))
        return tuple(
            (memory.setdefault(one, number), values.setdefault(other, number)) for number, (one, other) in known
        )

    def _identity(self, node: fx.Node) -> tuple[int | None, Hashable]:
        """Of the memory behind a node, and of the tensor or symbol that is its value."""
        if node not in self._identities:
            v = raw_value(node)
            by_value = id(v) if isinstance(v, torch.Tensor) else v.node.expr if is_own_symbol(v) else None
            self._identities[node] = storage(node), by_value
        return self._identities[node]


def _renamed(result: Result, nodes: Renaming) -> Result:
    """Raises KeyError where the result cannot be said of other nodes."""
    match result:
        case AttentionSite():
            return renamed_site(result, nodes)
        case Refused():
            return renamed_refusal(result, nodes)
    return None


def _given(result: Result) -> AttentionSite | None:
    if isinstance(result, Refused):
        raise result
    return result
