"""Reads of captured tensors, by what their gradient is summed over, and where it is added.

The gradient of a read at (n.., i) or (n.., j) alone is a sum over keys, or over queries, which the kernel that passes
over those forms; what is left is linear in the sequence and added to the tensor by torch. A read over queries and keys
has an element of its own for each pair, or pairs share elements: tables of distances, look-ups. Only an element of the
first kind has an owner that can write it without atomics.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import sympy
import torch

from flashfuse.kernels.derivative import Leaf, leaves
from flashfuse.kernels.evaluate import Tile, affine, evaluate, evaluate_index, position_symbols, strided
from flashfuse.kernels.expr import Expr, Gather, Index, Load, Product, free_symbols
from flashfuse.kernels.spec import KV_IDX, Q_IDX, AttentionSpec

PAIR = frozenset({Q_IDX, KV_IDX})


@functools.lru_cache(maxsize=1024)
def unsupported(spec: AttentionSpec, needs: tuple[bool, ...]) -> tuple[int, ...]:
    """Captured tensors whose gradient the backward kernels cannot form; empty where they can form all.

    needs: for each captured tensor, whether its gradient is wanted.
    """
    found = [
        read.tensor
        for read in _reads(spec.programs)
        if isinstance(read.tensor, int) and needs[read.tensor] and is_of_pairs(read) and not _has_owner(spec, read)
    ]
    return tuple(dict.fromkeys(found))


def _reads(programs: Iterable[Expr]) -> Iterable[Load | Gather]:
    return dict.fromkeys(leaf for p in programs for leaf in leaves(p) if not isinstance(leaf, Product))


def is_of_pairs(read: Leaf) -> bool:
    """Whether a read has elements of its own for pairs of a query and a key."""
    return free_symbols(read) >= PAIR


def _has_owner(spec: AttentionSpec, read: Load | Gather) -> bool:
    """Whether every position of the tensor is read at one position at most, as far as the indices alone say."""
    if isinstance(read, Gather):
        return False
    symbols = position_symbols(spec)
    for index in read.indices:
        form = affine(index, symbols)
        if form is None or len(index.free_symbols & PAIR) == 2 or any(c.is_negative for c in form[1:]):
            return False
    return all(sum(s in index.free_symbols for index in read.indices) == 1 for s in PAIR)


def owned_view(tensor: torch.Tensor, read: Load, tile: Tile) -> torch.Tensor | None:
    """`tensor` over the positions of `tile`, of size 1 on axes it does not depend on; None where elements overlap."""
    view = strided(tensor, read, tile)
    if view is None:
        return None
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(view.shape, view.stride(), strict=True)):
        if size > 1 and stride <= reach:
            return None
        reach += stride * (size - 1)
    return view


def add_at(grad: torch.Tensor, read: Load | Gather, values: torch.Tensor, tile: Tile) -> None:
    """Add `values`, one for each position of `tile`, to the elements of `grad` that `read` reads there."""
    if grad.numel() == 0:
        return
    view = owned_view(grad, read, tile) if isinstance(read, Load) else None
    if view is not None:
        view += values.sum_to_size(view.shape)
        return
    at = [_positions(index, tile) for index in _indices(read)]
    shape = torch.broadcast_shapes(*(p.shape for p in at), (1,) * values.dim())
    places = tuple(p.clamp(0, n - 1).expand(shape) for p, n in zip(at, grad.shape, strict=True))
    grad.index_put_(places, values.sum_to_size(shape), accumulate=True)


def _indices(read: Load | Gather) -> Sequence[sympy.Expr | Expr]:
    return read.at if isinstance(read, Gather) else read.indices


def _positions(index: sympy.Expr | Expr, tile: Tile) -> torch.Tensor:
    if isinstance(index, Expr) and not isinstance(index, Index):
        return evaluate(index, tile).to(torch.int64)
    found = evaluate_index(index.value if isinstance(index, Index) else index, tile.symbols)
    return found if isinstance(found, torch.Tensor) else torch.tensor(found, device=tile.device)
