"""The output of one attention: where its axes stand in the node's dimensions, and in which order they lie in memory.

The operator writes its result in any order of its batch and query axes. Choosing the order that the graph goes on with
makes the transposition and copy after most attentions a view.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from flashfuse.patterns.axes import Roles
from flashfuse.patterns.calls import name_of
from flashfuse.patterns.graph import tensor
from flashfuse.patterns.indexing import Indices
from flashfuse.patterns.layout import Layout

_TRANSPOSITIONS = ("transpose", "permute", "swapaxes", "movedim")


def output_order(
    node: fx.Node, position: Indices, roles: Roles, layout: Layout
) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """(how the result is permuted to the node's dimensions, its order in memory, whether that order is free).

    The first two number the axes of the result [batch axes.., q, d]; the order has the outermost first and always ends
    in d. Where it is not free, the graph may count on the very strides that the node has.
    """
    axes = (*layout.batch, roles.i, roles.d)
    last = len(axes) - 1
    numbers = {a: n for n, a in enumerate(axes) if a is not None}
    groups = [[numbers[p] for p in layout.parts.get(o, (o,))] if isinstance(o, sympy.Symbol) else [] for o in position]
    missing = [n for n, a in enumerate(axes) if a is None]
    out_axes = (*(n for group in groups for n in group), *missing)
    layout.lifter.region.use((node, *(node.users if len(node.users) == 1 else ())))
    dims, free = _memory_order(node)
    order = [n for n in missing if n != last] + [n for dim in dims for n in groups[dim]]
    if last in missing:
        order.append(last)
    return out_axes, tuple(order) if order[-1] == last else tuple(range(len(axes))), free


def _memory_order(node: fx.Node) -> tuple[list[int], bool]:
    """(dimensions of the node's output, outermost in memory first; whether the graph leaves that order open).

    As the graph has it, except where all that is done with it is a transposition followed by a copy into contiguous
    memory: then the order of that copy, which makes the copy disappear.
    """
    out = tensor(node)
    assert out is not None
    natural = memory_order(out), False
    if len(node.users) != 1:
        return natural
    (user,) = node.users
    moved = tensor(user)
    if name_of(user) not in _TRANSPOSITIONS or moved is None or not user.users:
        return natural
    if not all(_copies(u, moved) for u in user.users):
        return natural
    dims = _permutation(user, out.dim())
    return natural if dims is None else (dims, True)


def memory_order(t: torch.Tensor) -> list[int]:
    """The tensor's dimensions, largest stride first."""
    return sorted(range(t.dim()), key=lambda d: (-_hint(t.stride()[d]), d))


def _hint(stride: int | torch.SymInt) -> int:
    return stride if isinstance(stride, int) else int(stride.node.hint or 0)


def _copies(user: fx.Node, source: torch.Tensor) -> bool:
    """Whether the user copies `source`, which is not contiguous, into contiguous memory."""
    made = tensor(user)
    if name_of(user) not in ("contiguous", "reshape", "flatten") or made is None:
        return False
    return made.untyped_storage()._cdata != source.untyped_storage()._cdata


def _permutation(user: fx.Node, rank: int) -> list[int] | None:
    """The dimensions of its input in the order of its output; None where they are not plain numbers."""
    given = user.args[1:]
    if name_of(user) == "permute" and len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = tuple(given[0])
    dims = [d for d in given if isinstance(d, int)]
    if len(dims) != len(given):
        return None
    if name_of(user) == "permute":
        return [d % rank for d in dims]
    if len(dims) != 2:
        return None
    order = list(range(rank))
    a, b = dims
    order[a], order[b] = order[b], order[a]
    return order
