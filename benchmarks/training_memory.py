"""Peak memory of a training step of one causal layer as the sequence grows, as a plot and as numbers."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import flashfuse
from benchmarks.measure import versions, why
from benchmarks.steps import Step, Tensors, peak_bytes
from benchmarks.table import allowed_error, relative_error
from benchmarks.training_cases import causal_attention
from tests.forms import exact

HEADS, HEAD_DIM = 16, 64
LENGTHS = tuple(2**power for power in range(10, 17))
TINY_LENGTHS = (64, 128, 256)
NAME = "training_memory"
PEERS = ("flashfuse", "flex", "inductor")


class Layer(nn.Module):
    """Causal self-attention with its projections; `attend` takes q, k, v [B, H, T, D] and whatever follows x."""

    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.attend = attend
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, *others: Any) -> torch.Tensor:
        """x and result: [B, T, width]."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(q, k, v, *others).transpose(1, 2).reshape(batch, length, width))


@dataclass(frozen=True)
class Point:
    """Bytes held during a step above those before, at a length; or what stood in the way."""

    peer: str
    length: int
    bytes: int | None = None
    note: str = ""


def measure(folder: Path, device: str, tiny: bool) -> None:
    """Print every point as it comes; write NAME.json and NAME.png into `folder`."""
    points: list[Point] = []
    for peer in PEERS:
        for point in series(peer, TINY_LENGTHS if tiny else LENGTHS, device):
            points.append(point)
            print(f"{peer:12}{point.length:>8}  {_mebibytes(point)}", flush=True)
        if exponent := growth(points, peer):
            print(f"{peer:12}grows as length^{exponent:.2f}")
    entries = {
        "where": versions(),
        "layer": f"B1 H{HEADS} D{HEAD_DIM}, causal, bf16",
        "points": list(map(asdict, points)),
    }
    (folder / f"{NAME}.json").write_text(json.dumps(entries, indent=1))
    plot(folder / f"{NAME}.png", points)


def series(peer: str, lengths: tuple[int, ...], device: str) -> Iterator[Point]:
    """The peer's points up to the length that it cannot do, after its gradients were checked at the shortest."""
    torch._dynamo.reset()
    flashfuse.reset()
    torch.manual_seed(0)
    layer = Layer(flex_attend if peer == "flex" else causal_attention).to(device, torch.bfloat16)
    backend = "flashfuse" if peer == "flashfuse" else "inductor"
    run = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for length in lengths:
        try:
            step = step_of(peer, layer, run, length)
            found = step.whole()
            problem = mistake(layer, step, found) if length == lengths[0] else None
            if peer == "flashfuse" and not flashfuse.reports()[-1].sites:
                problem = "not fused: " + "; ".join(map(str, flashfuse.reports()[-1].refusals))
            del found
            point = Point(peer, length, note=problem) if problem else Point(peer, length, peak_bytes(step))
        except Exception as error:
            point = Point(peer, length, note=why(error))
        yield point
        if point.bytes is None:
            return


def step_of(peer: str, layer: Layer, run: Callable[..., torch.Tensor], length: int) -> Step:
    """The step on random tokens, the same for every peer; gradients of the tokens and the layer's parameters."""
    like = layer.out.weight
    generator = torch.Generator(like.device).manual_seed(length)
    sizes = (1, length, HEADS * HEAD_DIM)
    x, grad_out = (torch.randn(sizes, device=like.device, generator=generator).to(like.dtype) for _ in range(2))
    others = (causal_mask(length, like.device.type),) if peer == "flex" else ()
    return Step(functools.partial(run, x.requires_grad_(), *others), (x, *layer.parameters()), grad_out)


def mistake(layer: Layer, step: Step, found: Tensors) -> str | None:
    """What is wrong with (output, *gradients): errors against float64 of more than twice eager's."""
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        same = Layer(causal_attention).to(step.device, torch.bfloat16)
        same.load_state_dict(layer.state_dict())
        x = step.leaves[0].detach().to(dtype).requires_grad_()
        forward = (
            functools.partial(exact, same.to(dtype), (x,)) if dtype == torch.float64 else functools.partial(same, x)
        )
        results.append(Step(forward, (x, *same.parameters()), step.grad_out.to(dtype)).whole())
    for at, (mine, theirs, truth) in enumerate(zip(found, *results, strict=True)):
        error, allowed = relative_error(mine, truth), allowed_error(relative_error(theirs, truth), mine.dtype)
        if error > allowed:
            return f"wrong result {at}: relative error {error:.1e}, allowed {allowed:.1e}"
    return None


def flex_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    return flex_attention(q, k, v, block_mask=mask)


def causal_mask(length: int, device: str) -> BlockMask:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)


def growth(points: list[Point], peer: str) -> float | None:
    """The exponent of the length between the peer's last two points."""
    known = [(p.length, p.bytes) for p in points if p.peer == peer and p.bytes]
    if len(known) < 2:
        return None
    (short, less), (long, more) = known[-2:]
    return math.log(more / less) / math.log(long / short)


def plot(path: Path, points: list[Point]) -> None:
    """Both axes logarithmic, a line for each peer."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for peer in PEERS:
        known = [(p.length, p.bytes / 2**20) for p in points if p.peer == peer and p.bytes]
        if known:
            axes.plot(*zip(*known, strict=True), marker="o", label=peer)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(
        xlabel="tokens",
        ylabel="MiB above what was held before",
        title="peak memory of a training step, one causal layer",
    )
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _mebibytes(point: Point) -> str:
    return point.note if point.bytes is None else f"{point.bytes / 2**20:.1f} MiB"
