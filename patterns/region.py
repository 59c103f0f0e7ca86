"""What an analysis has looked at: the part of a graph that its result follows from.

Two analyses that start at nodes whose regions are alike come to the same result, over other nodes (`replay`). So
whoever looks at a node says so here; `tests/patterns/test_regions.py` watches every node that an analysis reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx


class Region:
    """Nodes by how closely they were looked at, in the order of first looks.

    seen: at their values. opened: at what they call, on which inputs. used: at who uses them, and how.
    first_read: for nodes whose value was read, their first reader. overwritten: nodes whose memory was written through
    another view before a reader saw it. specialised: whether a symbol was made the number that it is.
    """

    def __init__(self, position: Mapping[fx.Node, int]) -> None:
        self.position = position
        self.seen: dict[fx.Node, None] = {}
        self.opened: dict[fx.Node, None] = {}
        self.used: dict[fx.Node, None] = {}
        self.first_read: dict[fx.Node, fx.Node] = {}
        self.overwritten: set[fx.Node] = set()
        self.specialised = False

    def see(self, node: fx.Node) -> None:
        self.seen[node] = None

    def open(self, *nodes: fx.Node) -> None:
        self.opened.update(dict.fromkeys(nodes))

    def use(self, nodes: Iterable[fx.Node]) -> None:
        self.used.update(dict.fromkeys(nodes))

    def read(self, source: fx.Node, reader: fx.Node, overwritten: bool = False) -> None:
        """`reader` reads the value of `source`."""
        self.seen[source] = None
        known = self.first_read.get(source, reader)
        self.first_read[source] = min(known, reader, key=self.position.__getitem__)
        if overwritten:
            self.overwritten.add(source)

    def add(self, other: Region) -> None:
        """Take in what an earlier analysis looked at, whose result is used again."""
        self.seen.update(other.seen)
        self.opened.update(other.opened)
        self.used.update(other.used)
        for source, reader in other.first_read.items():
            self.read(source, reader)
        self.overwritten.update(other.overwritten)
        self.specialised |= other.specialised
