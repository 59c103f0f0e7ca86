"""Attention variants written twice: eagerly, as models write them, and by hand for FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

Tensors = tuple[torch.Tensor, ...]
CAP = 50.0


@dataclass(frozen=True)
class Shape:
    """q, k and v are [batch, heads, length, dim]; the constants of the masks keep their share of the length."""

    batch: int = 2
    heads: int = 16
    length: int = 8192
    dim: int = 128

    @property
    def window(self) -> int:
        """Keys a query sees, and the length of a chunk: 1024 of 8192."""
        return self.length // 8

    @property
    def document(self) -> int:
        """1000 of 8192."""
        return self.length * 1000 // 8192

    @property
    def prefix(self) -> int:
        """2048 of 8192."""
        return self.length // 4


@dataclass(frozen=True)
class Make:
    """Makes the tensors that a variant takes besides q, k and v."""

    shape: Shape
    dtype: torch.dtype
    device: str
    generator: torch.Generator

    def randn(self, *sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=self.generator, device=self.device).to(self.dtype)


def no_extras(make: Make) -> Tensors:
    return ()


@dataclass(frozen=True)
class Variant:
    """One variant. `extras` are the tensors it takes besides q, k and v.

    eager: (shape, q, k, v, *extras) to the output [B, H, T, D].
    axes: what the dimensions of each extra tensor are, such as "BT": batch (B), heads (H), or anything else.
    score_mod, mask_mod: given (shape, *extras), FlexAttention's function; None for none.
    finish: (out, lse, *extras) to the output, where FlexAttention's own is not the variant's yet.
    """

    name: str
    eager: Callable[..., torch.Tensor]
    extras: Callable[[Make], Tensors] = no_extras
    axes: tuple[str, ...] = ()
    score_mod: Callable[..., Any] | None = None
    mask_mod: Callable[..., Any] | None = None
    finish: Callable[..., torch.Tensor] | None = None

    def make(self, shape: Shape, dtype: torch.dtype, device: str) -> Tensors:
        """q, k, v and the extras, the same at every call with the same arguments."""
        make = Make(shape, dtype, device, torch.Generator(device).manual_seed(0))
        sizes = (shape.batch, shape.heads, shape.length, shape.dim)
        return (*(make.randn(*sizes) for _ in range(3)), *self.extras(make))

    def cuts(self, along: str) -> tuple[tuple[slice, ...], ...]:
        """Of each of q, k, v and the extras, the part that belongs to the last of the `along` axes, such as "BH"."""
        axes = ("BHTD",) * 3 + self.axes
        return tuple(tuple(slice(-1, None) if axis in along else slice(None) for axis in names) for names in axes)

    def last_head(self, inputs: Tensors) -> Tensors:
        """The inputs of the last head of the last batch row."""
        return tuple(x[cut] for x, cut in zip(inputs, self.cuts("BH"), strict=True))

    def block_mask(self, shape: Shape, inputs: Tensors) -> BlockMask | None:
        """FlexAttention's block mask."""
        if self.mask_mod is None:
            return None
        batch = shape.batch if any("B" in axes for axes in self.axes) else None
        mod = self.mask_mod(shape, *inputs[3:])
        return create_block_mask(mod, batch, None, shape.length, shape.length, device=inputs[0].device.type)

    def twin(self, shape: Shape, extras: Tensors) -> Callable[..., torch.Tensor]:
        """(q, k, v, block_mask) to the output, by FlexAttention."""
        score_mod = self.score_mod(shape, *extras) if self.score_mod else None

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_mask: BlockMask | None) -> torch.Tensor:
            if self.finish is None:
                return flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask)
            out, aux = flex_attention(q, k, v, score_mod, block_mask, return_aux=AuxRequest(lse=True))
            return self.finish(out, aux.lse, *extras)

        return run


# --------------------------------------------------------------------------------------------------------------------
# The eager code


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5


def attend(s: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.matmul(F.softmax(s, dim=-1, dtype=torch.float32).to(v.dtype), v)


def positions(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.arange(q.shape[2], device=q.device)
    return at[:, None], at


def seen(s: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return s.masked_fill(~keep, float("-inf"))


def plain(c: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attend(scores(q, k), v)


def causal(c: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = positions(q)
    return attend(seen(scores(q, k), j <= i), v)


def softcap(c: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = positions(q)
    return attend(seen(torch.tanh(scores(q, k) / CAP) * CAP, j <= i), v)


def alibi(c: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    i, j = positions(q)
    s = scores(q, k)
    return attend(seen(s + (slopes[:, None, None] * (j - i)).to(s.dtype), j <= i), v)


def window(c: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = positions(q)
    return attend(seen(scores(q, k), (j <= i) & (i - j < c.window)), v)


def documents(c: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    i, j = positions(q)
    return attend(seen(scores(q, k), (ids[:, None] == ids) & (j <= i)), v)


def bias(c: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    return attend(scores(q, k) + added, v)


def padding(c: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return attend(seen(scores(q, k), keep[:, None, None, :]), v)


def prefix(c: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = positions(q)
    return attend(seen(scores(q, k), (j <= i) | (j < c.prefix)), v)


def chunked(c: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = positions(q)
    return attend(seen(scores(q, k), (j <= i) & (i // c.window == j // c.window)), v)


def sinks(c: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    i, j = positions(q)
    s = seen(scores(q, k), j <= i)
    s = torch.cat([s, sink[None, :, None, None].expand(s.shape[0], -1, s.shape[2], 1)], dim=-1)
    s = s - s.max(dim=-1, keepdim=True).values
    return torch.matmul(F.softmax(s, dim=-1)[..., :-1], v)


# --------------------------------------------------------------------------------------------------------------------
# Their twins


def flex_causal(c: Shape, *extras: torch.Tensor) -> Any:
    return lambda b, h, i, j: i >= j


def flex_softcap(c: Shape) -> Any:
    return lambda s, b, h, i, j: CAP * torch.tanh(s / CAP)


def flex_alibi(c: Shape, slopes: torch.Tensor) -> Any:
    return lambda s, b, h, i, j: s + slopes[h] * (j - i)


def flex_window(c: Shape) -> Any:
    return lambda b, h, i, j: (i >= j) & (i - j < c.window)


def flex_documents(c: Shape, ids: torch.Tensor) -> Any:
    return lambda b, h, i, j: (i >= j) & (ids[i] == ids[j])


def flex_bias(c: Shape, added: torch.Tensor) -> Any:
    return lambda s, b, h, i, j: s + added[0, h, i, j]


def flex_padding(c: Shape, keep: torch.Tensor) -> Any:
    return lambda b, h, i, j: keep[b, j]


def flex_prefix(c: Shape) -> Any:
    return lambda b, h, i, j: (i >= j) | (j < c.prefix)


def flex_chunked(c: Shape) -> Any:
    return lambda b, h, i, j: (i >= j) & (i // c.window == j // c.window)


def with_sinks(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    return out * torch.sigmoid(lse - sink[None, :, None]).to(out.dtype)[..., None]


# --------------------------------------------------------------------------------------------------------------------
# Tensors besides q, k and v


def slopes_of(make: Make) -> Tensors:
    heads = make.shape.heads
    return (torch.exp2(-8.0 / heads * torch.arange(1, heads + 1, device=make.device)),)


def document_ids(make: Make) -> Tensors:
    return (torch.arange(make.shape.length, device=make.device) // make.shape.document,)


def dense_bias(make: Make) -> Tensors:
    return (make.randn(1, make.shape.heads, make.shape.length, make.shape.length),)


def kept_keys(make: Make) -> Tensors:
    """All keys of the first batch row, fewer of each that follows."""
    batch, length = make.shape.batch, make.shape.length
    lengths = length - torch.arange(batch, device=make.device) * (length // (batch + 1))
    return (torch.arange(length, device=make.device) < lengths[:, None],)


def sink_of_each_head(make: Make) -> Tensors:
    return (make.randn(make.shape.heads),)


VARIANTS = (
    Variant("plain", plain),
    Variant("causal", causal, mask_mod=flex_causal),
    Variant("softcap, causal", softcap, score_mod=flex_softcap, mask_mod=flex_causal),
    Variant("ALiBi, causal", alibi, slopes_of, ("H",), score_mod=flex_alibi, mask_mod=flex_causal),
    Variant("window 1024, causal", window, mask_mod=flex_window),
    Variant("documents of 1000, causal", documents, document_ids, ("T",), mask_mod=flex_documents),
    Variant("dense bias (1, H, S, S)", bias, dense_bias, ("1HST",), score_mod=flex_bias),
    Variant("key padding", padding, kept_keys, ("BT",), mask_mod=flex_padding),
    Variant("prefix 2048", prefix, mask_mod=flex_prefix),
    Variant("chunks of 1024, causal", chunked, mask_mod=flex_chunked),
    Variant("sinks, causal", sinks, sink_of_each_head, ("H",), mask_mod=flex_causal, finish=with_sinks),
)
