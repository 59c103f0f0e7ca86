"""Masks that depend on data: padding, lengths, documents of packed sequences, and dense tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .bodies import causal, functional, hugging_face, lucidrains, nano_gpt
from .form import Expect, Form, Make

DATA = r".*t\d"  # a mask that reads a captured tensor


def minimum(keep: Any, q: Any) -> Any:
    """The additive mask of transformers: zero, or the smallest number."""
    return torch.where(keep, 0.0, torch.finfo(q.dtype).min).to(q.dtype)


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


PADDING = (
    Form("padding", (padding_lucidrains, padding_fairseq, padding_functional), Expect(mask=DATA), _padding_bool),
    Form("padding-int", (padding_bert, padding_equal_zero), Expect((r"qk \* 0\.3535", r"t0\["), mask=""), _padding_int),
    Form("padding-added", (given_added, given_functional), Expect((r"qk \* 0\.3535", r"t0\["), mask=""), _padding_added),
    Form("left-padding", (left_transformers, left_filled), Expect(mask=DATA), _left, empty="mean"),
    Form("left-padding-inf", (left_infinite, left_infinite_twice), Expect(mask=DATA), _left, empty="nan"),
    Form("left-padding-functional", (left_functional, left_functional_added), Expect(mask=DATA, empty_row="zero"), _left, empty="zero"),
    Form("lengths", (lengths_arange, lengths_causal), Expect(mask=DATA), _row_lengths),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Packed sequences


def _document_ids(make: Make) -> torch.Tensor:
    """Documents of uneven lengths, another cut in each sequence, [B, T]."""
    c = make.sizes
    at = torch.arange(c.kv_len, device=make.device)[None] + torch.arange(c.batch, device=make.device)[:, None]
    return torch.div(at, max(c.kv_len // 3, 1), rounding_mode="floor") + (at > c.kv_len // 2)


def _documents(make: Make) -> tuple[torch.Tensor, ...]:
    return (*make.qkv(), _document_ids(make))


def documents_equal(c: Any, q: Any, k: Any, v: Any, ids: Any) -> Any:
    keep = (ids[:, :, None] == ids[:, None, :]) & causal(q, k)
    return lucidrains(c, q, k, v, keep[:, None])


def documents_functional(c: Any, q: Any, k: Any, v: Any, ids: Any) -> Any:
    same = ids.unsqueeze(1).unsqueeze(3).eq(ids.unsqueeze(1).unsqueeze(2))
    return functional(c, q, k, v, same & causal(q, k))


def documents_added(c: Any, q: Any, k: Any, v: Any, ids: Any) -> Any:
    drop = torch.logical_or(ids[:, None, :, None] != ids[:, None, None, :], ~causal(q, k))
    return hugging_face(c, q, k, v, torch.zeros_like(drop, dtype=q.dtype).masked_fill(drop, torch.finfo(q.dtype).min))


def _restarts(make: Make) -> tuple[torch.Tensor, ...]:
    """Position ids that start again with each document, [B, T]."""
    ids = _document_ids(make)
    first = torch.cat([torch.ones_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] != ids[:, :-1]], dim=-1)
    at = torch.arange(ids.shape[1], device=make.device).expand_as(ids)
    return (*make.qkv(), at - torch.where(first, at, 0).cummax(-1).values)


def restarts_transformers(c: Any, q: Any, k: Any, v: Any, position_ids: Any) -> Any:
    """transformers' find_packed_sequence_indices"""
    first = position_ids[:, :1] - 1
    sequence = (torch.diff(position_ids, prepend=first, dim=-1) != 1).cumsum(-1)
    i, j = torch.arange(q.shape[2], device=q.device), torch.arange(k.shape[2], device=q.device)
    keep = (j[None, :] <= i[:, None]) & (sequence[:, i][:, :, None] == sequence[:, j][:, None, :])
    return hugging_face(c, q, k, v, minimum(keep[:, None], q))


def restarts_counted(c: Any, q: Any, k: Any, v: Any, position_ids: Any) -> Any:
    document = torch.cumsum(position_ids == 0, dim=-1)
    keep = (document.unsqueeze(2) == document.unsqueeze(1)) & causal(q, k)
    return nano_gpt(c, q, k, v, ~keep.unsqueeze(1))


def _offsets(make: Make) -> tuple[torch.Tensor, ...]:
    """cu_seqlens of one packed row."""
    n = make.sizes.kv_len
    return (*make.qkv(), torch.tensor([0, n // 4, n // 4 + 1, 2 * n // 3, n], device=make.device))


def offsets_searched(c: Any, q: Any, k: Any, v: Any, cu_seqlens: Any) -> Any:
    ids = torch.searchsorted(cu_seqlens, torch.arange(k.shape[2], device=q.device), right=True)
    return nano_gpt(c, q, k, v, ids[:, None] != ids[None, :])


def offsets_bucketized(c: Any, q: Any, k: Any, v: Any, cu_seqlens: Any) -> Any:
    ids = torch.bucketize(torch.arange(k.shape[2], device=q.device), cu_seqlens, right=True)
    return hugging_face(c, q, k, v, minimum(ids.view(-1, 1) == ids.view(1, -1), q))


def _prefixes(make: Make) -> tuple[torch.Tensor, ...]:
    c = make.sizes
    return (*make.qkv(), torch.arange(1, c.batch + 1, device=make.device) * (c.kv_len // 3))


def prefixes_or(c: Any, q: Any, k: Any, v: Any, prefix: Any) -> Any:
    keep = causal(q, k) | (torch.arange(k.shape[2], device=q.device) < prefix[:, None, None])
    return lucidrains(c, q, k, v, keep[:, None])


def prefixes_added(c: Any, q: Any, k: Any, v: Any, prefix: Any) -> Any:
    in_prefix = torch.arange(k.shape[2], device=q.device)[None, None, None, :] < prefix.view(-1, 1, 1, 1)
    return hugging_face(c, q, k, v, minimum(in_prefix | causal(q, k), q))


def _cache_positions(make: Make) -> tuple[torch.Tensor, ...]:
    """The slots that the queries fill in a cache with room for more keys, [Tq]."""
    c = make.sizes
    return (*make.qkv(), torch.arange(c.q_len, device=make.device) + (c.kv_len - c.q_len) // 2)


def cache_transformers(c: Any, q: Any, k: Any, v: Any, cache_position: Any) -> Any:
    """A static cache: whatever lies behind a query's own slot has not been written yet."""
    keep = torch.arange(k.shape[2], device=q.device) <= cache_position.reshape(-1, 1)
    return hugging_face(c, q, k, v, minimum(keep[None, None], q))


def cache_functional(c: Any, q: Any, k: Any, v: Any, cache_position: Any) -> Any:
    return functional(c, q, k, v, cache_position[:, None] >= torch.arange(k.shape[2], device=q.device)[None])


PACKED = (
    Form("documents", (documents_equal, documents_functional, documents_added), Expect(mask=r"(?=.*causal|.*kv_idx <= q_idx).*t0"), _documents),
    Form("position-restarts", (restarts_transformers, restarts_counted), Expect(mask=DATA), _restarts),
    Form("sequence-offsets", (offsets_searched, offsets_bucketized), Expect(mask=DATA), _offsets),
    Form("prefix-lengths", (prefixes_or, prefixes_added), Expect(mask=DATA), _prefixes),
    Form("cache-positions", (cache_transformers, cache_functional), Expect(mask=DATA), _cache_positions, more_keys=True),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Dense masks


def _dense_keep(make: Make, empty: bool = False) -> torch.Tensor:
    """[B, 1, Tq, Tkv], a row of the first sequence without a key if asked for."""
    c = make.sizes
    keep = make.chance(c.batch, 1, c.q_len, c.kv_len) | torch.eye(c.q_len, c.kv_len, device=make.device).bool()
    if empty:
        keep[0, :, c.q_len // 2] = False
    return keep


def _dense(make: Make) -> tuple[torch.Tensor, ...]:
    return (*make.qkv(), _dense_keep(make))


def _dense_empty(make: Make) -> tuple[torch.Tensor, ...]:
    return (*make.qkv(), _dense_keep(make, empty=True))


def _dense_added(make: Make) -> tuple[torch.Tensor, ...]:
    return (*make.qkv(), minimum(_dense_keep(make, empty=True), make.randn(1)))


def dense_dropped(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    return nano_gpt(c, q, k, v, ~keep)


def dense_infinite(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    return hugging_face(c, q, k, v, torch.where(keep, 0.0, float("-inf")).to(q.dtype))


def dense_minimum(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    return hugging_face(c, q, k, v, minimum(keep, q))


def dense_lucidrains(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    return lucidrains(c, q, k, v, keep)


def dense_scaled(c: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
    scores = torch.einsum("bhid,bhjd->bhij", q * c.scale, k)
    return torch.einsum("bhij,bhjd->bhid", (mask + scores).softmax(-1), v)


DENSE = (
    Form("dense", (dense_dropped, given_functional, dense_infinite), Expect(mask=DATA, squares=1), _dense),
    Form("dense-empty-inf", (dense_dropped, dense_infinite), Expect(mask=DATA, squares=1), _dense_empty, empty="nan"),
    Form("dense-empty-min", (dense_minimum, dense_lucidrains), Expect(mask=DATA, squares=1), _dense_empty, empty="mean"),
    Form("dense-empty-added", (given_added, dense_scaled), Expect((r"qk \* 0\.3535", r"t0\["), "", squares=1), _dense_added, empty="mean"),
)  # fmt: skip

FORMS = (*PADDING, *PACKED, *DENSE)
