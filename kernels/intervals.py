"""Interval arithmetic of a predicate over a grid of tiles: where it is false throughout, true throughout, or mixed.

Everything is plain torch on tensors [N.., blocks of queries, granules of keys], of size 1 on axes that a value does not
depend on, so a compiler fuses it. A tensor that a predicate reads is reduced to its least and greatest element a tile
first. Sums and products of floats are not read: their rounding is the kernel's own affair.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sympy
import torch

from flashfuse.kernels.evaluate import evaluate_index
from flashfuse.kernels.expr import Const, Expr, Index, Load, Pointwise, free_symbols
from flashfuse.kernels.operators import OPS
from flashfuse.kernels.predicate import NEGATED
from flashfuse.kernels.solve import extremes
from flashfuse.kernels.spec import KV_IDX, KV_LEN, Q_IDX, Q_LEN

# The first and the last position of a tile.
_TILE = {
    symbol: tuple(sympy.Symbol(f"{symbol.name}_{end}", integer=True, nonnegative=True) for end in ("first", "last"))
    for symbol in (Q_IDX, KV_IDX)
}


class Interval(NamedTuple):
    """Every value of a tile lies in [low, high]. For booleans: `low` true throughout, `high` true anywhere.

    A NaN in a tile makes both NaN, of which every comparison is false.
    """

    low: torch.Tensor
    high: torch.Tensor


@dataclass(frozen=True, eq=False)
class Grid:
    """Tiles of `block_q` queries by `block_kv` keys at every batch position.

    batch: symbol and size of each batch axis. sizes: the value of every size symbol, perhaps symbolic.
    captured: the tensors that loads read, whole. found: what `interval` has found.
    """

    batch: Sequence[tuple[sympy.Symbol, int]]
    sizes: Mapping[sympy.Symbol, int]
    captured: Sequence[torch.Tensor]
    block_q: int
    block_kv: int
    device: torch.device
    found: dict[Expr, Interval | None] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return len(self.batch) + 2

    @property
    def tiles(self) -> tuple[int, int]:
        """Blocks of queries and granules of keys that cover them, one more where lengths are symbolic.

        A size that may be 1 would have a compiler compile for 1 and for more.
        """
        lengths, blocks = (self.sizes[Q_LEN], self.sizes[KV_LEN]), (self.block_q, self.block_kv)
        rows, columns = (
            (length + block - 1) // block + (0 if isinstance(length, int) else 1)
            for length, block in zip(lengths, blocks, strict=True)
        )
        return rows, columns

    def along(self, axis: int, positions: torch.Tensor) -> torch.Tensor:
        """`positions` [n] as a tensor of the grid's rank that varies along `axis`."""
        return positions.view(*(-1 if a == axis % self.rank else 1 for a in range(self.rank)))

    def positions(self, symbol: sympy.Symbol) -> torch.Tensor:
        """Every position on an axis, whole tiles of it on q and kv: behind the end the last one is repeated."""
        for axis, (name, size) in enumerate(self.batch):
            if name == symbol:
                return self.along(axis, torch.arange(size, device=self.device))
        axis, length = (-2, self.sizes[Q_LEN]) if symbol == Q_IDX else (-1, self.sizes[KV_LEN])
        block = self.block_q if symbol == Q_IDX else self.block_kv
        every = torch.arange(self.tiles[axis] * block, device=self.device)
        return self.along(axis, every.clamp(max=length - 1))

    def tile_positions(self, symbol: sympy.Symbol) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and the last position of each tile."""
        if symbol not in (Q_IDX, KV_IDX):
            positions = self.positions(symbol)
            return positions, positions
        axis, length = (-2, self.sizes[Q_LEN]) if symbol == Q_IDX else (-1, self.sizes[KV_LEN])
        block = self.block_q if symbol == Q_IDX else self.block_kv
        first = torch.arange(self.tiles[axis], device=self.device) * block
        return self.along(axis, first), self.along(axis, (first + (block - 1)).clamp(max=length - 1))


def interval(expr: Expr, grid: Grid) -> Interval | None:
    """The values of `expr` on each tile of the grid; None for a number that nothing is known of."""
    if expr not in grid.found:
        found = _interval(expr, grid)
        if found is None and expr.dtype == torch.bool:
            never = torch.zeros((1,) * grid.rank, dtype=torch.bool, device=grid.device)
            found = Interval(never, ~never)
        grid.found[expr] = found
    return grid.found[expr]


def _interval(expr: Expr, grid: Grid) -> Interval | None:
    match expr:
        case Const(value=value):
            dtype = torch.bool if isinstance(value, bool) else torch.float32
            number = torch.full((1,) * grid.rank, value, dtype=dtype, device=grid.device)
            return Interval(number, number)
        case Index(value=value):
            return _index(value, grid)
        case Load():
            return _load(expr, grid)
        case Pointwise(op=op, args=(Index(value=left), Index(value=right))) if op in NEGATED:
            # One difference is exact where positions of both sides move together.
            difference, zero = _index(sympy.expand(left - right), grid), _index(sympy.S.Zero, grid)
            return difference and zero and _RULES[op](difference, zero)
        case Pointwise(op=op, args=args):
            parts = [interval(a, grid) for a in args]
            known = [part for part in parts if part is not None]
            exact = op not in _ROUNDING or not expr.dtype.is_floating_point
            return _RULES[op](*known) if op in _RULES and exact and len(known) == len(parts) else None
    return None


def _index(value: sympy.Expr, grid: Grid) -> Interval | None:
    ends = extremes(value, _TILE)
    if ends is None:
        return None
    known: dict[sympy.Symbol, Any] = dict(grid.sizes)
    for symbol in value.free_symbols - known.keys():
        known |= dict(zip(_TILE.get(symbol, (symbol, symbol)), grid.tile_positions(symbol), strict=True))
    zero = torch.zeros((1,) * grid.rank, dtype=torch.int64, device=grid.device)
    return Interval(*(zero + evaluate_index(end, known) for end in ends))


def _load(load: Load, grid: Grid) -> Interval | None:
    if load.dtype == torch.float64:
        return None
    assert isinstance(load.tensor, int)
    tensor, moving = grid.captured[load.tensor], free_symbols(load)
    known: dict[sympy.Symbol, Any] = {s: grid.positions(s) for s in moving - grid.sizes.keys()} | dict(grid.sizes)
    zero = torch.zeros((1,) * grid.rank, dtype=torch.int64, device=grid.device)
    at = [zero + evaluate_index(index, known) for index in load.indices]
    # An index may leave the tensor where the predicate does not use the element.
    inside = tuple(i.clamp(0, extent - 1) for i, extent in zip(at, tensor.shape, strict=True))
    values = tensor[inside] if inside else tensor.to(grid.device).view(zero.shape)
    if values.dtype != torch.bool:
        values = values.to(torch.float32 if values.dtype.is_floating_point else torch.int64)
    (rows, columns), (blocks, granules) = (s in moving for s in (Q_IDX, KV_IDX)), grid.tiles
    values = values.unflatten(-1, (granules, grid.block_kv) if columns else (1, 1))
    values = values.unflatten(-3, (blocks, grid.block_q) if rows else (1, 1))
    return Interval(values.amin((-3, -1)), values.amax((-3, -1)))


# --------------------------------------------------------------------------------------------------------------------
# Rules: from the intervals of the arguments to that of the result


def _order(strict: bool, swapped: bool) -> Callable[[Interval, Interval], Interval]:
    """a < b, a <= b, and with `swapped` a > b, a >= b."""
    less, at_least = (torch.lt, torch.ge) if strict else (torch.le, torch.gt)

    def rule(a: Interval, b: Interval) -> Interval:
        a, b = (_whole(b), _whole(a)) if swapped else (_whole(a), _whole(b))
        return Interval(less(a.high, b.low), ~at_least(a.low, b.high))

    return rule


def _equal(a: Interval, b: Interval) -> Interval:
    a, b = _whole(a), _whole(b)
    same = (a.low == a.high) & (b.low == b.high) & (a.low == b.low)
    return Interval(same, ~((a.high < b.low) | (b.high < a.low)))


def _not(a: Interval) -> Interval:
    return Interval(~a.high, ~a.low)


def _monotone(op: str) -> Callable[..., Interval]:
    def rule(*args: Interval) -> Interval:
        return Interval(OPS[op].torch(*(a.low for a in args)), OPS[op].torch(*(a.high for a in args)))

    return rule


def _hull(*candidates: torch.Tensor) -> Interval:
    return Interval(functools.reduce(torch.minimum, candidates), functools.reduce(torch.maximum, candidates))


def _where(condition: Interval, yes: Interval, no: Interval) -> Interval:
    def chosen(a: torch.Tensor, b: torch.Tensor, combine: Callable[..., torch.Tensor]) -> torch.Tensor:
        mixed = torch.where(condition.high, combine(a, b), b)
        return torch.where(condition.low, a, mixed)

    return Interval(chosen(yes.low, no.low, torch.minimum), chosen(yes.high, no.high, torch.maximum))


def _negative(a: Interval) -> Interval:
    return Interval(-a.high, -a.low)


def _absolute(a: Interval) -> Interval:
    largest = torch.maximum(a.low.abs(), a.high.abs())
    return Interval(torch.maximum(torch.maximum(a.low, -a.high), torch.zeros_like(a.low)), largest)


def _whole(a: Interval) -> Interval:
    return Interval(*(x.long() if x.dtype == torch.bool else x for x in a))


_RULES: Mapping[str, Callable[..., Interval]] = {
    "and": _monotone("and"),
    "or": _monotone("or"),
    "not": _not,
    "lt": _order(strict=True, swapped=False),
    "le": _order(strict=False, swapped=False),
    "gt": _order(strict=True, swapped=True),
    "ge": _order(strict=False, swapped=True),
    "eq": _equal,
    "ne": lambda a, b: _not(_equal(a, b)),
    "where": _where,
    "min": _monotone("min"),
    "max": _monotone("max"),
    "floor": _monotone("floor"),
    "to_float": _monotone("to_float"),
    "to_float16": _monotone("to_float16"),
    "to_bfloat16": _monotone("to_bfloat16"),
    "to_float32": _monotone("to_float32"),
    "to_int": _monotone("to_int"),
    "to_bool": lambda a: _not(_equal(a, Interval(torch.zeros_like(a.low), torch.zeros_like(a.high)))),
    "neg": _negative,
    "abs": _absolute,
    "add": _monotone("add"),
    "sub": lambda a, b: Interval(a.low - b.high, a.high - b.low),
    "mul": lambda a, b: _hull(a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high),
}
# Of floats, their results are rounded, and where the kernel fuses two of them, differently.
_ROUNDING = frozenset({"add", "sub", "mul"})
