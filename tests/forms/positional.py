"""Masks made of positions alone, with every fill, and rows that they leave without a key."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .bodies import causal, functional, hugging_face, lucidrains, minimum, nano_gpt, positions
from .form import Attention, Expect, Form, Sizes

SINK_TOKENS = 2

# --------------------------------------------------------------------------------------------------------------------
# Causal


def tril_ones(c: Any, q: Any, k: Any, v: Any) -> Any:
    n = q.size(2)
    return nano_gpt(c, q, k, v, torch.tril(torch.ones(n, n, device=q.device)).view(1, 1, n, n) == 0)


def triu_added(c: Any, q: Any, k: Any, v: Any) -> Any:
    """nn.Transformer.generate_square_subsequent_mask"""
    n = q.size(2)
    return hugging_face(c, q, k, v, torch.triu(torch.full((n, n), float("-inf"), device=q.device, dtype=q.dtype), 1))


def arange_where(c: Any, q: Any, k: Any, v: Any) -> Any:
    keep = causal(q, k)[None, None].expand(q.shape[0], 1, -1, -1)
    return hugging_face(c, q, k, v, minimum(keep, q))


def filled_in_place(c: Any, q: Any, k: Any, v: Any) -> Any:
    scores = torch.bmm(q.flatten(0, 1) * c.scale, k.flatten(0, 1).transpose(1, 2))
    mask = torch.ones(q.shape[2], k.shape[2], device=q.device, dtype=torch.bool).triu_(1)
    scores.masked_fill_(mask, float("-inf"))
    return torch.bmm(F.softmax(scores, dim=-1), v.flatten(0, 1))


def assigned(c: Any, q: Any, k: Any, v: Any) -> Any:
    scores = q @ k.transpose(-1, -2) * c.scale
    future = torch.ones(q.shape[2], k.shape[2], device=q.device).triu(1) == 1
    scores[:, :, future] = float("-inf")
    return scores.softmax(-1) @ v


def is_causal(c: Any, q: Any, k: Any, v: Any) -> Any:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def keep_functional(c: Any, q: Any, k: Any, v: Any) -> Any:
    return functional(c, q, k, v, causal(q, k))


class TrilBuffer(Attention):
    """nanoGPT: a slice of a registered lower triangle."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        n = sizes.kv_len + sizes.chunk
        self.register_buffer("bias", torch.tril(torch.ones(n, n)).view(1, 1, n, n))

    def forward(self, q: Any, k: Any, v: Any) -> Any:
        n = q.size(2)
        return nano_gpt(self, q, k, v, self.bias[:, :, :n, :n] == 0)


class BoolBuffer(Attention):
    """GPT-2: a boolean buffer, sliced from behind, and `where` with a minimum."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        n = sizes.kv_len + sizes.chunk
        self.register_buffer("bias", torch.tril(torch.ones((n, n), dtype=torch.bool)).view(1, 1, n, n))

    def forward(self, q: Any, k: Any, v: Any) -> Any:
        query_length, key_length = q.size(-2), k.size(-2)
        attn_weights = torch.matmul(q, k.transpose(-1, -2)) * self.scale
        causal_mask = self.bias[:, :, key_length - query_length : key_length, :key_length]
        mask_value = torch.full([], torch.finfo(q.dtype).min, dtype=attn_weights.dtype, device=q.device)
        attn_weights = torch.where(causal_mask, attn_weights, mask_value)
        return torch.matmul(F.softmax(attn_weights, dim=-1), v)


def triu_from_the_end(c: Any, q: Any, k: Any, v: Any) -> Any:
    """lucidrains: the last query sees every key."""
    i, j = q.shape[-2], k.shape[-2]
    return lucidrains(c, q, k, v, ~torch.ones((i, j), dtype=torch.bool, device=q.device).triu(j - i + 1))


def offset_positions(c: Any, q: Any, k: Any, v: Any) -> Any:
    """transformers: positions of the queries behind those in the cache."""
    past = k.shape[2] - q.shape[2]
    cache_position = torch.arange(past, past + q.shape[2], device=q.device)
    keep = torch.arange(k.shape[2], device=q.device)[None, :] <= cache_position[:, None]
    return hugging_face(c, q, k, v, minimum(keep, q))


CAUSAL = (
    Form("causal", (tril_ones, triu_added, arange_where, filled_in_place, assigned), Expect(mask="causal$")),
    Form("causal-functional", (is_causal, keep_functional), Expect(mask="causal$", empty_row="zero")),
    Form("causal-buffer", (TrilBuffer, BoolBuffer), Expect(mask=r"mask \(t0\)$", squares=1)),
    Form(
        "causal-offset",
        (triu_from_the_end, offset_positions),
        Expect(mask=r"window \.\.6$"),
        more_keys=True,
    ),
)


# --------------------------------------------------------------------------------------------------------------------
# Fills, and rows without a key

FILLS: dict[str, Callable[[torch.dtype], float]] = {
    "inf": lambda dtype: float("-inf"),
    "min": lambda dtype: torch.finfo(dtype).min,
    "1e4": lambda dtype: -1e4,
    "1e9": lambda dtype: -1e9,
}


def before(q: Any, k: Any, behind: int) -> Any:
    """True where a key is at most at the query's position less `behind`."""
    i, j = positions(q, k)
    return j <= i - behind


def filled(c: Any, q: Any, k: Any, v: Any, *, fill: str, behind: int) -> Any:
    return nano_gpt(c, q, k, v, ~before(q, k, behind), FILLS[fill](q.dtype))


def chosen(c: Any, q: Any, k: Any, v: Any, *, fill: str, behind: int) -> Any:
    scores = torch.einsum("bhid,bhjd->bhij", q * c.scale, k)
    scores = torch.where(before(q, k, behind)[None, None], scores, FILLS[fill](q.dtype))
    return torch.einsum("bhij,bhjd->bhid", torch.softmax(scores, -1), v)


def added(c: Any, q: Any, k: Any, v: Any, *, fill: str, behind: int) -> Any:
    mask = torch.zeros(q.shape[2], k.shape[2], device=q.device, dtype=q.dtype)
    return hugging_face(c, q, k, v, mask.masked_fill(~before(q, k, behind), FILLS[fill](q.dtype)))


def added_where(c: Any, q: Any, k: Any, v: Any, *, fill: str, behind: int) -> Any:
    zero = torch.tensor(0.0, device=q.device, dtype=q.dtype)
    bias = torch.where(before(q, k, behind), zero, FILLS[fill](q.dtype))
    scores = bias[None, None] + q @ k.transpose(-1, -2) * c.scale
    return scores.softmax(-1) @ v


def _fill(spellings: tuple[Any, ...], kind: str, fill: str, behind: int, mask: str, empty: str | None) -> Form:
    return Form(
        f"{kind}-{fill}{'-empty' if behind else ''}",
        tuple(functools.partial(s, fill=fill, behind=behind) for s in spellings),
        Expect(mask=mask),
        empty=empty,
        fp16=fill != "1e9",
    )


# Adding -1e4 or -1e9 is adding a number: scores can be as large, so these are no masks.
FILLED = tuple(
    _fill((filled, chosen), "filled", fill, behind, "causal$" if not behind else r"window \.\.-1$", empty)
    for fill in FILLS
    for behind, empty in ((0, None), (1, "nan" if fill == "inf" else "mean"))
) + tuple(
    _fill((added, added_where), "added", fill, behind, mask, empty)
    for fill, behind, mask, empty in (
        ("inf", 0, "causal$", None),
        ("min", 0, "causal$", None),
        ("1e4", 0, "none$", None),
        ("1e9", 0, "none$", None),
        ("inf", 1, r"window \.\.-1$", "nan"),
        ("min", 1, r"window \.\.-1$", "mean"),
    )
)


# --------------------------------------------------------------------------------------------------------------------
# Other shapes: each predicate is a function of the module and positions, each form two frames around two ways to say it


def window_and(c: Any, i: Any, j: Any) -> Any:
    return (j <= i) & (j > i - c.window)


def window_not(c: Any, i: Any, j: Any) -> Any:
    return ~((j > i) | (i - j >= c.window))


def both_sides_abs(c: Any, i: Any, j: Any) -> Any:
    return (i - j).abs() <= c.window


def both_sides_and(c: Any, i: Any, j: Any) -> Any:
    return torch.logical_and(j - i <= c.window, i - j <= c.window)


def dilated_remainder(c: Any, i: Any, j: Any) -> Any:
    return (j <= i) & ((i - j) % 2 == 0)


def dilated_strided(c: Any, i: Any, j: Any) -> Any:
    return torch.logical_and(torch.remainder(i - j, 2) == 0, i >= j)


def dilated_window(c: Any, i: Any, j: Any) -> Any:
    return ((i - j) % 2 == 0) & (j <= i) & (i - j < 2 * c.window)


def dilated_window_not(c: Any, i: Any, j: Any) -> Any:
    return ~((torch.remainder(i - j, 2) != 0) | (j > i) | (j + 2 * c.window <= i))


def chunked_divided(c: Any, i: Any, j: Any) -> Any:
    return (i // c.chunk == j // c.chunk) & (j <= i)


def chunked_start(c: Any, i: Any, j: Any) -> Any:
    return (j >= torch.div(i, c.chunk, rounding_mode="floor") * c.chunk) & (j <= i)


def block_diagonal_divided(c: Any, i: Any, j: Any) -> Any:
    return i // c.chunk == j // c.chunk


def block_diagonal_repeated(c: Any, i: Any, j: Any) -> Any:
    ids = torch.arange(c.q_len // c.chunk, device=i.device).repeat_interleave(c.chunk)
    return ids[:, None] == ids[None, :]


def block_causal_divided(c: Any, i: Any, j: Any) -> Any:
    return j // c.chunk <= i // c.chunk


def block_causal_end(c: Any, i: Any, j: Any) -> Any:
    return j < (i // c.chunk + 1) * c.chunk


def prefix_or(c: Any, i: Any, j: Any) -> Any:
    return (j <= i) | (j < c.window)


def prefix_not(c: Any, i: Any, j: Any) -> Any:
    return ~((j > i) & (j >= c.window))


def streaming(c: Any, i: Any, j: Any) -> Any:
    """StreamingLLM, https://arxiv.org/abs/2309.17453: a window and the first tokens."""
    return (j <= i) & ((i - j < c.window) | (j < SINK_TOKENS))


def streaming_distributed(c: Any, i: Any, j: Any) -> Any:
    return ((j <= i) & (i - j < c.window)) | ((j <= i) & (j < SINK_TOKENS))


def globals_or(c: Any, i: Any, j: Any) -> Any:
    """Longformer, https://arxiv.org/abs/2004.05150: a band, and tokens that see and are seen by all."""
    return ((i - j).abs() <= c.chunk) | (i < SINK_TOKENS) | (j < SINK_TOKENS)


def globals_not(c: Any, i: Any, j: Any) -> Any:
    return ~(((i - j > c.chunk) | (j - i > c.chunk)) & (i >= SINK_TOKENS) & (j >= SINK_TOKENS))


def globals_assigned(c: Any, i: Any, j: Any) -> Any:
    keep = (i - j).abs() <= c.chunk
    keep[:SINK_TOKENS] = True
    keep[:, :SINK_TOKENS] = 1
    return keep


def in_frame(c: Any, q: Any, k: Any, v: Any, *, predicate: Callable[..., Any], frame: Callable[..., Any]) -> Any:
    return frame(c, q, k, v, predicate(c, *positions(q, k)))


def dropped(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    return nano_gpt(c, q, k, v, ~keep)


def added_minimum(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    return hugging_face(c, q, k, v, minimum(keep, q)[None, None])


def _shape(name: str, predicates: tuple[Callable[..., Any], ...], mask: str) -> Form:
    """Two ways to say a mask or more, in three frames."""
    first, *others = predicates
    pairs = ((first, dropped), (first, added_minimum), *((other, lucidrains) for other in others))
    spellings = tuple(functools.partial(in_frame, predicate=p, frame=f) for p, f in pairs)
    return Form(name, spellings, Expect(mask=mask))


GLOBALS = r"(window -4\.\.4 or .* or prefix 2|prefix 2 or .* or window -4\.\.4)$"
SHAPES = (
    _shape("window", (window_and, window_not), "causal, window 5$"),
    _shape("window-both-sides", (both_sides_abs, both_sides_and), r"window -5\.\.5$"),
    _shape("dilated-window", (dilated_window, dilated_window_not), "causal, window 10, dilated by 2"),
    _shape("dilated", (dilated_remainder, dilated_strided), "(causal, )?dilated by 2"),
    _shape("chunked", (chunked_divided, chunked_start), r"chunks of 4, causal$|causal, keys from .*q_idx // 4"),
    _shape("block-diagonal", (block_diagonal_divided, block_diagonal_repeated), "chunks of 4$"),
    _shape("block-causal", (block_causal_divided, block_causal_end), "causal in blocks of 4$"),
    _shape("prefix", (prefix_or, prefix_not), "causal or prefix 5$"),
    _shape("streaming", (streaming, streaming_distributed), "causal, window .* or .*prefix 2$"),
    _shape("global-tokens", (globals_or, globals_not, globals_assigned), GLOBALS),
)

FORMS = (*CAUSAL, *FILLED, *SHAPES)
