"""Erasing what only the attentions used: masks, biases, expanded keys. What the user's graph never used stays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

from flashfuse.patterns.calls import functional_target, is_foreign, mutated_inputs, name_of
from flashfuse.patterns.graph import storage


class Unused:
    """What a graph did not use before it was rewritten, so that the rewrite does not account for it.

    replaced: nodes whose memory the rewrite replaces; what is written there is read, though no node says so any more.
    """

    def __init__(self, graph: fx.Graph, replaced: Iterable[fx.Node] = ()) -> None:
        self.graph = graph
        kept = [n for n in graph.nodes if n.op in ("placeholder", "get_attr") or is_foreign(n.target)]
        self.given = {storage(n) for n in (*kept, *replaced)}
        self.before = {node for node in graph.nodes if node.op != "output" and not self._is_used(node)}

    def erase_others(self) -> None:
        """Erase every node that has become unused since."""
        for node in reversed(list(self.graph.nodes)):
            if node.op not in ("placeholder", "output") and node not in self.before and not self._is_used(node):
                self.graph.erase_node(node)

    def _is_used(self, node: fx.Node) -> bool:
        """Whether anything takes the node's value, or reads what it writes."""
        return bool(node.users) or (bool(mutated_inputs(node)) and not self._writes_unread(node))

    def _writes_unread(self, node: fx.Node) -> bool:
        """Whether all that the node does is to write memory of the graph's own that nothing reads after it."""
        if functional_target(node) is None and name_of(node) not in ("setitem", "__setitem__"):
            return False
        written = {storage(n) for n in mutated_inputs(node)}
        if None in written or written & self.given:
            return False
        return not any(storage(n) in written for later in _after(node) for n in later.all_input_nodes)


def _after(node: fx.Node) -> Iterator[fx.Node]:
    while (node := node.next).op != "root":
        yield node
