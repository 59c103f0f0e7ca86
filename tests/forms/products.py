"""Scores that are sums of products, and attentions that are differences of attentions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from .bodies import causal, minimum
from .form import Expect, Form, Make

ROTARY = 4  # width of the part of a head that carries positions


def _latent(make: Make) -> tuple[torch.Tensor, ...]:
    """q and k without position [B, H, T, D], q and (for all heads) k with it [.., R], and v of another width."""
    c = make.sizes
    q, k, v = make.qkv()
    q_pe = make.randn(c.batch, c.heads, c.q_len, ROTARY)
    return q, q_pe, k, make.randn(c.batch, 1, c.kv_len, ROTARY), v


def latent_sum(c: Any, q: Any, q_pe: Any, k: Any, k_pe: Any, v: Any) -> Any:
    """DeepSeek-V2 (https://arxiv.org/abs/2405.04434): the sum of two products."""
    scores = torch.einsum("bhsd,bhtd->bhst", q, k) + torch.einsum("bhsr,btr->bhst", q_pe, k_pe.squeeze(1))
    scores = scores * (c.dim + ROTARY) ** -0.5
    mask = torch.full((q.shape[2], k.shape[2]), float("-inf"), device=q.device).triu_(1)
    scores += mask.to(q.dtype)
    scores = scores.softmax(dim=-1, dtype=torch.float32).type_as(q)
    return torch.einsum("bhst,bhtd->bshd", scores, v)


def latent_scaled_apart(c: Any, q: Any, q_pe: Any, k: Any, k_pe: Any, v: Any) -> Any:
    scale = 1.0 / math.sqrt(c.dim + ROTARY)
    attn_weights = torch.matmul(q * scale, k.transpose(2, 3)) + torch.matmul(q_pe * scale, k_pe.transpose(2, 3))
    return F.softmax(attn_weights.masked_fill(~causal(q, k), float("-inf")), dim=-1) @ v


def latent_concatenated(c: Any, q: Any, q_pe: Any, k: Any, k_pe: Any, v: Any) -> Any:
    """transformers: one product over concatenated features."""
    query_states = torch.cat((q, q_pe), dim=-1)
    key_states = torch.cat((k, k_pe.expand(*k.shape[:-1], -1)), dim=-1)
    attn_weights = torch.matmul(query_states, key_states.transpose(2, 3)) * query_states.shape[-1] ** -0.5
    attn_weights = attn_weights + minimum(causal(q, k), q)
    return torch.matmul(F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(q.dtype), v)


def latent_filled(c: Any, q: Any, q_pe: Any, k: Any, k_pe: Any, v: Any) -> Any:
    """DeepSeek's first release: empty tensors, filled by slices."""
    query_states = k_pe.new_empty(*q.shape[:-1], c.dim + ROTARY)
    query_states[:, :, :, : c.dim] = q
    query_states[:, :, :, c.dim :] = q_pe
    key_states = k_pe.new_empty(*k.shape[:-1], c.dim + ROTARY)
    key_states[:, :, :, : c.dim] = k
    key_states[:, :, :, c.dim :] = k_pe
    keep = causal(q, k)
    return F.scaled_dot_product_attention(query_states, key_states, v, attn_mask=keep)


def _two_streams(make: Make) -> tuple[torch.Tensor, ...]:
    """q, k and v of a text, and q and k of its layout, half as wide."""
    c = make.sizes
    layout = (make.randn(c.batch, c.heads, n, c.dim // 2) for n in (c.q_len, c.kv_len))
    return (*make.qkv(), *layout)


def streams_lilt(c: Any, q: Any, k: Any, v: Any, layout_q: Any, layout_k: Any) -> Any:
    """LiLT (https://arxiv.org/abs/2202.13669): each product is scaled by its own width."""
    layout_scores = torch.matmul(layout_q, layout_k.transpose(-1, -2)) / math.sqrt(c.dim // 2)
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(c.dim)
    return F.softmax(scores + layout_scores, dim=-1) @ v


def streams_einsum(c: Any, q: Any, k: Any, v: Any, layout_q: Any, layout_k: Any) -> Any:
    scores = torch.einsum("bhid,bhjd->bhij", q * c.scale, k)
    scores = scores + torch.einsum("bhid,bhjd->bhij", layout_q * (c.dim // 2) ** -0.5, layout_k)
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


# --------------------------------------------------------------------------------------------------------------------
# Differential attention, https://arxiv.org/abs/2410.05258


def _differential(make: Make) -> tuple[torch.Tensor, ...]:
    """Two q and two k of each head, one v, and lambda."""
    q, k, v = make.qkv()
    return q, make.queries(), k, make.keys(), v, torch.tensor(0.4, device=make.device).to(make.dtype)


def differential_outputs(c: Any, q1: Any, q2: Any, k1: Any, k2: Any, v: Any, lambda_full: Any) -> Any:
    attn1 = F.scaled_dot_product_attention(q1, k1, v, is_causal=True)
    attn2 = F.scaled_dot_product_attention(q2, k2, v, is_causal=True)
    return attn1 - lambda_full * attn2


def differential_products(c: Any, q1: Any, q2: Any, k1: Any, k2: Any, v: Any, lambda_full: Any) -> Any:
    drop = ~causal(q1, k1)
    first, second = (
        (q @ k.transpose(-1, -2) * c.scale).masked_fill(drop, float("-inf")).softmax(-1) @ v
        for q, k in ((q1, k1), (q2, k2))
    )
    return first - lambda_full * second


def differential_probabilities(c: Any, q1: Any, q2: Any, k1: Any, k2: Any, v: Any, lambda_full: Any) -> Any:
    attention_mask = torch.where(causal(q1, k1), 0.0, float("-inf")).to(q1.dtype)
    a1 = F.softmax(torch.matmul(q1, k1.transpose(-1, -2)) * c.scale + attention_mask, dim=-1)
    a2 = F.softmax(torch.matmul(q2, k2.transpose(-1, -2)) * c.scale + attention_mask, dim=-1)
    return torch.matmul(a1 - lambda_full * a2, v)


def differential_interleaved(c: Any, q1: Any, q2: Any, k1: Any, k2: Any, v: Any, lambda_full: Any) -> Any:
    """The authors' code: both in one softmax over twice the heads."""
    b, h, n, _ = q1.shape
    q, k = (torch.stack(pair, dim=2).flatten(1, 2) for pair in ((q1, q2), (k1, k2)))
    attn_weights = torch.matmul(q * c.scale, k.transpose(-1, -2))
    attn_weights += torch.triu(torch.zeros([n, n], device=q.device).fill_(float("-inf")).type_as(attn_weights), 1)
    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).type_as(attn_weights)
    attn_weights = attn_weights.view(b, h, 2, n, n)
    attn_weights = attn_weights[:, :, 0] - lambda_full * attn_weights[:, :, 1]
    return torch.matmul(attn_weights, v)


def difference_of_sigmoids(c: Any, q1: Any, q2: Any, k1: Any, k2: Any, v: Any, lambda_full: Any) -> Any:
    drop = ~causal(q1, k1)
    gates = [
        torch.sigmoid(q @ k.transpose(-1, -2) * c.scale - math.log(c.kv_len)).masked_fill(drop, 0.0)
        for q, k in ((q1, k1), (q2, k2))
    ]
    return torch.matmul(gates[0] - lambda_full * gates[1], v)


def sigmoids_interleaved(c: Any, q1: Any, q2: Any, k1: Any, k2: Any, v: Any, lambda_full: Any) -> Any:
    """Both in one sigmoid over twice the heads."""
    b, h, n, _ = q1.shape
    q, k = (torch.stack(pair, dim=2).flatten(1, 2) for pair in ((q1, q2), (k1, k2)))
    gates = torch.sigmoid(torch.einsum("bhid,bhjd->bhij", q * c.scale, k) - math.log(c.kv_len)).view(b, h, 2, n, -1)
    return torch.einsum("bhij,bhjd->bhid", (gates[:, :, 0] - gates[:, :, 1] * lambda_full).tril(), v)


FORMS = (
    Form("latent-sum", (latent_sum, latent_scaled_apart), Expect((r"qk",), "causal$"), _latent),
    Form("latent-concatenated", (latent_concatenated, latent_filled), Expect((r"qk \* 0\.2886",), "causal$"), _latent),
    Form("two-streams", (streams_lilt, streams_einsum), Expect((r"qk",)), _two_streams),
    Form(
        "differential-outputs",
        (differential_outputs, differential_products),
        Expect(mask="causal$", sites=2),
        _differential,
    ),
    Form(
        "differential-probabilities",
        (differential_probabilities, differential_interleaved),
        Expect(mask="causal$"),
        _differential,
    ),
    Form(
        "difference-of-sigmoids",
        (difference_of_sigmoids, sigmoids_interleaved),
        Expect((r"sigmoid\(", r"qk \* 0\.3535"), "causal$", normaliser="none"),
        _differential,
    ),
)
