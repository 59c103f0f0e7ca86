"""Biases that are looked up: in buckets of distances (T5, https://arxiv.org/abs/1910.10683), in tables of pairs.

Such tables, and masks of shifted windows beside them, are Swin's: https://arxiv.org/abs/2103.14030.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from .bodies import functional, hugging_face, minimum, positions
from .form import Expect, Form, Make


def bucket(relative_position: Any, num_buckets: int, max_distance: int = 20) -> Any:
    """T5's bidirectional relative_position_bucket."""
    num_buckets //= 2
    relative_buckets = (relative_position > 0).to(torch.long) * num_buckets
    relative_position = torch.abs(relative_position)
    max_exact = num_buckets // 2
    is_small = relative_position < max_exact
    large = max_exact + (
        torch.log(relative_position.float() / max_exact)
        / math.log(max_distance / max_exact)
        * (num_buckets - max_exact)
    ).to(torch.long)
    large = torch.min(large, torch.full_like(large, num_buckets - 1))
    return relative_buckets + torch.where(is_small, relative_position, large)


def bucketed_t5(c: Any, q: Any, k: Any, v: Any, table: Any) -> Any:
    context_position, memory_position = positions(q, k)
    values = F.embedding(bucket(memory_position[None, :] - context_position, c.buckets), table)
    position_bias = values.permute([2, 0, 1]).unsqueeze(0)
    scores = torch.matmul(q * c.scale, k.transpose(3, 2))
    scores += position_bias
    attn_weights = F.softmax(scores.float(), dim=-1).type_as(scores)
    return torch.matmul(attn_weights, v)


def bucketed_mpnet(c: Any, q: Any, k: Any, v: Any, table: Any) -> Any:
    i, j = positions(q, k)
    rp_bucket = bucket((j - i).long(), c.buckets)
    bias = table[rp_bucket].permute([2, 0, 1]).unsqueeze(0).expand((q.shape[0], -1, -1, -1)).contiguous()
    attention_scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(c.dim)
    attention_scores += bias
    return torch.matmul(F.softmax(attention_scores, dim=-1), v)


def bucket_before(distance: Any, num_buckets: int, max_distance: int = 20) -> Any:
    """T5's buckets for a decoder, which looks back only; parts are added in place."""
    found = 0
    back = -torch.min(distance, torch.zeros_like(distance))
    exact = num_buckets // 2
    far = exact + (torch.log(back.float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)).to(
        torch.long
    )
    far = torch.min(far, torch.full_like(far, num_buckets - 1))
    found += torch.where(back < exact, back, far)
    return found


def decoder_t5(c: Any, q: Any, k: Any, v: Any, table: Any) -> Any:
    """The biases of all positions, sliced to those of the last queries, with the causal mask added once."""
    at = torch.arange(k.shape[2], device=q.device)
    values = F.embedding(bucket_before(at[None, :] - at[:, None], c.buckets), table)
    position_bias = values.permute([2, 0, 1]).unsqueeze(0)[:, :, -q.shape[2] :, :]
    i, j = positions(q, k)
    position_bias = position_bias + minimum(j <= i + (k.shape[2] - q.shape[2]), q)
    scores = torch.matmul(q * c.scale, k.transpose(3, 2))
    scores += position_bias
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)


def decoder_x_transformers(c: Any, q: Any, k: Any, v: Any, table: Any) -> Any:
    i, j = q.shape[2], k.shape[2]
    q_pos = torch.arange(j - i, j, dtype=torch.long, device=q.device)
    k_pos = torch.arange(j, dtype=torch.long, device=q.device)
    rel_pos = k_pos[None, :] - q_pos[:, None]
    bias = F.embedding(bucket_before(rel_pos, c.buckets), table).movedim(-1, 0)
    sim = torch.einsum("bhid,bhjd->bhij", q, k) * c.scale + bias
    sim = sim.masked_fill(rel_pos > 0, -torch.finfo(sim.dtype).max)
    return torch.einsum("bhij,bhjd->bhid", sim.softmax(dim=-1), v)


def clipped_bias(c: Any, q: Any, k: Any, v: Any, table: Any) -> Any:
    i, j = positions(q, k)
    at = torch.clamp(j - i, -(c.buckets // 2), c.buckets // 2 - 1) + c.buckets // 2
    return functional(c, q, k, v, table[at].permute(2, 0, 1)[None])


def clipped_bias_selected(c: Any, q: Any, k: Any, v: Any, table: Any) -> Any:
    i, j = positions(q, k)
    span = c.buckets // 2
    at = (i - j).clamp(min=1 - span, max=span)
    bias = torch.index_select(table, 0, (span - at).flatten()).view(q.shape[2], k.shape[2], c.heads)
    return hugging_face(c, q, k, v, bias.permute(2, 0, 1)).transpose(1, 2)


def _buckets(make: Make) -> tuple[torch.Tensor, ...]:
    return (*make.qkv(), make.randn(make.sizes.buckets, make.sizes.heads))


def relative_position_index(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Swin's buffer: for each pair of pixels of a window the row of the bias table, [N, N]."""
    at = torch.arange(height * width, device=device)
    y, x = at // width, at % width
    rows = (y[:, None] - y + height - 1) * (2 * width - 1)
    return rows + x[:, None] - x + width - 1


def _table(make: Make) -> tuple[torch.Tensor, ...]:
    height, width = make.sizes.grid
    table = make.randn((2 * height - 1) * (2 * width - 1), make.sizes.heads)
    return (*make.qkv(), table, relative_position_index(height, width, make.device))


def table_beit(c: Any, q: Any, k: Any, v: Any, table: Any, index: Any) -> Any:
    n = index.shape[0]
    bias = table[index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
    attn = (q * c.scale) @ k.transpose(-2, -1)
    attn = attn + bias.unsqueeze(0)
    return attn.softmax(dim=-1) @ v


def table_timm(c: Any, q: Any, k: Any, v: Any, table: Any, index: Any) -> Any:
    bias = table[index].permute(2, 0, 1).unsqueeze(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


WINDOWS = 2  # of a shifted-window layer


def _windows(make: Make) -> tuple[torch.Tensor, ...]:
    """[B * windows, H, N, D], the table and its index, and the mask [windows, N, N] of -100 between regions."""
    c = make.sizes
    q, k, v = (make.randn(c.batch * WINDOWS, c.heads, c.q_len, d) for d in (c.dim, c.dim, c.value_dim))
    _, _, _, table, index = _table(make)
    region = torch.arange(c.q_len, device=make.device) // 3 % 2
    shifted = (region[:, None] != region) * -100.0
    return q, k, v, table, index, torch.stack([torch.zeros_like(shifted), shifted]).to(make.dtype)


def shifted_windows_swin(c: Any, q: Any, k: Any, v: Any, table: Any, index: Any, mask: Any) -> Any:
    b, heads, n, _ = q.shape
    attn = (q * c.scale) @ k.transpose(-2, -1)
    bias = table[index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
    attn = attn + bias.unsqueeze(0)
    windows = mask.shape[0]
    attn = attn.view(b // windows, windows, heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
    attn = attn.view(-1, heads, n, n)
    return F.softmax(attn, dim=-1) @ v


def shifted_windows_timm(c: Any, q: Any, k: Any, v: Any, table: Any, index: Any, mask: Any) -> Any:
    b, heads, n, _ = q.shape
    attn_mask = table[index].permute(2, 0, 1).unsqueeze(0)
    windows = mask.shape[0]
    mask = mask.view(1, windows, 1, n, n).expand(b // windows, -1, heads, -1, -1)
    attn_mask = attn_mask + mask.reshape(-1, heads, n, n)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)


FORMS = (
    Form("bucketed-distances", (bucketed_t5, bucketed_mpnet), Expect((r"qk", r"t\d\[n1, .*kv_idx")), _buckets),
    Form(
        "bucketed-offset",
        (decoder_t5, decoder_x_transformers),
        Expect((r"qk", r"t\d\[n1, .*kv_idx"), r"window \.\.6$"),
        _buckets,
        more_keys=True,
    ),
    Form("clipped-bias", (clipped_bias, clipped_bias_selected), Expect((r"qk", r"t\d\[n1, .*kv_idx")), _buckets),
    Form("bias-table", (table_beit, table_timm), Expect(squares=None), _table),
    Form("shifted-windows", (shifted_windows_swin, shifted_windows_timm), Expect(squares=None), _windows),
)
