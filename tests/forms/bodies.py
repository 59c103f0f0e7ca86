"""The frame that a library puts around its scores: where it scales, how it masks, in which type it normalises."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F


def hugging_face(c: Any, q: Any, k: Any, v: Any, bias: Any = None) -> Any:
    """transformers' eager_attention_forward; `bias` is added to the scores. q [B, H, Tq, D] to [B, Tq, H, Dv]."""
    attn_weights = torch.matmul(q, k.transpose(2, 3)) * c.scale
    if bias is not None:
        attn_weights = attn_weights + bias
    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(q.dtype)
    attn_weights = F.dropout(attn_weights, p=0.1, training=c.training)
    attn_output = torch.matmul(attn_weights, v)
    return attn_output.transpose(1, 2).contiguous()


def nano_gpt(c: Any, q: Any, k: Any, v: Any, drop: Any, fill: float = float("-inf")) -> Any:
    """nanoGPT's manual attention; `drop` is True where a key is masked."""
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(drop, fill)
    att = F.softmax(att, dim=-1)
    return att @ v


def lucidrains(c: Any, q: Any, k: Any, v: Any, keep: Any) -> Any:
    """lucidrains' Attention; `keep` is True where a key is seen."""
    sim = torch.einsum("b h i d, b h j d -> b h i j", q * c.scale, k)
    sim = sim.masked_fill(~keep, -torch.finfo(sim.dtype).max)
    attn = sim.softmax(dim=-1)
    return torch.einsum("b h i j, b h j d -> b h i d", attn, v)


def fairseq(c: Any, q: Any, k: Any, v: Any, attn_mask: Any) -> Any:
    """fairseq's MultiheadAttention: heads folded into the batch, a mask that broadcasts to [B, H, Tq, Tkv] added."""
    bsz, heads, tgt_len, src_len = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    q = (q * c.scale).reshape(bsz * heads, tgt_len, -1)
    k = k.reshape(bsz * heads, src_len, -1)
    v = v.reshape(bsz * heads, src_len, -1)
    attn_weights = torch.bmm(q, k.transpose(1, 2))
    attn_weights = attn_weights.view(bsz, heads, tgt_len, src_len) + attn_mask
    attn_weights = attn_weights.view(bsz * heads, tgt_len, src_len)
    attn_weights = F.softmax(attn_weights.float(), dim=-1).type_as(attn_weights)
    return torch.bmm(attn_weights, v).view(bsz, heads, tgt_len, -1)


def functional(c: Any, q: Any, k: Any, v: Any, attn_mask: Any = None) -> Any:
    """The functional call; a boolean mask is True where a key is seen."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)


def positions(q: Any, k: Any) -> tuple[Any, Any]:
    """Query positions [Tq, 1] and key positions [Tkv]."""
    return torch.arange(q.shape[-2], device=q.device)[:, None], torch.arange(k.shape[-2], device=q.device)


def causal(q: Any, k: Any) -> Any:
    """True where a key is seen, [Tq, Tkv]."""
    i, j = positions(q, k)
    return j <= i


def minimum(keep: Any, q: Any) -> Any:
    """The additive mask of transformers: zero, or the smallest number of the queries' type."""
    return torch.where(keep, torch.tensor(0.0, device=q.device, dtype=q.dtype), torch.finfo(q.dtype).min)
