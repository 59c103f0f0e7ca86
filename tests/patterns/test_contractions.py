"""Products that are no `matmul` of matrices: of vectors, and written as multiplications and sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import check_fused
from graphs import matched, only_refusal, only_site, score_of

S, T, D, E = 6, 10, 8, 3


def qkv() -> tuple[torch.Tensor, ...]:
    return torch.randn(2, S, D), torch.randn(2, T, D), torch.randn(2, T, E)


def vector_query(q: Any, k: Any, v: Any) -> Any:
    return (q[0, 0] @ k[0].mT).softmax(-1) @ v[0]


def vector_behind_keys(q: Any, k: Any, v: Any) -> Any:
    return (k @ q[0, 0]).softmax(-1)[:, None] @ v


def vector_under_autocast(q: Any, k: Any, v: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return vector_query(q, k, v)


@pytest.mark.parametrize("fn", [vector_query, vector_behind_keys, vector_under_autocast], ids=lambda f: f.__name__)
def test_a_vector_is_one_query(fn: Callable[..., Any]) -> None:
    """`matmul` of a vector and a matrix was refused for the operator by which torch makes a vector of its result."""
    site = only_site(fn, *qkv())
    assert (site.q_len, site.kv_len, site.head_dim, site.value_dim) == (1, T, D, E)
    check_fused(fn, *qkv())


def broadcast(q: Any, k: Any, v: Any) -> Any:
    return (q[..., :1] * k[..., 0].unsqueeze(-2) * 0.5 + 1).softmax(-1) @ v


def given_as_rows(q: Any, k: Any, v: Any) -> Any:
    s = q[..., 0][:, :, None] * k[..., 0][:, None]
    return s.masked_fill(torch.ones(S, T).triu(2) > 0, -1e4).softmax(-1) @ v


@pytest.mark.parametrize("fn", [broadcast, given_as_rows], ids=lambda f: f.__name__)
def test_a_product_of_one_feature_by_broadcasting(fn: Callable[..., Any]) -> None:
    """It was no product, and nothing was said."""
    assert only_site(fn, *qkv()).head_dim == 1
    check_fused(fn, *qkv())


def test_a_multiplication_with_a_parameter_is_no_product() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(1, T))

        def forward(self, x: Any, v: Any) -> Any:
            return (x * self.weight).softmax(-1) @ v

    result = matched(Layer(), torch.randn(2, S, 1), torch.randn(2, T, E))
    assert (result.sites, result.refusals) == ((), ())


def pairs(q: Any, k: Any) -> Any:
    return q[:, :, None] * k[:, None]


def summed_scores(q: Any, k: Any, v: Any) -> Any:
    return pairs(q, k).sum(-1).softmax(-1) @ v


def summed_values(q: Any, k: Any, v: Any) -> Any:
    return torch.sum(summed_weights(q, k)[..., None] * v[:, None], 2)


def summed_weights(q: Any, k: Any) -> Any:
    return pairs(q, k).sum(dim=-1).softmax(-1)


def scaled_within(q: Any, k: Any, v: Any) -> Any:
    return (pairs(q, k) / 8).sum(-1).softmax(-1) @ v


def averaged(q: Any, k: Any, v: Any) -> Any:
    return pairs(q, k).mean(-1).softmax(-1) @ v


def over_two_axes(q: Any, k: Any, v: Any) -> Any:
    q, k = q.unflatten(-1, (2, 4)), k.unflatten(-1, (2, 4))
    return (q[:, :, None] * k[:, None]).sum((-1, -2)).softmax(-1) @ v


def vecdot(q: Any, k: Any, v: Any) -> Any:
    return torch.linalg.vecdot(q[:, :, None], k[:, None]).softmax(-1) @ v


def summed_gates(q: Any, k: Any, v: Any) -> Any:
    return (pairs(q, k).sum(-1).sigmoid()[..., None] * v[:, None]).sum(-2)


def pooled(q: Any, k: Any, v: Any) -> Any:
    """One query, and sums that keep the axis."""
    return ((q[:, :1] * k).sum(-1, keepdim=True).softmax(1) * v).sum(1)


def pooled_by_a_repeated_query(q: Any, k: Any, v: Any) -> Any:
    return ((q[:, :1].expand(-1, T, -1) * k).sum(-1).softmax(-1)[..., None] * v).sum(1)


def pooled_by_a_copied_query(q: Any, k: Any, v: Any) -> Any:
    return ((q[:, :1].repeat(1, T, 1) * k).sum(-1).softmax(-1)[..., None] * v).sum(1)


SUMMED = {
    summed_scores: "qk", summed_values: "qk", scaled_within: "(qk * 0.125)", averaged: "(qk * 0.125)", vecdot: "qk",
    over_two_axes: "qk",
    summed_gates: "sigmoid(qk)", pooled: "qk", pooled_by_a_repeated_query: "qk", pooled_by_a_copied_query: "qk",
}  # fmt: skip


@pytest.mark.parametrize("fn", SUMMED, ids=lambda f: f.__name__)
def test_a_sum_of_products_of_broadcast_tensors_is_their_product(fn: Callable[..., Any]) -> None:
    """It was left alone without a word."""
    site = only_site(fn, *qkv())
    assert score_of(site.spec) == SUMMED[fn]
    assert (site.q_len, site.kv_len, site.value_dim) == (1 if "pooled" in fn.__name__ else S, T, E)
    check_fused(fn, *qkv())


def outer(q: Any, k: Any, v: Any) -> Any:
    return (torch.outer(q[0, :, 0], k[0, :, 0]) * 0.5).softmax(-1) @ v[0]


def outer_method(q: Any, k: Any, v: Any) -> Any:
    return ((k[0, :, 0].ger(q[0, :, 0]) / 2).softmax(0).mT) @ v[0]


def einsum_of_one_feature(q: Any, k: Any, v: Any) -> Any:
    return (torch.einsum("bs,bt->bst", q[..., 0], k[..., 0]) * 0.5).softmax(-1) @ v


@pytest.mark.parametrize("fn", [outer, outer_method, einsum_of_one_feature], ids=lambda f: f.__name__)
def test_a_number_for_each_query_times_one_for_each_key(fn: Callable[..., Any]) -> None:
    """Products over one feature: one was left alone without a word, the other said to be none."""
    site = only_site(fn, *qkv())
    assert score_of(site.spec) == "(qk * 0.5)"
    assert (site.q_len, site.kv_len, site.head_dim) == (S, T, 1)
    check_fused(fn, *qkv())


def test_a_number_for_each_query_beside_what_is_unknown() -> None:
    """The search for a product over one feature ended at the temperature, and its reason was told."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        return ((q @ k.mT).cosh() * q[:, :1, :1]).softmax(-1) @ v

    assert only_refusal(fn, *qkv()).code == "unknown-operator"
