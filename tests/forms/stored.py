"""Keys and values that a cache stores in a narrower type, dequantised on the way to the products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .bodies import causal, functional, lucidrains, minimum
from .form import Expect, Form, Make

BY_TOKEN = r"\(.*t\d\[n0, n1, kv_idx, 0\].*\)$"


def _levels(x: torch.Tensor, scale: torch.Tensor, zero: int, dtype: torch.dtype) -> torch.Tensor:
    limits = torch.iinfo(dtype)
    return (x.float() / scale.float() + zero).round().clamp(limits.min, limits.max).to(dtype)


def _symmetric(make: Make) -> tuple[torch.Tensor, ...]:
    """Queries, int8 keys and values, and a scale for each token of both."""
    q, k, v = make.qkv()
    scales = [(x.abs().amax(-1, keepdim=True) / 127).to(make.dtype) for x in (k, v)]
    return q, *(_levels(x, s, 0, torch.int8) for x, s in zip((k, v), scales, strict=True)), *scales


def symmetric_multiplied(c: Any, q: Any, k: Any, v: Any, k_scale: Any, v_scale: Any) -> Any:
    k, v = k.to(q.dtype) * k_scale, v.to(q.dtype) * v_scale
    return lucidrains(c, q, k, v, causal(q, k))


def symmetric_in_float32(c: Any, q: Any, k: Any, v: Any, k_scale: Any, v_scale: Any) -> Any:
    """Dequantised in float32, by scales that were expanded to all columns."""
    key = torch.mul(k.float(), k_scale.float().expand_as(k)).to(q.dtype)
    value = torch.mul(v.float(), v_scale.float().expand_as(v)).type_as(q)
    attn_weights = torch.matmul(q, key.transpose(2, 3)) * c.scale + minimum(causal(q, k), q)
    return torch.matmul(F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(q.dtype), value)


def symmetric_functional(c: Any, q: Any, k: Any, v: Any, k_scale: Any, v_scale: Any) -> Any:
    return functional(c, q, k * k_scale, v * v_scale, causal(q, k))


def _affine(make: Make) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values in bytes, and for each a scale and a zero point: keys' by channel, values' by token."""
    q, k, v = make.qkv()
    scales = [(x.abs().amax(axis, keepdim=True) / 127).to(make.dtype) for x, axis in ((k, 2), (v, 3))]
    stored = [_levels(x, s, 128, torch.uint8) for x, s in zip((k, v), scales, strict=True)]
    zeros = [torch.full_like(s, 128) for s in scales]
    return q, *stored, *scales, *zeros


def affine_subtracted(c: Any, q: Any, k: Any, v: Any, ks: Any, vs: Any, kz: Any, vz: Any) -> Any:
    k, v = (k.to(q.dtype) - kz) * ks, (v.to(q.dtype) - vz) * vs
    return lucidrains(c, q, k, v, causal(q, k))


def affine_added(c: Any, q: Any, k: Any, v: Any, ks: Any, vs: Any, kz: Any, vz: Any) -> Any:
    """As HQQ's `(W - zero) * scale` written out in float32."""
    k = (k.float() * ks.float() - kz.float() * ks.float()).to(q.dtype)
    v = (v.float() * vs.float() - vz.float() * vs.float()).to(q.dtype)
    return functional(c, q, k, v, causal(q, k))


FORMS = (
    Form(
        "int8-cache",
        (symmetric_multiplied, symmetric_in_float32, symmetric_functional),
        Expect(mask="causal", key=BY_TOKEN, value=BY_TOKEN),
        _symmetric,
    ),
    Form(
        "affine-cache",
        (affine_subtracted, affine_added),
        Expect(mask="causal", key=r".*t\d\[n0, n1, 0, d_idx\]", value=BY_TOKEN),
        _affine,
    ),
)
