"""Masks that depend on data: documents of packed sequences, prefixes, slots of a cache, dense tensors."""

from __future__ import annotations

from typing import Any

import torch

from .bodies import causal, functional, hugging_face, lucidrains, minimum, nano_gpt
from .form import Expect, Form, Make
from .padding import given_added, given_functional

DOCUMENTS, DENSE = r"causal, documents \(t0\)$", r"mask \(t0\)$"
EITHER = r"causal or padding \(t0\)$|padding \(t0\) or causal$"

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


PACKED_FORMS = (
    Form(
        "documents",
        (documents_equal, documents_functional, documents_added),
        Expect(mask=DOCUMENTS),
        _documents,
    ),
    Form("position-restarts", (restarts_transformers, restarts_counted), Expect(mask=DOCUMENTS), _restarts),
    Form("sequence-offsets", (offsets_searched, offsets_bucketized), Expect(mask=r"documents \(t0\)$"), _offsets),
    Form(
        "prefix-lengths",
        (prefixes_or, prefixes_added),
        Expect(mask=EITHER),
        _prefixes,
    ),
    Form(
        "cache-positions",
        (cache_transformers, cache_functional),
        Expect(mask=r"positions \(t0\)$"),
        _cache_positions,
        more_keys=True,
    ),
)


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


DENSE_FORMS = (
    Form("dense", (dense_dropped, given_functional, dense_infinite), Expect(mask=DENSE, squares=1), _dense),
    Form(
        "dense-empty-inf",
        (dense_dropped, dense_infinite),
        Expect(mask=DENSE, squares=1),
        _dense_empty,
        empty="nan",
    ),
    Form(
        "dense-empty-min",
        (dense_minimum, dense_lucidrains),
        Expect(mask=DENSE, squares=1),
        _dense_empty,
        empty="mean",
    ),
    Form(
        "dense-empty-added",
        (given_added, dense_scaled),
        Expect((r"qk \* 0\.3535", r"t0\["), squares=1),
        _dense_added,
        empty="mean",
    ),
)

FORMS = (*PACKED_FORMS, *DENSE_FORMS)
