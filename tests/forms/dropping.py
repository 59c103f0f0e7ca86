"""Dropout on the probabilities."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .bodies import causal, minimum
from .form import Attention, Expect, Form, Make, Sizes

P = 0.25


def hugging_face(c: Any, q: Any, k: Any, v: Any) -> Any:
    """transformers' eager attention, in training."""
    weights = torch.matmul(q, k.transpose(2, 3)) * c.scale
    weights = weights + minimum(causal(q, k), q)
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=P, training=True), v)


class NanoGPT(Attention):
    """nanoGPT's modules."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.attn_dropout = nn.Dropout(P)

    def train(self, mode: bool = True) -> NanoGPT:
        """In training, whatever the rest of the model is in."""
        return super().train(True)

    def forward(self, q: Any, k: Any, v: Any) -> Any:
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(~causal(q, k), float("-inf"))
        return self.attn_dropout(F.softmax(att, dim=-1)) @ v


class InPlace(NanoGPT):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.attn_dropout = nn.Dropout(P, inplace=True)


def functional(c: Any, q: Any, k: Any, v: Any) -> Any:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=P, is_causal=True)


def folded(c: Any, q: Any, k: Any, v: Any) -> Any:
    """fairseq: heads folded into the batch, float32 probabilities cast before they are dropped from."""
    shape = (q.shape[0] * q.shape[1], -1, q.shape[3])
    weights = torch.bmm(q.reshape(shape) * c.scale, k.reshape(shape).transpose(1, 2))
    weights = F.softmax(weights.masked_fill(~causal(q, k), -math.inf).float(), dim=-1).type_as(weights)
    attn = torch.bmm(torch.dropout(weights, P, True), v.flatten(0, 1))
    return attn.view(q.shape[0], q.shape[1], q.shape[2], -1)


def _head_mask(make: Make) -> tuple[torch.Tensor, ...]:
    return (*make.qkv(), make.randn(make.sizes.heads))


def scores(c: Any, q: Any, k: Any) -> Any:
    return q @ k.transpose(-1, -2) * c.scale


def factor_behind(c: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
    """BERT's head mask."""
    return (F.dropout(scores(c, q, k).softmax(-1), P) * mask.view(1, -1, 1, 1)) @ v


def factor_before(c: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
    return F.dropout(scores(c, q, k).softmax(-1) * mask[:, None, None], P) @ v


def sink_column(c: Any, q: Any, k: Any, v: Any, sinks: Any) -> Any:
    """gpt-oss: the column without a value is cut off first."""
    column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    probs = torch.cat([scores(c, q, k), column], dim=-1).softmax(-1)
    return torch.matmul(F.dropout(probs[..., :-1], p=P, training=True), v)


def sink_cut_off(c: Any, q: Any, k: Any, v: Any, sinks: Any) -> Any:
    """The softmax spelled without the column."""
    x = scores(c, q, k)
    sink = sinks[:, None, None]
    m = torch.maximum(x.amax(-1, keepdim=True), sink)
    e = torch.exp(x - m)
    return F.dropout(e / (e.sum(-1, keepdim=True) + torch.exp(sink - m)), P) @ v


def difference_dropped(c: Any, q: Any, k: Any, v: Any) -> Any:
    """One mask for both terms."""
    return F.dropout(scores(c, q, k).softmax(-1) - 0.5 * scores(c, k, q).softmax(-1), P) @ v


def difference_of_columns(c: Any, q: Any, k: Any, v: Any) -> Any:
    """The same over tensors that are kept apart until they are subtracted."""
    first, second = (torch.einsum("bhid,bhjd->bhij", a, b).mul(c.scale).softmax(-1) for a, b in ((q, k), (k, q)))
    return torch.einsum("bhij,bhjd->bhid", F.dropout(first - second / 2, P), v)


def difference_of_dropped(c: Any, q: Any, k: Any, v: Any) -> Any:
    """A mask for each term."""
    first = F.dropout(scores(c, q, k).softmax(-1), P)
    return (first - 0.5 * F.dropout(scores(c, k, q).softmax(-1), P)) @ v


def difference_of_two_modules(c: Any, q: Any, k: Any, v: Any) -> Any:
    first, second = (torch.dropout(scores(c, a, b).softmax(-1), P, True) for a, b in ((q, k), (k, q)))
    return torch.sub(first, second, alpha=0.5) @ v


def sigmoid(c: Any, q: Any, k: Any, v: Any) -> Any:
    return F.dropout(torch.sigmoid(scores(c, q, k)), P) @ v


def sigmoid_cast(c: Any, q: Any, k: Any, v: Any) -> Any:
    return F.dropout(torch.sigmoid(scores(c, q, k).float()), P).to(v.dtype) @ v


def cleared(c: Any, q: Any, k: Any, v: Any) -> Any:
    """Rows without a key are NaN until they are cleared, dropped or not."""
    masked = scores(c, q, k).masked_fill(~causal(q, k).tril(-3), -math.inf)
    return F.dropout(masked.softmax(-1), P).nan_to_num(0.0) @ v


def cleared_before(c: Any, q: Any, k: Any, v: Any) -> Any:
    masked = scores(c, q, k).masked_fill(~causal(q, k).tril(-3), -math.inf)
    return F.dropout(masked.softmax(-1).nan_to_num(0.0), P) @ v


FORMS = (
    Form(
        "dropout-causal", (hugging_face, NanoGPT, InPlace, functional, folded), Expect(mask="causal$", dropout=P)
    ),
    Form("dropout-factor", (factor_behind, factor_before), Expect(factor=r"t0\[n1\]", dropout=P), _head_mask),
    Form("dropout-sink", (sink_column, sink_cut_off), Expect(sink=r"t0\[n1\]", dropout=P), _head_mask),
    Form("dropout-difference", (difference_dropped, difference_of_columns), Expect(dropout=P)),
    Form("dropout-differences", (difference_of_dropped, difference_of_two_modules), Expect(dropout=P)),
    Form("dropout-sigmoid", (sigmoid, sigmoid_cast), Expect(normaliser="none", score=("sigmoid",), dropout=P)),
    Form(
        "dropout-cleared", (cleared, cleared_before),
        Expect(mask="q_idx - kv_idx >= 3|.*", empty_row="zero", dropout=P), empty="zero",
    ),
)  # fmt: skip
