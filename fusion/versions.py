"""Versions of tensors: a node for what each tensor is after a write through another view of its memory.

They are for lifting: the nodes compute nothing, and are gone from what is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from flashfuse.insert import as_module, copy_graph
from flashfuse.patterns.calls import after_write
from flashfuse.patterns.graph import Graph, raw_value, same_place, storage
from flashfuse.patterns.transforms import is_wrapped


def with_versions(graph: Graph) -> Graph:
    """A copy in which what reads a tensor after such a write reads an `after_write`; the graph where there is none."""
    writes = list(_foreign_writes(graph))
    if not writes:
        return graph
    made, copied = copy_graph(graph.module)
    place: dict[fx.Node, float] = {copied[n]: p for n, p in graph.position.items() if n in copied}
    latest = dict(copied)
    for node, writer in writes:
        before, write = latest[node], copied[writer]
        with made.inserting_after(write):
            version = made.create_node("call_function", after_write, (before, write), name=node.name)
        version.meta = {**write.meta, "example_value": raw_value(node)}
        place[version] = place[write] + 0.5
        for user in [*before.users]:
            if place.get(user, len(graph.nodes)) > place[version]:
                user.replace_input_with(before, version)
        latest[node] = version
    return Graph(as_module(graph.module, made))


def _foreign_writes(graph: Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Each tensor that is read after a write whose own value does not stand for it, with the writer, in order."""
    known: dict[int, list[fx.Node]] = {}
    for writer in graph.nodes:
        for where in {storage(n): None for n in graph.mutated[writer]}:
            for node in known.get(where, ()) if where is not None else ():
                read_later = any(graph.position[user] > graph.position[writer] for user in node.users)
                if read_later and not same_place(node, writer):
                    yield node, writer
        where = storage(writer)
        if where is not None and not is_wrapped(raw_value(writer)):
            known.setdefault(where, []).append(writer)


def without_versions(graph: fx.Graph) -> None:
    """Give what reads an `after_write` the tensor itself."""
    for node in graph.find_nodes(op="call_function", target=after_write):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
