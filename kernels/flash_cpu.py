"""Attention whose score is scale * product + bias, on the fused attention kernel that torch has for the CPU.

Masks are such biases too: a score replaced by -inf, or by a constant so negative that it absorbs any product, is a
product plus that constant. Only a block of queries' bias exists at a time, and only over the keys its mask leaves.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flashfuse.kernels.expr import Const, Expr, Load, Pointwise, Product, free_symbols, walk
from flashfuse.kernels.mask import HUGE_FILL, may_cancel
from flashfuse.kernels.normal import pointwise
from flashfuse.kernels.problem import Box, Problem, slices, split
from flashfuse.kernels.rounding import unrounded
from flashfuse.kernels.spec import AttentionSpec

# The most elements of one block's bias, 4 MiB in float32, and the fewest queries of a block.
BIAS_ELEMENTS = 1 << 20
MIN_BLOCK_Q = 32
MAX_BLOCK_Q = 256
# The most rows that lie together because they share keys; the kernel takes so many queries at a time.
FOLDED_ROWS = 64
# From this size on a log-sum-exp in one number has lost too much of its logarithm.
LARGE = 1e3

# A log-sum-exp above this lacks digits, and scores that differ by this are decided.
_LARGE_LSE = 32.0


@dataclass(frozen=True)
class AdditiveProgram:
    """The score scale * Product(0) + bias, `bias` free of products."""

    scale: float
    bias: Expr


def additive_program(problem: Problem) -> AdditiveProgram | None:
    """The call's score program in additive form; None where torch's kernel cannot run it."""
    spec, q, k, v = problem.spec, problem.q, problem.k, problem.v
    dtypes = {q.dtype, k.dtype, v.dtype, spec.product_dtype, spec.probs_dtype, spec.out_dtype}
    same_width = q.shape[-1] == v.shape[-1] and all(x.stride(-1) == 1 for x in (q, k, v))
    if q.device.type != "cpu" or len(dtypes) > 1 or not same_width:
        return None
    if spec.key is not None or spec.value is not None:
        return None
    if spec.normaliser != "softmax" or spec.factor is not None or spec.dropout:
        return None
    # The sink rescales the kernel's output, which is a rounding more than a narrow type has to spare.
    if spec.sink is not None and spec.out_dtype != spec.compute_dtype:
        return None
    return _additive_program(spec)


@functools.lru_cache(maxsize=4096)
def _additive_program(spec: AttentionSpec) -> AdditiveProgram | None:
    # A sum of biases alone would keep what a score loses beside one of them, where another takes that away.
    biases = [e for e in walk(spec.score) if isinstance(e, Load) and e.dtype.is_floating_point]
    if may_cancel(spec.score) or len({*biases}) < len(biases):
        return None
    # A row in which a sum is rounded has a log-sum-exp that is `LARGE`, and is none of that kernel's.
    return split_additive(unrounded(spec.score))


def split_additive(score: Expr, factor: float = 1.0) -> AdditiveProgram | None:
    """`score` as scale * Product(0) + bias; None when it is no such sum.

    factor: what multiplies `score` further out, which may shrink a fill below absorbing a product.
    """
    match score:
        case Product(slot=0):
            return AdditiveProgram(1.0, Const(score.dtype, 0.0))
        case Pointwise(op="mul", args=(inner, Const(value=c)) | (Const(value=c), inner)):
            found = split_additive(inner, factor * c) if math.isfinite(c) and c > 0 else None
            return found and AdditiveProgram(found.scale * c, pointwise("mul", found.bias, Const(score.dtype, c)))
        case Pointwise(op="add", args=(left, right)) if not (_has_product(left) and _has_product(right)):
            inner, term = (left, right) if _has_product(left) else (right, left)
            found = split_additive(inner, factor)
            return found and AdditiveProgram(found.scale, pointwise("add", found.bias, term))
        case Pointwise(op="sub", args=(inner, term)) if not _has_product(term):
            found = split_additive(inner, factor)
            return found and AdditiveProgram(found.scale, pointwise("sub", found.bias, term))
        case Pointwise(op="where", args=(kept, inner, Const(value=fill) as masked)) if not _has_product(kept):
            found = split_additive(inner, factor) if fill * min(factor, 1.0) <= HUGE_FILL else None
            return found and AdditiveProgram(found.scale, pointwise("where", kept, found.bias, masked))
        case Pointwise(op="where", args=(dropped, Const() as masked, inner)):
            return split_additive(pointwise("where", pointwise("not", dropped), inner, masked), factor)
    return None


def _has_product(expr: Expr) -> bool:
    return any(isinstance(e, Product) for e in walk(expr))


def boxes(problem: Problem, program: AdditiveProgram) -> Iterator[Box]:
    """Boxes of query rows of at most two batch axes (torch's kernel has two), whose bias fits `BIAS_ELEMENTS`.

    Axes whose rows lie with the queries are none of the two.
    """
    *batch, q_len = problem.q.shape[:-1]
    folded = _folded_axes(problem)
    longest = sorted(range(len(batch) - folded), key=lambda axis: batch[axis])[-2:]
    blocks = [n if axis in longest or axis >= len(batch) - folded else 1 for axis, n in enumerate(batch)]
    block_q = q_len
    if not isinstance(program.bias, Const):
        used = free_symbols(program.bias)
        planes = math.prod(n for n, symbol in zip(blocks, problem.symbols, strict=False) if symbol in used)
        block_q = max(BIAS_ELEMENTS // (planes * problem.k.shape[-2]), MIN_BLOCK_Q)
    if problem.bounded:
        block_q = min(block_q, MAX_BLOCK_Q)
    cuts = (split(range(n), block) for n, block in zip((*batch, q_len), (*blocks, block_q), strict=True))
    return itertools.product(*cuts)


def _folded_axes(problem: Problem) -> int:
    """How many batch axes, the last ones, lie with the queries as rows that meet the same keys.

    All over which keys are shared, so that each key is read once; none where those are many rows, or where the others
    are too few for every thread to have one.
    """
    outer = problem.k.dim() - 2
    rows, pairs = (math.prod(sizes) for sizes in (problem.q.shape[outer:-1], problem.q.shape[:outer]))
    few = rows <= FOLDED_ROWS and pairs >= torch.get_num_threads()
    return problem.q.dim() - problem.k.dim() if few else 0


def attend(problem: Problem, program: AdditiveProgram, box: Box) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Output [box.., D] and log-sum-exp [box.., 2] of the query rows in `box`.

    None where the kernel's answer may not be the score program's: a NaN or infinity among the products, a row with no
    key, or a row whose every visited key is masked by a finite fill, so that the keys left out count as well. None too
    for log-sum-exps that are `LARGE`, as the kernel gives them in one number.
    """
    limits = problem.kv_range(box)
    keys = range(limits.start, limits.end)
    if not keys:
        return None
    folded = _folded_axes(problem)
    batch = tuple(len(positions) for positions in box[:-1])
    alone = batch[: len(batch) - folded]
    outer = slices(box[: problem.k.dim() - 2])
    shared = (None,) * (len(alone) - len(outer))
    k, v = (x[*outer, *shared, keys.start : keys.stop] for x in (problem.k, problem.v))
    bias = None
    if program.bias != Const(program.bias.dtype, 0.0):
        bias = problem.evaluate_broadcast(program.bias, (*box, keys)).to(problem.spec.compute_dtype)
        bias = bias.expand(*batch, len(box[-1]), len(keys)).flatten(len(alone), -2)
        bias = _four_dims(bias, alone)
    q = problem.q[slices(box)].flatten(len(alone), -2)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_four_dims(x, alone) for x in (q, k, v)), attn_mask=bias, scale=program.scale
    )
    # A row without a key comes back as log-sum-exp 0.
    if not bool(((lse.abs() <= LARGE) & (lse != 0)).all()):
        return None
    threshold = problem.fill_threshold
    if threshold is not None and bool((lse - math.log(len(keys)) <= threshold).any()):
        return None
    out, lse = out.reshape(*batch, len(box[-1]), out.shape[-1]), lse.reshape(*batch, len(box[-1]))
    if problem.spec.sink is not None:
        sink = problem.evaluate_rows(problem.spec.sink, box)
        # A large log-sum-exp has no room for the digits that a sink of its size is compared by.
        if bool(((lse.abs() > _LARGE_LSE) & ((lse - sink).abs() < _LARGE_LSE)).any()):
            return None
        out, lse = out * torch.sigmoid(lse - sink).unsqueeze(-1), torch.logaddexp(lse, sink)
    return out, torch.stack([lse, torch.ones_like(lse)], -1)


def _four_dims(x: torch.Tensor, batch: tuple[int, ...]) -> torch.Tensor:
    """`x` [.., T, D] over a box with at most two axes of several positions, as [M, N, T, D]."""
    x = x.expand(*batch, *x.shape[-2:])
    x = x[tuple(slice(None) if n > 1 else 0 for n in batch)]
    return x[(None,) * (4 - x.dim())]
