"""Scores that are the weights themselves, and what is no attention at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import matched, only_refusal, only_site, score_of
from written_out import B, D, S, T, check, inputs, scores

UNNORMALISED: dict[str, tuple[Callable[..., Any], str]] = {
    "sigmoid": (lambda s, keep: torch.sigmoid(s - math.log(T)), f"sigmoid(((qk * 0.5) - {math.log(T)!r}))"),
    "sigmoid-mask": (
        lambda s, keep: s.masked_fill(~keep, -math.inf).sigmoid(),
        "sigmoid(where(t0[n0, 0, 0, kv_idx], -inf, (qk * 0.5)))",
    ),
    "sigmoid-zeroed": (
        lambda s, keep: torch.where(keep, s.sigmoid(), 0.0),
        "where(t0[n0, 0, 0, kv_idx], sigmoid((qk * 0.5)), 0.0)",
    ),
    "relu": (lambda s, keep: F.relu(s) / T, "(max(0.0, (qk * 0.5)) * 0.1)"),
    "squared-relu": (lambda s, keep: F.relu(s).square(), "pow(max(0.0, (qk * 0.5)), 2)"),
    "silu": (lambda s, keep: F.silu(s), "((qk * 0.5) * sigmoid((qk * 0.5)))"),
    "softplus": (
        lambda s, keep: F.softplus(s),
        "where(((qk * 0.5) > 20.0), (qk * 0.5), log1p(exp((qk * 0.5))))",
    ),
    "wave": (lambda s, keep: torch.sin(s), "sin((qk * 0.5))"),
    "exponential": (lambda s, keep: torch.exp(s), "exp((qk * 0.5))"),
}


@pytest.mark.parametrize("name", UNNORMALISED)
def test_scores_are_the_weights(name: str) -> None:
    weights, text = UNNORMALISED[name]

    def fn(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
        return weights(scores(q, k), keep) @ v

    site = only_site(fn, *inputs())
    assert site.spec.normaliser == "none"
    assert score_of(site.spec) == text
    check(fn, *inputs())


def minus(a: Any, b: Any, keep: Any) -> Any:
    return a.sigmoid() - 0.25 * b.sigmoid()


def scaled_sum(a: Any, b: Any, keep: Any) -> Any:
    return (a.relu() + b.sigmoid()) / 8.0


def masked_together(a: Any, b: Any, keep: Any) -> Any:
    return torch.where(keep, a.sigmoid() - b, 0.0)


def shared_product(a: Any, b: Any, keep: Any) -> Any:
    return a.sigmoid() - (b.relu() - a.tanh()) * keep


SUMS: dict[Callable[..., Any], tuple[str, str]] = {
    minus: ("sigmoid((qk * 0.5))", "neg((sigmoid((qk * 0.5)) * 0.25))"),
    scaled_sum: ("(max(0.0, (qk * 0.5)) * 0.125)", "(sigmoid((qk * 0.5)) * 0.125)"),
    masked_together: (
        "where(t0[n0, 0, 0, kv_idx], sigmoid((qk * 0.5)), 0.0)",
        "where(t0[n0, 0, 0, kv_idx], neg((qk * 0.5)), 0.0)",
    ),
    shared_product: (
        "neg((max(0.0, (qk * 0.5)) * t0[n0, 0, 0, kv_idx]))",
        "(sigmoid((qk * 0.5)) + neg((neg(tanh((qk * 0.5))) * t0[n0, 0, 0, kv_idx])))",
    ),
}


@pytest.mark.parametrize("weights", SUMS, ids=lambda f: f.__name__)
def test_weights_that_are_a_sum(weights: Callable[..., Any]) -> None:
    """Functions of two products, added: they used to be left alone without a word. Each is an attention of its own."""

    def fn(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        return weights(scores(q1, k1), scores(q2, k2), keep) @ v

    site = only_site(fn, *inputs())
    assert [term.spec.normaliser for term in (site, *site.plus)] == ["none", "none"]
    assert tuple(score_of(term.spec) for term in (site, *site.plus)) == SUMS[weights]
    check(fn, *inputs())


def test_weights_of_two_products_multiplied() -> None:
    """Used to be left alone without a word."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        return (scores(q1, k1).sigmoid() * scores(q2, k2).sigmoid()) @ v

    refusals = matched(fn, *inputs()[:3]).refusals
    assert {r.code for r in refusals} == {"square-intermediate"}
    assert all("transpose" in r.location.code for r in refusals)


LINEAR: dict[str, Callable[..., Any]] = {
    "gram": lambda q, k, v, keep: (q @ k.mT) @ v,
    "scaled": lambda q, k, v, keep: scores(q, k) @ v,
    "masked": lambda q, k, v, keep: (scores(q, k) * keep) @ v,
    "decay": lambda q, k, v, keep: torch.where(keep, scores(q, k), 0.0) @ v,
    "feature-map": lambda q, k, v, keep: (F.elu(q) + 1) @ ((F.elu(k) + 1).mT @ v),
    "whole-row": lambda q, k, v, keep: F.normalize(scores(q, k), dim=-1) @ v,
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_in_the_product_is_no_attention(name: str) -> None:
    result = matched(lambda q, k, v, keep: LINEAR[name](q, k, v, keep), *inputs()[:3], inputs()[4])
    assert not result.sites
    assert not result.refusals


def test_layers_with_weights_are_no_attention() -> None:
    class Mlp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = (torch.nn.Parameter(torch.randn(*shape)) for shape in ((D, 16), (16, D)))

        def forward(self, x: Any) -> Any:
            return F.relu(x @ self.up) @ self.down + F.linear(torch.sigmoid(F.linear(x, self.up.T)), self.down.T)

    with torch.no_grad():
        result = matched(Mlp(), torch.randn(B, S, D))
    assert not result.sites
    assert not result.refusals


def test_routed_experts_are_no_attention() -> None:
    """Weights that data choose were taken for keys and values, and those of a gate refused as a second product."""

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate = (torch.nn.Parameter(torch.randn(3, D, 4 * D)) for _ in range(2))
            self.down = torch.nn.Parameter(torch.randn(3, 4 * D, D))

        def forward(self, x: Any, expert: Any) -> Any:
            plain = torch.bmm(F.gelu(torch.bmm(x, self.up[expert])), self.down[expert])
            hidden = F.silu(torch.bmm(x, self.gate.index_select(0, expert))) * torch.bmm(x, self.up[expert])
            return plain + torch.bmm(hidden, self.down[expert])

    result = matched(Experts(), torch.randn(2, S, D), torch.tensor([2, 0]))
    assert not result.sites
    assert not result.refusals


def test_a_gated_layer_of_given_weights_is_no_attention() -> None:
    """Where a graph break makes inputs of an expert's weights, its gate was refused as a second matrix of scores."""

    def fn(x: Any, gate: Any, up: Any, down: Any) -> Any:
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down

    result = matched(fn, torch.randn(S, D), *(torch.randn(4 * D, D) for _ in range(3)))
    assert not result.sites
    assert not result.refusals


def test_layers_that_add_their_bias_are_no_attention() -> None:
    """A layer written as addmm behind another and a curve was refused as an attention whose output has a bias."""

    class Mlp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shapes = ((D, 16), (16,), (16, D), (D,))
            self.up, self.first, self.down, self.second = (torch.nn.Parameter(torch.randn(*s)) for s in shapes)

        def forward(self, x: Any) -> Any:
            x = torch.addmm(self.first, x.view(-1, x.size(-1)), self.up)
            return torch.addmm(self.second, F.gelu(x), self.down)

    with torch.no_grad():
        result = matched(Mlp(), torch.randn(B, S, D))
    assert not result.sites
    assert not result.refusals


def test_linear_attention_with_decays_is_no_attention() -> None:
    """The exponentials of decays were taken for a softmax before the operators that no kernel has."""

    def fn(q: Any, k: Any, v: Any, decay: Any) -> Any:
        total = F.logsigmoid(decay).exp().cumsum(-1)
        weights = scores(q, k) * (total[..., None] - total[..., None, :]).tril().exp()
        new = torch.linalg.solve_triangular(weights, v, upper=False, unitriangular=True)
        return weights.cumsum(-1) @ new

    q = inputs()[0]
    result = matched(fn, q, q, q, q[..., 0])
    assert not result.sites
    assert not result.refusals


def test_weights_without_a_normaliser_that_are_returned() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        weights = torch.sigmoid(scores(q, k))
        return weights @ v, weights

    assert only_refusal(fn, *inputs()[:3]).code == "scores-used"


def test_a_linear_function_of_two_products_is_no_attention() -> None:
    """A refusal, as of one, stood beside the attention whose queries it was: a choice of products is linear, too."""

    def fn(x: Any, wq: Any, wk: Any, wv: Any) -> Any:
        q, k, v = (F.linear(x, w) for w in (wq, wk, wv))
        q = torch.cat([q, q])[: q.shape[0]].mul(0.3)
        return (q @ k.mT).softmax(-1) @ v

    args = (torch.randn(B, S, D), *(torch.randn(D, D) for _ in range(3)))
    result = matched(fn, *args)
    assert len(result.sites) == 1
    assert not result.refusals
    check(fn, *args)
