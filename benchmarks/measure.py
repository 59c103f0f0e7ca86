"""Timing peers side by side on one GPU: they take turns, in shuffled rounds, and report medians."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import triton
from triton.testing import do_bench

from examples import measure as memory

ROUNDS = 4
PAUSE_SECONDS = 0.15
# Device time spent on a cold run in a round, and how often it runs in that.
LAP_MS = 10.0
LAPS = (3, 20)

Run = Callable[[], torch.Tensor]
Name = TypeVar("Name")
Result = TypeVar("Result")


def require_cuda(program: str) -> None:
    """Exit where there is no device to measure on."""
    if not torch.cuda.is_available():
        raise SystemExit(f"{program} needs a CUDA device")


def versions() -> str:
    """The device and the versions that figures belong to."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{device}, torch {torch.__version__}, triton {triton.__version__}"


def measure(
    runs: Mapping[Name, Callable[[], object]], rounds: int = ROUNDS, pause: float = PAUSE_SECONDS
) -> dict[Name, list[float]]:
    """Milliseconds of each run, one median a round; a pause before each, so that clocks and power treat all alike."""
    times: dict[Name, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            time.sleep(pause)
            times[name].append(do_bench(runs[name], warmup=4, rep=25, return_mode="median"))
    return times


def peak_bytes(run: Run, device: str = "cuda") -> int:
    """The most memory that torch held during a run above what it held before; the run has been compiled."""
    return memory.peak_bytes(run, torch.device(device))


def milliseconds(run: Callable[[], object], device: str = "cuda") -> float:
    """The median time of a run that brings data of its own that no cache holds; nothing is flushed."""
    if device == "cpu":
        return 1e3 * memory.seconds(run, torch.device(device), repeats=1)
    marks = [_marks(run)]
    torch.cuda.synchronize()
    count = int(LAP_MS / max(marks[0][0].elapsed_time(marks[0][1]), 1e-3))
    marks = [_marks(run) for _ in range(min(max(count, LAPS[0]), LAPS[1]))]
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def _marks(run: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    return start, end


def measure_cold(
    runs: Mapping[Name, Callable[[], object]], rounds: int, device: str = "cuda"
) -> dict[Name, list[float]]:
    """`milliseconds` of each run, one a round, in shuffled rounds."""
    times: dict[Name, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            times[name].append(milliseconds(runs[name], device))
    return times


def graphed(run: Callable[[], Result], pool: Any = None) -> Callable[[], Result]:
    """The run's launches, captured in a CUDA graph.

    pool: where graphs that never run at a time find their memory, from `torch.cuda.graph_pool_handle`.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = run()

    def replay() -> Result:
        graph.replay()
        return out

    return replay


def why(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
