"""What looks like attention and must be left alone: with a code, or, where nothing is an attention, silently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .form import Make, Sizes, Spelling, module, plain_inputs


@dataclass(frozen=True)
class Decoy:
    """code: the refusal's, None where nothing is refused either."""

    name: str
    spelling: Spelling
    code: str | None
    inputs: Callable[[Make], tuple[torch.Tensor, ...]] = plain_inputs

    def make(self, sizes: Sizes) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
        """The module and its inputs."""
        generator = torch.Generator().manual_seed(0)
        make = Make(sizes, torch.float32, torch.device("cpu"), generator)
        return module(self.spelling, sizes), self.inputs(make)


def scores(c: Any, q: Any, k: Any) -> Any:
    return q @ k.transpose(-1, -2) * c.scale


def _mixing(make: Make) -> tuple[torch.Tensor, ...]:
    return (*make.qkv(), make.randn(make.sizes.heads, make.sizes.heads))


def talking_before(c: Any, q: Any, k: Any, v: Any, mix: Any) -> Any:
    """https://arxiv.org/abs/2003.02436"""
    return torch.einsum("bhij,hg->bgij", scores(c, q, k), mix).softmax(-1) @ v


def talking_after(c: Any, q: Any, k: Any, v: Any, mix: Any) -> Any:
    """CaiT: a linear layer over the heads."""
    attn = scores(c, q, k).softmax(-1)
    return F.linear(attn.permute(0, 2, 3, 1), mix).permute(0, 3, 1, 2) @ v


def talking_convolution(c: Any, q: Any, k: Any, v: Any, mix: Any) -> Any:
    return F.conv2d(scores(c, q, k).softmax(-1), mix[:, :, None, None]) @ v


def _second(make: Make) -> tuple[torch.Tensor, ...]:
    return (*make.qkv(), make.queries(), make.keys())


def gated_scores(c: Any, q: Any, k: Any, v: Any, q2: Any, k2: Any) -> Any:
    return (scores(c, q, k) * torch.sigmoid(scores(c, q2, k2))).softmax(-1) @ v


def multiplied_scores(c: Any, q: Any, k: Any, v: Any, q2: Any, k2: Any) -> Any:
    return (scores(c, q, k) * scores(c, q2, k2)).softmax(-1) @ v


def capped_second(c: Any, q: Any, k: Any, v: Any, q2: Any, k2: Any) -> Any:
    return (scores(c, q, k) + torch.tanh(scores(c, q2, k2))).softmax(-1) @ v


def multiplied_gates(c: Any, q: Any, k: Any, v: Any, q2: Any, k2: Any) -> Any:
    return (scores(c, q, k).sigmoid() * scores(c, q2, k2).sigmoid()) @ v


def top_k(c: Any, q: Any, k: Any, v: Any) -> Any:
    dots = scores(c, q, k)
    kth = dots.topk(k=4, dim=-1).values[..., -1:]
    return dots.masked_fill(dots < kth, float("-inf")).softmax(-1) @ v


def kth_value(c: Any, q: Any, k: Any, v: Any) -> Any:
    dots = scores(c, q, k)
    return dots.masked_fill(dots < dots.kthvalue(4, dim=-1, keepdim=True).values, float("-inf")).softmax(-1) @ v


def sorted_scores(c: Any, q: Any, k: Any, v: Any) -> Any:
    return scores(c, q, k).sort(-1).values.softmax(-1) @ v


def cumulative(c: Any, q: Any, k: Any, v: Any) -> Any:
    """Stick breaking and contextual positions: sums over the keys before."""
    dots = scores(c, q, k)
    return (dots + torch.sigmoid(dots).flip(-1).cumsum(-1).flip(-1)).softmax(-1) @ v


def normalised_rows(c: Any, q: Any, k: Any, v: Any) -> Any:
    dots = scores(c, q, k)
    return (dots / dots.norm(dim=-1, keepdim=True)).softmax(-1) @ v


def mean_threshold(c: Any, q: Any, k: Any, v: Any) -> Any:
    dots = scores(c, q, k)
    return dots.masked_fill(dots < dots.mean(-1, keepdim=True), float("-inf")).softmax(-1) @ v


def over_queries(c: Any, q: Any, k: Any, v: Any) -> Any:
    """Slot attention: a softmax over the queries."""
    return scores(c, q, k).softmax(-2) @ v


def over_heads(c: Any, q: Any, k: Any, v: Any) -> Any:
    return scores(c, q, k).softmax(1) @ v


def returned(c: Any, q: Any, k: Any, v: Any) -> Any:
    probs = scores(c, q, k).softmax(-1)
    return probs @ v, probs


def averaged(c: Any, q: Any, k: Any, v: Any) -> Any:
    probs = scores(c, q, k).softmax(-1)
    return probs @ v, probs.mean(1)


def scores_kept(c: Any, q: Any, k: Any, v: Any) -> Any:
    """RealFormer: scores carried to the next layer."""
    dots = scores(c, q, k)
    return dots.softmax(-1) @ v, dots


def crosswise(c: Any, q: Any, k: Any, v: Any, q2: Any, k2: Any) -> Any:
    """LiLT (https://arxiv.org/abs/2202.13669): the scores of text and layout, each added to the other's."""
    text, layout = scores(c, q, k), scores(c, q2, k2)
    return (text + layout).softmax(-1) @ v, (layout + text.detach()).softmax(-1) @ (v * 2)


def hard(c: Any, q: Any, k: Any, v: Any) -> Any:
    """GroupViT: straight-through assignment."""
    probs = scores(c, q, k).softmax(-1)
    one_hot = torch.zeros_like(probs).scatter_(-1, probs.argmax(-1, keepdim=True), 1.0)
    return (one_hot - probs.detach() + probs) @ v


def dropped_heads(c: Any, q: Any, k: Any, v: Any) -> Any:
    """One random number for all probabilities of a head."""
    return F.dropout2d(scores(c, q, k).softmax(-1), 0.5, training=True) @ v


def dropped_together(c: Any, q: Any, k: Any, v: Any) -> Any:
    """One random number for the probabilities of two heads."""
    probs = F.dropout(scores(c, q[:, ::2], k[:, ::2]).softmax(-1), 0.5, training=True)
    return probs.repeat_interleave(2, 1) @ v


def dropped_by_hand(c: Any, q: Any, k: Any, v: Any) -> Any:
    keep = torch.empty_like(q @ k.transpose(-1, -2)).bernoulli_(0.5)
    return (scores(c, q, k).softmax(-1) * keep / 0.5) @ v


def dropped_to_saturation(c: Any, q: Any, k: Any, v: Any) -> Any:
    return F.alpha_dropout(scores(c, q, k).softmax(-1), 0.5, training=True) @ v


def dropped_scores(c: Any, q: Any, k: Any, v: Any) -> Any:
    return F.dropout(scores(c, q, k), 0.5, training=True).softmax(-1) @ v


def dropped_twice(c: Any, q: Any, k: Any, v: Any) -> Any:
    return F.dropout(F.dropout(scores(c, q, k).softmax(-1), 0.5), 0.5) @ v


def kept_before_dropout(c: Any, q: Any, k: Any, v: Any) -> Any:
    """output_attentions in training."""
    probs = scores(c, q, k).softmax(-1)
    return F.dropout(probs, 0.5) @ v, probs


def clamped_after_dropout(c: Any, q: Any, k: Any, v: Any) -> Any:
    """Probabilities that are kept may be larger than 1."""
    return F.dropout(scores(c, q, k).softmax(-1), 0.5).clamp(max=1.0) @ v


def linear_attention(c: Any, q: Any, k: Any, v: Any) -> Any:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.transpose(-1, -2) @ v)) / (q @ k.sum(-2).unsqueeze(-1))


def masked_linear_attention(c: Any, q: Any, k: Any, v: Any) -> Any:
    """Linear in the product: decays and masks do not make it an attention that needs a score function."""
    return torch.tril(q @ k.transpose(-1, -2)) @ v


def efficient_attention(c: Any, q: Any, k: Any, v: Any) -> Any:
    """https://arxiv.org/abs/1812.01243: features normalised apart."""
    return q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)


def gram(c: Any, q: Any, k: Any, v: Any) -> Any:
    return (q @ k.transpose(-1, -2)) @ v


DECOYS = (
    Decoy("talking-before", talking_before, "head-mixing", _mixing),
    Decoy("talking-after", talking_after, "head-mixing", _mixing),
    Decoy("talking-convolution", talking_convolution, "head-mixing", _mixing),
    Decoy("gated-scores", gated_scores, "square-intermediate", _second),
    Decoy("multiplied-scores", multiplied_scores, "square-intermediate", _second),
    Decoy("capped-second", capped_second, "square-intermediate", _second),
    Decoy("multiplied-gates", multiplied_gates, "square-intermediate", _second),
    Decoy("top-k", top_k, "top-k"),
    Decoy("kth-value", kth_value, "top-k"),
    Decoy("sorted", sorted_scores, "sort"),
    Decoy("cumulative", cumulative, "cumulative"),
    Decoy("normalised-rows", normalised_rows, "row-dependent"),
    Decoy("mean-threshold", mean_threshold, "row-dependent"),
    Decoy("over-queries", over_queries, "softmax-axis"),
    Decoy("over-heads", over_heads, "softmax-axis"),
    Decoy("returned", returned, "probabilities-used"),
    Decoy("averaged", averaged, "probabilities-used"),
    Decoy("scores-kept", scores_kept, "scores-used"),
    Decoy("crosswise", crosswise, "scores-used", _second),
    Decoy("hard", hard, "unknown-operator"),
    Decoy("dropout-heads", dropped_heads, "dropout"),
    Decoy("dropout-together", dropped_together, "dropout"),
    Decoy("dropout-alpha", dropped_to_saturation, "dropout"),
    Decoy("dropout-twice", dropped_twice, "dropout"),
    Decoy("dropout-by-hand", dropped_by_hand, "probability-factor"),
    Decoy("dropout-scores", dropped_scores, "unknown-operator"),
    Decoy("dropout-and-probabilities", kept_before_dropout, "probabilities-used"),
    Decoy("dropout-clamped", clamped_after_dropout, "probability-factor"),
    Decoy("linear-attention", linear_attention, None),
    Decoy("masked-linear-attention", masked_linear_attention, None),
    Decoy("gram", gram, None),
)
