"""Decode steps to measure: their sizes, and the tensors that take turns."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Point:
    """One decode step: a query for each of `heads` query heads, and `kv_len` keys and values of `kv_heads` heads."""

    batch: int
    heads: int
    kv_heads: int
    kv_len: int
    dim: int

    def __str__(self) -> str:
        length = f"{self.kv_len // 1024}k" if self.kv_len % 1024 == 0 else str(self.kv_len)
        return f"B{self.batch} H{self.heads}/{self.kv_heads} KV{length} D{self.dim}"

    @property
    def groups(self) -> int:
        return self.heads // self.kv_heads

    @property
    def family(self) -> tuple[int, int, int]:
        """What compiled code may depend on."""
        return self.heads, self.kv_heads, self.dim

    def kv_bytes(self, dtype: torch.dtype) -> int:
        return 2 * self.batch * self.kv_heads * self.kv_len * self.dim * dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """everything, some: the points where every peer is measured, and where only those are that compile little.

    rotated_bytes: of keys and values that take turns, in at most `max_sets` sets; a set may be larger.
    read_bytes: read to find the device's bandwidth.
    """

    everything: tuple[Point, ...]
    some: tuple[Point, ...]
    dtype: torch.dtype
    rotated_bytes: int
    max_sets: int
    read_bytes: int

    @property
    def points(self) -> tuple[Point, ...]:
        """All, those that share compiled code one after the other."""
        return tuple(sorted((*self.everything, *self.some), key=lambda p: self.families.index(p.family)))

    @property
    def families(self) -> list[tuple[int, int, int]]:
        return list(dict.fromkeys(p.family for p in (*self.everything, *self.some)))

    def sets(self, point: Point) -> int:
        return min(max(1, -(-self.rotated_bytes // point.kv_bytes(self.dtype))), self.max_sets)


def _points(batches: tuple[int, ...], lengths: tuple[int, ...], *family: int) -> tuple[Point, ...]:
    heads, kv_heads, dim = family
    return tuple(Point(b, heads, kv_heads, n, dim) for b, n in itertools.product(batches, lengths))


K = 1024
MAIN = (32, 8, 128)
OTHERS = ((28, 4, 128), (16, 16, 128), (32, 8, 64), (32, 8, 256))
FULL = Plan(
    everything=_points((1, 8, 64), (1 * K, 8 * K, 32 * K, 128 * K), *MAIN),
    some=tuple(Point(b, heads, kv_heads, n * K, dim) for heads, kv_heads, dim in OTHERS
               for b, n in ((1, 1), (1, 8), (1, 32), (8, 8), (8, 32), (64, 8))),
    dtype=torch.bfloat16, rotated_bytes=2**30, max_sets=64, read_bytes=2**32,
)  # fmt: skip
QUICK = dataclasses.replace(FULL, everything=_points((1, 8, 64), (1 * K, 8 * K, 32 * K), *MAIN), some=())
# float16: the interpreter of Triton 3.6 multiplies bfloat16 wrongly.
TINY = Plan(
    everything=_points((1, 2), (48, 80), 4, 2, 16), some=_points((2,), (48,), 2, 2, 16),
    dtype=torch.float16, rotated_bytes=2**14, max_sets=3, read_bytes=2**16,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Operands:
    """A point's tensors: sets of (q [B, Hq, 1, D], k and v [B, Hkv, KV, D]), of which none but the next is read."""

    point: Point
    sets: tuple[Tensors, ...]

    @staticmethod
    def make(point: Point, plan: Plan, device: str) -> Operands:
        generator = torch.Generator(device).manual_seed(0)

        def randn(heads: int, length: int) -> torch.Tensor:
            x = torch.empty(point.batch, heads, length, point.dim, dtype=plan.dtype, device=device)
            return x.normal_(generator=generator)

        sizes = ((point.heads, 1), (point.kv_heads, point.kv_len), (point.kv_heads, point.kv_len))
        return Operands(point, tuple(tuple(randn(*size) for size in sizes) for _ in range(plan.sets(point))))

    @property
    def device(self) -> torch.device:
        return self.sets[0][0].device

    @property
    def looked_at(self) -> tuple[int, int]:
        """The first set and the last."""
        return 0, len(self.sets) - 1

    def sample(self) -> Tensors:
        """Of the sets looked at, the operands of the first and of the last key head, as [4, heads, length, D]."""
        groups = self.point.groups
        sets = [self.sets[at] for at in self.looked_at]
        parts = [(q[:1, :groups], k[:1, :1], v[:1, :1]) for q, k, v in sets]
        parts += [(q[-1:, -groups:], k[-1:, -1:], v[-1:, -1:]) for q, k, v in sets]
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def sampled(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """What of the sets' outputs belongs to `sample`."""
        groups = self.point.groups
        outs = [outputs[at] for at in self.looked_at]
        return torch.cat([*(out[:1, :groups] for out in outs), *(out[-1:, -groups:] for out in outs)])
