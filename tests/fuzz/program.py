"""`Program`: one generated function with its inputs, as Python source that runs, and that can be pasted as a test."""

from __future__ import annotations

import linecache
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

Sizes = Mapping[str, int]
Axes = tuple[str, ...]

# What an input is made by: Python over its shape, the length of its last axis (n) and its element type.
KINDS: Mapping[str, str] = {
    "normal": "torch.randn({shape}, dtype=torch.float64).to({dtype})",
    "offsets": "torch.randn({shape}, dtype=torch.float64).to({dtype})",
    "large": "(4 * torch.randn({shape}, dtype=torch.float64)).to({dtype})",
    "weights": "(torch.randn({shape}, dtype=torch.float64) * 0.3).to({dtype})",
    "positive": "(torch.rand({shape}, dtype=torch.float64) + 0.5).to({dtype})",
    "strided": "torch.randn({longer}, dtype=torch.float64).to({dtype})[..., ::2]",
    "tail": "torch.randn({longer}, dtype=torch.float64).to({dtype})[..., {n}:]",
    "turned": "torch.randn({turned}, dtype=torch.float64).to({dtype}).mT",
    "shared": "torch.randn({shared}, dtype=torch.float64).to({dtype}).expand({shape})",
    "kept": "torch.rand({shape}) < 0.7",
    "mostly": "torch.rand({shape}) < 0.97",
    "rarely": "torch.rand({shape}) < 0.2",
    "triangle": "torch.ones({shape}).tril().bool()",
    "bits": "(torch.rand({shape}) < 0.7).long()",
    "ones": "(torch.rand({shape}) < 0.7).to({dtype})",
    "infinite": "torch.zeros({shape}).masked_fill(torch.rand({shape}) < 0.2, -math.inf).to({dtype})",
    "minimal": "torch.zeros({shape}, dtype={dtype}).masked_fill(torch.rand({shape}) < 0.3, torch.finfo({dtype}).min)",
    "documents": "torch.randint(0, 3, ({shape},)).sort(-1).values",
    "lengths": "torch.randint(1, {keys} + 1, ({shape},))",
    "positions": "torch.arange({n}).expand({shape}) + torch.randint(0, 3, ({first}, 1))",
    "buckets": "torch.randint(0, 5, ({shape},))",
}
# What all keys of a row have in common has the gradient 0, and what is computed is rounding alone (numerics.md, 5).
WITHOUT_GRADIENT = frozenset({"offsets"})


@dataclass(frozen=True)
class Input:
    name: str
    axes: Axes
    kind: str

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """An axis of several letters is those axes in one; a digit is a length itself."""
        return tuple(math.prod(int(x) if x.isdigit() else sizes[x] for x in axis) for axis in self.axes)

    def expression(self, sizes: Sizes, dtype: torch.dtype) -> str:
        """The Python that makes it."""
        shape = self.shape(sizes)
        last = shape[-1] if shape else 1
        return KINDS[self.kind].format(
            shape=_listed(shape),
            longer=_listed((*shape[:-1], 2 * last)),
            turned=_listed((*shape[:-2], *shape[:-3:-1])),
            shared=_listed((1, *shape[1:])),
            first=shape[0] if shape else 1,
            keys=sizes["t"],
            n=last,
            dtype=dtype,
        )


def _listed(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape)) if shape else "()"


@dataclass(frozen=True, repr=False)
class Program:
    """A function `attention` of tensors.

    lines: its body. sizes: the axes' lengths, for each call of it; more than one where lengths are dynamic.
    sites: how many attentions have to be found; None where a program only looks like attention.
    refused: the codes of refusals that are right instead.
    trains: whether gradients are asked for. left_open: whether rows that are not finite in float64 are left open, as
    where exponentials of scores overflow or vanish, and those of differences from a row's maximum do not. curved:
    whether scores are under a function, which may be flat where no mask is.
    """

    inputs: tuple[Input, ...]
    lines: tuple[str, ...]
    sizes: tuple[Sizes, ...]
    dtype: torch.dtype
    sites: int | None
    refused: frozenset[str] = frozenset()
    trains: bool = False
    left_open: bool = False
    curved: bool = False
    labels: tuple[str, ...] = field(default=(), compare=False)

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def source(self) -> str:
        first = f"def attention({', '.join(i.name for i in self.inputs)}):"
        return "\n".join((first, *(f"    {line}" for line in self.lines)))

    def function(self) -> Callable[..., Any]:
        """The function, whose lines tracebacks and refusals can show."""
        source = self.source + "\n"
        name = f"<program {abs(hash(source)):x}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        scope: dict[str, Any] = {"torch": torch, "F": F, "math": math}
        exec(compile(source, name, "exec"), scope)
        return scope["attention"]

    def make(self, call: int = 0, seed: int = 0) -> list[torch.Tensor]:
        """The inputs of one of its calls."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            scope = {"torch": torch, "math": math}
            return [eval(i.expression(self.sizes[call], self.dtype), scope) for i in self.inputs]

    def __repr__(self) -> str:
        """As a test."""
        made = [f"    {i.name} = {i.expression(self.sizes[0], self.dtype)}" for i in self.inputs]
        calls = [f"# also called with {dict(sizes)}" for sizes in self.sizes[1:]]
        names = ", ".join(i.name for i in self.inputs)
        expected = "right" if self.sites is None else f"{self.sites} fused"
        return "\n".join((
            f"# {self.dtype}, {expected}{', trained' if self.trains else ''}; {', '.join(self.labels)}", *calls,
            self.source, "", "", "def test_found() -> None:", "    torch.manual_seed(0)", *made,
            f"    check_fused(attention, {names}, sites={self.sites or 0})",
        ))  # fmt: skip
