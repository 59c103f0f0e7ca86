"""Padding: keys that are not there, as booleans, integers, added minima or lengths, on either side."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .bodies import causal, functional, hugging_face, lucidrains, minimum, nano_gpt
from .form import Expect, Form, Make

PADDING, LEFT = r"padding \(t0\)$", r"causal, padding \(t0\)$"
# Where the source makes an additive mask of one number a key, that small tensor is a bias like any other.
PADDING_OR_BIAS = rf"none$|{PADDING}"
ADDED = (r"qk \* 0\.3535", r"t0\[")


# --------------------------------------------------------------------------------------------------------------------
# Padding


def _lengths(make: Make) -> torch.Tensor:
    """The keys each sequence has, [B]: fewer than there is room for, at least half."""
    c = make.sizes
    return c.kv_len - torch.arange(c.batch, device=make.device) * (c.kv_len // 3) - 1


def _keep(make: Make) -> torch.Tensor:
    return torch.arange(make.sizes.kv_len, device=make.device)[None] < _lengths(make)[:, None]


def _padding_bool(make: Make) -> tuple[torch.Tensor, ...]:
    return (*make.qkv(), _keep(make))


def padding_lucidrains(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    return lucidrains(c, q, k, v, keep[:, None, None, :])


def padding_fairseq(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    b, h, n, _ = q.shape
    attn_weights = torch.bmm((q * c.scale).reshape(b * h, n, -1), k.reshape(b * h, k.shape[2], -1).transpose(1, 2))
    attn_weights = attn_weights.view(b, h, n, k.shape[2])
    attn_weights = attn_weights.masked_fill((~keep).unsqueeze(1).unsqueeze(2).to(torch.bool), float("-inf"))
    attn_weights = attn_weights.view(b * h, n, k.shape[2])
    return torch.bmm(F.softmax(attn_weights, dim=-1), v.reshape(b * h, k.shape[2], -1))


def padding_assigned(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    """The scores are written through a view of them."""
    b, h, n, m = *q.shape[:3], k.shape[2]
    attn_weights = torch.bmm((q * c.scale).reshape(b * h, n, -1), k.reshape(b * h, m, -1).transpose(1, 2))
    attn_weights.view(b, h, n, m)[~keep[:, None, None].expand(-1, h, n, -1)] = float("-inf")
    return torch.bmm(F.softmax(attn_weights, dim=-1), v.reshape(b * h, m, -1))


def padding_functional(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    return functional(c, q, k, v, keep[:, None, None, :].expand(-1, -1, q.shape[2], -1))


def _padding_int(make: Make) -> tuple[torch.Tensor, ...]:
    return (*make.qkv(), _keep(make).long())


def padding_bert(c: Any, q: Any, k: Any, v: Any, attention_mask: Any) -> Any:
    """transformers' get_extended_attention_mask"""
    extended = attention_mask[:, None, None, :].to(dtype=q.dtype)
    return hugging_face(c, q, k, v, (1.0 - extended) * torch.finfo(q.dtype).min)


def padding_equal_zero(c: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
    """The Annotated Transformer, with its -1e9 in a range that float16 has too."""
    scores = torch.matmul(q, k.transpose(-2, -1)) / (c.dim**0.5)
    scores = scores.masked_fill(mask[:, None, None] == 0, -6e4)
    return torch.matmul(scores.softmax(dim=-1), v)


def _padding_added(make: Make) -> tuple[torch.Tensor, ...]:
    return (*make.qkv(), minimum(_keep(make), make.randn(1))[:, None, None, :])


def given_added(c: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
    return hugging_face(c, q, k, v, mask)


def given_functional(c: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
    return functional(c, q, k, v, mask)


def _left(make: Make) -> tuple[torch.Tensor, ...]:
    """Sequences that end together: the first queries of the shorter ones see nothing."""
    return (*make.qkv(), _keep(make).flip(-1))


def left_transformers(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    return hugging_face(c, q, k, v, minimum(causal(q, k)[None, None] & keep[:, None, None, :], q))


def left_filled(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    drop = torch.logical_or(~causal(q, k), ~keep[:, None, None])
    return nano_gpt(c, q, k, v, drop, torch.finfo(q.dtype).min)


def left_infinite(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    return nano_gpt(c, q, k, v, ~(causal(q, k) & keep[:, None, None, :]))


def left_infinite_twice(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * c.scale
    scores = scores.masked_fill(~causal(q, k), float("-inf"))
    scores = scores.masked_fill(~keep[:, None, None, :], float("-inf"))
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def left_functional(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    return functional(c, q, k, v, causal(q, k) & keep[:, None, None, :])


def left_functional_added(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    keep = causal(q, k)[None, None] & keep[:, None, None, :]
    return functional(c, q, k, v, torch.zeros_like(keep, dtype=q.dtype).masked_fill(~keep, float("-inf")))


def _row_lengths(make: Make) -> tuple[torch.Tensor, ...]:
    return (*make.qkv(), _lengths(make))


def lengths_arange(c: Any, q: Any, k: Any, v: Any, lengths: Any) -> Any:
    """WeNet and ESPnet's make_pad_mask"""
    seq_range = torch.arange(0, k.shape[2], dtype=torch.int64, device=lengths.device)
    mask = seq_range.unsqueeze(0).expand(lengths.shape[0], k.shape[2]) >= lengths.unsqueeze(-1)
    return nano_gpt(c, q, k, v, mask.unsqueeze(1).unsqueeze(2))


def lengths_causal(c: Any, q: Any, k: Any, v: Any, lengths: Any) -> Any:
    keep = torch.arange(k.shape[2], device=q.device) < lengths.view(-1, 1, 1, 1)
    return hugging_face(c, q, k, v, minimum(keep, q))


FORMS = (
    Form(
        "padding",
        (padding_lucidrains, padding_fairseq, padding_functional, padding_assigned),
        Expect(mask=PADDING),
        _padding_bool,
    ),
    Form(
        "padding-int",
        (padding_bert, padding_equal_zero),
        Expect(ADDED, PADDING_OR_BIAS),
        _padding_int,
    ),
    Form("padding-added", (given_added, given_functional), Expect(ADDED), _padding_added),
    Form("left-padding", (left_transformers, left_filled), Expect(mask=LEFT), _left, empty="mean"),
    Form("left-padding-inf", (left_infinite, left_infinite_twice), Expect(mask=LEFT), _left, empty="nan"),
    Form(
        "left-padding-functional",
        (left_functional, left_functional_added),
        Expect(mask=LEFT, empty_row="zero"),
        _left,
        empty="zero",
    ),
    Form("lengths", (lengths_arange, lengths_causal), Expect(ADDED, PADDING_OR_BIAS), _row_lengths),
)
