"""The attention operator in plain PyTorch with memory linear in the sequence: online softmax over tiles of keys.

This is what runs where there is no GPU. Batch axes over which k and v are shared (the query group of grouped-query
attention) are folded into the rows of the matrix products, so shared keys are neither copied nor read twice.
Online softmax: Milakov and Gimelshein, https://arxiv.org/abs/1805.02867; the tiling: Rabe and Staats,
https://arxiv.org/abs/2112.05682.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from flashfuse.kernels import flash_cpu
from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.dropout import keep_scale
from flashfuse.kernels.expr import Expr
from flashfuse.kernels.output import empty_output
from flashfuse.kernels.problem import Axes, Box, Problem, slices, split

# Queries and keys of a tile, and the most elements of one buffer: 1 MiB in float32, so that a few stay in cache.
BLOCK_Q = 256
BLOCK_KV = 1024
WORKSPACE = 1 << 18


def attention_tiled(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` [N.., Tq, Dv] and `lse` [N.., Tq, 2], on any device."""
    # The spec states every element type, so an autocast region around the call must not change one.
    with torch.autocast(call.device.type, enabled=False):
        return _attention(call)


def _attention(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = empty_output(call)
    if lse.numel() == 0:
        return out, lse
    operands, stored_alike = (call.k, call.v), call.spec.shares_stored
    axes = Axes.of(call.batch, lambda axis: stored_alike(axis) and all(_is_shared(x, axis) for x in operands))
    problem = axes.problem(call)
    out_rows, lse_rows = axes.rows(out), axes.rows(lse)
    if call.kv_len == 0:
        lse_rows[..., 0] = _lse_without_keys(problem, tuple(map(range, lse_rows.shape[:-1])))
        lse_rows[..., 1] = 0.0 if problem.spec.sink is None else 1.0
        return out.zero_(), lse
    program = flash_cpu.additive_program(problem)
    width = max(call.head_dim, call.value_dim)
    for box in row_boxes(problem.q.shape[:-1], width) if program is None else flash_cpu.boxes(problem, program):
        where = slices(box)
        done = None if program is None else flash_cpu.attend(problem, program, box)
        out_rows[where], lse_rows[where] = done or _attend(problem, box)
    return out, lse


def _is_shared(x: torch.Tensor, axis: int) -> bool:
    return x.shape[axis] == 1 or x.stride(axis) == 0


def row_boxes(rows: Sequence[int], width: int) -> Iterator[Box]:
    """Split the rows [N.., Tq] into boxes whose tiles, and whose [keys, `width`] operands, fit the workspace."""
    budget = max(1, WORKSPACE // (BLOCK_KV * max(width, min(rows[-1], BLOCK_Q))))
    blocks = [min(rows[-1], BLOCK_Q)]
    for extent in reversed(rows[:-1]):
        blocks.append(min(extent, budget))
        budget //= blocks[-1]
        budget = max(1, budget)
    return itertools.product(*(split(range(n), block) for n, block in zip(rows, reversed(blocks), strict=True)))


def key_tiles(keys: range) -> list[range]:
    """The tiles that a range of keys is visited in."""
    return split(keys, BLOCK_KV)


def _attend(problem: Problem, box: Box) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [box.., Dv] and log-sum-exp [box.., 2] of the query rows in `box`, by online softmax."""
    inner, shape = problem.inner, tuple(len(positions) for positions in box)
    rows = _Rows(problem, box)
    keys = problem.kv_range(box)
    rows.visit(range(keys.start, keys.full_start), inner.masked)
    rows.visit(range(keys.full_start, keys.full_end), inner.full)
    rows.visit(range(keys.full_end, keys.end), inner.masked)
    threshold = problem.fill_threshold
    if threshold is not None and bool((inner.scaled(rows.max.clone()) <= threshold).any()):
        rows.visit(range(keys.start), inner.masked)
        rows.visit(range(keys.end, problem.k.shape[-2]), inner.masked)
    out, lse = rows.result()
    return out.view(*shape, -1), lse.view(*shape, 2)


def _lse_without_keys(problem: Problem, box: Box) -> torch.Tensor:
    """The largest score, broadcastable to [box..], where there are no keys at all."""
    if problem.spec.sink is not None:
        return problem.evaluate_rows(problem.spec.sink, box)
    return problem.q.new_tensor(0.0 if problem.spec.normaliser == "none" else -math.inf)


class _Rows:
    """Running maximum of inner scores, sum [pairs, rows, 1] and weighted values [pairs, rows, Dv] of rows in a box.

    A pair is one combination of positions on the batch axes that k and v depend on; all other query rows that meet the
    same keys are the pair's rows.
    """

    def __init__(self, problem: Problem, box: Box) -> None:
        self.problem, self.box = problem, box
        outer = slices(box[: problem.k.dim() - 2])
        pairs = math.prod(len(positions) for positions in box[: len(outer)])
        self.k, self.v = problem.k[outer], problem.v[outer]
        q = problem.q[slices(box)].to(problem.spec.compute_dtype)
        self.q = q.reshape(pairs, math.prod(q.shape[:-1]) // pairs, q.shape[-1])
        self.max = self.q.new_full((*self.q.shape[:2], 1), -math.inf)
        self.sum = torch.zeros_like(self.max)
        self.acc = self.q.new_zeros((*self.q.shape[:2], self.v.shape[-1]))

    def visit(self, keys: range, score: Expr) -> None:
        """Take the keys into account, their inner scores given by `score`."""
        for tile in key_tiles(keys):
            self._visit_tile(tile, score)

    def _visit_tile(self, keys: range, score: Expr) -> None:
        # [pairs, keys, D], [pairs, keys, Dv]
        k, v = self._tile(self.k, keys, self.problem.spec.key), self._tile(self.v, keys, self.problem.spec.value)
        # [pairs, rows, keys]
        product = torch.bmm(self.q, k.mT)
        scores = self.problem.evaluate(score, (*self.box, keys), product).reshape(product.shape)
        if self.problem.spec.normaliser == "none":
            self.acc.baddbmm_(self._weights(scores, keys), v)
            return
        row_max = torch.maximum(self.max, scores.amax(-1, keepdim=True))
        # A row of only -inf so far: any finite shift keeps its probabilities zero.
        shift = row_max.masked_fill(row_max == -math.inf, 0.0)
        probs = self.problem.inner.scaled(torch.sub(scores, shift)).exp_()
        decay = self.problem.inner.scaled(self.max - shift).exp_()
        self.sum = self.sum * decay + probs.sum(-1, keepdim=True)
        self.acc.mul_(decay).baddbmm_(self._weights(probs, keys), v)
        self.max = row_max

    def _tile(self, x: torch.Tensor, keys: range, program: Expr | None) -> torch.Tensor:
        """Keys or values [pairs, keys, columns] in the arithmetic's own type."""
        box = (*self.box[: x.dim() - 2], keys)
        tile = self.problem.from_stored(x[..., keys.start : keys.stop, :], program, box)
        return tile.reshape(len(self.q), len(keys), x.shape[-1])

    def _weights(self, probs: torch.Tensor, keys: range) -> torch.Tensor:
        """What multiplies the values [pairs, rows, keys]: probabilities times the spec's factor, those dropped 0."""
        spec, box = self.problem.spec, (*self.box, keys)
        shape = tuple(len(positions) for positions in box)
        if spec.factor is not None and spec.factor.dtype != torch.bool:
            probs = (probs.view(shape) * self.problem.evaluate_broadcast(spec.factor, box)).view(probs.shape)
        if spec.dropout:
            probs = probs.view(shape).mul(self.problem.kept(box)).view(probs.shape)
        return probs

    def _of_rows(self, expr: Expr) -> torch.Tensor:
        """`expr`, which has no key position, of every row [pairs, rows, 1]."""
        shape = [len(positions) for positions in self.box]
        return self.problem.evaluate_rows(expr, self.box).expand(shape).reshape(self.sum.shape)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [pairs, rows, Dv] and log-sum-exp [pairs, rows, 2] after the last key."""
        spec = self.problem.spec
        zeros = self.sum.expand(*self.sum.shape[:-1], 2)
        out, lse = self._normalised() if spec.normaliser == "softmax" else (self.acc, zeros)
        if spec.dropout:
            out = out * keep_scale(spec.dropout)
        if spec.factor is not None and spec.factor.dtype == torch.bool:
            out = out.masked_fill(~self._of_rows(spec.factor), 0.0)
        return out, lse

    def _normalised(self) -> tuple[torch.Tensor, torch.Tensor]:
        spec = self.problem.spec
        acc, total = self.acc, self.sum
        largest = row_max = self.problem.inner.scaled(self.max.clone())
        empty = row_max == -math.inf
        if spec.sink is not None:
            if spec.empty_row == "nan":
                acc = acc.masked_fill(empty, math.nan)
            sink = self._of_rows(spec.sink).to(total.dtype)
            row_max = torch.maximum(row_max, sink)
            shift = row_max.masked_fill(row_max == -math.inf, 0.0)
            decay = torch.exp(largest - shift)
            acc, total = acc * decay, total * decay + torch.exp(sink - shift)
        out = acc / total
        if spec.empty_row == "zero":
            out = out.masked_fill(row_max == -math.inf, 0.0)
        if spec.empty_row == "nan":
            total = total.masked_fill(empty, math.nan)
        return out, torch.cat([row_max, total], -1)
