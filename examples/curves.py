"""Whether loss curves lie on each other, and their plot.

A curve is smoothed by a moving average, since single batches are noise; two are as far apart as the smoothed ones are
where they are furthest apart. A compiler passes when its curve is no further from eager's than that of a second eager
seed: so much differs from run to run with no compiler at all. Equal they cannot be, since a compiler draws other
dropout masks from the same seed. A seed also decides weights and batches, which the compared runs share; a right
compiler is therefore well within (less than half of the way, when measured), and passes by no luck.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import matplotlib
from matplotlib import pyplot

matplotlib.use("agg")

WINDOWS = 10


def smoothed(losses: Sequence[float]) -> list[float]:
    """The averages over a tenth of the curve, [steps - window + 1]."""
    window = max(1, len(losses) // WINDOWS)
    sums = [0.0, *accumulate(losses)]
    return [(after - before) / window for before, after in zip(sums, sums[window:], strict=False)]


def gaps(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """How far apart two curves are, where they are."""
    return [abs(a - b) for a, b in zip(smoothed(one), smoothed(other), strict=True)]


def within_noise(curve: Sequence[float], eager: Sequence[float], second: Sequence[float]) -> bool:
    """Whether `curve`, finite throughout, is no further from eager's than the curve of the second eager seed is."""
    return all(map(math.isfinite, curve)) and max(gaps(curve, eager)) <= max(gaps(second, eager))


def plot(path: Path, title: str, curves: Mapping[str, Sequence[float]], eager: str) -> None:
    """Write a PNG: the smoothed curves, and below how far each is from the one called `eager`."""
    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(8, 7), height_ratios=(2, 1), layout="constrained")
    for name, losses in curves.items():
        averages = smoothed(losses)
        steps = range(len(losses) - len(averages) + 1, len(losses) + 1)
        (line,) = above.plot(steps, averages, label=name)
        above.plot(range(1, len(losses) + 1), losses, color=line.get_color(), alpha=0.15)
        if name != eager:
            below.plot(steps, gaps(losses, curves[eager]), label=name, color=line.get_color())
    above.set(title=title, ylabel="training loss (nats a byte)")
    below.set(xlabel="step", ylabel=f"distance from {eager}", ylim=(0, None))
    above.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
