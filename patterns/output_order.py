"""The output of one attention: where its axes stand in the node's dimensions, and in which order they lie in memory.

The operator writes its result in any order of its batch and query axes. Choosing the order that the graph goes on with
makes the transposition and copy after most attentions a view.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from flashfuse.patterns.axes import Roles
from flashfuse.patterns.graph import name_of, tensor
from flashfuse.patterns.indexing import Indices
from flashfuse.patterns.layout import Layout

_TRANSPOSITIONS = ("transpose", "permute", "swapaxes", "movedim")
_COPIES = ("contiguous", "reshape", "flatten", "clone")


def output_order(
    node: fx.Node, position: Indices, roles: Roles, layout: Layout
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(how the operator's result is permuted to the node's dimensions, memory order of the operator's result).

    Both number the axes of the result [batch axes.., q, d]; the order has the outermost first and always ends in d.
    """
    axes = (*layout.batch, roles.i, roles.d)
    last = len(axes) - 1
    numbers = {a: n for n, a in enumerate(axes) if a is not None}
    groups = [[numbers[p] for p in layout.parts.get(o, (o,))] if isinstance(o, sympy.Symbol) else [] for o in position]
    missing = [n for n, a in enumerate(axes) if a is None]
    out_axes = (*(n for group in groups for n in group), *missing)
    order = [n for n in missing if n != last] + [n for dim in _memory_order(node) for n in groups[dim]]
    if last in missing:
        order.append(last)
    return out_axes, tuple(order) if order[-1] == last else tuple(range(len(axes)))


def _memory_order(node: fx.Node) -> list[int]:
    """Dimensions of the node's output, outermost in memory first.

    As the graph has it, except where all that is done with it is a transposition followed by a copy: then the order
    of that copy, which makes the copy disappear.
    """
    out = tensor(node)
    assert out is not None
    natural = sorted(range(out.dim()), key=lambda d: (_stride_key(out, d), d))
    if len(node.users) != 1:
        return natural
    (user,) = node.users
    copied = bool(user.users) and all(name_of(u) in _COPIES for u in user.users)
    if name_of(user) not in _TRANSPOSITIONS or not copied or tensor(user) is None:
        return natural
    return _permutation(user, out.dim()) or natural


def _stride_key(out: torch.Tensor, dim: int) -> int:
    """Larger strides first; a symbolic stride keeps the dimension's own place."""
    stride = out.stride()[dim]
    return -stride if isinstance(stride, int) and all(isinstance(s, int) for s in out.stride()) else dim


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
