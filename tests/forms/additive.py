"""Biases added to the scores: of every broadcast shape, ALiBi, pairs."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F

from .bodies import causal, fairseq, functional, hugging_face, minimum, positions
from .form import Expect, Form, Make


def added_first(c: Any, q: Any, k: Any, v: Any, bias: Any) -> Any:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
    scores = bias + scores / math.sqrt(c.dim)
    return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), v)


def _with_bias(make: Make, letters: str) -> tuple[torch.Tensor, ...]:
    return (*make.qkv(), make.shaped(letters))


def _bias(letters: str) -> Form:
    square = int(letters[-2:] == "ST")
    return Form(
        f"bias-{letters}",
        (hugging_face, added_first, fairseq, functional),
        Expect((r"qk \* 0\.3535", r"t0\["), squares=square),
        functools.partial(_with_bias, letters=letters),
    )


BROADCAST = tuple(_bias(s) for s in ("11ST", "1HST", "B11T", "B1ST", "H1T", "BHST", "ST"))


# --------------------------------------------------------------------------------------------------------------------
# ALiBi, https://arxiv.org/abs/2108.12409


def _slopes(make: Make) -> tuple[torch.Tensor, ...]:
    heads = make.sizes.heads
    slopes = torch.exp2(-8.0 / heads * torch.arange(1, heads + 1, device=make.device))
    return (*make.qkv(), slopes.to(make.dtype))


def alibi_distance(c: Any, q: Any, k: Any, v: Any, slopes: Any) -> Any:
    """MPT: slopes times the signed distance, a causal mask of finfo.min."""
    i, j = positions(q, k)
    bias = (j - i)[None, None] * slopes.view(1, c.heads, 1, 1)
    min_val = torch.finfo(q.dtype).min
    attn_weight = q.matmul(k.transpose(-1, -2)) * c.scale
    attn_weight = attn_weight + bias
    attn_weight = attn_weight.masked_fill(~causal(q, k).view(1, 1, q.shape[2], k.shape[2]), min_val)
    return torch.softmax(attn_weight, dim=-1).matmul(v)


def alibi_absolute(c: Any, q: Any, k: Any, v: Any, slopes: Any) -> Any:
    """x-transformers: minus the absolute distance times the slopes, after the product."""
    seq_arange = torch.arange(q.shape[-2], device=q.device)
    context_arange = torch.arange(k.shape[-2], device=q.device)
    bias = -torch.abs(context_arange[None, None, :] - seq_arange[None, :, None])
    sim = torch.einsum("bhid,bhjd->bhij", q, k) * c.scale
    sim = sim + bias * slopes[:, None, None]
    i, j = seq_arange.view(-1, 1), context_arange.view(1, -1)
    sim = sim.masked_fill(j > i, -torch.finfo(sim.dtype).max)
    return torch.einsum("bhij,bhjd->bhid", sim.softmax(dim=-1), v)


def alibi_baddbmm(c: Any, q: Any, k: Any, v: Any, slopes: Any) -> Any:
    """BLOOM: slopes times the key's position, [B * H, 1, Tkv], is the first operand of baddbmm."""
    batch, heads, q_len, _ = q.shape
    alibi = slopes[..., None] * torch.arange(k.shape[2], device=q.device)[None, :]
    alibi = alibi.expand(batch, -1, -1).reshape(batch * heads, 1, k.shape[2])
    matmul_result = alibi.baddbmm(
        batch1=q.reshape(batch * heads, q_len, -1),
        batch2=k.reshape(batch * heads, k.shape[2], -1).transpose(-1, -2),
        beta=1.0,
        alpha=c.scale,
    )
    attn_weights = matmul_result.view(batch, heads, q_len, -1)
    attn_weights = attn_weights + minimum(causal(q, k), q)
    attention_probs = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(attention_probs.view(batch * heads, q_len, -1), v.reshape(batch * heads, k.shape[2], -1))


def alibi_by_head(c: Any, q: Any, k: Any, v: Any, slopes: Any) -> Any:
    """Each head's scores are written by themselves."""
    i, j = positions(q, k)
    scores = q @ k.transpose(-1, -2) * c.scale
    for head in range(q.shape[1]):
        scores[:, head] -= slopes[head] * (i - j)
    return scores.masked_fill(j > i, float("-inf")).softmax(-1) @ v


def prebuilt_baddbmm(c: Any, q: Any, k: Any, v: Any, alibi: Any) -> Any:
    """A product with scaled beta and alpha onto a prebuilt tensor [H, Tq, Tkv]."""
    batch, heads, q_len, _ = q.shape
    out = torch.baddbmm(
        alibi.repeat(batch, 1, 1), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), beta=c.scale, alpha=c.scale
    )
    return (out.softmax(-1) @ v.flatten(0, 1)).view(batch, heads, q_len, -1)


def prebuilt_added(c: Any, q: Any, k: Any, v: Any, alibi: Any) -> Any:
    """Falcon: (scores + alibi) * inv_norm_factor."""
    attention_scores = q @ k.transpose(-1, -2)
    attention_scores = (attention_scores + alibi[None, :, : q.shape[2], : k.shape[2]]) * c.scale
    return F.softmax(attention_scores, dim=-1, dtype=q.dtype) @ v


def _prebuilt(make: Make) -> tuple[torch.Tensor, ...]:
    return (*make.qkv(), make.shaped("HST"))


ALIBI = (
    Form(
        "alibi",
        (alibi_distance, alibi_absolute, alibi_baddbmm, alibi_by_head),
        Expect((r"qk \* 0\.3535", r"t0\[.*n1", r"(q_idx|kv_idx)"), "causal$"),
        _slopes,
    ),
    Form(
        "alibi-prebuilt",
        (prebuilt_baddbmm, prebuilt_added),
        Expect((r"qk", r"t0\[n1, q_idx, kv_idx\]"), squares=1),
        _prebuilt,
    ),
)


# --------------------------------------------------------------------------------------------------------------------
# Pair bias, https://doi.org/10.1038/s41586-021-03819-2


def _pair(make: Make) -> tuple[torch.Tensor, ...]:
    """[B, N, H, T, D], and biases [B, N, 1, 1, T] of a mask and [B, 1, H, T, T] of pairs."""
    c = make.sizes
    rows = 3
    q, k, v = (make.randn(c.batch, rows, c.heads, c.q_len, d) for d in (c.dim, c.dim, c.value_dim))
    mask = torch.where(make.chance(c.batch, rows, 1, 1, c.q_len, of=0.8), 0.0, -1e4).to(make.dtype)
    return q, k, v, mask, make.randn(c.batch, 1, c.heads, c.q_len, c.q_len)


def pair_openfold(c: Any, q: Any, k: Any, v: Any, mask_bias: Any, pair_bias: Any) -> Any:
    a = torch.matmul(q * c.scale, k.transpose(-1, -2))
    for b in [mask_bias, pair_bias]:
        a += b
    return torch.matmul(F.softmax(a, dim=-1), v)


def pair_einsum(c: Any, q: Any, k: Any, v: Any, mask_bias: Any, pair_bias: Any) -> Any:
    logits = torch.einsum("bnhqc,bnhkc->bnhqk", q, k) * c.scale
    logits = logits + (mask_bias + pair_bias)
    return torch.einsum("bnhqk,bnhkc->bnqhc", logits.softmax(-1), v)


PAIRS = (Form("pair-bias", (pair_openfold, pair_einsum), Expect((r"t0\[", r"t1\["), squares=1), _pair),)

FORMS = (*BROADCAST, *ALIBI, *PAIRS)
