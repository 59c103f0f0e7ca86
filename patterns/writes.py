"""What a write through a view or an assignment leaves of a tensor: the new value where it went, the old one elsewhere.

Where it went is an index map read backwards, so slices, diagonals and positions that are formulas become conditions on
positions, and a boolean mask is a condition itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from flashfuse.kernels.expr import Expr, Load, Pointwise
from flashfuse.kernels.normal import conjunction, const, pointwise, rewrite
from flashfuse.patterns.assignment import New, assigned
from flashfuse.patterns.calls import ASSIGNMENTS, after_write, name_of
from flashfuse.patterns.graph import same_place, shape, storage, tensor, wants_gradient
from flashfuse.patterns.indexing import Indices
from flashfuse.patterns.inverse import inverse
from flashfuse.patterns.lift import NODE_ROWS, CannotLift, Lifter, NodeView


def _after_write(view: NodeView, position: Indices) -> Expr:
    """where(the position was written, what was written, what the tensor held)"""
    before, writer = view.node.args
    _check_length(view.lifter, view.node)
    assert isinstance(before, fx.Node)
    assert isinstance(writer, fx.Node)
    lifter = view.lifter
    lifter.region.open(writer)
    # The tensors are read by the writer: after it their memory holds something else.
    at = NodeView(lifter, writer)
    old = at.input(before, position)
    written = lifter.graph.mutated[writer]
    if len(written) != 1:
        raise CannotLift(writer, "writes several tensors at once")
    if lifter.history and wants_gradient(before) and not wants_gradient(written[0]):
        raise CannotLift(writer, "writes a tensor behind a place where its gradient ends")
    place, inside = _beside(lifter, before, position, written[0], writer)
    rule = assigned if name_of(writer) in ASSIGNMENTS else _edited
    new, further = rule(at, written[0], place, old)
    return _only_where(conjunction([*dict.fromkeys([*inside, *further])]), new, old)


NODE_ROWS[after_write] = _after_write

# Longer chains of choices are slower to compute than to read from memory.
_MOST_WRITES = 32


def _check_length(lifter: Lifter, version: fx.Node) -> None:
    """Refuse what is written again and again."""
    for _ in range(_MOST_WRITES):
        before = version.args[0]
        assert isinstance(before, fx.Node)
        lifter.region.open(before)
        if before.target is not after_write:
            return
        version = before
    raise CannotLift(version, f"writes a tensor that is written more than {_MOST_WRITES} times")


# What leaves the first argument as it is, in the place of the second.
_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1, "and": True, "or": False}


def _only_where(condition: Expr, new: Expr, old: Expr) -> Expr:
    """where(condition, new, old), with `old` once where `new` is made of it: a loop of edits stays a chain."""
    match new:
        case Pointwise(op=op, args=(first, second)) if op in _NEUTRAL and first == old and new.dtype == old.dtype:
            neutral = const(_NEUTRAL[op], second.dtype)
            return pointwise(
                op, old, pointwise("where", condition, second, neutral, dtype=second.dtype), dtype=old.dtype
            )
        case Pointwise(op="where", args=(inner, chosen, other)) if other == old:
            return pointwise("where", pointwise("and", condition, inner), chosen, old, dtype=old.dtype)
    return pointwise("where", condition, new, old, dtype=old.dtype)


def _edited(view: NodeView, written: fx.Node, place: Indices, old: Expr) -> New:
    """The element of an operator that writes all of a tensor, which is its own value."""
    writer = view.node
    if not same_place(written, writer):
        raise CannotLift(writer, "writes its input in a way that is not known")
    new = view.lifter.expand(view.lifter.load(writer, place))

    def rule(e: Expr) -> Expr | None:
        if not isinstance(e, Load) or not isinstance(e.tensor, fx.Node) or e.indices != place:
            return None
        return old if same_place(e.tensor, written) else None

    return rewrite(new, rule), []


# --------------------------------------------------------------------------------------------------------------------
# Two tensors in one memory


def _beside(
    lifter: Lifter, seen: fx.Node, position: Indices, written: fx.Node, writer: fx.Node
) -> tuple[Indices, list[Expr]]:
    """Where the element of `seen` stands in the tensor `written`, and the conditions under which it is in it."""
    if same_place(seen, written):
        return position, []
    t = tensor(written)
    assert t is not None
    own = lifter.position(shape(t), "w")
    origins = list(_origins(lifter, Load(torch.bool, seen, position)))
    for behind in _origins(lifter, Load(torch.bool, written, own)):
        for target in origins:
            if same_place(behind.tensor, target.tensor):  # type: ignore[arg-type]
                return inverse(lifter, writer, behind.indices, target.indices, own)
    raise CannotLift(writer, "writes memory that the scores see through another tensor")


def _origins(lifter: Lifter, load: Load | None) -> Iterator[Load]:
    """An element as one of the tensors that its tensor is a view of, nearest first. Types do not matter."""
    while load is not None:
        yield load
        load = _origin(lifter, load)


def _origin(lifter: Lifter, load: Load) -> Load | None:
    node = load.tensor
    assert isinstance(node, fx.Node)
    lifter.region.open(node)
    same = [*node.args[:1]] if node.target is after_write else lifter.graph.mutated[node]
    for one in same:
        if isinstance(one, fx.Node) and same_place(one, node):
            return Load(load.dtype, one, load.indices)
    try:
        behind = lifter.look_behind(load)
    except CannotLift:
        return None
    if not isinstance(behind, Load) or not isinstance(behind.tensor, fx.Node):
        return None
    return behind if storage(behind.tensor) == storage(node) is not None else None
