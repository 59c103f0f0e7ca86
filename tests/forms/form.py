"""`Form`: one attention as model code writes it, in several spellings, and what has to be recovered from each.

A spelling is what stands in a model's `forward`: a function of the module (for its numbers) and of tensors. Its inputs
are random and far from uniform, so that a wrong mask, scale or bias shows in the output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .same_dropout import SEED, SameDropout

# What a spelling is: a function of its module and of tensors, or a module class that is built from `Sizes`.
Spelling = Callable[..., Any]


@dataclass(frozen=True)
class Sizes:
    """The numbers of a model's configuration, and the lengths it is called with.

    window, chunk: of masks. buckets: of relative position tables. They are far below the lengths.
    """

    batch: int = 2
    heads: int = 4
    q_len: int = 12
    kv_len: int = 12
    dim: int = 8
    value_dim: int = 6
    window: int = 5
    chunk: int = 4
    buckets: int = 8

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the image whose pixels are the queries."""
        height = next(h for h in range(math.isqrt(self.q_len), 0, -1) if self.q_len % h == 0)
        return height, self.q_len // height


@dataclass(frozen=True)
class Make:
    """Makes the inputs of one call."""

    sizes: Sizes
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers, rounded to the element type."""
        x = torch.randn(shape, generator=self.generator, device=self.device)
        return (x * scale).to(self.dtype)

    def chance(self, *shape: int, of: float = 0.5) -> torch.Tensor:
        """Booleans that are True with this probability."""
        return torch.rand(shape, generator=self.generator, device=self.device) < of

    def queries(self) -> torch.Tensor:
        """[B, H, Tq, D]"""
        c = self.sizes
        return self.randn(c.batch, c.heads, c.q_len, c.dim)

    def keys(self) -> torch.Tensor:
        """[B, H, Tkv, D]"""
        c = self.sizes
        return self.randn(c.batch, c.heads, c.kv_len, c.dim)

    def values(self) -> torch.Tensor:
        """[B, H, Tkv, Dv]"""
        c = self.sizes
        return self.randn(c.batch, c.heads, c.kv_len, c.value_dim)

    def qkv(self) -> tuple[torch.Tensor, ...]:
        return self.queries(), self.keys(), self.values()

    def shaped(self, letters: str, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers of a shape such as "B1ST": batch, heads, queries (S), keys (T) or 1."""
        c = self.sizes
        extent = {"B": c.batch, "H": c.heads, "S": c.q_len, "T": c.kv_len, "1": 1}
        return self.randn(*(extent[letter] for letter in letters), scale=scale)


@dataclass(frozen=True)
class Expect:
    """What the spec of every site must say. Texts are regular expressions.

    score: each occurs in the score program's text.
    mask: matches the mask's description from its beginning.
    squares: how many captured tensors have an element for each score; None where the source leaves a choice.
    sites: how many attentions the code holds.
    normaliser, empty_row: the spec's; None where it does not matter.
    dropout: the probability.
    sink, factor, key, value: occurs in the text of that program, which is "none" where the spec has none.
    """

    score: tuple[str, ...] = (r"qk \* 0\.3535",)
    mask: str = "none$"
    squares: int | None = 0
    sites: int = 1
    normaliser: str = "softmax"
    empty_row: str | None = None
    sink: str = "none"
    factor: str = "none"
    key: str = "none"
    value: str = "none"
    dropout: float = 0.0


def plain_inputs(make: Make) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values."""
    return make.qkv()


@dataclass(frozen=True)
class Form:
    """One attention in several spellings.

    inputs: makes what every spelling is called with.
    more_keys: whether there are more keys than queries, as with a cache.
    empty: what a row whose keys are all masked gives ("nan", "zero", "mean" of the values); None where no row is.
    fp16: whether the code's constants fit in float16.
    """

    name: str
    spellings: tuple[Spelling, ...]
    expect: Expect
    inputs: Callable[[Make], tuple[torch.Tensor, ...]] = plain_inputs
    more_keys: bool = False
    empty: str | None = None
    fp16: bool = True

    def sizes(self, sizes: Sizes) -> Sizes:
        """The lengths this form is called with."""
        return dataclasses.replace(sizes, kv_len=sizes.q_len + (sizes.q_len // 2 if self.more_keys else 0))

    def make(self, sizes: Sizes, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[torch.Tensor, ...]:
        """The inputs, the same at every call with the same arguments."""
        generator = torch.Generator(device).manual_seed(0)
        return self.inputs(Make(self.sizes(sizes), dtype, torch.device(device), generator))


class Attention(nn.Module):
    """A model's attention module: its configuration's numbers are attributes."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        for field in dataclasses.fields(sizes):
            setattr(self, field.name, getattr(sizes, field.name))
        self.scale, self.grid = sizes.scale, sizes.grid


class Written(Attention):
    """A module whose forward is a spelling."""

    def __init__(self, sizes: Sizes, spelling: Spelling) -> None:
        super().__init__(sizes)
        self.spelling = spelling

    def forward(self, *inputs: Any) -> Any:
        return self.spelling(self, *inputs)


def module(spelling: Spelling, sizes: Sizes) -> nn.Module:
    """The module of a spelling."""
    built = spelling(sizes) if isinstance(spelling, type) else Written(sizes, spelling)
    return built.eval()


def exact(built: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What the module computes from the same numbers in float64, also where its code asks for a narrower type.

    The smallest number that it masks with stays the one of the inputs' own type.
    """
    own = next(x.dtype for x in inputs if x.is_floating_point())
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    with widened(own):
        return eager(built, tuple(wide))


@contextlib.contextmanager
def widened(own: torch.dtype) -> Iterator[None]:
    """float64 tensors are meant to be of the type `own`, and stay float64."""
    of_type = torch.finfo
    with Wide(), patch.object(torch, "finfo", lambda dtype: of_type(own if dtype == torch.float64 else dtype)):
        yield


def eager(built: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What the module computes, where it drops at random from the seed that a graph draws."""
    torch.manual_seed(SEED)
    with SameDropout():
        return built(*inputs)


class Wide(TorchFunctionMode):
    """Keeps float64 tensors float64: casts and `dtype=` arguments that would narrow one are ignored."""

    NARROW = (torch.float16, torch.bfloat16, torch.float32)
    CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if not (isinstance(first, torch.Tensor) and first.dtype == torch.float64):
            return func(*args, **kwargs)
        if func in self.CASTS:
            return first
        widened = [torch.float64 if any(a is d for d in self.NARROW) else a for a in args]
        named = {k: torch.float64 if any(a is d for d in self.NARROW) else a for k, a in kwargs.items()}
        return func(*widened, **named)
