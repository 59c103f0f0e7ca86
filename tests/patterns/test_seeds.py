"""Where a search starts: exponentials and products that belong to an attention, and those that are something else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from graphs import matched, only_refusal, only_site, score_of

S, D = 6, 8


def qkv() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, 4, S, D) for _ in range(3))


def test_attentions_that_share_a_learned_temperature() -> None:
    """The exponential of a temperature was taken for the normaliser of both, and the second was passed over."""

    def fn(q: Any, k: Any, v: Any, tau: Any) -> Any:
        scale = tau.exp()
        first = (q @ k.mT * scale).softmax(-1) @ v
        return (first @ k.mT * scale).softmax(-1) @ v

    result = matched(fn, *qkv(), torch.randn(()))
    assert len(result.sites) == 2
    assert not result.refusals


def test_attentions_that_share_a_temperature_of_their_tokens() -> None:
    """The same of curves of a product, which belong to no attention: whatever an attention was made of was taken."""

    def fn(q: Any, k: Any, v: Any, x: Any, w: Any) -> Any:
        scale, gate = (x @ w).exp(), (x @ w).sigmoid()
        first = (q @ k.mT * scale).softmax(-1) @ v
        second = (first @ k.mT * scale).softmax(-1) @ v
        third = torch.sigmoid(second @ k.mT * gate) @ v
        return torch.sigmoid(third @ k.mT * gate) @ v

    result = matched(fn, *qkv(), torch.randn(2, 4, S, D), torch.randn(D, 1))
    assert [site.spec.normaliser for site in result.sites] == ["softmax", "softmax", "none", "none"]
    assert not result.refusals


def test_a_reason_beside_the_exponential_of_something_else() -> None:
    """A softmax behind the exponential of a bias was left alone without a refusal."""

    def fn(q: Any, k: Any, v: Any, bias: Any) -> Any:
        far = torch.arange(S)[:, None] - torch.arange(S)
        s = q @ k.mT + bias + torch.exp(-far.abs() / 4.0)
        return torch.exp(s - s.logsumexp(-1, keepdim=True)) @ v

    assert only_refusal(fn, *qkv(), torch.randn(S, S)).code == "log-sum-exp"


def test_a_reason_beside_the_exponential_of_a_temperature() -> None:
    """Weights without a normaliser were left alone without a refusal: the search started from the temperature."""

    def fn(q: Any, k: Any, v: Any, tau: Any) -> Any:
        return torch.sigmoid(q @ k.mT * tau.exp()).to(v.dtype) @ v

    q, k, v = qkv()
    refusal = only_refusal(fn, q, k, v.double(), torch.randn(()))
    assert (refusal.code, refusal.node.name) == ("dtype", "matmul_1")
    assert "float64" in refusal.reason


def test_exponential_in_place() -> None:
    """`exp_` started no search, so a softmax written in place was left alone without a refusal."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        s = q @ k.mT
        s -= s.amax(-1, keepdim=True)
        probs = s.exp_()
        probs /= probs.sum(-1, keepdim=True)
        return probs @ v

    assert score_of(only_site(fn, *qkv()).spec) == "qk"


def test_sum_to_the_power_of_minus_one() -> None:
    """Only `reciprocal` and a division were read as a normaliser."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        e = (q @ k.mT - 1).exp()
        return (e * e.sum(-1, keepdim=True) ** -1) @ v

    only_site(fn, *qkv())


def projected(x: Any, wq: Any, k: Any, v: Any, curve: Any) -> Any:
    """Weights come from outside, so a layer is a product of activations, and its curve might make it an attention."""
    return (curve(F.linear(x, wq)) @ k.mT).softmax(-1) @ v


def test_curved_queries_are_no_attention_of_their_own() -> None:
    """Curved queries times keys were taken as sigmoid attention, and that around it read what the rewrite erased."""
    q, k, v = qkv()
    weight = torch.randn(D, D)
    site = only_site(lambda *xs: projected(*xs, curve=torch.tanh), q, weight, k, v)
    assert site.q.node.name == "tanh"
    assert site.spec.normaliser == "softmax"


def test_scaled_queries_are_not_refused() -> None:
    """`mul` in the queries counts as a curve, and the product of scores it led to was refused beside the site."""

    def fn(x: Any, wq: Any, k: Any, v: Any) -> Any:
        q = F.linear(x, wq).mul(0.3)
        s = torch.baddbmm(q.new_empty(4, S, S), q, k.mT, beta=0, alpha=0.5)
        return s.softmax(-1) @ v

    x, k, v = (t[0] for t in qkv())
    only_site(fn, x, torch.randn(D, D), k, v)


def test_scaled_queries_are_not_refused_beside_a_refusal() -> None:
    """They were where the softmax behind them is no site: `value-product` at the product of scores."""

    def fn(x: Any, wq: Any, k: Any, v: Any) -> Any:
        q = F.linear(x, wq).mul(0.3)
        s = torch.baddbmm(q.new_empty(4, S, S), q, k.mT, beta=0, alpha=0.5)
        return s.softmax(-2) @ v

    x, k, v = (t[0] for t in qkv())
    assert only_refusal(fn, x, torch.randn(D, D), k, v).code == "softmax-axis"


def test_curved_keys_of_two_attentions() -> None:
    """The product of an attention's output with them had a refusal, `scores-used`, beside both sites."""

    def fn(x: Any, wq: Any, wk: Any, wv: Any) -> Any:
        q, k, v = F.linear(x, wq), F.linear(x, wk).tanh(), F.linear(x, wv)
        out = torch.einsum("st,te->se", (q @ k.mT).softmax(-1), v)
        return torch.einsum("st,te->se", (out / 2 @ k.transpose(-2, -1)).softmax(-1), v)

    result = matched(fn, torch.randn(S, 4), *(torch.randn(D, 4) for _ in range(3)))
    assert len(result.sites) == 2
    assert not result.refusals


def test_an_attention_before_a_product_that_another_takes_over() -> None:
    """Its curved output times keys was a site too, which hid it and was itself part of the last."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        out = (q @ k.mT).sigmoid() @ v
        return F.relu(out.relu() @ k.mT) @ v

    result = matched(fn, *qkv())
    assert [site.node.name for site in result.sites] == ["out", "matmul_3"]
    assert not result.refusals


def test_a_product_with_values_to_which_something_is_added() -> None:
    def fn(q: Any, k: Any, v: Any, x: Any) -> Any:
        return torch.baddbmm(x, (q @ k.mT).softmax(-1), v)

    q, k, v = (t[0] for t in qkv())
    assert only_refusal(fn, q, k, v, torch.randn(4, S, D)).code == "value-product"
