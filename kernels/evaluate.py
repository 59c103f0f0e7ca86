"""Evaluate a score program with torch tensors over one tile of positions.

A tile is a box of positions: dimension a of every value belongs to the a-th symbol of the tile. A value keeps size 1 on
every dimension it does not depend on, so a causal mask costs one query-by-key plane whatever the number of heads.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.distances import DISTANCE, by_distance
from flashfuse.kernels.expr import Const, Element, Expr, Gather, Index, Load, Pointwise, Product
from flashfuse.kernels.operators import OPS
from flashfuse.kernels.spec import KV_IDX, KV_LEN, Q_IDX, Q_LEN, AttentionSpec, batch_symbol, size_symbol

Integer = int | torch.Tensor


@dataclass(frozen=True, eq=False)
class Tile:
    """Where a score program is evaluated.

    axes: for each dimension of the result its position symbol and the positions on it.
    sizes: the value of every size symbol (`q_len`, `kv_len`, `size0`, ..).
    products: `Product(s)` over the tile, in `dtype`.
    captured: the captured tensors, whole, of any rank, strides and element type.
    dtype: element type of all floating-point arithmetic, float32 or float64.
    stored: `Element` over the tile, in `dtype`; None for programs without one.
    """

    axes: tuple[tuple[sympy.Symbol, range], ...]
    sizes: Mapping[sympy.Symbol, int]
    products: Sequence[torch.Tensor]
    captured: Sequence[torch.Tensor]
    dtype: torch.dtype
    device: torch.device
    stored: torch.Tensor | None = None

    @functools.cached_property
    def symbols(self) -> Mapping[sympy.Symbol, Integer]:
        """The value of every symbol: an int, or the positions along the symbol's own dimension."""
        rank = len(self.axes)
        values: dict[sympy.Symbol, Integer] = dict(self.sizes)
        for axis, (symbol, positions) in enumerate(self.axes):
            shape = [1] * rank
            shape[axis] = len(positions)
            values[symbol] = torch.arange(positions.start, positions.stop, device=self.device).view(shape)
        return values


def position_symbols(spec: AttentionSpec) -> tuple[sympy.Symbol, ...]:
    """The symbols of the axes [n.., q, kv] of the spec's scores."""
    return (*(batch_symbol(axis) for axis in range(spec.batch_axes)), Q_IDX, KV_IDX)


def size_values(spec: AttentionSpec, q_len: int, kv_len: int, sizes: Sequence[int]) -> Mapping[sympy.Symbol, int]:
    """The value of every size symbol, from the `sizes` of an operator call."""
    named = {size_symbol(slot): size for slot, size in enumerate(sizes[spec.batch_axes :])}
    return {Q_LEN: q_len, KV_LEN: kv_len, **named}


def evaluate(expr: Expr, tile: Tile) -> torch.Tensor:
    """The value of `expr` over `tile`, broadcastable to the tile's shape.

    The result may be a view of a captured tensor or of a product. Raises TypeError for a node no score program holds.
    """
    return _value(expr, tile, {})


# Not local functions that call each other: those are a cycle, and keep a tile's tensors until a garbage collection.
def _value(expr: Expr, tile: Tile, done: dict[Expr, torch.Tensor]) -> torch.Tensor:
    """The value, computed at its first use; `done` keeps it."""
    if expr not in done:
        done[expr] = _computed(expr, tile, done)
    return done[expr]


def _computed(expr: Expr, tile: Tile, done: dict[Expr, torch.Tensor]) -> torch.Tensor:
    match expr:
        case Product(slot=slot):
            return tile.products[slot]
        case Element():
            assert tile.stored is not None
            return tile.stored
        case Const(value=number):
            dtype = torch.bool if isinstance(number, bool) else tile.dtype
            return torch.full((), number, dtype=dtype, device=tile.device)
        case Index(value=number):
            result = evaluate_index(number, tile.symbols)
            return result if isinstance(result, torch.Tensor) else torch.full((), result, device=tile.device)
        case Load():
            return _widen(_load(expr, tile), tile.dtype)
        case Gather(tensor=int() as slot, at=at):
            return _widen(_gathered(tile.captured[slot], [_value(a, tile, done) for a in at]), tile.dtype)
        case Pointwise(op="to_float", args=(arg,)):
            return _value(arg, tile, done).to(tile.dtype)
        case Pointwise(op=op, args=args):
            values = [_value(a, tile, done) for a in args]
            if OPS[op].result == "float":
                values = [v.to(tile.dtype) for v in values]
            return OPS[op].torch(*values)
    raise TypeError(f"a score program holds no {type(expr).__name__}")


def _widen(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Floats in the arithmetic's own type, integers where sums of positions cannot overflow, booleans as they are."""
    if x.dtype == torch.bool:
        return x
    return x.to(dtype if x.dtype.is_floating_point else torch.int64)


# --------------------------------------------------------------------------------------------------------------------
# Index expressions


def evaluate_index(index: Any, symbols: Mapping[sympy.Symbol, Integer]) -> Integer:
    """A sympy index expression over ints and integer tensors. Raises TypeError for a function it does not know."""
    if isinstance(index, sympy.Symbol):
        return symbols[index]
    if isinstance(index, int) or index.is_Integer:
        return int(index)
    values = [evaluate_index(a, symbols) for a in index.args]
    for kind, combine in _FUNCTIONS.items():
        if isinstance(index, kind):
            return functools.reduce(combine, values)
    raise TypeError(f"cannot evaluate the index expression {index} ({type(index).__name__})")


def _minimum(a: Integer, b: Integer) -> Integer:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.minimum(a, b)
    if isinstance(a, torch.Tensor):
        return a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, torch.Tensor) else min(a, b)


_FUNCTIONS: Mapping[tuple[type, ...], Any] = {
    (sympy.Add,): lambda a, b: a + b,
    (sympy.Mul,): lambda a, b: a * b,
    (sympy.Pow,): lambda a, b: a**b,
    (FloorDiv,): lambda a, b: a // b,
    (Mod, sympy.Mod): lambda a, b: a % b,
    (sympy.Min,): _minimum,
    (sympy.Max,): lambda a, b: -_minimum(-a, -b),
}


# --------------------------------------------------------------------------------------------------------------------
# Loads


def _load(load: Load, tile: Tile) -> torch.Tensor:
    """The loaded elements: a strided view where the indices are affine, a table's diagonals, or gathered.

    An index may leave the tensor at positions whose value a `where` discards (a concatenation is such a `where`), so
    gathered indices are clamped.
    """
    assert isinstance(load.tensor, int)
    tensor = tile.captured[load.tensor]
    view = strided(tensor, load, tile)
    if view is None and (row := diagonals(tensor, load, tile)) is not None:
        return row.squeeze(-2).unfold(-1, len(tile.axes[-1][1]), 1).flip(-2)
    return _gathered(tensor, positions(load, tile)) if view is None else view


def positions(read: Load | Gather, tile: Tile) -> list[torch.Tensor]:
    """Where the read goes in its tensor, an integer tensor for each of that tensor's dimensions."""
    if isinstance(read, Gather):
        return [evaluate(at, tile) for at in read.at]
    found = (evaluate_index(index, tile.symbols) for index in read.indices)
    return [p if isinstance(p, torch.Tensor) else torch.full((), p, device=tile.device) for p in found]


def diagonals(tensor: torch.Tensor, load: Load, tile: Tile) -> torch.Tensor | None:
    """What a table of distances holds for the tile, a view [.., 1, queries + keys - 1] by key minus query position.

    None where the load is no function of that difference, or the tile's last two axes are not [queries, keys].
    """
    *outer, (query, queries), (key, keys) = tile.axes
    read = by_distance(load) if (query, key) == (Q_IDX, KV_IDX) else None
    if read is None or not queries or not keys:
        return None
    assert isinstance(read, Load)
    distances = range(keys[0] - queries[-1], keys[-1] - queries[0] + 1)
    over = replace(tile, axes=(*outer, (query, range(1)), (DISTANCE, distances)))
    row = strided(tensor, read, over)
    return row if row is not None and row.shape[-1] == len(distances) else None


def overlaps(view: torch.Tensor) -> bool:
    """Whether two positions of the view may be the same element."""
    reach = 0
    for stride, size in sorted((t, n) for t, n in zip(view.stride(), view.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _gathered(tensor: torch.Tensor, positions: Sequence[torch.Tensor]) -> torch.Tensor:
    if tensor.numel() == 0:
        return torch.zeros((), dtype=tensor.dtype, device=tensor.device)
    return tensor[tuple(p.clamp(0, extent - 1) for p, extent in zip(positions, tensor.shape, strict=True))]


def strided(tensor: torch.Tensor, load: Load, tile: Tile) -> torch.Tensor | None:
    """The load as a view of `tensor`: None when an index is not affine or leaves the tensor, or it runs backwards."""
    sizes = tuple(tile.sizes.items())
    view = _view(load.indices, tuple(tensor.shape), tensor.stride(), tile.axes, sizes)
    if view is None:
        return None
    shape, strides, offset = view
    return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)


@functools.lru_cache(maxsize=4096)
def _view(
    indices: tuple[sympy.Expr, ...],
    extents: tuple[int, ...],
    outer: tuple[int, ...],
    axes: tuple[tuple[sympy.Symbol, range], ...],
    sizes: tuple[tuple[sympy.Symbol, int], ...],
) -> tuple[tuple[int, ...], tuple[int, ...], int] | None:
    """(shape, strides, offset) of `strided`, of a tensor of the sizes `extents` and the strides `outer`."""
    symbols = tuple(symbol for symbol, _ in axes)
    offset, strides = 0, [0] * len(symbols)
    for index, extent, stride in zip(indices, extents, outer, strict=True):
        form = affine(index, symbols)
        if form is None:
            return None
        constant, *coefficients = (int(evaluate_index(part, dict(sizes))) for part in form)
        first = last = start = constant
        for axis, (coefficient, (_, positions)) in enumerate(zip(coefficients, axes, strict=True)):
            if not positions:
                return None
            ends = coefficient * positions[0], coefficient * positions[-1]
            first, last, start = first + min(ends), last + max(ends), start + ends[0]
            strides[axis] += coefficient * stride
        if first < 0 or last >= extent:
            return None
        offset += start * stride
    if any(stride < 0 for stride in strides):
        return None
    shape = tuple(len(positions) if stride else 1 for stride, (_, positions) in zip(strides, axes, strict=True))
    return shape, tuple(strides), offset


@functools.lru_cache(maxsize=4096)
def affine(index: sympy.Expr, symbols: tuple[sympy.Symbol, ...]) -> tuple[sympy.Expr, ...] | None:
    """Constant and coefficient of each symbol, all over sizes, when `index` is affine in `symbols`."""
    try:
        poly = sympy.Poly(index, *symbols)
    except sympy.PolynomialError:
        return None
    if poly.total_degree() > 1:
        return None
    return (poly.coeff_monomial(1), *(poly.coeff_monomial(symbol) for symbol in symbols))
