"""One attention call on tensors, cut into boxes: what the tiled torch implementations share.

A box is a range of positions on every axis of a result; it names the part of the rows, or of the scores, at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch

from flashfuse.kernels.evaluate import Tile, evaluate
from flashfuse.kernels.expr import Expr
from flashfuse.kernels.mask import Q_START, Q_STOP, KvRange, MaskStructure, mask_of
from flashfuse.kernels.spec import AttentionSpec

Box = tuple[range, ...]

mask_of = functools.lru_cache(maxsize=4096)(mask_of)


def slices(box: Box) -> tuple[slice, ...]:
    """The box as an index of a tensor."""
    return tuple(slice(positions.start, positions.stop) for positions in box)


def split(positions: range, block: int) -> list[range]:
    """Consecutive ranges of at most `block` positions."""
    return [positions[start : start + block] for start in range(0, len(positions), block)]


@dataclass(frozen=True, eq=False)
class Problem:
    """One call, its batch axes ordered so that those shared by all keys and values come last, next to the queries.

    q: [outer.., shared.., Tq, D], k: [outer.., Tkv, D], v: [outer.., Tkv, Dv].
    symbols: of the scores' axes, in that order. sizes: the value of every size symbol.
    """

    spec: AttentionSpec
    symbols: tuple[sympy.Symbol, ...]
    sizes: Mapping[sympy.Symbol, int]
    captured: Sequence[torch.Tensor]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @functools.cached_property
    def mask(self) -> MaskStructure:
        return mask_of(self.spec, self.spec.score)

    @functools.cached_property
    def _ranges(self) -> dict[range, KvRange]:
        return {}

    def kv_range(self, box: Box) -> KvRange:
        """The keys that the query rows in `box` visit; all of them where the bounds differ along a batch axis."""
        kv_len = self.k.shape[-2]
        lines = (*self.mask.lower, *self.mask.upper)
        if any(line.offset.has(*self.symbols) for line in lines):
            return KvRange(0, 0, 0, kv_len)
        queries = box[-1]
        if queries not in self._ranges:
            values = {**self.sizes, Q_START: queries.start, Q_STOP: queries.stop}
            self._ranges[queries] = self.mask.kv_range(values)
        return self._ranges[queries]

    def evaluate(self, expr: Expr, box: Box, product: torch.Tensor) -> torch.Tensor:
        """`expr` over a box of scores, in the shape of the box; `product` holds the box's query-key products."""
        shape = tuple(len(positions) for positions in box)
        return self.evaluate_broadcast(expr, box, product.view(shape)).to(product.dtype).expand(shape)

    def evaluate_broadcast(self, expr: Expr, box: Box, *products: torch.Tensor) -> torch.Tensor:
        """`expr` over a box of scores, with size 1 on the axes it does not depend on."""
        axes = tuple(zip(self.symbols, box, strict=True))
        return evaluate(expr, Tile(axes, self.sizes, products, self.captured, self.spec.compute_dtype, self.q.device))

    def evaluate_rows(self, expr: Expr, box: Box) -> torch.Tensor:
        """`expr`, which has no key position, over a box of rows, with size 1 on the axes it does not depend on."""
        return self.evaluate_broadcast(expr, (*box, range(1))).squeeze(-1)
