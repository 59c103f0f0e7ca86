"""What is done to the scores themselves: scales, temperatures, soft caps, clamps, cosine similarity."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from .bodies import causal, minimum, positions
from .form import Expect, Form, Make

CAP = 5.0


# --------------------------------------------------------------------------------------------------------------------
# Soft caps, https://arxiv.org/abs/2408.00118


def softcap_gemma(c: Any, q: Any, k: Any, v: Any) -> Any:
    attn_weights = torch.matmul(q, k.transpose(2, 3)) * c.scale
    attn_weights = attn_weights / CAP
    attn_weights = torch.tanh(attn_weights)
    attn_weights = attn_weights * CAP
    attn_weights = attn_weights + minimum(causal(q, k), q)
    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(attn_weights, v)


def softcap_grok(c: Any, q: Any, k: Any, v: Any) -> Any:
    logits = torch.einsum("bhqd,bhkd->bhqk", q * c.scale, k)
    logits = CAP * torch.tanh(logits / CAP)
    logits = torch.where(causal(q, k), logits, -1e30)
    return torch.einsum("bhqk,bhkd->bhqd", logits.softmax(-1), v)


def clamp(c: Any, q: Any, k: Any, v: Any) -> Any:
    attn_weights = torch.bmm(q.flatten(0, 1) * c.scale, k.flatten(0, 1).transpose(1, 2))
    attn_weights = torch.clamp(attn_weights, min=-1.5, max=1.5)
    return torch.bmm(attn_weights.softmax(-1), v.flatten(0, 1))


def clamp_as_min_and_max(c: Any, q: Any, k: Any, v: Any) -> Any:
    scores = q @ k.mT * c.scale
    bound = torch.tensor(1.5, dtype=q.dtype, device=q.device)
    scores = torch.maximum(torch.minimum(scores, bound), -bound)
    return scores.softmax(-1) @ v


def clamp_xglm(c: Any, q: Any, k: Any, v: Any) -> Any:
    attn_weights = torch.matmul(q * c.scale, k.transpose(2, 3))
    attn_weights = attn_weights + minimum(causal(q, k), q)
    attn_weights = torch.max(
        attn_weights, torch.tensor(torch.finfo(attn_weights.dtype).min, device=q.device, dtype=attn_weights.dtype)
    )
    return F.softmax(attn_weights, dim=-1) @ v


def clamp_min(c: Any, q: Any, k: Any, v: Any) -> Any:
    scores = q @ k.transpose(-1, -2) * c.scale
    scores = scores.masked_fill(~causal(q, k), torch.finfo(q.dtype).min)
    return scores.clamp(min=torch.finfo(q.dtype).min).softmax(-1) @ v


# --------------------------------------------------------------------------------------------------------------------
# Temperatures


def _per_head(make: Make) -> tuple[torch.Tensor, ...]:
    """A temperature of each head, [H, 1, 1]."""
    return (*make.qkv(), (make.shaped("H11").abs() + 0.3).to(make.dtype))


def temperature_after(c: Any, q: Any, k: Any, v: Any, temperature: Any) -> Any:
    attn = (q @ k.transpose(-2, -1)) * temperature
    return attn.softmax(dim=-1) @ v


def temperature_on_queries(c: Any, q: Any, k: Any, v: Any, temperature: Any) -> Any:
    return torch.einsum("bhij,bhjd->bihd", torch.einsum("bhid,bhjd->bhij", q * temperature, k).softmax(-1), v)


def _scalar(make: Make) -> tuple[torch.Tensor, ...]:
    return (*make.qkv(), torch.tensor(0.7, device=make.device).to(make.dtype))


def temperature_scalar(c: Any, q: Any, k: Any, v: Any, temperature: Any) -> Any:
    return F.softmax(torch.matmul(q, k.transpose(2, 3)) / temperature, dim=-1) @ v


def temperature_inverse(c: Any, q: Any, k: Any, v: Any, temperature: Any) -> Any:
    return torch.bmm((1.0 / temperature * q.flatten(0, 1) @ k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1))


def _logit_scale(make: Make) -> tuple[torch.Tensor, ...]:
    """SwinV2's logit scale [H, 1, 1], some of it above the clamp."""
    return (*make.qkv(), (make.shaped("H11") + 3.5).to(make.dtype))


def cosine_swin(c: Any, q: Any, k: Any, v: Any, logit_scale: Any) -> Any:
    """https://arxiv.org/abs/2111.09883, section 3.2"""
    attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    logit_scale = torch.clamp(logit_scale, max=math.log(1.0 / 0.01)).exp()
    attn = attn * logit_scale
    return attn.softmax(dim=-1) @ v


def cosine_lucidrains(c: Any, q: Any, k: Any, v: Any, logit_scale: Any) -> Any:
    q, k = (F.normalize(t, p=2, dim=-1) for t in (q, k))
    sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * logit_scale.clamp(max=math.log(100)).exp()
    return torch.einsum("b h i j, b h j d -> b h i d", sim.softmax(dim=-1), v)


def row_temperature_qwen(c: Any, q: Any, k: Any, v: Any) -> Any:
    """Queries scaled by the logarithm of their position."""
    position = torch.arange(1, q.shape[2] + 1, device=q.device, dtype=torch.float32)
    q = q * (torch.log(position + 3.0) / math.log(6.0)).to(q.dtype)[None, None, :, None]
    scores = q @ k.transpose(-1, -2) * c.scale
    return scores.masked_fill(~causal(q, k), float("-inf")).softmax(-1) @ v


def row_temperature_scores(c: Any, q: Any, k: Any, v: Any) -> Any:
    """Scores of a row scaled by its position."""
    i, j = positions(q, k)
    tuned = (torch.log(i + 4.0) / math.log(6.0)).to(q.dtype)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * c.scale * tuned
    return torch.einsum("bhij,bhjd->bhid", torch.where(j <= i, scores, float("-inf")).softmax(-1), v)


# --------------------------------------------------------------------------------------------------------------------
# Scaling after masks


def scaled_after_mask(c: Any, q: Any, k: Any, v: Any) -> Any:
    """CodeGen: the mask's minimum is divided too."""
    attn_weights = torch.matmul(q, k.transpose(-1, -2))
    mask_value = torch.tensor(torch.finfo(attn_weights.dtype).min, dtype=attn_weights.dtype, device=q.device)
    attn_weights = torch.where(causal(q, k), attn_weights, mask_value) / math.sqrt(c.dim)
    return F.softmax(attn_weights, dim=-1) @ v


def scaled_after_added_mask(c: Any, q: Any, k: Any, v: Any) -> Any:
    scores = q @ k.mT
    scores = scores + torch.zeros_like(causal(q, k), dtype=q.dtype).masked_fill(~causal(q, k), float("-inf"))
    return (scores * c.scale).softmax(-1) @ v


def cogview(c: Any, q: Any, k: Any, v: Any) -> Any:
    """CogView's PB-relax: softmax((s / 32 - max) * 32), https://arxiv.org/abs/2105.13290"""
    attention_scores = torch.matmul(q, k.transpose(-1, -2)) * c.scale
    scaled = attention_scores / 32
    max_value = scaled.amax(dim=-1).unsqueeze(-1)
    return F.softmax((scaled - max_value) * 32, dim=-1) @ v


def shifted_by_maximum(c: Any, q: Any, k: Any, v: Any) -> Any:
    """Flamingo: the row's maximum is subtracted before a softmax that does so itself."""
    sim = torch.einsum("bhid,bhjd->bhij", q * c.scale, k)
    sim = sim - sim.amax(dim=-1, keepdim=True).detach()
    return torch.einsum("bhij,bhjd->bhid", sim.softmax(dim=-1), v)


FORMS = (
    Form("softcap", (softcap_gemma, softcap_grok), Expect((r"tanh\(", r"qk \* 0\.0707", r"\* 5\.0"), "causal$")),
    Form("clamp", (clamp, clamp_as_min_and_max), Expect((r"qk \* 0\.3535", r"min(imum)?\(", r"max(imum)?\("))),
    Form("clamp-mask", (clamp_xglm, clamp_min), Expect((r"qk \* 0\.3535", r"max(imum)?\("), "causal$")),
    Form("temperature-heads", (temperature_after, temperature_on_queries), Expect((r"qk \* t0\[.*n1",)), _per_head),
    Form("temperature-scalar", (temperature_scalar, temperature_inverse), Expect((r"qk [*/] .*t0\[",)), _scalar),
    Form("cosine", (cosine_swin, cosine_lucidrains), Expect((r"qk \* .*t0\[.*n1",)), _logit_scale),
    Form("row-temperature", (row_temperature_qwen, row_temperature_scores), Expect((r"qk",), "causal$", squares=0)),
    Form("scaled-after-mask", (scaled_after_mask, scaled_after_added_mask), Expect((r"\* 0\.3535",), "causal$")),
    Form("shifted-by-maximum", (cogview, shifted_by_maximum), Expect()),
)
