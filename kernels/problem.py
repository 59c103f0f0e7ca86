"""One attention call on tensors, cut into boxes: what the tiled torch implementations share.

A box is a range of positions on every axis of a result; it names the part of the rows, or of the scores, at hand.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import sympy
import torch

from flashfuse.kernels.bounds import Q_START, Q_STOP, KvRange
from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.dropout import kept
from flashfuse.kernels.evaluate import Tile, evaluate, position_symbols, size_values
from flashfuse.kernels.expr import Const, Expr, Pointwise
from flashfuse.kernels.mask import MASK_BLOCK, MaskStructure, mask_of
from flashfuse.kernels.spec import D_IDX, KV_IDX, AttentionSpec

Box = tuple[range, ...]


@dataclass(frozen=True)
class Axes:
    """The batch axes in an order of their own: those over which all keys and values are shared come last.

    batch: the sizes, in the operator's order. shared: how many of `order` are shared.
    """

    batch: tuple[int, ...]
    order: tuple[int, ...]
    shared: int

    @staticmethod
    def of(batch: Sequence[int], is_shared: Callable[[int], bool]) -> Axes:
        order = sorted(range(len(batch)), key=is_shared)
        return Axes(tuple(batch), tuple(order), sum(map(is_shared, order)))

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """[.., T, D] that broadcasts over the batch as a view [outer.., shared.., T, D]."""
        rank = len(self.batch)
        return x.expand(*self.batch, *x.shape[-2:]).permute(*self.order, rank, rank + 1)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """The same as [outer.., T, D]: one position stands for all on a shared axis."""
        outer = len(self.batch) - self.shared
        where: tuple[slice | int, ...] = (*(slice(None),) * outer, *(0,) * self.shared)
        return self.rows(x)[where]

    def problem(self, call: AttentionCall) -> Problem:
        """The call over these axes."""
        rank, symbols = len(self.batch), position_symbols(call.spec)
        return Problem(
            spec=call.spec,
            symbols=(*(symbols[axis] for axis in self.order), *symbols[rank:]),
            sizes=size_values(call.spec, call.q_len, call.kv_len, call.sizes),
            captured=call.captured,
            q=self.rows(call.q),
            k=self.keys(call.k),
            v=self.keys(call.v),
            kv_ranges=None if call.kv_ranges is None else self.rows(call.kv_ranges),
            seed=call.seed,
            batch_strides=tuple(math.prod(self.batch[axis + 1 :]) for axis in self.order),
        )


def slices(box: Box) -> tuple[slice, ...]:
    """The box as an index of a tensor."""
    return tuple(slice(positions.start, positions.stop) for positions in box)


def split(positions: range, block: int) -> list[range]:
    """Consecutive ranges of at most `block` positions."""
    return [positions[start : start + block] for start in range(0, len(positions), block)]


class Inner(NamedTuple):
    """score = scale * inner score, of all keys and of those between `full_start` and `full_end`.

    A large score is rounded by its product with the scale, which differences of inner scores have not gone through.
    """

    scale: float
    masked: Expr
    full: Expr

    def scaled(self, inner: torch.Tensor) -> torch.Tensor:
        """Scores, or their differences, of inner ones and in their place."""
        return inner if self.scale == 1.0 else inner.mul_(self.scale)


def _outer_factor(score: Expr) -> tuple[float, Expr]:
    """The last factor of a score, where it makes nothing infinite, and what it multiplies."""
    match score:
        case Pointwise(op="mul", args=(inner, Const(value=c)) | (Const(value=c), inner)) if 0 < c <= 1:
            return float(c), inner
    return 1.0, score


@dataclass(frozen=True, eq=False)
class Problem:
    """One call, its batch axes ordered so that those shared by all keys and values come last, next to the queries.

    q: [outer.., shared.., Tq, D], k: [outer.., Tkv, D], v: [outer.., Tkv, Dv].
    symbols: of the scores' axes, in that order. sizes: the value of every size symbol.
    kv_ranges: [outer.., shared.., ceil(Tq / MASK_BLOCK), 4], or None.
    seed: one int64, or None without dropout. batch_strides: of the axes outer.., shared.. among batch positions.
    """

    spec: AttentionSpec
    symbols: tuple[sympy.Symbol, ...]
    sizes: Mapping[sympy.Symbol, int]
    captured: Sequence[torch.Tensor]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv_ranges: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    batch_strides: tuple[int, ...] = ()

    @functools.cached_property
    def mask(self) -> MaskStructure:
        return mask_of(self.spec)

    @property
    def bounded(self) -> bool:
        """Whether a box of queries may leave out keys."""
        return self.mask.bounded or self.kv_ranges is not None

    @functools.cached_property
    def full(self) -> Expr:
        """The score of the keys between `full_start` and `full_end`."""
        return self.mask.full if self.kv_ranges is None else self.mask.unmasked

    @functools.cached_property
    def fill_threshold(self) -> float | None:
        """See `MaskStructure.fill_threshold`."""
        fewer_queries = self.q.shape[-2] <= self.k.shape[-2]
        return self.mask.fill_threshold(ranged=self.kv_ranges is not None, fewer_queries=fewer_queries)

    @functools.cached_property
    def inner(self) -> Inner:
        """The score program without its last factor; as it is without a softmax, or where the two programs differ."""
        (scale, masked), (other, full) = _outer_factor(self.spec.score), _outer_factor(self.full)
        if scale != other or self.spec.normaliser == "none":
            scale, masked, full = 1.0, self.spec.score, self.full
        return Inner(scale, masked, full)

    @functools.cached_property
    def _known(self) -> dict[range, KvRange]:
        return {}

    def kv_range(self, box: Box) -> KvRange:
        """The keys that the query rows in `box` visit; all of them where the bounds differ along a batch axis."""
        found = self._by_position(box)
        if self.kv_ranges is None:
            return found
        blocks = slice(box[-1].start // MASK_BLOCK, (box[-1].stop - 1) // MASK_BLOCK + 1)
        ranges = self.kv_ranges[*slices(box[:-1]), blocks].flatten(0, -2)
        first, _, full_end, _ = ranges.amin(0).tolist()
        _, full_start, _, last = ranges.amax(0).tolist()
        end = min(found.end, last)
        start = min(max(found.start, first), end)
        full_start = min(max(full_start, found.full_start, start), end)
        return KvRange(start, full_start, max(min(full_end, found.full_end, end), full_start), end)

    def _by_position(self, box: Box) -> KvRange:
        kv_len = self.k.shape[-2]
        if self.mask.bounds.depends_on(set(self.symbols)):
            return KvRange(0, 0, 0, kv_len)
        queries = box[-1]
        if queries not in self._known:
            values = {**self.sizes, Q_START: queries.start, Q_STOP: queries.stop}
            self._known[queries] = self.mask.bounds.kv_range(values)
        return self._known[queries]

    def evaluate(self, expr: Expr, box: Box, product: torch.Tensor) -> torch.Tensor:
        """`expr` over a box of scores, in the shape of the box; `product` holds the box's query-key products."""
        shape = tuple(len(positions) for positions in box)
        return self.evaluate_broadcast(expr, box, product.view(shape)).to(product.dtype).expand(shape)

    def evaluate_broadcast(self, expr: Expr, box: Box, *products: torch.Tensor) -> torch.Tensor:
        """`expr` over a box of scores, with size 1 on the axes it does not depend on."""
        return evaluate(expr, self.tile(box, *products))

    def tile(self, box: Box, *products: torch.Tensor) -> Tile:
        """Where programs are evaluated over a box of scores."""
        axes = tuple(zip(self.symbols, box, strict=True))
        return Tile(axes, self.sizes, products, self.captured, self.spec.compute_dtype, self.q.device)

    def from_stored(self, x: torch.Tensor, program: Expr | None, box: Box) -> torch.Tensor:
        """Keys or values over `box` [outer.., keys], from what is stored [outer.., keys, columns], as numbers."""
        x = x.to(self.spec.compute_dtype)
        if program is None:
            return x
        symbols = (*self.symbols[: len(box) - 1], KV_IDX, D_IDX)
        axes = tuple(zip(symbols, (*box, range(x.shape[-1])), strict=True))
        tile = Tile(axes, self.sizes, (), self.captured, x.dtype, x.device, x)
        return evaluate(program, tile).to(x.dtype).expand(x.shape)

    def kept(self, box: Box) -> torch.Tensor:
        """1 where dropout keeps a weight and 0 where it drops it, over a box of scores, in its shape."""
        assert self.seed is not None
        *batch, queries, keys = box
        rank = len(batch)
        positions = torch.zeros((1,) * rank, dtype=torch.int64, device=self.q.device)
        for axis, (along, stride) in enumerate(zip(batch, self.batch_strides, strict=True)):
            numbers = torch.arange(along.start, along.stop, device=self.q.device) * stride
            positions = positions + numbers.view(*(-1 if a == axis else 1 for a in range(rank)))
        return kept(self.seed, self.spec.dropout, positions, queries, keys, self.spec.compute_dtype)

    def evaluate_rows(self, expr: Expr, box: Box) -> torch.Tensor:
        """`expr`, which has no key position, over a box of rows, with size 1 on the axes it does not depend on."""
        return self.evaluate_broadcast(expr, (*box, range(1))).squeeze(-1)
