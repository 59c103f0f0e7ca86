"""Look-ups in few buckets of a row, of a key, or of all pairs: which those are, and in which of them a pair is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from flashfuse.kernels.distances import DISTANCE, by_distance
from flashfuse.kernels.evaluate import Tile, overlaps, positions, strided
from flashfuse.kernels.expr import Gather, Index, Load, free_symbols, places
from flashfuse.kernels.spec import KV_IDX, Q_IDX

# From so many on, sorting the pairs takes less than asking each which bucket it is in.
MAX_BUCKETS = 512
PAIR = frozenset({Q_IDX, KV_IDX})


class BucketSums(NamedTuple):
    """What is to be added up: values [N, rows, keys], with neighbouring keys next to each other.

    at: the bucket of the first pair, and behind it those of others, `strides` apart by row and by key; buckets: how
        many, to which they are clamped.
    owner: "rows", "keys" or "pairs", whose buckets they are.
    """

    values: torch.Tensor
    at: torch.Tensor
    strides: tuple[int, int]
    buckets: int
    owner: str


# Gives the sums [N, owners, buckets], or over the owners "pairs" in several parts.
SumBuckets = Callable[[BucketSums], torch.Tensor]


class Buckets(NamedTuple):
    """Where look-ups go in a tensor.

    dims: the dimensions whose elements are the buckets. step, offset: from one owner to the next, and to the first.
    """

    owner: str
    dims: tuple[int, ...]
    step: int
    offset: int


def buckets_of(total: torch.Tensor, read: Load | Gather, tile: Tile, looked_up: Sequence[int]) -> Buckets | None:
    """None where buckets are many, or depend on more than a query and a key."""
    if tuple(symbol for symbol, _ in tile.axes[-2:]) != (Q_IDX, KV_IDX):
        return None
    along = [free_symbols(places(read)[dim]) & {symbol for symbol, _ in tile.axes} for dim in looked_up]
    if frozenset().union(*along) != PAIR:
        return None
    found = Buckets("pairs", tuple(looked_up), 0, 0)
    for owner, axis, symbol in (("rows", -2, Q_IDX), ("keys", -1, KV_IDX)):
        dims = [dim for dim, of in zip(looked_up, along, strict=True) if of == {symbol}]
        formulas = tuple(place.value for dim in dims if isinstance(place := places(read)[dim], Index))
        if not dims or len(formulas) < len(dims) or len(dims) == len(looked_up):
            continue
        of_dims = total.as_strided([total.shape[dim] for dim in dims], [total.stride(dim) for dim in dims])
        view = strided(of_dims, Load(read.dtype, read.tensor, formulas), tile)
        if view is not None and not overlaps(view):
            rest = tuple(dim for dim in looked_up if dim not in dims)
            found = Buckets(owner, rest, view.stride(axis), int(view.storage_offset() - total.storage_offset()))
            break
    return found if math.prod(total.shape[dim] for dim in found.dims) <= MAX_BUCKETS else None


def bucket_positions(
    total: torch.Tensor, read: Load | Gather, tile: Tile, dims: Sequence[int]
) -> tuple[torch.Tensor, tuple[int, int]]:
    """`BucketSums.at` and its strides. Of distances alone, as many numbers as there are distances."""
    (_, queries), (_, keys) = tile.axes[-2:]
    moved = by_distance_at(read, tuple(dims))
    if moved is not None:
        distances = range(keys[0] - queries[-1], keys[-1] - queries[0] + 1)
        tile = replace(tile, axes=((Q_IDX, range(1)), (DISTANCE, distances)))
        at = _flat(positions(moved, tile), total, dims).expand(1, len(distances))
        return at[0, len(queries) - 1 :], (-at.stride(1), at.stride(1))
    found = positions(read, tile)
    at = _flat([found[dim] for dim in dims], total, dims)
    at = at.reshape(at.shape[-2:]).expand(len(queries), len(keys))
    return at, (at.stride(0), at.stride(1))


@functools.lru_cache(maxsize=4096)
def by_distance_at(read: Load | Gather, dims: tuple[int, ...]) -> Load | Gather | None:
    """Where a read goes in some dimensions, over `DISTANCE`; None where it is no function of that."""
    return by_distance(Gather(read.dtype, read.tensor, tuple(places(read)[dim] for dim in dims)))


def _flat(found: Sequence[torch.Tensor], total: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """One number for the positions in several dimensions, each clamped to its own."""
    if len(dims) == 1:
        return found[0]
    at, step = torch.zeros((), dtype=torch.int64, device=found[0].device), 1
    for position, dim in zip(reversed(found), reversed(dims), strict=True):
        at = at + position.clamp(0, total.shape[dim] - 1) * step
        step *= total.shape[dim]
    return at
