"""Part 3: peak memory of one attention layer as the sequence grows, for eager, Inductor and flashfuse."""

from __future__ import annotations

import math

import measure
import torch
from peers import NAMES
from rich.console import Console
from rich.table import Table
from torch import nn

HEADS, HEAD_DIM, WINDOW = 4, 64, 512
LENGTHS = {"cpu": (512, 1024, 2048, 4096), "cuda": (2048, 4096, 8192, 16384)}


class WindowedAttention(nn.Module):
    """Causal attention over the last 512 positions, as one writes it first: no library call, no special layout."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x and result: [B, T, width]."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(HEAD_DIM)
        i = torch.arange(length, device=x.device)[:, None]
        j = torch.arange(length, device=x.device)[None, :]
        scores = scores.masked_fill((j > i) | (j <= i - WINDOW), float("-inf"))
        probs = scores.softmax(dim=-1)
        return self.out((probs @ v).transpose(1, 2).reshape(batch, length, width))


def long_sequence(console: Console, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Memory against length. Returns what grows as it should not, or disagrees."""
    layer = WindowedAttention().to(device, dtype).eval()
    inputs = {n: torch.randn(1, n, HEADS * HEAD_DIM, device=device, dtype=dtype) for n in LENGTHS[device.type]}
    outputs: dict[str, torch.Tensor] = {}
    growth: dict[str, float] = {}
    columns = [f"{n}: MiB, ms" for n in inputs]
    table = Table("windowed causal layer", *columns, "memory grows as", title="long sequences", title_justify="left")
    for name, label in NAMES.items():
        torch._dynamo.reset()
        run = layer if name == "eager" else torch.compile(layer, backend=name, dynamic=True)
        peaks, times = [], []
        for n, x in inputs.items():
            with console.status(f"long sequences: {name}, length {n}"):
                outputs[name] = run(x)
                peaks.append(measure.peak_bytes(lambda: run(x), device))  # noqa: B023
                times.append(measure.seconds(lambda: run(x), device, repeats=3))  # noqa: B023
        lengths = list(inputs)
        growth[name] = math.log(peaks[-1] / peaks[0]) / math.log(lengths[-1] / lengths[0])
        cells = [f"{peak / 2**20:.1f}, {1e3 * took:.1f}" for peak, took in zip(peaks, times, strict=True)]
        table.add_row(label, *cells, f"length^{growth[name]:.2f}")
    console.print(table)
    problems = []
    if growth["flashfuse"] > 1.2:
        problems.append(f"long sequences: flashfuse's memory grows as length^{growth['flashfuse']:.2f}")
    if growth["eager"] < 1.7:
        problems.append(f"long sequences: eager's memory grows as length^{growth['eager']:.2f}, which it cannot")
    exact = layer.double()(inputs[max(inputs)].double())
    if wrong := measure.disagreement(outputs["flashfuse"], outputs["eager"], exact):
        problems.append(f"long sequences: {wrong}")
    return problems
