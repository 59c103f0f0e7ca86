"""Opening composite nodes: the torch calls of `F.multi_head_attention_forward` in the place of the one node.

The rewrite replaces whole nodes, so an attention inside a function that Dynamo keeps whole needs nodes of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from flashfuse.history import Histories, tied
from flashfuse.insert import Inserter, as_module, copy_graph
from flashfuse.patterns.calls import mutated_inputs, name_of
from flashfuse.patterns.composite import Record, record
from flashfuse.patterns.graph import Graph, location, storage, tensor, to_sympy
from flashfuse.patterns.site import Refusal
from flashfuse.patterns.trace import CannotTrace

_NUMBERS = (int, float, complex, bool, str, type(None), type(...))
_LITERALS = (*_NUMBERS, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Opened:
    """A module with composite nodes opened: `origin` is the composite node of the old graph behind each new node."""

    module: fx.GraphModule
    origin: dict[fx.Node, fx.Node] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()


def inline(graph: Graph, nodes: Iterable[fx.Node]) -> Opened:
    """A copy of the graph's module in which each of `nodes` is the torch calls it makes; the module itself for none.

    A node whose calls cannot stand for it stays as it is, with a refusal.
    """
    nodes = tuple(nodes)
    if not nodes:
        return Opened(graph.module)
    made, copied = copy_graph(graph.module)
    origin: dict[fx.Node, fx.Node] = {}
    refusals: list[Refusal] = []
    for node in nodes:
        insert = Inserter(copied[node])
        try:
            fresh = _open(insert, node, record(graph, node), copied)
        except (CannotTrace, LookupError) as error:
            for unfinished in reversed(insert.made):
                made.erase_node(unfinished)
            reason = f"`{name_of(node)}` cannot be taken apart: {error}"
            refusals.append(Refusal(node, "opaque-function", reason, location(node)))
            continue
        origin |= dict.fromkeys(fresh, node)
    return Opened(as_module(graph.module, made), origin, tuple(refusals))


def _open(insert: Inserter, node: fx.Node, what: Record, copied: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """Insert the recorded calls of `node` and give their results to its users. Returns the nodes that are needed.

    `copied` is told which nodes stand for the results from here on: they may be inputs of the next node to open.
    """
    composite = insert.before
    known = {identity: copied[node] for identity, node in what.inputs.items()}
    needed: set[fx.Node] = set()
    for call in what.calls:
        args, kwargs = _as_nodes(call.args, known, insert), _as_nodes(call.kwargs, known, insert)
        made = insert.add(call.op, call.target, args, kwargs, call.output)
        if call.draws:
            needed.add(made)
        _learn(made, call.output, known, insert)
    if isinstance(what.result, torch.Tensor):
        copied[node] = _stand_in(known[id(what.result)], node, insert)
        composite.replace_all_uses_with(copied[node])
    for user in () if isinstance(what.result, torch.Tensor) else node.users:
        part, copied[user] = copied[user], known[id(what.result[user.args[1]])]
        part.replace_all_uses_with(copied[user])
        composite.graph.erase_node(part)
    composite.graph.erase_node(composite)
    return [fresh for fresh in reversed(insert.made) if not _erased(fresh, needed)]


def _stand_in(made: fx.Node, node: fx.Node, insert: Inserter) -> fx.Node:
    """What was made, with the inputs that autograd reaches from `node`, and in the memory that its views are in."""
    seen = tensor(node)
    assert seen is not None
    out = tied(made, seen, insert, Histories())
    if sum(storage(n) == storage(out) for n in (*insert.made, *node.all_input_nodes)) == 1:
        out.meta["example_value"] = seen
    return out


def _erased(node: fx.Node, needed: set[fx.Node]) -> bool:
    """Erase a node that computes what the user did not ask for."""
    if node.users or node in needed or mutated_inputs(node):
        return False
    node.graph.erase_node(node)
    return True


def _learn(node: fx.Node, output: Any, known: dict[int, fx.Node], insert: Inserter) -> None:
    """Which node stands for each tensor of an output; parts of a tuple get nodes of their own."""
    if isinstance(output, torch.Tensor):
        known[id(output)] = node
        return
    for i, part in enumerate(output):
        _learn(insert.part(node, i, part), part, known, insert)


def _as_nodes(argument: Any, known: dict[int, fx.Node], insert: Inserter) -> Any:
    """A recorded argument with nodes for its tensors and symbolic numbers. Raises LookupError."""
    match argument:
        case torch.Tensor():
            if id(argument) not in known:
                raise LookupError("a tensor comes from outside the graph")
            return known[id(argument)]
        case torch.SymInt():
            return insert.size(to_sympy(argument))
        case torch.SymFloat():
            return insert.scalar(to_sympy(argument))
        case list():
            return [_as_nodes(a, known, insert) for a in argument]
        case tuple():
            return tuple(_as_nodes(a, known, insert) for a in argument)
        case dict():
            return {key: _as_nodes(a, known, insert) for key, a in argument.items()}
        case slice():
            return slice(*(_as_nodes(a, known, insert) for a in (argument.start, argument.stop, argument.step)))
        case _ if isinstance(argument, _LITERALS):
            return argument
    raise LookupError(f"an argument is a {type(argument).__name__}")
