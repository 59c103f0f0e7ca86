"""Softmaxes that are masked by setting exponentials, or probabilities that are normalised once more, to zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import check_fused
from graphs import only_refusal, only_site, score_of

B, S, T, D = 2, 6, 10, 8


def inputs() -> tuple[torch.Tensor, ...]:
    keep = torch.rand(B, 1, T) > 0.4
    keep[..., 0] = True
    return torch.randn(B, S, D), torch.randn(B, T, D), torch.randn(B, T, D), keep


def quotient(e: Any, beside: float = 0.0) -> Any:
    return e / (e.sum(-1, keepdim=True) + beside if beside else e.sum(-1, keepdim=True))


def multiplied(q: Any, k: Any, v: Any, keep: Any) -> Any:
    return quotient(torch.exp(q @ k.mT) * keep.float()) @ v


def multiplied_by_a_triangle(q: Any, k: Any, v: Any, keep: Any) -> Any:
    mask = torch.tril(torch.ones(S, T), 3)
    return quotient(torch.exp(q @ k.mT) * mask) @ v


def filled(q: Any, k: Any, v: Any, keep: Any) -> Any:
    return quotient(torch.exp(q @ k.mT).masked_fill(~keep, 0.0)) @ v


def chosen_behind_the_maximum(q: Any, k: Any, v: Any, keep: Any) -> Any:
    s = q @ k.mT
    return quotient(torch.where(keep, torch.exp(s - s.amax(-1, keepdim=True)), torch.zeros(()))) @ v


def times_another(q: Any, k: Any, v: Any, keep: Any) -> Any:
    return quotient(torch.exp(q @ k.mT) * torch.exp(v[..., 0][:, None])) @ v


def renormalised(q: Any, k: Any, v: Any, keep: Any) -> Any:
    return quotient((q @ k.mT).softmax(-1) * keep) @ v


def normalised_twice(q: Any, k: Any, v: Any, keep: Any) -> Any:
    return quotient((q @ k.mT).masked_fill(~keep, -1e9).softmax(-1)) @ v


FORMS = {
    times_another: "(qk + t0[n0, kv_idx, 0])",
    normalised_twice: "where(t0[n0, 0, kv_idx], -1000000000.0, qk)",
    multiplied: "where((~t0[n0, 0, kv_idx]), -inf, qk)",
    multiplied_by_a_triangle: "where((kv_idx > (3 + q_idx)), -inf, qk)",
    filled: "where(t0[n0, 0, kv_idx], -inf, qk)",
    chosen_behind_the_maximum: "where(t0[n0, 0, kv_idx], qk, -inf)",
    renormalised: "where(t0[n0, 0, kv_idx], qk, -inf)",
}


@pytest.mark.parametrize("fn", FORMS, ids=lambda f: f.__name__)
def test_zeroed_terms_are_masked_scores(fn: Callable[..., Any]) -> None:
    """They were refused: the scores were said to be needed as a whole by the sum."""
    site = only_site(fn, *inputs())
    assert score_of(site.spec) == FORMS[fn]
    assert (site.spec.sink, site.spec.empty_row) == (None, "nan")
    check_fused(fn, *inputs())


def test_a_number_beside_the_sum_is_a_sink() -> None:
    def fn(q: Any, k: Any, v: Any, keep: Any) -> Any:
        return quotient((q @ k.mT).exp().tril(2) * keep, beside=0.5) @ v

    q, k, v, keep = inputs()
    keep[0] = False
    site = only_site(fn, q, k, v, keep)
    assert site.spec.sink is not None
    assert site.spec.empty_row == "zero"
    check_fused(fn, q, k, v, keep)


def test_a_number_beside_a_sum_of_probabilities_is_refused() -> None:
    """It is relative to the sum that they were divided by, which the masked scores no longer have."""

    def fn(q: Any, k: Any, v: Any, keep: Any) -> Any:
        return quotient((q @ k.mT).softmax(-1) * keep, beside=0.5) @ v

    refusal = only_refusal(fn, *inputs())
    assert refusal.code == "row-dependent"
    assert "normalised again" in refusal.reason


def test_cleared_where_data_decide_which_rows_vanish() -> None:
    """The maximum may be of a key that the mask drops, beside which the others' exponentials are 0."""

    def fn(q: Any, k: Any, v: Any, keep: Any) -> Any:
        return torch.nan_to_num(quotient(chosen(q, k, keep))) @ v

    def chosen(q: Any, k: Any, keep: Any) -> Any:
        s = q @ k.mT
        return torch.exp(s - s.amax(-1, keepdim=True)) * keep

    assert only_refusal(fn, *inputs()).code == "probability-mask"


def test_reason_of_values_that_are_multiplied_and_summed() -> None:
    """The reason of the exponentials' own sum was told, as if the probabilities were used again by their division."""

    def fn(q: Any, k: Any, v: Any, keep: Any) -> Any:
        p = multiplied_probabilities(q, k, keep).masked_fill(v[:, None, :, 0] > 1, 0.0)
        return (v[:, None] * p[..., None]).sum(-2)

    assert only_refusal(fn, *inputs()).code == "probability-mask"


def multiplied_probabilities(q: Any, k: Any, keep: Any) -> Any:
    return quotient(torch.exp(q @ k.mT) * keep.float())


@pytest.mark.parametrize("sink", [False, True])
def test_cleared_rows_of_an_added_mask_that_becomes_nan(sink: bool) -> None:
    """Rows with a masked key were NaN, where eager code clears them: only a mask that fills was seen to spoil them."""

    def fn(q: Any, k: Any, v: Any, keep: Any) -> Any:
        s = torch.nn.functional.silu(q @ k.mT + torch.where(keep, torch.zeros(()), float("-inf")))
        beside = torch.cat([s, torch.zeros_like(s[..., :1])], -1) if sink else s
        return beside.softmax(-1)[..., :T].nan_to_num() @ v

    assert only_refusal(fn, *inputs()).code == "probability-mask"
