"""Add up, for each element of a tensor, what the reads of it over a tile of positions give: sums in a fixed order.

What an element takes is a sum over the positions that read it. Those are whole axes of the tile where indices are
affine in positions or in their quotients and remainders (rows and columns of an image): a sum over axes, added to a
view. What is left are look-ups, whose positions are sorted by element.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.buckets import Buckets, BucketSums, SumBuckets, bucket_positions, buckets_of, by_distance_at
from flashfuse.kernels.evaluate import Tile, diagonals, overlaps, positions, strided
from flashfuse.kernels.expr import Expr, Gather, Index, Load, free_symbols, places, sympify, walk
from flashfuse.kernels.normal import index, rewrite

Axes = tuple[tuple[sympy.Symbol, range], ...]
Sizes = tuple[tuple[sympy.Symbol, int], ...]


def scatter_add(
    total: torch.Tensor, read: Load | Gather, values: torch.Tensor, tile: Tile, sum_buckets: SumBuckets | None = None
) -> None:
    """Add `values` to the elements of the contiguous `total` that `read` reads over the tile.

    values: of the tile's shape, or of size 1 on axes that they have been summed over, which `read` does not depend on.
    sum_buckets: adds up what is in few buckets, where that is faster than to sort look-ups.
    """
    if total.numel() == 0:
        return
    apart = _apart(total, read, tile)
    if apart.looked_up:
        row = diagonals(total, read, tile) if isinstance(read, Load) else None
        if row is not None and not overlaps(row):
            row += _summed_along_diagonals(values.sum_to_size(*row.shape[:-2], *values.shape[-2:]))
            return
        read, axes = _digits(read, tile.axes, tuple(tile.sizes.items()))
        values, tile = _unflattened(values, axes), replace(tile, axes=_flat(axes))
        apart = _apart(total, read, tile)
    buckets = buckets_of(total, read, tile, apart.looked_up) if sum_buckets is not None and apart.looked_up else None
    if sum_buckets is not None and buckets is not None:
        _add_buckets(buckets, apart, total, read, values, tile, sum_buckets)
    elif apart.looked_up:
        _add_looked_up(apart, total, read, values, tile)
    else:
        total.as_strided(*apart[:3]).add_(values.sum_to_size(apart.shape))


def look_ups(total: torch.Tensor, read: Load | Gather, tile: Tile) -> int:
    """How many positions of elements `scatter_add` makes for it, and may sort; buckets of distances take few."""
    apart = _apart(total, read, tile)
    if apart.looked_up:
        read, axes = _digits(read, tile.axes, tuple(tile.sizes.items()))
        tile = replace(tile, axes=_flat(axes))
        apart = _apart(total, read, tile)
    buckets = buckets_of(total, read, tile, apart.looked_up) if apart.looked_up else None
    if not apart.looked_up or (buckets is not None and by_distance_at(read, buckets.dims) is not None):
        return 0
    along = frozenset().union(*(free_symbols(places(read)[dim]) for dim in apart.looked_up))
    return math.prod(len(positions) for symbol, positions in tile.axes if symbol in along)


def _summed_along_diagonals(values: torch.Tensor) -> torch.Tensor:
    """[.., queries, keys] to [.., 1, queries + keys - 1], summed by key minus query position.

    Rows from the last query on, one element longer than the result, are in the result's rows shifted by one each.
    """
    rows, columns = values.shape[-2:]
    padded = torch.nn.functional.pad(values.flip(-2), (0, rows)).flatten(-2)
    return padded[..., :-rows].unflatten(-1, (rows, rows + columns - 1)).sum(-2, keepdim=True)


# --------------------------------------------------------------------------------------------------------------------
# Positions as several digits


@functools.lru_cache(maxsize=4096)
def _digits(read: Load | Gather, axes: Axes, sizes: Sizes) -> tuple[Load | Gather, tuple[Axes, ...]]:
    """The read over the digits of positions whose quotients and remainders it reads, and for each axis its digits, the
    most significant first."""
    read = _mapped(read, lambda formula: formula.xreplace(dict(sizes)))
    found: list[Axes] = []
    for symbol, along in axes:
        digits: Axes = ()
        while base := min((int(e.args[1]) for f in _formulas(read) for e in _divisions(f, symbol)), default=0):
            upper: sympy.Expr = sympy.Integer(along[0] // base)
            lower: sympy.Expr = symbol - base * upper
            whole = not along.start % base and not len(along) % base
            if whole:
                upper, lower = (sympy.Symbol(f"{symbol}_{of}", integer=True) for of in ("high", "low"))
                digits = ((lower, range(base)), *digits)
            elif along[0] // base != along[-1] // base:
                break
            read = _mapped(read, functools.partial(_divided, symbol=symbol, base=base, upper=upper, lower=lower))
            if whole:
                symbol, along = upper, range(along.start // base, along.stop // base)
        found.append(((symbol, along), *digits))
    return read, tuple(found)


def _unflattened(values: torch.Tensor, axes: Sequence[Axes]) -> torch.Tensor:
    """With an axis for each digit, of size 1 where the position's is."""
    for axis in reversed(range(len(axes))):
        if len(axes[axis]) > 1:
            sizes = [len(digit) if values.shape[axis] > 1 else 1 for _, digit in axes[axis]]
            values = values.unflatten(axis, sizes)
    return values


def _flat(axes: Sequence[Axes]) -> Axes:
    return tuple(digit for axis in axes for digit in axis)


def _formulas(read: Load | Gather) -> list[sympy.Expr]:
    found = ((e.value,) if isinstance(e, Index) else e.indices for e in walk(read) if isinstance(e, (Index, Load)))
    return [sympify(formula) for formulas in found for formula in formulas]


def _mapped(read: Load | Gather, of: Callable[[sympy.Expr], sympy.Expr]) -> Load | Gather:
    """The read with other formulas."""

    def rule(e: Expr) -> Expr | None:
        if isinstance(e, Load):
            return replace(e, indices=tuple(of(sympify(i)) for i in e.indices))
        return index(of(e.value)) if isinstance(e, Index) else None

    found = rewrite(read, rule)
    assert isinstance(found, (Load, Gather))
    return found


def _divisions(formula: sympy.Expr, symbol: sympy.Symbol) -> list[Any]:
    """The quotients and remainders of a position by numbers."""
    found = formula.atoms(FloorDiv, Mod, sympy.Mod)
    return [e for e in found if e.args[0] == symbol and e.args[1].is_Integer and e.args[1] > 1]


def _divided(formula: sympy.Expr, symbol: sympy.Symbol, base: int, upper: sympy.Expr, lower: sympy.Expr) -> sympy.Expr:
    """With base * upper + lower for a position, in its quotients and remainders by multiples of the base too."""
    known: dict[sympy.Expr, sympy.Expr] = {symbol: base * upper + lower}
    for e in _divisions(formula, symbol):
        times, rest = divmod(int(e.args[1]), base)
        if not rest and isinstance(e, FloorDiv):
            known[e] = FloorDiv(upper, sympy.Integer(times)) if times > 1 else upper
        elif not rest:
            known[e] = (base * Mod(upper, sympy.Integer(times)) if times > 1 else 0) + lower
    return formula.xreplace(known)


# --------------------------------------------------------------------------------------------------------------------
# Look-ups


class _Apart(NamedTuple):
    """A tensor with the axes of a tile that only choose among look-ups, as a view.

    shape, strides: over the axes of the tile, of size 1 on others. looked_up: the dimensions that are left.
    """

    shape: list[int]
    strides: list[int]
    offset: int
    looked_up: list[int]


def _apart(total: torch.Tensor, read: Load | Gather, tile: Tile) -> _Apart:
    shape, strides, offset = [1] * len(tile.axes), [0] * len(tile.axes), total.storage_offset()
    looked_up: list[int] = []
    for dims, load in _parts(read, tuple(symbol for symbol, _ in tile.axes)):
        of_dims = total.as_strided([total.shape[d] for d in dims], [total.stride(d) for d in dims])
        view = None if load is None else strided(of_dims, load, tile)
        if view is None or overlaps(view):
            looked_up += dims
            continue
        shape = [max(sizes) for sizes in zip(shape, view.shape, strict=True)]
        strides = [sum(steps) for steps in zip(strides, view.stride(), strict=True)]
        offset += int(view.storage_offset()) - int(total.storage_offset())
    return _Apart(shape, strides, int(offset), looked_up)


@functools.lru_cache(maxsize=4096)
def _parts(read: Load | Gather, symbols: tuple[sympy.Symbol, ...]) -> tuple[tuple[tuple[int, ...], Load | None], ...]:
    """Dimensions of a tensor that a read goes through along the same axes, and that as a read, if it is a formula."""
    parts: list[tuple[frozenset[sympy.Symbol], tuple[int, ...]]] = []
    for dim, place in enumerate(places(read)):
        along, dims = free_symbols(place) & frozenset(symbols), [dim]
        for other in [part for part in parts if part[0] & along]:
            parts.remove(other)
            along, dims = along | other[0], [*other[1], *dims]
        parts.append((along, tuple(sorted(dims))))

    def load(dims: tuple[int, ...]) -> Load | None:
        formulas = tuple(place.value for d in dims if isinstance(place := places(read)[d], Index))
        return Load(read.dtype, read.tensor, formulas) if len(formulas) == len(dims) else None

    return tuple((dims, load(dims)) for _, dims in parts)


def _add_looked_up(apart: _Apart, total: torch.Tensor, read: Load | Gather, values: torch.Tensor, tile: Tile) -> None:
    shape, strides, offset, looked_up = apart
    outer = [axis for axis, size in enumerate(shape) if size > 1]
    inner = [axis for axis, size in enumerate(shape) if size == 1]
    target = total.as_strided(
        [shape[axis] for axis in outer] + [total.shape[d] for d in looked_up],
        [strides[axis] for axis in outer] + [total.stride(d) for d in looked_up],
        offset,
    )
    # Where a `where` discards what is read, a position may leave the tensor.
    found = positions(read, tile)
    at = torch.broadcast_tensors(*(found[d].clamp(0, total.shape[d] - 1) for d in looked_up))
    wanted = [max(sizes) for sizes in zip(shape, at[0].shape, strict=True)]
    values = values.sum_to_size(wanted).permute(*outer, *inner)
    every = [None] * len(outer)
    # Deterministic on every device, unlike index_add_; the check of positions that it leaves out would wait for them.
    torch.ops.aten._index_put_impl_(
        target, every + [one.squeeze(outer) for one in at], values, accumulate=True, unsafe=True
    )


def _add_buckets(
    buckets: Buckets,
    apart: _Apart,
    total: torch.Tensor,
    read: Load | Gather,
    values: torch.Tensor,
    tile: Tile,
    sum_buckets: SumBuckets,
) -> None:
    (_, queries), (_, keys) = tile.axes[-2:]
    values = values.sum_to_size(*apart.shape[:-2], len(queries), len(keys)).reshape(-1, len(queries), len(keys))
    at, steps = bucket_positions(total, read, tile, buckets.dims)
    sizes = [total.shape[dim] for dim in buckets.dims]
    sums = sum_buckets(BucketSums(values, at, steps, math.prod(sizes), buckets.owner))
    if buckets.owner == "pairs":
        sums = sums.sum(1, keepdim=True)
    shape = [*apart.shape[:-2], sums.shape[1], *sizes]
    strides = [*apart.strides[:-2], buckets.step, *(total.stride(dim) for dim in buckets.dims)]
    total.as_strided(shape, strides, apart.offset + buckets.offset).add_(sums.view(shape))
