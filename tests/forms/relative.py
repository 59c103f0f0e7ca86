"""Scores with a second product in them: of queries with relative positions, read through an index map or a look-up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .bodies import positions
from .form import Expect, Form, Make

# --------------------------------------------------------------------------------------------------------------------
# Decomposed relative positions of an image, ViTDet (https://arxiv.org/abs/2203.16527), SAM


def _decomposed(make: Make) -> tuple[torch.Tensor, ...]:
    """q, k [B, H, N, D] and v of an image of N pixels, and one table of relative rows and one of relative columns."""
    c = make.sizes
    tables = (make.randn(2 * n - 1, c.dim, scale=0.5) for n in c.grid)
    return (*make.qkv(), *tables)


def rel_pos(size: int, table: Any) -> Any:
    """The table's rows by query and key coordinate, [size, size, D]."""
    coords = torch.arange(size, device=table.device)
    return table[(coords[:, None] - coords[None, :] + (size - 1)).long()]


def decomposed_sam(c: Any, q: Any, k: Any, v: Any, rel_pos_h: Any, rel_pos_w: Any) -> Any:
    h, w = c.grid
    batch = q.shape[0] * q.shape[1]
    q, k, v = (x.reshape(batch, h * w, -1) for x in (q, k, v))
    attn = (q * c.scale) @ k.transpose(-2, -1)
    r_q = q.reshape(batch, h, w, -1)
    rel_h = torch.einsum("bhwc,hkc->bhwk", r_q, rel_pos(h, rel_pos_h))
    rel_w = torch.einsum("bhwc,wkc->bhwk", r_q, rel_pos(w, rel_pos_w))
    attn = (attn.view(batch, h, w, h, w) + rel_h[:, :, :, :, None] + rel_w[:, :, :, None, :]).view(batch, h * w, h * w)
    return attn.softmax(dim=-1) @ v


def decomposed_functional(c: Any, q: Any, k: Any, v: Any, rel_pos_h: Any, rel_pos_w: Any) -> Any:
    h, w = c.grid
    r_q = q.reshape(q.shape[0], q.shape[1], h, w, -1)
    rel_h = torch.einsum("bnhwc,hkc->bnhwk", r_q, rel_pos(h, rel_pos_h))[..., :, None]
    rel_w = torch.einsum("bnhwc,wkc->bnhwk", r_q, rel_pos(w, rel_pos_w))[..., None, :]
    bias = (rel_h + rel_w).reshape(q.shape[0], q.shape[1], h * w, h * w)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


# --------------------------------------------------------------------------------------------------------------------
# Relative shift, Transformer-XL (https://arxiv.org/abs/1901.02860), XLNet, Conformer


def _shifted(make: Make) -> tuple[torch.Tensor, ...]:
    """q, k, v; keys of the 2 T - 1 relative positions [H, 2 T - 1, D]; the two query biases [H, 1, D]."""
    c = make.sizes
    biases = (make.randn(c.heads, 1, c.dim, scale=0.5) for _ in range(2))
    return (*make.qkv(), make.randn(c.heads, 2 * c.q_len - 1, c.dim), *biases)


def _shifted_even(make: Make) -> tuple[torch.Tensor, ...]:
    """The same with 2 T relative positions."""
    q, k, v, _, u, w = _shifted(make)
    c = make.sizes
    return q, k, v, make.randn(c.heads, 2 * c.q_len, c.dim), u, w


def shift_conformer(c: Any, q: Any, k: Any, v: Any, r: Any, u: Any, w: Any) -> Any:
    """ESPnet's RelPositionMultiHeadedAttention: a zero column in front, a view, a slice."""
    matrix_ac = torch.matmul(q + u, k.transpose(-2, -1))
    x = torch.matmul(q + w, r.transpose(-2, -1))
    zero_pad = torch.zeros((*x.size()[:3], 1), device=x.device, dtype=x.dtype)
    x_padded = torch.cat([zero_pad, x], dim=-1)
    x_padded = x_padded.view(*x.size()[:2], x.size(3) + 1, x.size(2))
    matrix_bd = x_padded[:, :, 1:].view_as(x)[:, :, :, : x.size(-1) // 2 + 1]
    scores = (matrix_ac + matrix_bd) * c.scale
    return torch.matmul(torch.softmax(scores, dim=-1), v)


def shift_padded(c: Any, q: Any, k: Any, v: Any, r: Any, u: Any, w: Any) -> Any:
    """NeMo and lucidrains: pad, view, drop the first row, view, and scaled products."""
    ac = torch.einsum("bhid,bhjd->bhij", (q + u) * c.scale, k)
    x = torch.einsum("bhid,hjd->bhij", (q + w) * c.scale, r)
    b, h, qlen, pos_len = x.size()
    x = F.pad(x, pad=(1, 0))
    x = x.view(b, h, -1, qlen)
    x = x[:, :, 1:].view(b, h, qlen, pos_len)
    return (ac + x[..., : k.shape[2]]).softmax(-1) @ v


def shift_xlnet(c: Any, q: Any, k: Any, v: Any, r: Any, u: Any, w: Any) -> Any:
    """XLNet's rel_shift_bnij: a reshape, a slice, a reshape, and index_select of the keys."""
    ac = torch.einsum("bnid,bnjd->bnij", q + u, k)
    x = torch.einsum("bnid,njd->bnij", q + w, r)
    size = x.shape
    x = x.reshape(size[0], size[1], size[3], size[2])
    x = x[:, :, 1:, :]
    x = x.reshape(size[0], size[1], size[2], size[3] - 1)
    bd = torch.index_select(x, 3, torch.arange(k.shape[2], device=x.device, dtype=torch.long))
    attn_score = (ac + bd) * c.scale
    attn_prob = F.softmax(attn_score, dim=3)
    return torch.einsum("bnij,bnjd->bind", attn_prob, v)


def shift_by_index(c: Any, q: Any, k: Any, v: Any, r: Any, u: Any, w: Any) -> Any:
    """The same shift as a gather of positions."""
    i, j = positions(q, k)
    x = torch.matmul(q + w, r.transpose(-2, -1))
    index = (q.shape[2] + j - i).expand(*x.shape[:2], -1, -1)
    scores = torch.matmul(q + u, k.transpose(-2, -1)) + torch.gather(x, -1, index)
    return torch.matmul((scores * c.scale).softmax(-1), v)


# --------------------------------------------------------------------------------------------------------------------
# Disentangled attention, DeBERTa (https://arxiv.org/abs/2006.03654)


def _disentangled(make: Make) -> tuple[torch.Tensor, ...]:
    """q, k, v; keys and queries of the relative positions [H, buckets, D]."""
    c = make.sizes
    return (*make.qkv(), *(make.randn(c.heads, c.buckets, c.dim) for _ in range(2)))


def disentangled_hf(c: Any, q: Any, k: Any, v: Any, pos_key: Any, pos_query: Any) -> Any:
    """transformers' DebertaV2: heads folded into the batch, gathers of two more products."""
    b, n, s, d = q.shape
    query_layer, key_layer, value_layer = (x.reshape(b * n, s, -1) for x in (q, k, v))
    pos_key_layer, pos_query_layer = (x.repeat(b, 1, 1) for x in (pos_key, pos_query))
    scale = torch.sqrt(torch.tensor(d, dtype=torch.float) * 3)
    attention_scores = torch.bmm(query_layer, key_layer.transpose(-1, -2) / scale.to(dtype=q.dtype))
    i, j = positions(q, k)
    relative_pos = (i - j).unsqueeze(0)
    att_span = c.buckets // 2
    c2p_att = torch.bmm(query_layer, pos_key_layer.transpose(-1, -2))
    c2p_pos = torch.clamp(relative_pos + att_span, 0, att_span * 2 - 1)
    c2p_att = torch.gather(c2p_att, dim=-1, index=c2p_pos.expand([b * n, s, s]))
    score = c2p_att / scale.to(dtype=c2p_att.dtype)
    p2c_att = torch.bmm(key_layer, pos_query_layer.transpose(-1, -2))
    p2c_pos = torch.clamp(-relative_pos + att_span, 0, att_span * 2 - 1)
    p2c_att = torch.gather(p2c_att, dim=-1, index=p2c_pos.expand([b * n, s, s])).transpose(-1, -2)
    score = score + p2c_att / scale.to(dtype=p2c_att.dtype)
    attention_scores = (attention_scores + score).view(b, n, s, s)
    attention_probs = F.softmax(attention_scores, dim=-1)
    return torch.bmm(attention_probs.view(b * n, s, s), value_layer).view(b, n, s, -1)


def disentangled_four_axes(c: Any, q: Any, k: Any, v: Any, pos_key: Any, pos_query: Any) -> Any:
    scale = (c.dim * 3) ** -0.5
    i, j = positions(q, k)
    span = c.buckets // 2
    rel = i - j
    c2c = torch.einsum("bhqd,bhkd->bhqk", q, k)
    c2p = torch.einsum("bhqd,hpd->bhqp", q, pos_key)
    p2c = torch.einsum("bhkd,hpd->bhkp", k, pos_query)
    shape = (*q.shape[:3], k.shape[2])
    c2p = c2p.gather(-1, (rel + span).clamp(0, 2 * span - 1).expand(shape))
    p2c = p2c.gather(-1, (span - rel).clamp(0, 2 * span - 1).expand(shape)).mT
    return ((c2c + c2p + p2c) * scale).softmax(-1) @ v


# --------------------------------------------------------------------------------------------------------------------
# Relative keys by a table of clipped distances, Shaw et al. (https://arxiv.org/abs/1803.02155)


def _relative_keys(make: Make) -> tuple[torch.Tensor, ...]:
    c = make.sizes
    return (*make.qkv(), make.randn(c.buckets + 1, c.dim))


def clipped_gather(c: Any, q: Any, k: Any, v: Any, table: Any) -> Any:
    i, j = positions(q, k)
    index = (j - i).clamp(-(c.buckets // 2), c.buckets // 2) + c.buckets // 2
    relative = torch.matmul(q, table.transpose(0, 1))
    scores = q @ k.mT + relative.gather(-1, index.expand(*q.shape[:3], -1))
    return (scores * c.scale).softmax(-1) @ v


def clipped_take(c: Any, q: Any, k: Any, v: Any, table: Any) -> Any:
    i, j = positions(q, k)
    index = torch.clamp(j - i, min=-(c.buckets // 2), max=c.buckets // 2) + c.buckets // 2
    relative = torch.einsum("bhqd,rd->bhqr", q * c.scale, table)
    scores = torch.einsum("bhqd,bhkd->bhqk", q * c.scale, k)
    scores = scores + torch.take_along_dim(relative, index[None, None], dim=-1)
    return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(scores, -1), v)


FORMS = (
    Form(
        "decomposed-positions",
        (decomposed_sam, decomposed_functional),
        Expect((r"qk \* 0\.3535", r"t0", r"t1")),
        _decomposed,
    ),
    Form("relative-shift", (shift_conformer, shift_padded), Expect((r"qk", r"t0\["), squares=1), _shifted),
    Form("relative-shift-even", (shift_xlnet, shift_by_index), Expect((r"qk", r"t0\["), squares=1), _shifted_even),
    Form("disentangled", (disentangled_hf, disentangled_four_axes), Expect((r"qk", r"t0\[", r"t1\[")), _disentangled),
    Form("clipped-distances", (clipped_gather, clipped_take), Expect((r"qk", r"\* 0\.3535", r"t0\[")), _relative_keys),
)
