"""The attention operator in plain PyTorch with memory linear in the sequence: online softmax over tiles of keys.

This is what runs where there is no GPU. Batch axes over which k and v are shared (the query group of grouped-query
attention) are folded into the rows of the matrix products, so shared keys are neither copied nor read twice.
Online softmax: Milakov and Gimelshein, https://arxiv.org/abs/1805.02867; the tiling: Rabe and Staats,
https://arxiv.org/abs/2112.05682.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch

from flashfuse.kernels.evaluate import Tile, evaluate, position_symbols, size_values
from flashfuse.kernels.output import empty_output
from flashfuse.kernels.spec import AttentionSpec

# Queries and keys of a tile, and the most elements of one buffer (4 MiB in float32), so that a few of them stay in cache.
BLOCK_Q = 256
BLOCK_KV = 512
WORKSPACE = 1 << 20

Box = tuple[range, ...]


def attention_tiled(
    spec: AttentionSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captured: Sequence[torch.Tensor],
    sizes: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` [N.., Tq, Dv] and `lse` [N.., Tq] of q [.., Tq, D], k [.., Tkv, D] and v [.., Tkv, Dv], on any device."""
    out, lse = empty_output(spec, q, v, sizes)
    if k.shape[-2] == 0:
        return out.zero_(), lse.fill_(-math.inf)
    if lse.numel() == 0:
        return out, lse
    rank = spec.batch_axes
    order = sorted(range(rank), key=lambda axis: _is_shared(k, axis) and _is_shared(v, axis))
    folded = sum(_is_shared(k, axis) and _is_shared(v, axis) for axis in range(rank))
    batch, symbols = sizes[:rank], position_symbols(spec)
    q, k, v = (x.expand(*batch, *x.shape[-2:]).permute(*order, rank, rank + 1) for x in (q, k, v))
    problem = _Problem(
        spec=spec,
        symbols=(*(symbols[axis] for axis in order), *symbols[rank:]),
        sizes=size_values(spec, q.shape[-2], k.shape[-2], sizes),
        captured=captured,
        q=q,
        # One position stands for all on a shared axis.
        k=k[(..., *(0,) * folded, slice(None), slice(None))],
        v=v[(..., *(0,) * folded, slice(None), slice(None))],
    )
    out_rows, lse_rows = out.permute(*order, rank, rank + 1), lse.permute(*order, rank)
    for box in _boxes(q.shape[:-1], max(q.shape[-1], v.shape[-1])):
        where = _slices(box)
        out_rows[where], lse_rows[where] = problem.attend(box)
    return out, lse


def _is_shared(x: torch.Tensor, axis: int) -> bool:
    return x.shape[axis] == 1 or x.stride(axis) == 0


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(positions.start, positions.stop) for positions in box)


def _boxes(rows: Sequence[int], width: int) -> itertools.product[Box]:
    """Split the rows [N.., Tq] into boxes whose tiles, and whose [keys, `width`] operands, fit the workspace."""
    budget = max(1, WORKSPACE // (BLOCK_KV * max(width, min(rows[-1], BLOCK_Q))))
    blocks = [min(rows[-1], BLOCK_Q)]
    for extent in reversed(rows[:-1]):
        blocks.append(min(extent, budget))
        budget //= blocks[-1]
        budget = max(1, budget)
    return itertools.product(*(_split(n, block) for n, block in zip(rows, reversed(blocks), strict=True)))


def _split(extent: int, block: int) -> list[range]:
    return [range(start, min(start + block, extent)) for start in range(0, extent, block)]


@dataclass(frozen=True, eq=False)
class _Problem:
    """One call, its batch axes ordered so that those shared by all keys and values come last, next to the queries.

    q: [outer.., shared.., Tq, D], k: [outer.., Tkv, D], v: [outer.., Tkv, Dv]; `symbols` in the order of the scores.
    """

    spec: AttentionSpec
    symbols: tuple[sympy.Symbol, ...]
    sizes: Mapping[sympy.Symbol, int]
    captured: Sequence[torch.Tensor]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def attend(self, box: Box) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [box.., Dv] and log-sum-exp [box..] of the query rows in `box`."""
        dtype = self.spec.compute_dtype
        shape = tuple(len(positions) for positions in box)
        outer = box[: self.k.dim() - 2]
        pairs = math.prod(shape[: len(outer)])
        q = self.q[_slices(box)].to(dtype).reshape(pairs, -1, self.q.shape[-1])
        k, v = self.k[_slices(outer)], self.v[_slices(outer)]
        row_max = q.new_full((*q.shape[:2], 1), -math.inf)
        row_sum = torch.zeros_like(row_max)
        acc = q.new_zeros((*q.shape[:2], v.shape[-1]))
        for keys in _split(k.shape[-2], BLOCK_KV):
            # [pairs, keys, D], [pairs, keys, Dv]
            k_tile, v_tile = (x[..., keys.start : keys.stop, :].to(dtype).reshape(pairs, len(keys), -1) for x in (k, v))
            # [pairs, rows, keys]
            product = torch.bmm(q, k_tile.mT)
            scores = self.scores(product.view(*shape, len(keys)), (*box, keys)).reshape(product.shape)
            new_max = torch.maximum(row_max, scores.amax(-1, keepdim=True))
            # A row of only -inf so far: any finite shift keeps its probabilities zero.
            shift = new_max.masked_fill(new_max == -math.inf, 0.0)
            probs = torch.sub(scores, shift).exp_()
            decay = torch.exp(row_max - shift)
            row_sum = row_sum * decay + probs.sum(-1, keepdim=True)
            acc.mul_(decay).baddbmm_(probs, v_tile)
            row_max = new_max
        out = acc / row_sum
        if self.spec.empty_row == "zero":
            out = out.masked_fill(row_max == -math.inf, 0.0)
        return out.view(*shape, -1), (row_max + row_sum.log()).view(shape)

    def scores(self, product: torch.Tensor, box: Box) -> torch.Tensor:
        """The score program over `box`, in the shape of `product`."""
        axes = tuple(zip(self.symbols, box, strict=True))
        tile = Tile(axes, self.sizes, (product,), self.captured, self.spec.compute_dtype, product.device)
        return evaluate(self.spec.score, tile).to(product.dtype).expand(product.shape)
