"""Reads of captured tensors, by what their gradient is summed over, and where it is added.

The gradient of a read at (n.., i) or (n.., j) alone is a sum over keys, or over queries, which the kernel that passes
over those forms; what is left is linear in the sequence and added to the tensor by torch. A read over queries and keys
has an element of its own for each pair, or pairs share elements: tables of distances, look-ups. Only an element of the
first kind has an owner that can write it without atomics; a read of distances is summed by distance first.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

import sympy
import torch

from flashfuse.kernels.derivative import Leaf, leaves
from flashfuse.kernels.distances import by_distance
from flashfuse.kernels.evaluate import Tile, affine, overlaps, position_symbols, strided
from flashfuse.kernels.expr import Expr, Gather, Load, Product, free_symbols
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
        if isinstance(read.tensor, int) and needs[read.tensor] and _is_shared(spec, read)
    ]
    return tuple(dict.fromkeys(found))


def _reads(programs: Iterable[Expr]) -> Iterable[Load | Gather]:
    return dict.fromkeys(leaf for p in programs for leaf in leaves(p) if not isinstance(leaf, Product))


def is_of_pairs(read: Leaf) -> bool:
    """Whether a read has elements of its own for pairs of a query and a key."""
    return free_symbols(read) >= PAIR


def _is_shared(spec: AttentionSpec, read: Load | Gather) -> bool:
    """Whether pairs share elements of a tensor, and not all pairs that are equally far apart."""
    return is_of_pairs(read) and by_distance(read) is None and not _has_owner(spec, read)


def _has_owner(spec: AttentionSpec, read: Load | Gather) -> bool:
    """Whether every position of the tensor is read by one pair at most, as far as the indices alone say."""
    if isinstance(read, Gather):
        return False
    forms = [affine(index, position_symbols(spec)) for index in read.indices]
    known = [form[-2:] for form in forms if form is not None]
    # Two indices that tell both positions.
    told = (sympy.expand(a * d - b * c) != 0 for (a, b), (c, d) in itertools.combinations(known, 2))
    return len(known) == len(forms) and any(told)


def owned_view(tensor: torch.Tensor, read: Load, tile: Tile) -> torch.Tensor | None:
    """`tensor` over the positions of `tile`, of size 1 on axes it does not depend on; None where elements overlap."""
    view = strided(tensor, read, tile)
    return None if view is None or overlaps(view) else view
