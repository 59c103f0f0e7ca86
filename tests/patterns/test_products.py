"""Several products in one score: sums are one product over concatenated features, others stay tensors of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import check_fused
from graphs import graph_of, only_refusal, only_site, score_of

from flashfuse.patterns.match import find_attention
from flashfuse.rewrite import rewrite

B, H, S, T, D, R, E = 2, 4, 6, 10, 8, 4, 3


def latent() -> tuple[torch.Tensor, ...]:
    """Content and position parts of queries and keys; the position part of the keys is shared by the heads."""
    return (
        torch.randn(B, H, S, D),
        torch.randn(B, H, T, D),
        torch.randn(B, H, S, R),
        torch.randn(B, 1, T, R),
        torch.randn(B, H, T, E),
    )


def attend(s: Any, v: Any) -> Any:
    return torch.softmax(s, -1) @ v


def added(q: Any, k: Any, qp: Any, kp: Any, v: Any) -> Any:
    return attend((q @ k.mT + qp @ kp.mT) * 0.25, v)


def added_einsum(q: Any, k: Any, qp: Any, kp: Any, v: Any) -> Any:
    s = torch.einsum("bhid,bhjd->bhij", q, k) + torch.einsum("bhir,bjr->bhij", qp, kp.squeeze(1))
    return torch.einsum("bhij,bhjd->bhid", (s * 0.25).softmax(-1), v)


def added_in_place(q: Any, k: Any, qp: Any, kp: Any, v: Any) -> Any:
    s = qp @ kp.mT
    s += q @ k.mT
    s *= 0.25
    return attend(s, v)


def scaled_apart(q: Any, k: Any, qp: Any, kp: Any, v: Any) -> Any:
    return attend(q @ k.mT * 0.25 + (qp @ kp.mT) / 4, v)


def added_by_baddbmm(q: Any, k: Any, qp: Any, kp: Any, v: Any) -> Any:
    q, k, qp, kp, v = (x.expand(B, H, -1, -1).flatten(0, 1) for x in (q, k, qp, kp, v))
    s = torch.baddbmm(torch.bmm(qp, kp.mT), q, k.mT, beta=0.25, alpha=0.25)
    return torch.bmm(s.softmax(-1), v).view(B, H, S, E)


@pytest.mark.parametrize(
    "fn", [added, added_einsum, added_in_place, scaled_apart, added_by_baddbmm], ids=lambda f: f.__name__
)
def test_a_sum_of_products_is_one_product(fn: Callable[..., Any]) -> None:
    site = only_site(fn, *latent())
    assert score_of(site.spec) == "(qk * 0.25)"
    assert site.spec.captured == ()
    assert site.head_dim == D + R
    assert [(q.factor, k.factor) for q, k in site.more] == [(1.0, 1.0)]
    check_fused(fn, *latent())


def test_a_product_written_twice_is_one_product() -> None:
    """It counted as two products that are not just added."""

    def fn(q: Any, k: Any, qp: Any, kp: Any, v: Any) -> Any:
        near = torch.arange(T) > torch.arange(S)[:, None]
        again = q @ k.transpose(-1, -2)
        again *= 0.5
        return attend(torch.where(near, q @ k.mT, again), v)

    assert score_of(only_site(fn, *latent()).spec) == "where((kv_idx > q_idx), qk, (qk * 0.5))"
    check_fused(fn, *latent())


def test_a_product_of_keys_that_were_written_in_between_is_another() -> None:
    def fn(q: Any, k: Any, qp: Any, kp: Any, v: Any) -> Any:
        keys = k * 1.5
        first = q @ keys.mT
        keys.mul_(2.0)
        return attend(torch.maximum(first, q @ keys.mT), v)

    assert only_refusal(fn, *latent()).code == "square-intermediate"


def test_another_scale_goes_into_the_smaller_queries() -> None:
    def fn(q: Any, k: Any, qp: Any, kp: Any, v: Any) -> Any:
        return attend((qp @ kp.mT) * 0.5 + q @ k.mT * 0.25, v)

    def subtracted(q: Any, k: Any, qp: Any, kp: Any, v: Any) -> Any:
        return attend((q @ k.mT - 2 * (qp @ kp.mT)) / 4, v)

    for f, factor in ((fn, 2.0), (subtracted, -2.0)):
        site = only_site(f, *latent())
        assert score_of(site.spec) == "(qk * 0.25)"
        assert [q.factor for q, _ in site.more] == [factor]
        check_fused(f, *latent())


def test_a_sum_that_a_function_reads_twice() -> None:
    """It was refused: the sum counted as the only place of the products where it stands once."""

    def fn(q: Any, k: Any, qp: Any, kp: Any, v: Any) -> Any:
        return attend(F.leaky_relu(q @ k.mT + qp @ kp.mT, 0.1), v)

    site = only_site(fn, *latent())
    assert site.head_dim == D + R
    assert score_of(site.spec).count("qk") > 1
    check_fused(fn, *latent())


def test_three_products_with_a_mask_and_dynamic_sizes() -> None:
    def fn(q: Any, k: Any, qp: Any, kp: Any, v: Any, m: Any) -> Any:
        return attend((q @ k.mT + qp @ kp.mT + q @ (2 * k).mT) * 0.25 + m, v)

    args = (*latent(), torch.randn(B, 1, 1, T))
    site = only_site(fn, *args, dynamic=True)
    assert score_of(site.spec) == "((qk * 0.25) + t0[n0, 0, 0, kv_idx])"
    assert len(site.more) == 2
    check_fused(fn, *args, dynamic=True)


def test_shared_keys_are_expanded_only_over_axes_that_other_keys_have() -> None:
    def fn(q: Any, k: Any, qp: Any, kp: Any, v: Any) -> Any:
        return attend(q @ k[:, :1].mT + qp @ kp.mT, v)

    gm = graph_of(fn, *latent())
    after = rewrite(gm, find_attention(gm).sites)
    call = next(n for n in after.graph.nodes if n.target is torch.ops.flashfuse.attention.default)
    q, k = (n.meta["example_value"].shape for n in call.args[:2])
    assert tuple(q) == (B, H, S, D + R)
    assert tuple(k) == (B, 1, T, D + R)
    check_fused(fn, *latent())


def test_half_precision_products_add_up_in_half_precision() -> None:
    args = [x.to(torch.bfloat16) for x in latent()]
    site = only_site(added, *args)
    assert site.spec.product_dtype == torch.bfloat16
    check_fused(added, *args)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_products_of_two_types_add_up_in_the_wider(narrow: torch.dtype) -> None:
    """They were refused, as if their sum were no sum."""
    q, k, qp, kp, v = latent()
    args = (q.to(narrow), k.to(narrow), qp, kp, v)
    site = only_site(added, *args)
    assert site.spec.product_dtype == torch.float32
    assert (site.q.dtype, site.more[0][0].dtype) == (narrow, torch.float32)
    check_fused(added, *args)


def test_a_scale_is_taken_in_in_the_type_of_the_product() -> None:
    """Queries of a narrower type than their product were rounded to their own type again behind the scale."""

    def fn(q: Any, k: Any, qp: Any, kp: Any, v: Any) -> Any:
        return attend(q @ k.mT + (qp.float() @ kp.float().mT) * 3.7, v)

    q, k, qp, kp, v = latent()
    check_fused(fn, q, k, qp.bfloat16(), kp.bfloat16(), v)


# --------------------------------------------------------------------------------------------------------------------
# Low-rank terms


def pixels() -> tuple[torch.Tensor, ...]:
    q, k, v = (torch.randn(B * H, 6, D) for _ in range(3))
    return q, k, v, torch.randn(2, 2, D), torch.randn(3, 3, D)


def decomposed_positions(q: Any, k: Any, v: Any, rows: Any, columns: Any) -> Any:
    s = (q * 0.25) @ k.mT
    pixel = q.reshape(B * H, 2, 3, D)
    by_row = torch.einsum("bhwc,hkc->bhwk", pixel, rows)
    by_column = torch.einsum("bhwc,wkc->bhwk", pixel, columns)
    s = (s.view(B * H, 2, 3, 2, 3) + by_row[:, :, :, :, None] + by_column[:, :, :, None, :]).view(B * H, 6, 6)
    return attend(s, v)


def decomposed_as_a_mask(q: Any, k: Any, v: Any, rows: Any, columns: Any) -> Any:
    pixel = q.reshape(B * H, 2, 3, D)
    by_row = torch.einsum("bhwc,hkc->bhwk", pixel, rows).unsqueeze(-1)
    by_column = torch.einsum("bhwc,wkc->bhwk", pixel, columns).unsqueeze(-2)
    bias = (by_row + by_column).reshape(B, H, 6, 6)
    q, k, v = (x.view(B, H, 6, D) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.25).flatten(0, 1)


def test_decomposed_relative_positions_stay_two_small_tensors() -> None:
    site = only_site(decomposed_positions, *pixels())
    assert score_of(site.spec) == (
        "(((qk * 0.25) + t0[n0, (q_idx // 3), (q_idx % 3), (kv_idx // 3)])"
        " + t1[n0, (q_idx // 3), (q_idx % 3), (kv_idx % 3)])"
    )
    assert [n.name for n in site.captured] == ["by_row", "by_column"]
    site = only_site(decomposed_as_a_mask, *pixels())
    assert [n.name for n in site.captured] == ["einsum", "einsum_1"]
    check_fused(decomposed_positions, *pixels())
    check_fused(decomposed_as_a_mask, *pixels())


def test_a_bias_for_every_key_is_no_second_product_of_queries() -> None:
    """The keys' own bias, [B, H, 1, T], is a tensor of the graph: it is far smaller than the scores."""

    def fn(q: Any, k: Any, v: Any, u: Any) -> Any:
        return attend(q @ k.mT + u @ k.mT, v)

    def merged(q: Any, k: Any, v: Any, u: Any) -> Any:
        return attend((q + u) @ k.mT, v)

    args = (*(torch.randn(B, H, S, D) for _ in range(3)), torch.randn(H, 1, D))
    site = only_site(fn, *args)
    assert score_of(site.spec) == "(qk + t0[n0, n1, 0, kv_idx])"
    assert score_of(only_site(merged, *args).spec) == "qk"
    check_fused(fn, *args)
    check_fused(merged, *args)


# --------------------------------------------------------------------------------------------------------------------
# What is no sum


@pytest.mark.parametrize(
    "combine",
    [
        lambda a, b: a * b,
        lambda a, b: a + torch.tanh(b),
        lambda a, b: torch.maximum(a, b),
        lambda a, b: a + b * torch.ones(H, 1, 1),
        lambda a, b: torch.where(torch.ones(S, T).tril() > 0, a, b),
    ],
)
def test_products_that_are_no_sum_are_refused(combine: Callable[[Any, Any], Any]) -> None:
    refusal = only_refusal(lambda q, k, qp, kp, v: attend(combine(q @ k.mT, qp @ kp.mT), v), *latent())
    assert refusal.code == "square-intermediate"
    assert "second score matrix" in refusal.reason


def test_a_product_that_is_also_returned_is_refused() -> None:
    def fn(q: Any, k: Any, qp: Any, kp: Any, v: Any) -> Any:
        second = qp @ kp.mT
        return attend(q @ k.mT + second, v), second

    assert only_refusal(fn, *latent()).code == "scores-used"
