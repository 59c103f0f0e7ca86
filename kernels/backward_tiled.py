"""Gradients of the attention operator in plain PyTorch, with memory linear in the sequence.

Probabilities are made again, a tile at a time, from q, k and the saved log-sum-exp. With s = score(q . k),
p = exp(s - m) / l with lse = (m, l), w = factor * p and out = sum_j w_j v_j, of each query row:

    dv_j += w_j dout,    dw_j = dout . v_j,    ds_j = p_j (factor_j dw_j - delta),    delta = dout . out
    dq += ds_j slope_j k_j,    dk_j += ds_j slope_j q,    slope = d score / d (q . k)

Every read of a captured tensor adds ds * d score / d read, dw * p * d factor / d read or -exp(sink - lse) * delta *
d sink / d read to the element it reads. Without a normaliser p is s, and ds is factor * dw.
Dropout multiplies w_j and dw_j by what it multiplied the weight by, drawn again.
Tri Dao, https://arxiv.org/abs/2307.08691, section 3.1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from flashfuse.kernels import tiled
from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.derivative import LARGEST, derivative, factored, leaves
from flashfuse.kernels.dropout import keep_scale
from flashfuse.kernels.evaluate import Tile, evaluate
from flashfuse.kernels.expr import Expr, Gather, Load, Product
from flashfuse.kernels.normal import number
from flashfuse.kernels.output import empty_gradients
from flashfuse.kernels.problem import Axes, Box, Problem, slices
from flashfuse.kernels.scatter import scatter_add
from flashfuse.kernels.tiled import key_tiles, row_boxes

# Places of the operands that have batch axes; captured tensor c is at place OPERANDS + c.
Q, K, V = range(3)
OPERANDS = 3
# A probability from here on is nearly all of its row; of one that is 1, as it is made again from large scores.
NEARLY_ALL = 0.9
# What slopes of more than this multiply may be infinite: it is summed before.
HUGE_SLOPE = 2.0**64


def attention_backward_tiled(
    call: AttentionCall, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, needs: Sequence[bool]
) -> list[torch.Tensor]:
    """Gradients of q, k, v and the floating-point captured tensors, those that `needs` flags, on any device.

    grad_out, out: [N.., Tq, Dv], lse: [N.., Tq, 2], of the call's forward.
    """
    gradients = empty_gradients(call, needs)
    axes = Axes.of(call.batch, lambda axis: call.k.shape[axis] == call.v.shape[axis] == 1)
    sums = {at: torch.zeros(_summed(axes, at, x), dtype=call.spec.compute_dtype, device=call.device)
            for at, x in enumerate(call.operands) if at in gradients}  # fmt: skip
    # The spec states every element type, so an autocast region around the call must not change one.
    with torch.autocast(call.device.type, enabled=False):
        if out.numel() and call.kv_len:
            backward = _Backward(
                problem=axes.problem(call),
                rows=tuple(map(axes.rows, (grad_out, out, lse))),
                sums={at: _arranged(axes, at, total) for at, total in sums.items()},
            )
            for box in row_boxes(backward.problem.q.shape[:-1], max(call.head_dim, call.value_dim)):
                _Rows(backward, box).visit_all()
    return [grad.copy_(sums[at].sum_to_size(grad.shape)) for at, grad in gradients.items()]


def _summed(axes: Axes, at: int, x: torch.Tensor) -> tuple[int, ...]:
    """The shape in which the gradient of the operand at a place is summed up."""
    if at >= OPERANDS:
        return tuple(x.shape)
    shared = () if at == Q else axes.order[len(axes.order) - axes.shared :]
    return (*(1 if axis in shared else size for axis, size in enumerate(axes.batch)), *x.shape[-2:])


def _arranged(axes: Axes, at: int, total: torch.Tensor) -> torch.Tensor:
    if at >= OPERANDS:
        return total
    return axes.rows(total) if at == Q else axes.keys(total)


@dataclass(frozen=True, eq=False)
class _Backward:
    """rows: grad_out, out and lse over the problem's axes. sums: by place, what is added up, over those axes too."""

    problem: Problem
    rows: tuple[torch.Tensor, ...]
    sums: Mapping[int, torch.Tensor]

    @functools.cached_property
    def captured(self) -> frozenset[int]:
        return frozenset(at - OPERANDS for at in self.sums if at >= OPERANDS)

    @functools.cached_property
    def score(self) -> _Slopes:
        return _slopes(self.problem.spec.score, self.captured, self.problem.inner.masked)

    @functools.cached_property
    def full(self) -> _Slopes:
        return _slopes(self.problem.full, self.captured, self.problem.inner.full)

    @functools.cached_property
    def factor(self) -> _Slopes | None:
        """A factor that is not a decision over whole rows."""
        factor = self.problem.spec.factor
        return None if factor is None or factor.dtype == torch.bool else _slopes(factor, self.captured)

    @functools.cached_property
    def sink(self) -> _Slopes | None:
        sink = self.problem.spec.sink
        return None if sink is None else _slopes(sink, self.captured)


@dataclass(frozen=True)
class _Slopes:
    """A program, its derivative by the query-key product, and by those of its reads whose gradient is needed.

    inner: a score's without its scale, see `problem.Inner`.
    """

    program: Expr
    inner: Expr
    product: Expr | None
    reads: tuple[tuple[Load | Gather, Expr], ...]


@functools.lru_cache(maxsize=4096)
def _slopes(program: Expr, captured: frozenset[int], inner: Expr | None = None) -> _Slopes:
    by = {leaf: derivative(program, leaf) for leaf in leaves(program) if _needed(leaf, captured)}
    products = [slope for leaf, slope in by.items() if isinstance(leaf, Product)]
    reads = tuple((leaf, slope) for leaf, slope in by.items() if not isinstance(leaf, Product))
    return _Slopes(program, inner or program, products[0] if products else None, reads)


def _needed(leaf: Product | Load | Gather, captured: frozenset[int]) -> bool:
    return isinstance(leaf, Product) or leaf.tensor in captured


class _Rows:
    """The query rows in a box: q [pairs, rows, D] and what else belongs to a row; see `tiled._Rows` for pairs."""

    def __init__(self, whole: _Backward, box: Box) -> None:
        self.whole, self.problem, self.box = whole, whole.problem, box
        self.outer = slices(box[: self.problem.k.dim() - 2])
        self.shape = tuple(len(positions) for positions in box)
        pairs = math.prod(self.shape[: len(self.outer)])
        self.lead = (pairs, math.prod(self.shape) // pairs)
        self.q, self.grad_out, self.out, lse = map(self._flat, (self.problem.q, *whole.rows))
        self.max, total = lse.split(1, -1)
        kept = self._kept()
        if kept is not None:
            # A row that was dropped is 0, whatever its probabilities would have been.
            self.grad_out = self.grad_out.masked_fill(~kept, 0.0)
            total = total.masked_fill(~kept, math.inf)
        self.delta = (self.grad_out * self.out).sum(-1, keepdim=True)
        # What dropout keeps is scaled on its way to the output, so its gradient is on its way back.
        self.kept_scale = keep_scale(self.problem.spec.dropout)
        self.grad_sum = self.grad_out if self.kept_scale == 1.0 else self.grad_out * self.kept_scale
        # exp(score - shift) * share is the probability: 0 or NaN in rows without a key.
        self.shift = self.max.masked_fill(self.max == -math.inf, 0.0)
        self.share = total.reciprocal().masked_fill(total == 0, 0.0)
        self.dq = torch.zeros_like(self.q)

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        """[N.., Tq, width] over the box as [pairs, rows, width]."""
        return x[slices(self.box)].to(self.problem.spec.compute_dtype).reshape(*self.lead, x.shape[-1])

    def _kept(self) -> torch.Tensor | None:
        """Which rows [pairs, rows, 1] a boolean factor keeps; None without one."""
        factor = self.problem.spec.factor
        if factor is None or factor.dtype != torch.bool:
            return None
        return self.problem.evaluate_rows(factor, self.box).expand(self.shape).reshape(*self.lead, 1)

    def visit_all(self) -> None:
        """Add the gradients by way of these rows to the sums."""
        whole = self.whole
        sink = None
        if whole.sink is not None:
            sink = torch.exp(self._of_rows(whole.sink.program) - self.shift) * self.share
        dsink = None if sink is None else -sink * self.delta
        tiles = self._tiles()
        for keys, score in tiles:
            dsink = self._visit_tile(keys, score, sink, dsink, alone=len(tiles) == 1)
        if whole.sink is not None and dsink is not None:
            self._add_reads(whole.sink, dsink, self.problem.tile((*self.box, range(1))))
        if Q in whole.sums:
            whole.sums[Q][slices(self.box)] = self.dq.view(*self.shape, -1)

    def _tiles(self) -> list[tuple[range, _Slopes]]:
        """The key tiles to visit, and the score program of each: one tile of few keys, masked or not."""
        score, keys, kv_len = self.whole.score, self.problem.kv_range(self.box), self.problem.k.shape[-2]
        every = range(kv_len) if self._see_every_key() else range(keys.start, keys.end)
        if 0 < len(every) <= tiled.BLOCK_KV // 2:
            return [(every, score)]
        parts = [
            (range(keys.start, keys.full_start), score),
            (range(keys.full_start, keys.full_end), self.whole.full),
            (range(keys.full_end, keys.end), score),
        ]
        if self._see_every_key():
            parts += [(range(keys.start), score), (range(keys.end, kv_len), score)]
        return [(tile, program) for part, program in parts for tile in key_tiles(part)]

    def _see_every_key(self) -> bool:
        """Whether a row has seen nothing above a fill, or has no key and spreads NaN."""
        threshold = self.problem.fill_threshold
        filled = threshold is not None and bool((self.max <= threshold).any())
        return filled or bool(self.share.isnan().any())

    def _of_rows(self, expr: Expr) -> torch.Tensor:
        """`expr`, which has no key position, of every row [pairs, rows, 1]."""
        values = self.problem.evaluate_rows(expr, self.box).to(self.q.dtype)
        return values.expand(self.shape).reshape(*self.lead, 1)

    def _visit_tile(
        self, keys: range, score: _Slopes, sink: torch.Tensor | None, dsink: torch.Tensor | None, alone: bool
    ) -> torch.Tensor | None:
        """Add what one tile of keys gives, and give the sink's gradient.

        sink, dsink: the sink's probability and gradient [pairs, rows, 1], None without one. alone: whether no key of
        another tile has a probability in these rows.
        """
        normalised = self.problem.spec.normaliser == "softmax"
        sums, at_keys = self.whole.sums, (*self.outer, slice(keys.start, keys.stop))
        # [pairs, keys, D], [pairs, keys, Dv]
        k, v = (
            x[at_keys].to(self.q.dtype).reshape(self.lead[0], len(keys), x.shape[-1])
            for x in (self.problem.k, self.problem.v)
        )
        # [pairs, rows, keys]
        product = torch.bmm(self.q, k.mT)
        tile = self.problem.tile((*self.box, keys), product.view(*self.shape, len(keys)))
        scores = self._over(score.inner, tile).reshape(product.shape)
        probs = self._probabilities(scores) if normalised else scores
        if normalised and alone:
            # The sum is of scores that another product rounded, by which it is off where they are large.
            total = probs.sum(-1, keepdim=True)
            total = total if sink is None else total.add_(sink)
            total = total.masked_fill_(total == 0, 1.0)
            probs = probs.div_(total)
            sink = None if sink is None else sink / total
        weights, dprobs, factors = probs, torch.bmm(self.grad_sum, v.mT), []
        if self.problem.spec.dropout:
            kept = self.problem.kept((*self.box, keys)).reshape(product.shape)
            weights, dprobs, factors = weights * kept, dprobs.mul_(kept), [kept]
        if self.whole.factor is not None:
            self._add_reads(self.whole.factor, dprobs * probs, tile)
            factor = self._over(self.whole.factor.program, tile).reshape(product.shape)
            weights, dprobs, factors = weights * factor, dprobs * factor, [*factors, factor]
        if V in sums:
            sums[V][at_keys] += torch.bmm(weights.mT, self.grad_sum).view(sums[V][at_keys].shape)
        if not normalised:
            dscores = dprobs
        elif alone:
            dscores, dsink = _of_whole_rows(probs, dprobs, sink)
        else:
            dscores = probs * (dprobs - self.delta)
            self._set_largest(dscores, probs, v, factors)
        self._add_reads(score, dscores, tile)
        if score.product is None or not {Q, K} & sums.keys():
            return dsink
        dproduct = self._scaled(dscores.view(*self.shape, len(keys)), score.product, tile).view(product.shape)
        if Q in sums:
            self.dq.baddbmm_(dproduct, k)
        if K in sums:
            sums[K][at_keys] += torch.bmm(dproduct.mT, self.q).view(sums[K][at_keys].shape)
        return dsink

    def _probabilities(self, inner: torch.Tensor) -> torch.Tensor:
        """exp(score - shift) * share, of a tile's inner scores [pairs, rows, keys]."""
        of = self.problem.inner
        if of.scale == 1.0:
            return torch.sub(inner, self.shift).exp_().mul_(self.share)
        row_max = inner.amax(-1, keepdim=True)
        probs = of.scaled(inner - row_max.masked_fill(row_max == -math.inf, 0.0)).exp_()
        return probs.mul_(torch.exp(of.scaled(row_max) - self.shift) * self.share)

    def _set_largest(
        self, dscores: torch.Tensor, probs: torch.Tensor, v: torch.Tensor, factors: Sequence[torch.Tensor]
    ) -> None:
        """Set the gradients of the scores that have nearly all of their row: p_j dout . (w_j / p_j v_j - out).

        That is p_j (dw_j - delta), where both are nearly the same, and each rounds a sum of products in its own order.
        factors: what multiplies the probabilities.
        """
        if not bool((probs.amax(-1) > NEARLY_ALL).any()):
            return
        pair, row, key = at = (probs > NEARLY_ALL).nonzero(as_tuple=True)
        # [scores, Dv]
        value = v[pair, key]
        for factor in factors:
            value = value * factor[at].unsqueeze(-1)
        # Rounded as the output has been, so that a row of one value has a difference of 0.
        value = (value * self.kept_scale).to(self.whole.rows[1].dtype).to(value.dtype)
        dscores[at] = probs[at] * (self.grad_out[pair, row] * (value - self.out[pair, row])).sum(-1)

    def _over(self, expr: Expr, tile: Tile) -> torch.Tensor:
        shape = [len(positions) for _, positions in tile.axes]
        return evaluate(expr, tile).to(tile.dtype).expand(shape)

    def _add_reads(self, slopes: _Slopes, grad: torch.Tensor, tile: Tile) -> None:
        """Add what the reads of a program take of the gradient of its value."""
        grad = grad.view([len(positions) for _, positions in tile.axes])
        for read, slope in slopes.reads:
            total = self.whole.sums[OPERANDS + read.tensor]  # type: ignore[operator]
            factor, rest = factored(slope, HUGE_SLOPE)
            if factor == 1:
                scatter_add(total, read, self._scaled(grad, slope, tile), tile)
            else:
                # Of terms that are infinite a sum may be NaN.
                part = torch.zeros_like(total)
                scatter_add(part, read, self._scaled(grad, rest, tile), tile)
                total.add_(_times(part, factor))

    def _scaled(self, grad: torch.Tensor, slope: Expr, tile: Tile) -> torch.Tensor:
        """grad * slope, and 0 where either is: what a mask discards stays 0 beside a NaN or an infinity."""
        factor, rest = factored(slope)
        constant = number(rest)
        if constant is not None:
            grad = grad if constant == 1 else grad * constant
        else:
            values = evaluate(rest, tile).to(grad.dtype)
            grad = (grad * values).masked_fill_((values == 0) | (grad == 0), 0.0)
        return grad if factor == 1 else _times(grad, factor)


def _times(x: torch.Tensor, factor: float) -> torch.Tensor:
    """x * factor, which may be a number that float32 does not hold."""
    return x * (factor / LARGEST) * LARGEST if abs(factor) > LARGEST else x * factor


def _of_whole_rows(
    probs: torch.Tensor, dprobs: torch.Tensor, sink: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of the scores [.., keys] and of the sink [.., 1] of rows whose every probability is here.

    They add up to 0 over a row: what rounding errors leave of that is taken off.
    """
    delta = (probs * dprobs).sum(-1, keepdim=True)
    dscores = probs * (dprobs - delta)
    rest = dscores.sum(-1, keepdim=True)
    if sink is None:
        return dscores.addcmul_(probs, rest, value=-1.0), None
    dsink = -sink * delta
    rest += dsink
    return dscores.addcmul_(probs, rest, value=-1.0), dsink.addcmul_(sink, rest, value=-1.0)
