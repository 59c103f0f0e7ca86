"""How fast the device reads memory at best: the roof of a decode step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import triton
import triton.language as tl

from benchmarks.measure import milliseconds

ROW = 4096
# Elements of a tile, tiles of a program, warps.
READERS = ((4096, 4, 8), (8192, 4, 8), (2048, 16, 4), (8192, 16, 16))


@triton.jit
def read_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """out[p] = the sum of the TILES tiles of BLOCK elements that are program p's."""
    offs = tl.program_id(0).to(tl.int64) * (BLOCK * TILES) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for tile in tl.static_range(TILES):
        total += tl.load(x_ptr + offs + tile * BLOCK)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def best_read(size: int, device: str) -> tuple[float, str]:
    """Bytes a second, and who read `size` bytes so fast: reductions and a copy (whose writes count too)."""
    x = torch.ones(size // 4, dtype=torch.float32, device=device)
    moved = {name: (run, size) for name, run in _readers(x).items()}
    target = torch.empty_like(x)
    moved["copy"] = (lambda: target.copy_(x), 2 * size)
    rates = {name: count / (1e-3 * milliseconds(run, device)) for name, (run, count) in moved.items()}
    name = max(rates, key=lambda n: rates[n])
    return rates[name], name


def _readers(x: torch.Tensor) -> Mapping[str, Callable[[], torch.Tensor]]:
    """Those whose sums are right."""
    readers: dict[str, Callable[[], torch.Tensor]] = {"torch.sum": lambda: x.view(-1, ROW).sum(1)}
    if x.is_cuda:
        readers |= {f"Triton {r}": _reader(x, *r) for r in READERS if x.numel() % (r[0] * r[1]) == 0}
    return {name: run for name, run in readers.items() if run().sum(dtype=torch.float64).item() == x.numel()}


def _reader(x: torch.Tensor, block: int, tiles: int, warps: int) -> Callable[[], torch.Tensor]:
    programs = x.numel() // (block * tiles)

    def run() -> torch.Tensor:
        out = torch.empty(programs, dtype=torch.float32, device=x.device)
        read_kernel[(programs,)](x, out, block, tiles, num_warps=warps)
        return out

    return run
