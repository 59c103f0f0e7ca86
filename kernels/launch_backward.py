"""Launch the backward kernels: describe operands to them, allocate the gradients, add up what is shared."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashfuse.kernels.backward import attention_keys_backward_kernel, attention_queries_backward_kernel
from flashfuse.kernels.backward_dense import attention_dense_backward_kernel
from flashfuse.kernels.backward_pairs import attention_pairs_backward_kernel
from flashfuse.kernels.backward_rows import DELTA, ROWS_BLOCK, SINK_GRAD, attention_rows_backward_kernel
from flashfuse.kernels.backward_tiled import attention_backward_tiled
from flashfuse.kernels.backward_variants import (
    BackwardLaunch,
    choose_backward,
    dense_constants,
    keys_constants,
    pairs_constants,
    queries_constants,
    rows_constants,
)
from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.captured_grad import CapturedGradients
from flashfuse.kernels.captured_reads import unsupported
from flashfuse.kernels.codegen_backward import BackwardProgram, load_backward
from flashfuse.kernels.distances import DistanceSums
from flashfuse.kernels.launch import choose_launch, device_of, padded, shape_of
from flashfuse.kernels.prepared import KernelLaunch, strides_of
from flashfuse.kernels.query_ranges import query_ranges
from flashfuse.kernels.relaunch import launched
from flashfuse.kernels.spec import MAX_BATCH_AXES, AttentionSpec

# Numbers kept for each row beside the log-sum-exp: see `backward`.
ROW_PLANES = 5
# Elements of the output that one program of the rows kernel reads.
ROW_ELEMENTS = 8192


@functools.lru_cache(maxsize=4096)
def _launch(
    spec: AttentionSpec, q_len: int, head_dim: int, value_dim: int, device: int | None
) -> BackwardLaunch | None:
    """None too where the forward runs in torch: its log-sum-exps are rounded otherwise."""
    shape = shape_of(spec, q_len, head_dim, value_dim)
    on = device_of(device)
    return None if choose_launch(on, shape) is None else choose_backward(on, shape)


def attention_backward(
    call: AttentionCall,
    grad_out: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    needs: Sequence[bool],
    launch: BackwardLaunch | None = None,
) -> list[torch.Tensor]:
    """Gradients of the needed tensors, in their shapes, element types and, where those are dense, memory orders.

    grad_out, out: [N.., Tq, Dv], lse: [N.., Tq, 2] of the forward kernel.
    needs: for q, k, v and every floating-point captured tensor. `launch` overrides the table, for searching.
    """
    spec = call.spec
    if launch is None:
        device = call.device.index if call.q.is_cuda else None
        launch = _launch(spec, call.q_len, call.head_dim, call.value_dim, device)
    floating = [at for at, x in enumerate(call.operands) if x.is_floating_point()]
    wanted = [at for at, need in zip(floating, needs, strict=True) if need]
    by_slot = tuple(slot + 3 in wanted for slot in range(len(call.captured)))
    empty = out.numel() == 0 or call.kv_len == 0 or call.q.numel() == 0
    if empty or launch is None or spec.compute_dtype == torch.float64 or unsupported(spec, by_slot):
        return attention_backward_tiled(call, grad_out, out, lse, needs)
    program = load_backward(spec, by_slot, call.kv_ranges is not None, call.q_len <= call.kv_len)
    gradients = CapturedGradients(call, program, by_slot)
    targets = gradients.pair_targets(launch.pairs)
    if targets is None:
        return attention_backward_tiled(call, grad_out, out, lse, needs)
    with torch.cuda.device_of(call.q):
        return _Backward(call, grad_out, out, lse, program, gradients, launch).run(wanted, targets)


@dataclass(frozen=True, eq=False)
class _Backward:
    """One backward pass."""

    call: AttentionCall
    grad_out: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    program: BackwardProgram
    gradients: CapturedGradients
    launch: BackwardLaunch

    def run(self, wanted: Sequence[int], targets: Sequence[torch.Tensor | DistanceSums]) -> list[torch.Tensor]:
        rows = self._rows()
        found: dict[int, torch.Tensor] = {}
        left = None
        if 0 in wanted or self.program.num_row_sums:
            dq, left = self._queries(rows, 0 in wanted)
            found |= dq
        if 1 in wanted or 2 in wanted or self.program.key_terms:
            found |= self._keys(rows, 1 in wanted, 2 in wanted)
        if left is not None and targets:
            rows[DELTA.value][..., : self.call.q_len] += left
        for i, (term, target) in enumerate(zip(self.program.pair_terms, targets, strict=True)):
            if isinstance(target, DistanceSums):
                self._pairs(rows, i, target.tiles)
            elif tuple(target.shape[:-2]) == self.call.batch:
                self._dense(rows, i, target)
            else:
                self._pairs(rows, i, target)
            self.gradients.add_pair(term, target)
        return [found[at] if at < 3 else self.gradients.result(at - 3) for at in wanted]

    @property
    def _needs_sink(self) -> bool:
        """Whether the gradients of sinks are needed: for themselves, or to correct those of the scores."""
        return self.gradients.of_sink or (self.call.spec.sink is not None and bool(self.program.corrected))

    def _rows(self) -> torch.Tensor:
        """[ROW_PLANES, N.., Tq up to a whole block]; the log-sum-exps, unused, where there is no softmax."""
        if self.call.spec.normaliser == "none":
            return self.lse
        q_len, value_dim = self.out.shape[-2:]
        rows_len = -(-q_len // ROWS_BLOCK.value) * ROWS_BLOCK.value
        rows = self.lse.new_empty(ROW_PLANES, *self.call.batch, rows_len)
        block = max(16, min(ROWS_BLOCK.value, ROW_ELEMENTS // padded(value_dim)))
        variant = rows_constants(self.call.spec, self.program, value_dim, block, self._needs_sink)
        arguments = (
            self.grad_out, self.out, self.lse, rows, *self._strides(self.grad_out, self.out),
            *_padded(self.call.batch), *self._program_arguments,
        )  # fmt: skip
        programs = math.prod(self.call.batch) * (rows_len // block)
        launched((KernelLaunch(attention_rows_backward_kernel, programs, variant),), arguments)
        if self.gradients.of_sink:
            self.gradients.add_sink(rows[SINK_GRAD.value][..., :q_len])
        return rows

    def _keys(self, rows: torch.Tensor, k_wanted: bool, v_wanted: bool) -> dict[int, torch.Tensor]:
        """The gradients of k (1) and v (2), where wanted, and those of reads at keys."""
        owned = self._owned_by_keys()
        dk, dv = self._buffer(self.call.k, owned, k_wanted), self._buffer(self.call.v, owned, v_wanted)
        q_len, kv_len = self.call.q_len, self.call.kv_len
        tiles = self.launch.keys
        ranges = (
            None if self.call.kv_ranges is None else query_ranges(self.call.kv_ranges, q_len, kv_len, tiles.block_kv)
        )
        sums = tuple(rows.new_empty(*self.call.batch, kv_len) for _ in self.program.key_terms)
        contiguous = 1 in (self.call.q.stride(-2), self.grad_out.stride(-2))
        variant = keys_constants(
            self.call.spec, self.program, self.call.head_dim, self.call.value_dim, tiles, contiguous
        )
        arguments = (
            self.call.q, self.call.k, self.call.v, self.grad_out, rows, ranges, self.call.seed, self._filled(),
            dk, dv, sums, *self._strides(self.call.q, self.call.k, self.call.v, self.grad_out, ranges, dk, dv),
            *_padded(owned), *_padded(_loop(self.call.batch, owned)), *self._program_arguments,
        )  # fmt: skip
        programs = math.prod(owned) * -(-kv_len // tiles.block_kv)
        launched((KernelLaunch(attention_keys_backward_kernel, programs, variant),), arguments)
        for term, found in zip(self.program.key_terms, sums, strict=True):
            self.gradients.add_keys(term, found)
        return {
            at: _finished(grad, x) for at, grad, x in ((1, dk, self.call.k), (2, dv, self.call.v)) if grad is not None
        }

    def _owned_by_keys(self) -> tuple[int, ...]:
        """The batch positions whose keys a program owns: 1 on the last axes, over which k and v are shared."""
        owned = list(self.call.batch)
        for axis in reversed(range(len(owned))):
            if self.call.k.shape[axis] != 1 or self.call.v.shape[axis] != 1:
                break
            owned[axis] = 1
        return tuple(owned)

    def _filled(self) -> torch.Tensor | None:
        """The queries [first, stop) that may have gradients through all keys, int32 [N.., 2]."""
        threshold = self.program.fill_threshold
        if threshold is None:
            return None
        found = self.lse[..., 1].isnan() | ((self.lse[..., 0] <= threshold) if threshold > -math.inf else False)
        number = torch.arange(found.shape[-1], device=found.device, dtype=torch.int32)
        first = torch.where(found, number, found.shape[-1]).amin(-1)
        return torch.stack([first, torch.where(found, number + 1, 0).amax(-1)], -1).to(torch.int32)

    def _queries(self, rows: torch.Tensor, wanted: bool) -> tuple[dict[int, torch.Tensor], torch.Tensor | None]:
        """The gradient of q (0), where wanted, and those of reads at queries; what is wrong with delta, [N.., Tq]."""
        dq = self._buffer(self.call.q, self.call.batch, wanted)
        tiles, q_len = self.launch.queries, self.call.q_len
        sums = tuple(rows.new_empty(*self.call.batch, q_len) for _ in range(self.program.num_row_sums))
        variant = queries_constants(self.call.spec, self.program, self.call.head_dim, self.call.value_dim, tiles)
        arguments = (
            self.call.q, self.call.k, self.call.v, self.grad_out, rows, self.call.kv_ranges, self.call.seed, dq, sums,
            *self._strides(self.call.q, self.call.k, self.call.v, self.grad_out, self.call.kv_ranges, dq),
            *_padded(self.call.batch), *self._program_arguments,
        )  # fmt: skip
        programs = math.prod(self.call.batch) * -(-q_len // tiles.block_q)
        launched((KernelLaunch(attention_queries_backward_kernel, programs, variant),), arguments)
        left = self._left(rows, sums[-1]) if self.program.corrected else None
        self.gradients.add_rows(sums, left)
        return {} if dq is None else {0: _finished(dq, self.call.q)}, left

    def _left(self, rows: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """What rounding the output has left in delta: but for it the gradients of a row's scores add up to 0."""
        return total + rows[SINK_GRAD.value][..., : self.call.q_len] if self._needs_sink else total

    def _pairs(self, rows: torch.Tensor, number: int, target: torch.Tensor) -> None:
        """Write the gradients of one read at pairs, or its sums by distance, by tiles of pairs."""
        tiles = self.launch.pairs
        variant = pairs_constants(
            self.call.spec, self.program, number, self.call.head_dim, self.call.value_dim, tiles
        )  # fmt: skip
        row_tiles, column_tiles = -(-target.shape[-2] // tiles.block_q), -(-target.shape[-1] // tiles.block_kv)
        programs = math.prod(target.shape[:-2]) * row_tiles * column_tiles
        owned = tuple(target.shape[:-2])
        arguments = (
            *self._pair_operands(rows, target), *_padded(owned), *_padded(_loop(self.call.batch, owned)),
            *self._program_arguments,
        )  # fmt: skip
        launched((KernelLaunch(attention_pairs_backward_kernel, programs, variant),), arguments)

    def _dense(self, rows: torch.Tensor, number: int, target: torch.Tensor) -> None:
        """Write the gradients of one read at pairs that no batch positions share, by rows."""
        call, tiles = self.call, self.launch.dense
        variant = dense_constants(call.spec, self.program, number, call.head_dim, call.value_dim, tiles)
        arguments = (*self._pair_operands(rows, target), *_padded(call.batch), *self._program_arguments)
        programs = math.prod(call.batch) * -(-call.q_len // tiles.block_q)
        launched((KernelLaunch(attention_dense_backward_kernel, programs, variant),), arguments)

    def _pair_operands(self, rows: torch.Tensor, target: torch.Tensor) -> tuple[Any, ...]:
        call = self.call
        return (
            call.q, call.k, call.v, self.grad_out, rows, call.kv_ranges, call.seed, target,
            *self._strides(call.q, call.k, call.v, self.grad_out, call.kv_ranges, target),
        )  # fmt: skip

    @property
    def _program_arguments(self) -> tuple[Any, ...]:
        call = self.call
        strides = tuple(c.stride() for c in call.captured)
        return call.q_len, call.kv_len, call.program_sizes, tuple(call.captured), strides

    def _strides(self, *tensors: torch.Tensor | None) -> list[tuple[int, ...]]:
        return [strides_of(self.call.q if x is None else x, self.call.batch) for x in tensors]

    def _buffer(self, x: torch.Tensor, owned: tuple[int, ...], wanted: bool) -> torch.Tensor | None:
        """Where the gradient of `x` goes: itself, or one for each position that shares `x`, in float32."""
        if not wanted:
            return None
        shape = (*owned, *x.shape[-2:])
        return torch.empty_like(x) if x.shape == shape else x.new_empty(shape, dtype=torch.float32)


def _finished(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of `x` in its own shape, element type and memory order."""
    return grad if grad.shape == x.shape else torch.empty_like(x).copy_(grad.sum_to_size(x.shape))


def _padded(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (*sizes, *(1,) * (MAX_BATCH_AXES - len(sizes)))


def _loop(batch: tuple[int, ...], owned: tuple[int, ...]) -> tuple[int, ...]:
    """The batch positions over which each owner passes."""
    return tuple(1 if mine == size else size for size, mine in zip(batch, owned, strict=True))
