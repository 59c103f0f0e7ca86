"""Matching under watch: every fact of a node that an analysis reads must be part of what it is compared by.

An analysis stands for those of like layers, so what it reads without saying so could differ there unnoticed.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any
from unittest.mock import patch

from torch import fx

from flashfuse.patterns import match
from flashfuse.patterns.graph import storage
from flashfuse.patterns.lift import Lifter
from flashfuse.patterns.match import MatchResult
from flashfuse.patterns.site import AttentionSite

# Attributes of a node, by how closely who reads them looks at it.
VALUE, CALL, USERS = {"op", "meta"}, {"target", "args", "kwargs", "all_input_nodes"}, {"users"}

Reads = Counter[tuple[fx.Node, str]]


def find_attention(module: fx.GraphModule) -> MatchResult:
    """What matching finds; fails where an analysis reads what its region does not hold."""
    analysis = match._match

    def watched(lifter: Lifter, node: fx.Node, leads: AbstractSet[fx.Node]) -> AttentionSite | None:
        with watching() as reads:
            try:
                return analysis(lifter, node, leads)
            finally:
                unsaid = _unsaid(lifter, reads)
                assert not unsaid, f"the analysis of {node} reads {unsaid} and does not say so"

    with patch.object(match, "_match", watched):
        return match.find_attention(module)


@contextlib.contextmanager
def watching() -> Iterator[Reads]:
    """How often each attribute of a node is read meanwhile."""
    reads: Reads = Counter()
    original = fx.Node.__getattribute__

    def read(node: fx.Node, name: str) -> Any:
        reads[node, name] += 1
        return original(node, name)

    with patch.object(fx.Node, "__getattribute__", read):
        yield reads


def _unsaid(lifter: Lifter, reads: Reads) -> set[tuple[fx.Node, str]]:
    """The reads of facts that a comparison of regions would not compare."""
    region = lifter.region
    users = {user for node in region.used for user in node.users}
    seen = {*region.seen, *region.opened, *users, *(n for node in region.opened for n in node.all_input_nodes)}
    writers = {writer for node in seen for writer in lifter.graph.writes.get(storage(node) or 0, ())}
    called = {*region.opened, *users, *writers}
    covered = {**dict.fromkeys(VALUE, seen | writers), **dict.fromkeys(CALL, called), "users": {*region.used}}
    return {(node, name) for node, name in reads if name in covered and node not in covered[name]}
