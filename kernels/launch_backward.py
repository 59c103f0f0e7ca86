"""Prepare the backward kernels for a call: choose tiles, describe operands to them, size what they write."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashfuse.kernels.backward import attention_keys_backward_kernel, attention_queries_backward_kernel
from flashfuse.kernels.backward_dense import attention_dense_backward_kernel
from flashfuse.kernels.backward_pairs import attention_pairs_backward_kernel
from flashfuse.kernels.backward_rows import ROWS_BLOCK, attention_rows_backward_kernel
from flashfuse.kernels.backward_tiled import attention_backward_tiled
from flashfuse.kernels.backward_variants import (
    BackwardLaunch,
    choose_backward,
    choose_dense,
    dense_constants,
    keys_constants,
    pairs_constants,
    queries_constants,
    rows_constants,
)
from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.captured_grad import CapturedProgram, PairTarget, queries_of
from flashfuse.kernels.codegen_backward import BackwardProgram, load_backward
from flashfuse.kernels.launch import Device, Launch, choose_launch, device_index, device_of, padded, shape_of
from flashfuse.kernels.launch_hopper_backward import prepare_one_pass
from flashfuse.kernels.launch_hopper_dense import prepare_hopper_pairs
from flashfuse.kernels.launch_ranges import filled_rows, query_ranges
from flashfuse.kernels.prepared import (
    Buffer,
    KernelLaunch,
    Strides,
    empty_on,
    loop_over,
    padded_axes,
    start,
    strides_of,
)
from flashfuse.kernels.prepared_backward import Found, Gradient, HopperPairs, Launched, PreparedBackward
from flashfuse.kernels.spec import AttentionSpec

# Numbers kept for each row beside the log-sum-exp: see `backward`.
ROW_PLANES = 5
# Elements of the output that one program of the rows kernel reads, and its most rows: those of its product as well.
ROW_ELEMENTS = 8192
MOST_ROWS = 64
# Programs with rows of pairs that a device takes at once, and the least tiles of keys that each has.
ROWS_PROGRAMS, ROWS_TILES = 256, 8


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
    prepared = prepare_backward(call, grad_out, out, lse, needs, launch)
    if prepared is None:
        return attention_backward_tiled(call, grad_out, out, lse, needs)
    with torch.cuda.device_of(call.q):
        return prepared.compute(empty_on(call.device), start, grad_out, out, lse, *call.tensors)


def prepare_backward(
    call: AttentionCall,
    grad_out: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    needs: Sequence[bool],
    launch: BackwardLaunch | None = None,
) -> PreparedBackward | None:
    """What computes `attention_backward` of tensors like these; None where torch does."""
    spec, searching = call.spec, launch is not None
    device = device_index(call)
    if launch is None:
        launch = _launch(spec, call.q_len, call.head_dim, call.value_dim, device)
    floating = [at for at, x in enumerate(call.operands) if x.is_floating_point()]
    wanted = tuple(at for at, need in zip(floating, needs, strict=True) if need)
    by_slot = tuple(slot + 3 in wanted for slot in range(len(call.captured)))
    empty = out.numel() == 0 or call.kv_len == 0 or call.q.numel() == 0
    if empty or launch is None or spec.compute_dtype == torch.float64:
        return None
    program = load_backward(spec, by_slot, call.kv_ranges is not None, call.q_len <= call.kv_len)
    captured = CapturedProgram.of(call, program, by_slot)
    hopper_on = None if searching else device_of(device)
    return _Preparation(call, grad_out, out, program, captured, launch, hopper_on).prepared(wanted)


@dataclass(frozen=True, eq=False)
class _Preparation:
    """A call, and what was found for it so far.

    hopper_on: the device, where the launch does not say that the plain passes have to run.
    """

    call: AttentionCall
    grad_out: torch.Tensor
    out: torch.Tensor
    program: BackwardProgram
    captured: CapturedProgram
    launch: BackwardLaunch
    hopper_on: Device | None

    def prepared(self, wanted: tuple[int, ...]) -> PreparedBackward:
        call, program, rows_batch = self.call, self.program, self.call.batch
        owned = self._owned_by_keys()
        dq = self._gradient(call.q, rows_batch) if 0 in wanted else None
        dk, dv = (self._gradient(x, owned) if at in wanted else None for at, x in ((1, call.k), (2, call.v)))
        one_pass = None
        if self.hopper_on is not None:
            one_pass = prepare_one_pass(self.hopper_on, call, self.grad_out, program, wanted, (dq, dk, dv))
        by_queries = one_pass is None and (dq is not None or program.num_row_sums > 0)
        by_keys = one_pass is None and (dk is not None or dv is not None or bool(program.key_terms))
        rows_len = -(-call.q_len // ROWS_BLOCK.value) * ROWS_BLOCK.value
        threshold = program.fill_threshold
        targets = self.captured.pair_targets(self.launch)
        return PreparedBackward(
            spec=call.spec,
            program=program,
            captured=self.captured,
            wanted=wanted,
            rows=self._rows(rows_len) if call.spec.normaliser == "softmax" else None,
            row_numbers=_float32(ROW_PLANES, *rows_batch, rows_len),
            of_sink=self.captured.of_sink,
            with_sink=self._with_sink,
            one_pass=one_pass,
            queries=self._queries(dq) if by_queries else None,
            dq=dq,
            row_sums=(_float32(*rows_batch, call.q_len),) * program.num_row_sums,
            ranges=self._ranges if by_keys else None,
            filled=None if threshold is None else filled_rows(rows_batch, call.q_len, threshold),
            keys=self._keys(owned, dk, dv) if by_keys else None,
            dk=dk,
            dv=dv,
            key_sums=(_float32(*rows_batch, call.kv_len),) * len(program.key_terms),
            pairs=tuple(map(self._pairs, targets)),
            targets=tuple(targets),
        )

    @property
    def _with_sink(self) -> bool:
        """Whether the gradients of sinks are needed: for themselves, or to correct those of the scores."""
        return self.captured.of_sink or (self.call.spec.sink is not None and bool(self.program.corrected))

    def _rows(self, rows_len: int) -> Launched:
        """The kernel that makes the numbers of rows, [ROW_PLANES, N.., rows_len]."""
        call = self.call
        block = max(16, min(MOST_ROWS, ROW_ELEMENTS // padded(call.value_dim)))
        variant = rows_constants(call.spec, self.program, call.head_dim, call.value_dim, block, self._with_sink)
        strides = tuple(strides_of(x, call.batch) for x in (self.grad_out, self.out))
        programs = math.prod(call.batch) * (rows_len // block)
        numbers = (*padded_axes(call.batch), *self._lengths)
        return self._launched(attention_rows_backward_kernel, programs, variant, strides, numbers)

    def _keys(self, owned: tuple[int, ...], dk: Gradient | None, dv: Gradient | None) -> Launched:
        """The kernel that passes by key tile."""
        call, tiles = self.call, self.launch.keys
        contiguous = 1 in (call.q.stride(-2), self.grad_out.stride(-2))
        variant = keys_constants(call.spec, self.program, call.head_dim, call.value_dim, tiles, contiguous)
        ranges = None if self._ranges is None else self._ranges.buffer.without_memory
        strides = self._strides(call.k, call.v, self.grad_out, ranges, *map(_written, (dk, dv)))
        numbers = (*padded_axes(owned), *padded_axes(loop_over(call.batch, owned)), *self._lengths)
        programs = math.prod(owned) * -(-call.kv_len // tiles.block_kv)
        return self._launched(attention_keys_backward_kernel, programs, variant, strides, numbers)

    def _owned_by_keys(self) -> tuple[int, ...]:
        """The batch positions whose keys a program owns: 1 on the last axes, over which k and v are shared."""
        owned = list(self.call.batch)
        for axis in reversed(range(len(owned))):
            if self.call.k.shape[axis] != 1 or self.call.v.shape[axis] != 1:
                break
            owned[axis] = 1
        return tuple(owned)

    @functools.cached_property
    def _ranges(self) -> Found | None:
        """What turns the ranges of keys round, where there are some."""
        call = self.call
        if call.kv_ranges is None:
            return None
        return query_ranges(call.kv_ranges, call.q_len, call.kv_len, self.launch.keys.block_kv)

    def _queries(self, dq: Gradient | None) -> Launched:
        """The kernel that passes by query tile."""
        call, tiles = self.call, self.launch.queries
        variant = queries_constants(call.spec, self.program, call.head_dim, call.value_dim, tiles)
        strides = self._strides(call.k, call.v, self.grad_out, call.kv_ranges, _written(dq))
        programs = math.prod(call.batch) * -(-call.q_len // tiles.block_q)
        numbers = (*padded_axes(call.batch), *self._lengths)
        return self._launched(attention_queries_backward_kernel, programs, variant, strides, numbers)

    def _pairs(self, target: PairTarget) -> tuple[Launched | HopperPairs, ...]:
        """The kernel that writes the gradients of reads at pairs, or their sums by distance, for each part."""
        found = None
        if self.hopper_on is not None:
            found = prepare_hopper_pairs(self.hopper_on, self.call, self.grad_out, self.program, target)
        if found is not None:
            return (found,)
        call, owned = self.call, tuple(target.view.shape[:-2])
        strides = self._strides(call.k, call.v, self.grad_out, call.kv_ranges, target.view)
        axes = (*padded_axes(owned), *padded_axes(loop_over(call.batch, owned)))
        of = call.spec, self.program, target.number, call.head_dim, call.value_dim
        shared_by = math.prod(call.batch) // max(math.prod(owned), 1)
        dense = None if target.by_distance else self._dense_tiles(shared_by)
        tiles = dense or self.launch.pairs
        kv_tiles = -(-target.view.shape[-1] // tiles.block_kv)
        variant = pairs_constants(*of, tiles) if dense is None else dense_constants(*of, dense, shared_by)
        launches = []
        for queries in map(queries_of, target.parts):
            programs = math.prod(owned) * -(-len(queries) // tiles.block_q)
            numbers: tuple[Any, ...] = (*axes, queries.start, queries.stop)
            if dense is None:
                kernel, programs = attention_pairs_backward_kernel, programs * kv_tiles
            else:
                # Some of the keys each, where programs for all of them were few.
                kernel, each = attention_dense_backward_kernel, -(-kv_tiles // _key_parts(programs, kv_tiles))
                programs, numbers = programs * -(-kv_tiles // each), (*numbers, each)
            launches.append(self._launched(kernel, programs, variant, strides, (*numbers, *self._lengths)))
        return tuple(launches)

    def _dense_tiles(self, shared_by: int) -> Launch | None:
        """The tile for rows of pairs that so many positions share, None where tiles of pairs are for them."""
        shape = shape_of(self.call.spec, self.call.q_len, self.call.head_dim, self.call.value_dim)
        return choose_dense(device_of(device_index(self.call)), shape, self.launch.dense, shared_by)

    def _launched(
        self,
        kernel: Any,
        programs: int,
        variant: Mapping[str, Any],
        strides: tuple[Strides, ...],
        numbers: tuple[Any, ...],
    ) -> Launched:
        """strides: of operands, but for those of the ranges, which come fifth."""
        captured_strides = tuple(c.stride() for c in self.call.captured)
        launch = KernelLaunch(kernel, programs, variant).of((*strides[:4], *strides[5:]), captured_strides)
        return Launched(launch, (*strides, *numbers), captured_strides)

    @property
    def _lengths(self) -> tuple[Any, ...]:
        return self.call.q_len, self.call.kv_len, self.call.program_sizes

    def _strides(self, *tensors: torch.Tensor | None) -> tuple[Strides, ...]:
        """Of q and these; any for what there is none of."""
        return tuple([strides_of(self.call.q if x is None else x, self.call.batch) for x in (self.call.q, *tensors)])

    def _gradient(self, x: torch.Tensor, owned: tuple[int, ...]) -> Gradient:
        """Where the gradient of `x` goes: itself, or one for each position that shares `x`, in float32."""
        own = Buffer.like(torch.empty_like(x, device="meta"))
        shape = (*owned, *x.shape[-2:])
        return Gradient(own, own if x.shape == shape else _float32(*shape))


def _key_parts(programs: int, kv_tiles: int) -> int:
    """Among how many programs the keys of rows of pairs are divided."""
    return max(1, min(ROWS_PROGRAMS // programs, kv_tiles // ROWS_TILES))


def _written(gradient: Gradient | None) -> torch.Tensor | None:
    return None if gradient is None else gradient.written.without_memory


def _float32(*size: int) -> Buffer:
    return Buffer.contiguous(size, torch.float32)
