"""Forward and backward of one peer, timed apart; on a CPU too, where only the logic is of interest.

A step runs forward, then backward. On a GPU events part the two, so that the backward pass is timed after its own
forward pass, as in training; and the host is ahead, as it is in a model of many layers: its time is not counted.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.measure import PAUSE_SECONDS, Run, graphed, measure, why
from examples import measure as memory

Tensors = tuple[torch.Tensor, ...]
# Device time spent on a peer in a round, and how often it runs in that.
LAP_MS = 30.0
LAPS = (3, 40)
# More than the L2 cache holds: written before every step, as Triton's own benchmark does.
FLUSHED_BYTES = 256 * 2**20
# What a device waits before every step, some 2 ms: by then the host has launched all of it.
WAIT_CYCLES = 4_000_000


@dataclass(frozen=True, eq=False)
class Step:
    """forward: makes the output, with history. Its gradient `grad_out` goes back to `leaves`."""

    forward: Run
    leaves: Tensors
    grad_out: torch.Tensor

    def backward(self, out: torch.Tensor) -> Tensors:
        """The gradients of the leaves; frees the history."""
        return torch.autograd.grad(out, self.leaves, self.grad_out)

    def whole(self) -> Tensors:
        """(output, *gradients)."""
        out = self.forward()
        return out.detach(), *self.backward(out)

    @property
    def device(self) -> torch.device:
        return self.grad_out.device


@dataclass(frozen=True)
class Times:
    """Milliseconds, medians of a round."""

    forward: float
    backward: float


def peak_bytes(step: Step) -> int:
    """The most memory held during a step above what was held before; the step has been compiled."""
    return memory.peak_bytes(step.whole, step.device)


def repeats_itself(step: Step) -> bool:
    """Whether two runs give the same gradients, bit by bit."""
    return all(torch.equal(one, other) for one, other in zip(step.whole()[1:], step.whole()[1:], strict=True))


def measure_steps(steps: Mapping[str, Step], rounds: int) -> dict[str, Times]:
    """The median round of every step; peers take turns, after a pause each."""
    found: dict[str, list[Times]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            time.sleep(PAUSE_SECONDS)
            found[name].append(_laps(steps[name]))
    return {name: _median(times) for name, times in found.items()}


def measure_graphed(steps: Mapping[str, Step], rounds: int, notes: dict[str, str]) -> dict[str, Times]:
    """The same of a forward pass captured in a CUDA graph, and of what a captured step takes longer.

    notes: gets why a step could not be captured; it is left out.
    """
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, step in steps.items():
        try:
            runs |= {(name, "forward"): graphed(step.forward), (name, "whole"): graphed(step.whole)}
        except Exception as error:
            notes[name] = why(error)
    medians = {key: statistics.median(times) for key, times in measure(runs, rounds).items()}
    captured = [name for name in steps if (name, "whole") in medians]
    return {
        name: Times(medians[name, "forward"], medians[name, "whole"] - medians[name, "forward"]) for name in captured
    }


def _laps(step: Step) -> Times:
    first = _lap(step, None)
    count = int(LAP_MS / max(first.forward + first.backward, 1e-3))
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=step.device) if step.device.type == "cuda" else None
    return _median([_lap(step, flushed) for _ in range(min(max(count, LAPS[0]), LAPS[1]))])


def _lap(step: Step, flushed: torch.Tensor | None) -> Times:
    if flushed is not None:
        flushed.zero_()
        torch.cuda._sleep(WAIT_CYCLES)
    clock = _DeviceClock() if step.device.type == "cuda" else _HostClock()
    clock.mark()
    out = step.forward()
    clock.mark()
    step.backward(out)
    clock.mark()
    return Times(*clock.laps())


def _median(times: Sequence[Times]) -> Times:
    return Times(statistics.median(t.forward for t in times), statistics.median(t.backward for t in times))


class _HostClock:
    """Milliseconds between marks."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def laps(self) -> tuple[float, ...]:
        return tuple(1e3 * (b - a) for a, b in zip(self.marks, self.marks[1:], strict=False))


class _DeviceClock:
    """The same by events on the GPU's stream."""

    def __init__(self) -> None:
        self.marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        self.marks.append(torch.cuda.Event(enable_timing=True))
        self.marks[-1].record()

    def laps(self) -> tuple[float, ...]:
        torch.cuda.synchronize()
        return tuple(a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:], strict=False))
