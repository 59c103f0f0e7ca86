"""Add up, for each element of a tensor, what the reads of it over a tile of positions give: sums in a fixed order.

What an element takes is a sum over the positions that read it. Those are whole axes of the tile where indices are affine
in positions, or in their quotients and remainders (rows and columns of an image), so it is a sum over axes, into a view.
What is left are look-ups, whose positions are sorted by element.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.evaluate import Tile, diagonals, overlaps, positions, strided
from flashfuse.kernels.expr import Expr, Gather, Index, Load, free_symbols, sympify
from flashfuse.kernels.normal import index

Axes = tuple[tuple[sympy.Symbol, range], ...]
Sizes = tuple[tuple[sympy.Symbol, int], ...]


def scatter_add(total: torch.Tensor, read: Load | Gather, values: torch.Tensor, tile: Tile) -> None:
    """Add `values` to the elements of the contiguous `total` that `read` reads over the tile.

    values: of the tile's shape, or of size 1 on axes that they have been summed over, which `read` does not depend on.
    """
    if total.numel() == 0:
        return
    apart = _apart(total, read, tile)
    if apart.looked_up and isinstance(read, Load):
        row = diagonals(total, read, tile)
        if row is not None and not overlaps(row):
            row += _summed_along_diagonals(values.sum_to_size(*row.shape[:-2], *values.shape[-2:]))
            return
        read, values, tile = _by_digits(read, values, tile)
        apart = _apart(total, read, tile)
    if apart.looked_up:
        _add_looked_up(apart, total, read, values, tile)
    else:
        total.as_strided(*apart[:3]).add_(values.sum_to_size(apart.shape))


def look_ups(total: torch.Tensor, read: Load | Gather, tile: Tile) -> int:
    """How many positions of elements `scatter_add` makes for it and sorts."""
    apart = _apart(total, read, tile)
    if apart.looked_up and isinstance(read, Load):
        indices, axes = _digits(read, tile.axes, tuple(tile.sizes.items()))
        read, tile = replace(read, indices=indices), replace(tile, axes=_flat(axes))
        apart = _apart(total, read, tile)
    places = _places(read)
    along = frozenset().union(*(free_symbols(places[d]) for d in apart.looked_up))
    return math.prod(len(positions) for symbol, positions in tile.axes if symbol in along) if apart.looked_up else 0


def _summed_along_diagonals(values: torch.Tensor) -> torch.Tensor:
    """[.., queries, keys] to [.., 1, queries + keys - 1], summed by key minus query position.

    Rows from the last query on, one element longer than the result, are in the result's rows shifted by one each.
    """
    rows, columns = values.shape[-2:]
    padded = torch.nn.functional.pad(values.flip(-2), (0, rows)).flatten(-2)
    return padded[..., :-rows].unflatten(-1, (rows, rows + columns - 1)).sum(-2, keepdim=True)


# --------------------------------------------------------------------------------------------------------------------
# Positions as several digits


def _by_digits(read: Load, values: torch.Tensor, tile: Tile) -> tuple[Load, torch.Tensor, Tile]:
    """The same with an axis for each digit of a position whose quotients and remainders are read."""
    indices, axes = _digits(read, tile.axes, tuple(tile.sizes.items()))
    for axis in reversed(range(len(axes))):
        if len(axes[axis]) > 1:
            sizes = [len(digit) if values.shape[axis] > 1 else 1 for _, digit in axes[axis]]
            values = values.unflatten(axis, sizes)
    return replace(read, indices=indices), values, replace(tile, axes=_flat(axes))


def _flat(axes: tuple[Axes, ...]) -> Axes:
    return tuple(digit for axis in axes for digit in axis)


@functools.lru_cache(maxsize=4096)
def _digits(read: Load, axes: Axes, sizes: Sizes) -> tuple[tuple[sympy.Expr, ...], tuple[Axes, ...]]:
    """The indices over the digits of positions, and for each axis its digits, the most significant first."""
    indices = tuple(sympify(i).xreplace(dict(sizes)) for i in read.indices)
    found: list[Axes] = []
    for symbol, along in axes:
        digits: Axes = ()
        while (base := _least_divisor(indices, symbol)) and not (along.start % base or len(along) % base):
            upper, lower = (sympy.Symbol(f"{symbol}_{part}", integer=True, nonnegative=True) for part in ("high", "low"))
            indices = tuple(i.xreplace(_quotients(i, symbol, base, upper, lower)) for i in indices)
            digits = ((lower, range(base)), *digits)
            symbol, along = upper, range(along.start // base, along.stop // base)
        found.append(((symbol, along), *digits))
    return indices, tuple(found)


def _least_divisor(indices: Sequence[sympy.Expr], symbol: sympy.Symbol) -> int | None:
    return min((int(e.args[1]) for i in indices for e in _divisions(i, symbol)), default=None)


def _divisions(formula: sympy.Expr, symbol: sympy.Symbol) -> list[Any]:
    """The quotients and remainders of a position by numbers."""
    found = formula.atoms(FloorDiv, Mod, sympy.Mod)
    return [e for e in found if e.args[0] == symbol and e.args[1].is_Integer and e.args[1] > 1]


def _quotients(
    formula: sympy.Expr, symbol: sympy.Symbol, base: int, upper: sympy.Symbol, lower: sympy.Symbol
) -> dict[sympy.Expr, sympy.Expr]:
    """What stands for a position base * upper + lower and its quotients and remainders by multiples of the base."""
    known: dict[sympy.Expr, sympy.Expr] = {symbol: base * upper + lower}
    for e in _divisions(formula, symbol):
        times, rest = divmod(int(e.args[1]), base)
        if rest:
            continue
        left = e.func(upper, sympy.Integer(times)) if times > 1 else upper if isinstance(e, FloorDiv) else 0
        known[e] = left if isinstance(e, FloorDiv) else base * left + lower
    return known


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
    return _Apart(shape, strides, offset, looked_up)


@functools.lru_cache(maxsize=4096)
def _parts(
    read: Load | Gather, symbols: tuple[sympy.Symbol, ...]
) -> tuple[tuple[tuple[int, ...], Load | None], ...]:
    """Dimensions of a tensor that a read goes through along the same axes, and the read of those, if it is a formula."""
    places = _places(read)
    parts: list[tuple[frozenset[sympy.Symbol], tuple[int, ...]]] = []
    for dim, place in enumerate(places):
        along, dims = free_symbols(place) & frozenset(symbols), (dim,)
        for other in [part for part in parts if part[0] & along]:
            parts.remove(other)
            along, dims = along | other[0], (*other[1], *dims)
        parts.append((along, tuple(sorted(dims))))

    def load(dims: tuple[int, ...]) -> Load | None:
        formulas = tuple(place.value for d in dims if isinstance(place := places[d], Index))
        return Load(read.dtype, read.tensor, formulas) if len(formulas) == len(dims) else None

    return tuple((dims, load(dims)) for _, dims in parts)


def _places(read: Load | Gather) -> Sequence[Expr]:
    return [index(sympify(i)) for i in read.indices] if isinstance(read, Load) else read.at


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
    places = [None] * len(outer) + [one.squeeze(outer) for one in at]
    # Deterministic on every device, unlike index_add_; the check of positions that it leaves out would wait for them.
    torch.ops.aten._index_put_impl_(target, places, values, accumulate=True, unsafe=True)
