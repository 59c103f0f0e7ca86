"""`PreparedBackward`: a backward pass but for its tensors, as launches of kernels and what torch adds up between."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from flashfuse.kernels.backward_rows import DELTA, SINK_GRAD
from flashfuse.kernels.captured_grad import CapturedGradients, CapturedProgram, PairTarget
from flashfuse.kernels.codegen_backward import BackwardProgram
from flashfuse.kernels.launch_buckets import sum_buckets
from flashfuse.kernels.prepared import Buffer, Empty, KernelLaunch, Start, described
from flashfuse.kernels.spec import AttentionSpec


class Launched(NamedTuple):
    """The launch of a kernel whose arguments are tensors, and then numbers that follow from their layouts.

    captured_strides: where the captured tensors and their strides come last.
    """

    launch: KernelLaunch
    numbers: tuple[Any, ...]
    captured_strides: tuple[tuple[int, ...], ...] | None = None


class Found(NamedTuple):
    """What a kernel makes of one tensor."""

    buffer: Buffer
    launched: Launched


class Gradient(NamedTuple):
    """The gradient of an operand, and what a kernel writes of it: the same, or one for each position that shares it."""

    own: Buffer
    written: Buffer

    def finished(self, found: torch.Tensor, empty: Empty) -> torch.Tensor:
        """The operand's gradient, from what the kernel has written."""
        return found if self.own is self.written else empty(*self.own).copy_(found.sum_to_size(self.own.size))


class OnePass(NamedTuple):
    """The gradients of q, k and v by one kernel, see `hopper_backward`.

    sums: those of the gradient of q, [positions, Tq, D], which start at 0 by the kernel of rows; `scaled` makes the
    gradient of them.
    operands: descriptors of q, k, v, the output's gradient, the gradients of k and v, the sums, and the captured tensor
        that is read for each pair, without tensors; pairs: the place of that among the captured, or None for both.
    ranges: what turns the ranges of keys round, for its tiles.
    """

    sums: Buffer
    left: Buffer | None
    operands: tuple[Any, ...]
    pairs: int | None
    ranges: Found | None
    one_pass: Launched
    scaled: Launched


class HopperPairs(NamedTuple):
    """The gradient of a read at pairs by the kernel of `hopper_dense`.

    operands: descriptors of q, k, v, the output's gradient, what is written, and the captured tensor at the place
        `pairs`, without tensors.
    """

    operands: tuple[Any, ...]
    pairs: int
    launched: Launched


@dataclass(frozen=True, eq=False)
class PreparedBackward:
    """All that follows from the element types, sizes and strides of a call's tensors.

    wanted: the places of the operands whose gradients are needed.
    rows: None without a softmax, where `row_numbers` are not read.
    of_sink, with_sink: whether gradients of sinks are wanted, and whether the kernel makes them.
    one_pass: in the place of queries and keys, None where there is none.
    queries, keys: None where nothing of that pass is needed. dq, dk, dv: None where it is not wanted.
    ranges, filled: what the pass by keys asks of data, where it does.
    pairs: for each of the targets a launch for each of its parts.
    """

    spec: AttentionSpec
    program: BackwardProgram
    captured: CapturedProgram
    wanted: tuple[int, ...]
    rows: Launched | None
    row_numbers: Buffer
    of_sink: bool
    with_sink: bool
    one_pass: OnePass | None
    queries: Launched | None
    dq: Gradient | None
    row_sums: tuple[Buffer, ...]
    ranges: Found | None
    filled: Found | None
    keys: Launched | None
    dk: Gradient | None
    dv: Gradient | None
    key_sums: tuple[Buffer, ...]
    pairs: tuple[tuple[Launched | HopperPairs, ...], ...]
    targets: tuple[PairTarget, ...]

    def compute(
        self,
        empty: Empty,
        start: Start,
        grad_out: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_ranges: torch.Tensor | None,
        seed: torch.Tensor | None,
        *captured: torch.Tensor,
    ) -> list[torch.Tensor]:
        """The wanted gradients, on the current device."""
        gradients = CapturedGradients(self.captured, captured, empty, functools.partial(sum_buckets, empty, start))
        # vmap leaves what it does not map at stride 0.
        run = _Run(self, empty, start, grad_out, out, lse.contiguous(), q, k, v, kv_ranges, seed, captured, gradients)
        return run.gradients()


@dataclass(eq=False, slots=True)
class _Run:
    """One backward pass. found: the gradients of q, k and v so far, by place."""

    of: PreparedBackward
    empty: Empty
    start: Start
    grad_out: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv_ranges: torch.Tensor | None
    seed: torch.Tensor | None
    captured: tuple[torch.Tensor, ...]
    of_captured: CapturedGradients
    found: dict[int, torch.Tensor] = field(default_factory=dict)

    def gradients(self) -> list[torch.Tensor]:
        sums = None if self.of.one_pass is None else self.empty(*self.of.one_pass.sums)
        rows, left = self._rows(sums), None
        if self.of.one_pass is not None:
            self._one_pass(self.of.one_pass, rows, sums)
        if self.of.queries is not None:
            left = self._queries(self.of.queries, rows)
        if self.of.keys is not None:
            self._keys(self.of.keys, rows)
        if left is not None and self.of.pairs:
            rows[DELTA.value][..., : self.q.shape[-2]].add_(left)
        for launches, target in zip(self.of.pairs, self.of.targets, strict=True):
            self._pairs(launches, target, rows)
        return [self.found[at] if at < 3 else self.of_captured.result(at - 3) for at in self.of.wanted]

    def _rows(self, sums: torch.Tensor | None) -> torch.Tensor:
        """The numbers of rows; the log-sum-exps, unused, where there is no softmax. `sums` are 0 then."""
        if self.of.rows is None:
            return self.lse
        rows = self.empty(*self.of.row_numbers)
        self._launch(self.of.rows, self.grad_out, self.out, self.lse, rows, sums)
        if self.of.of_sink:
            self.of_captured.add_sink(self._of_sinks(rows))
        return rows

    def _of_sinks(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[SINK_GRAD.value][..., : self.q.shape[-2]]

    def _one_pass(self, of: OnePass, rows: torch.Tensor, sums: torch.Tensor | None) -> None:
        """The gradients of q, k and v, and right deltas for those of pairs."""
        ranges, filled = self._found(of.ranges, self.kv_ranges), self._found(self.of.filled, self.lse)
        dq, dk, dv = self._new(self.of.dq), self._new(self.of.dk), self._new(self.of.dv)
        pairs = None if of.pairs is None else self.captured[of.pairs]
        tensors = (self.q, self.k, self.v, self.grad_out, dk, dv, sums, pairs)
        left = None if of.left is None else self.empty(*of.left)
        self._launch(of.one_pass, *map(described, of.operands, tensors), rows, left, ranges, filled)
        self._launch(of.scaled, sums, left, rows, dq)
        for place, gradient, found in ((0, self.of.dq, dq), (1, self.of.dk, dk), (2, self.of.dv, dv)):
            self._keep(place, gradient, found)

    def _queries(self, launched: Launched, rows: torch.Tensor) -> torch.Tensor | None:
        """The gradient of q and those of reads at queries; what rounding the output has left in delta, [N.., Tq]: but
        for it the gradients of a row's scores add up to 0."""
        dq, sums = self._new(self.of.dq), self._sums(self.of.row_sums)
        self._launch(
            launched, self.q, self.k, self.v, self.grad_out, rows, self.kv_ranges, self.seed, dq, sums
        )  # fmt: skip
        left = None
        if self.of.program.corrected:
            left = sums[-1] + self._of_sinks(rows) if self.of.with_sink else sums[-1]
        if sums:
            self.of_captured.add_rows(sums, left)
        self._keep(0, self.of.dq, dq)
        return left

    def _keys(self, launched: Launched, rows: torch.Tensor) -> None:
        """The gradients of k and v and those of reads at keys."""
        ranges, filled = self._found(self.of.ranges, self.kv_ranges), self._found(self.of.filled, self.lse)
        dk, dv, sums = self._new(self.of.dk), self._new(self.of.dv), self._sums(self.of.key_sums)
        self._launch(
            launched, self.q, self.k, self.v, self.grad_out, rows, ranges, self.seed, filled, dk, dv, sums
        )  # fmt: skip
        for term, found in zip(self.of.program.key_terms, sums, strict=True):
            self.of_captured.add_keys(term, found)
        self._keep(1, self.of.dk, dk)
        self._keep(2, self.of.dv, dv)

    def _pairs(self, launches: Sequence[Launched | HopperPairs], target: PairTarget, rows: torch.Tensor) -> None:
        """The gradients of reads at pairs, of all queries or of some at a time."""
        whole = target.whole_by(self.empty)
        for of, part in zip(launches, target.parts, strict=True):
            written = target.written(whole, part)
            self._write_pairs(of, rows, written)
            self.of_captured.add_pair(target, whole, written, part)

    def _write_pairs(self, of: Launched | HopperPairs, rows: torch.Tensor, written: torch.Tensor) -> None:
        operands = (self.q, self.k, self.v, self.grad_out)
        if isinstance(of, HopperPairs):
            tensors = (*operands, written, self.captured[of.pairs])
            self._launch(of.launched, *map(described, of.operands, tensors), rows, self.kv_ranges)
        else:
            self._launch(of, *operands, rows, self.kv_ranges, self.seed, written)

    def _launch(self, launched: Launched, *tensors: Any) -> None:
        launch, numbers, strides = launched
        self.start(launch, (*tensors, *numbers) if strides is None else (*tensors, *numbers, self.captured, strides))

    def _found(self, asked: Found | None, of: torch.Tensor | None) -> torch.Tensor | None:
        if asked is None:
            return None
        found = self.empty(*asked.buffer)
        self._launch(asked.launched, of, found)
        return found

    def _new(self, gradient: Gradient | None) -> torch.Tensor | None:
        return None if gradient is None else self.empty(*gradient.written)

    def _keep(self, place: int, gradient: Gradient | None, found: torch.Tensor | None) -> None:
        if gradient is not None and found is not None:
            self.found[place] = gradient.finished(found, self.empty)

    def _sums(self, buffers: Sequence[Buffer]) -> tuple[torch.Tensor, ...]:
        return tuple([self.empty(*buffer) for buffer in buffers])
