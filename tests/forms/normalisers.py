"""Normalisers other than a plain softmax: sinks, softmax-plus-one, none at all, and factors on the probabilities."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from .bodies import causal, minimum
from .form import Expect, Form, Make
from .padding import PADDING_OR_BIAS

# --------------------------------------------------------------------------------------------------------------------
# Attention sinks: one more score of each row, without a value


def _sinks(make: Make) -> tuple[torch.Tensor, ...]:
    return (*make.qkv(), make.randn(make.sizes.heads))


def sink_last(c: Any, q: Any, k: Any, v: Any, sinks: Any) -> Any:
    """gpt-oss: the sink is the last column."""
    attn_weights = torch.matmul(q, k.transpose(2, 3)) * c.scale
    attn_weights = attn_weights + minimum(causal(q, k), q)
    sinks = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    combined_logits = torch.cat([attn_weights, sinks], dim=-1)
    combined_logits = combined_logits - combined_logits.max(dim=-1, keepdim=True).values
    probs = F.softmax(combined_logits, dim=-1, dtype=combined_logits.dtype)
    scores = probs[..., :-1]
    return torch.matmul(scores, v).transpose(1, 2)


def sink_einsum(c: Any, q: Any, k: Any, v: Any, sinks: Any) -> Any:
    """OpenAI's reference: the same without the subtraction."""
    qk = torch.einsum("bhqd,bhkd->bhqk", q, k)
    qk *= c.scale
    qk += torch.triu(qk.new_full((q.shape[2], k.shape[2]), -float("inf")), diagonal=1)[None, None]
    s = sinks[None, :, None, None].expand(q.shape[0], -1, q.shape[2], 1)
    weights = torch.softmax(torch.cat([qk, s], dim=-1), dim=-1)
    return torch.einsum("bhqk,bhkd->bqhd", weights[..., :-1], v)


def sink_first(c: Any, q: Any, k: Any, v: Any, sinks: Any) -> Any:
    """x-transformers: the sink is the first column."""
    sim = torch.einsum("bhid,bhjd->bhij", q, k) * c.scale
    sim = sim.masked_fill(~causal(q, k), -torch.finfo(sim.dtype).max)
    attn_sink = sinks[None, :, None, None].expand(sim.shape[0], -1, sim.shape[2], 1)
    sim = torch.cat((attn_sink, sim), dim=-1)
    attn = sim.softmax(dim=-1)[..., 1:]
    return torch.einsum("bhij,bhjd->bhid", attn, v)


def sink_sigmoid(c: Any, q: Any, k: Any, v: Any, sinks: Any) -> Any:
    """The output of a plain attention times sigmoid(lse - sink)."""
    scores = torch.matmul(q, k.transpose(-1, -2)) * c.scale
    scores = scores.masked_fill(~causal(q, k), float("-inf"))
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    out = torch.softmax(scores, dim=-1) @ v
    return out * torch.sigmoid(lse - sinks.view(1, -1, 1, 1))


# --------------------------------------------------------------------------------------------------------------------
# Softmax-plus-one


def plus_one_direct(c: Any, q: Any, k: Any, v: Any) -> Any:
    x = (q @ k.transpose(-1, -2)) * c.scale
    e = torch.exp(x)
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


def plus_one_shifted(c: Any, q: Any, k: Any, v: Any) -> Any:
    x = torch.einsum("bhid,bhjd->bhij", q, k) * c.scale
    m = x.max(dim=-1, keepdim=True).values
    exp_x = torch.exp(x - m)
    return torch.einsum("bhij,bhjd->bhid", exp_x / (torch.exp(-m) + exp_x.sum(dim=-1, keepdim=True)), v)


def plus_one_clamped(c: Any, q: Any, k: Any, v: Any) -> Any:
    x = q @ k.mT * c.scale
    m = x.amax(-1, keepdim=True).clamp(min=0)
    e = (x - m).exp()
    return (e / (e.sum(-1, keepdim=True) + (-m).exp())) @ v


def plus_one_late(c: Any, q: Any, k: Any, v: Any) -> Any:
    """Divided behind the product with the values, as a fused kernel does it."""
    x = (q @ k.mT).mul(c.scale)
    m = x.amax(-1, keepdim=True)
    e = (x - m).exp()
    total = e.sum(-1, keepdim=True) + torch.exp(-m)
    return torch.einsum("bhij,bhjd->bhid", e.to(v.dtype), v) / total.to(v.dtype)


def plus_one_padded(c: Any, q: Any, k: Any, v: Any) -> Any:
    x = F.pad(q @ k.transpose(-1, -2) * c.scale, (1, 0))
    return F.softmax(x, dim=-1)[..., 1:] @ v


def plus_one_column(c: Any, q: Any, k: Any, v: Any) -> Any:
    x = torch.matmul(q, k.transpose(2, 3)) * c.scale
    x = torch.cat([x, torch.zeros_like(x[..., :1])], dim=-1)
    return torch.matmul(torch.softmax(x, dim=-1)[..., :-1], v)


def plus_one_gated(c: Any, q: Any, k: Any, v: Any) -> Any:
    x = q @ k.mT * c.scale
    return torch.sigmoid(x.logsumexp(-1, keepdim=True)) * (x.softmax(-1) @ v)


# --------------------------------------------------------------------------------------------------------------------
# No normaliser


def sigmoid_paper(c: Any, q: Any, k: Any, v: Any) -> Any:
    """https://arxiv.org/abs/2409.04431: a sigmoid with a bias of minus the logarithm of the length."""
    scores = q @ k.transpose(-1, -2) * c.scale
    return torch.sigmoid(scores - math.log(k.shape[2])) @ v


def sigmoid_einsum(c: Any, q: Any, k: Any, v: Any) -> Any:
    logits = torch.einsum("bhqd,bhkd->bhqk", q * c.scale, k)
    return torch.einsum("bhqk,bhkd->bqhd", F.sigmoid(logits + (-math.log(k.shape[2]))), v)


def sigmoid_filled(c: Any, q: Any, k: Any, v: Any) -> Any:
    scores = (q @ k.transpose(-1, -2) * c.scale).masked_fill(~causal(q, k), float("-inf"))
    return scores.sigmoid() @ v


def sigmoid_times_mask(c: Any, q: Any, k: Any, v: Any) -> Any:
    return (torch.sigmoid(q @ k.mT * c.scale) * causal(q, k).to(q.dtype)) @ v


def relu_over_length(c: Any, q: Any, k: Any, v: Any) -> Any:
    """https://arxiv.org/abs/2309.08586"""
    return (F.relu(q @ k.transpose(-1, -2) * c.scale) / k.shape[2]) @ v


def relu_times_inverse(c: Any, q: Any, k: Any, v: Any) -> Any:
    attn = torch.einsum("bhid,bhjd->bhij", q, k).mul(c.scale).relu().mul(1.0 / k.shape[2])
    return torch.einsum("bhij,bhjd->bhid", attn, v)


def squared_relu(c: Any, q: Any, k: Any, v: Any) -> Any:
    """FLASH, https://arxiv.org/abs/2202.10447"""
    sim = torch.einsum("bhid,bhjd->bhij", q, k) / k.shape[2]
    attn = F.relu(sim) ** 2
    return torch.einsum("bhij,bhjd->bhid", attn, v)


def squared_relu_method(c: Any, q: Any, k: Any, v: Any) -> Any:
    return (q @ k.mT / k.shape[2]).relu().square() @ v


# --------------------------------------------------------------------------------------------------------------------
# Factors on the probabilities


def _head_mask(make: Make) -> tuple[torch.Tensor, ...]:
    return (*make.qkv(), make.chance(make.sizes.heads).to(make.dtype))


def head_mask_bert(c: Any, q: Any, k: Any, v: Any, head_mask: Any) -> Any:
    attention_probs = F.softmax(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(c.dim), dim=-1)
    attention_probs = attention_probs * head_mask[None, :, None, None]
    return torch.matmul(attention_probs, v)


def head_mask_folded(c: Any, q: Any, k: Any, v: Any, head_mask: Any) -> Any:
    b, h, n, _ = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q * c.scale, k, v))
    probs = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
    probs = head_mask.view(1, -1, 1, 1) * probs.view(b, h, n, -1)
    return torch.bmm(probs.view(b * h, n, -1), v)


def _keep_padded(make: Make) -> tuple[torch.Tensor, ...]:
    """Which keys are seen, [B, Tkv]; none of the first sequence's."""
    keep = make.chance(make.sizes.batch, make.sizes.kv_len, of=0.7)
    keep[0] = False
    return (*make.qkv(), keep)


def zeroed_wenet(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    """WeNet and ESPnet: masked probabilities are set to zero, which also clears rows without a key."""
    mask = keep[:, None, None, :].eq(0)
    scores = torch.matmul(q, k.transpose(-2, -1)) * c.scale
    scores = scores.masked_fill(mask, -float("inf"))
    attn = torch.softmax(scores, dim=-1).masked_fill(mask, 0.0)
    return torch.matmul(attn, v)


def zeroed_minimum(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * c.scale
    keep = keep[:, None, None]
    attn = scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", torch.where(keep, attn, 0.0), v)


def nan_to_num(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    attn = (q @ k.transpose(-2, -1) * c.scale).masked_fill(~keep[:, None, None, :], float("-inf"))
    return torch.nan_to_num(attn.softmax(dim=-1)) @ v


def filled_where_nan(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    bias = torch.zeros_like(keep, dtype=q.dtype).masked_fill(~keep, float("-inf"))[:, None, None, :]
    probs = F.softmax(torch.matmul(q, k.transpose(-2, -1)) * c.scale + bias, dim=-1)
    probs = probs.masked_fill(torch.isnan(probs), 0.0)
    return torch.matmul(probs, v)


def where_all_infinite(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    """torch's own safe softmax, written out."""
    scores = (q @ k.transpose(-2, -1) * c.scale).masked_fill(~keep[:, None, None, :], float("-inf"))
    empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
    return torch.where(empty, 0.0, torch.softmax(scores, dim=-1)) @ v


def filled_in_empty_rows(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * c.scale
    scores = scores + torch.zeros_like(keep, dtype=q.dtype).masked_fill(~keep, float("-inf"))[:, None, None]
    attn = scores.softmax(-1).masked_fill(torch.isneginf(scores).all(-1, keepdim=True), 0.0)
    return torch.einsum("bhij,bhjd->bhid", attn, v)


def kept_where_any_key(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    """By the mask instead of the scores."""
    mask = keep[:, None, None, :].expand(-1, 1, q.shape[2], -1)
    attn = torch.matmul(q, k.transpose(-2, -1)).mul(c.scale).masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.matmul(torch.where(mask.any(-1, keepdim=True), attn, torch.zeros_like(attn)), v)


def _row_gate(make: Make) -> tuple[torch.Tensor, ...]:
    return (*make.qkv(), make.randn(make.sizes.batch, make.sizes.heads, make.sizes.q_len, 1))


def gate_after(c: Any, q: Any, k: Any, v: Any, gate: Any) -> Any:
    probs = (q @ k.mT * c.scale).softmax(-1) * gate.sigmoid()
    return probs @ v


def gate_where(c: Any, q: Any, k: Any, v: Any, gate: Any) -> Any:
    probs = torch.softmax(torch.einsum("bhid,bhjd->bhij", q * c.scale, k), dim=-1)
    return torch.einsum("bhij,bhjd->bhid", torch.sigmoid(gate) * probs, v)


NONE = "none"
FORMS = (
    Form("sink-last", (sink_last, sink_einsum), Expect(mask="causal$", sink=r"t\d\[.*n1"), _sinks),
    Form("sink-first", (sink_first, sink_sigmoid), Expect(mask="causal$", sink=r"t\d\[.*n1"), _sinks),
    Form(
        "softmax-plus-one",
        (
            plus_one_direct,
            plus_one_shifted,
            plus_one_clamped,
            plus_one_late,
            plus_one_padded,
            plus_one_column,
            plus_one_gated,
        ),
        Expect(sink=r"0(\.0)?$"),
    ),
    Form("sigmoid", (sigmoid_paper, sigmoid_einsum), Expect((r"sigmoid\(", r"qk \* 0\.3535"), normaliser=NONE)),
    Form(
        "sigmoid-causal",
        (sigmoid_filled, sigmoid_times_mask),
        Expect((r"sigmoid\(", r"qk \* 0\.3535"), r"causal$", normaliser=NONE),
    ),
    Form("relu", (relu_over_length, relu_times_inverse), Expect((r"max(imum)?\(|where\(",), normaliser=NONE)),
    Form("squared-relu", (squared_relu, squared_relu_method), Expect((r"max(imum)?\(|where\(",), normaliser=NONE)),
    Form("head-mask", (head_mask_bert, head_mask_folded), Expect(factor=r"t0\[.*n1"), _head_mask),
    Form(
        "zeroed-probabilities",
        (zeroed_wenet, zeroed_minimum),
        Expect(mask=r"padding \(t\d\)$", factor=""),
        _keep_padded,
        empty="zero",
    ),
    Form(
        "nan-to-zero",
        (nan_to_num, filled_where_nan),
        Expect(mask=PADDING_OR_BIAS, empty_row="zero"),
        _keep_padded,
        empty="zero",
    ),
    Form(
        "empty-rows-cleared",
        (where_all_infinite, filled_in_empty_rows, kept_where_any_key),
        Expect(mask=PADDING_OR_BIAS, empty_row="zero"),
        _keep_padded,
        empty="zero",
    ),
    Form("row-gate", (gate_after, gate_where), Expect(factor=r"t0\["), _row_gate),
)
