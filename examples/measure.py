"""Time, peak memory and agreement, measured the same way for every compiler of the demo."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

ULPS = 8


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median wall time of `call`, which has run before."""
    times = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory torch's allocator held during `call`, above what it held before."""
    if device.type == "cuda":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The CPU allocator keeps no peak, but tells the profiler of every allocation (+) and every release (-).
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def disagreement(actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> str | None:
    """None where `actual` keeps docs/numerics.md's rule: an error against float64 of at most twice eager's."""
    error = (actual.double() - exact).abs().max().item()
    scale = exact.abs().max().item() * torch.finfo(eager.dtype).eps
    allowed = 2 * (eager.double() - exact).abs().max().item() + ULPS * scale
    return None if error <= allowed else f"error {error:.3g}, allowed {allowed:.3g}"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
