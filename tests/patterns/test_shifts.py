"""Maxima subtracted from the scores, which leave no trace, and quotients by logarithms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import only_refusal, only_site, score_of
from written_out import MIN, check, inputs, masked, scores

SHIFTED: dict[str, Callable[..., Any]] = {
    "row": lambda s, keep: s - s.amax(-1, keepdim=True),
    "detached": lambda s, keep: s - s.max(dim=-1, keepdim=True)[0].detach(),
    "global": lambda s, keep: s - s.max(),
    "plane": lambda s, keep: s - s.amax(dim=(-2, -1), keepdim=True),
    "scaled-again": lambda s, keep: (s / 32 - (s / 32).amax(-1, keepdim=True)) * 32,
    "from-zero": lambda s, keep: s - s.amax(-1, keepdim=True).clamp(min=0.0),
}
MASKED: dict[str, Callable[..., Any]] = {
    "before-mask": lambda s, keep: (s - s.max()).masked_fill(~keep, -math.inf),
    "before-minimum": lambda s, keep: (s - s.amax(-1, keepdim=True)).masked_fill(~keep, MIN),
    "behind-mask": lambda s, keep: s.masked_fill(~keep, -math.inf) - s.amax(-1, keepdim=True),
    "masked-row": lambda s, keep: (m := s.masked_fill(~keep, -math.inf)) - m.amax(-1, keepdim=True),
}


@pytest.mark.parametrize("name", SHIFTED)
def test_subtracted_maximum_leaves_no_trace(name: str) -> None:
    def fn(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
        return SHIFTED[name](scores(q, k), keep).softmax(-1) @ v

    site = only_site(fn, *inputs())
    assert score_of(site.spec) == "(qk * 0.5)"
    assert site.captured == ()
    check(fn, *inputs())


@pytest.mark.parametrize("name", MASKED)
def test_subtracted_maximum_beside_a_mask(name: str) -> None:
    def fn(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
        return MASKED[name](scores(q, k), keep).softmax(-1) @ v

    fill = repr(MIN) if name == "before-minimum" else "-inf"
    assert score_of(only_site(fn, *inputs()).spec) == f"where(t0[n0, 0, 0, kv_idx], {fill}, (qk * 0.5))"
    check(fn, *inputs())


@pytest.mark.parametrize(
    "shift",
    [
        lambda s, keep: s - s.amax(-2, keepdim=True),
        lambda s, keep: s - s.mean(-1, keepdim=True) * s.amax(-1, keepdim=True),
        lambda s, keep: (s - s.amax(-1, keepdim=True)).masked_fill(~keep, -10.0),
        lambda s, keep: torch.tanh(s - s.amax(-1, keepdim=True)),
    ],
    ids=["other-axis", "other-number", "small-fill", "bent"],
)
def test_shift_that_changes_rows_is_not_dropped(shift: Callable[..., Any]) -> None:
    def fn(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
        return shift(scores(q, k), keep).softmax(-1) @ v

    assert only_refusal(fn, *inputs()).code in ("row-dependent", "unknown-operator")


@pytest.mark.parametrize(
    "normalise",
    [lambda s: torch.exp(s - torch.logsumexp(s, -1, keepdim=True)), lambda s: F.log_softmax(s, -1).exp()],
    ids=["logsumexp", "log_softmax"],
)
def test_exponential_of_a_logarithm(normalise: Callable[..., Any]) -> None:
    def fn(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
        return normalise(masked(q, k, keep)) @ v

    assert score_of(only_site(fn, *inputs()).spec) == "where(t0[n0, 0, 0, kv_idx], -inf, (qk * 0.5))"
    check(fn, *inputs())


@pytest.mark.parametrize("late", [False, True])
def test_a_sum_kept_above_a_number(late: bool) -> None:
    """With the row's own maximum subtracted it is at least 1: what keeps it above 1e-9 does nothing."""

    def fn(q: Any, k: Any, v: Any, low: float = 1e-9) -> Any:
        s = scores(q, k)
        e = (s - s.amax(-1, keepdim=True)).exp()
        total = e.sum(-1, keepdim=True).clamp(min=low)
        return e @ v / total if late else e / total @ v

    def masked_behind(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
        s = scores(q, k)
        e = (s - s.amax(-1, keepdim=True)).exp() * keep
        return e / e.sum(-1, keepdim=True).clamp(min=1e-9) @ v

    assert score_of(only_site(fn, *inputs()[:3]).spec) == "(qk * 0.5)"
    check(fn, *inputs()[:3])
    for refusal in (only_refusal(fn, *inputs()[:3], 1.5), only_refusal(masked_behind, *inputs())):
        assert refusal.code == "row-dependent"
        assert "is kept above a number" in refusal.reason


@pytest.mark.parametrize("late", [False, True])
def test_a_number_beside_a_sum_of_differences(late: bool) -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        s = scores(q, k)
        e = (s - s.amax(-1, keepdim=True)).exp()
        total = e.sum(-1, keepdim=True) + 1e-6
        return e @ v / total if late else e / total @ v

    refusal = only_refusal(fn, *inputs()[:3])
    assert refusal.code == "row-dependent"
    assert "a number is added to the sum of the exponentials" in refusal.reason
    assert "amax" in refusal.location.code


def test_logarithm_that_a_fill_absorbs() -> None:
    """A row of nothing but finfo.min gives exp(0) = 1 for every key in eager code, and no average."""

    def fn(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
        s = masked(q, k, keep, MIN)
        return torch.exp(s - torch.logsumexp(s, -1, keepdim=True)) @ v

    assert only_refusal(fn, *inputs()).code == "log-sum-exp"


@pytest.mark.parametrize(
    "shift",
    [
        lambda s: s - s[..., :2].amax(-1, keepdim=True),
        lambda s: s - s[:, :1].amax((1, -1), keepdim=True),
        lambda s: s - s.amax(-1, keepdim=True).clamp(min=1e30),
    ],
    ids=["first-keys", "first-head", "huge-limit"],
)
def test_shift_that_may_not_be_finite_is_not_dropped(shift: Callable[..., Any]) -> None:
    """A maximum over a part of the row may be -inf alone, and a huge limit absorbs the scores: both were dropped."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        s = scores(q, k)
        drop = torch.arange(s.shape[-1]) < torch.arange(s.shape[-2])[:, None]
        return shift(s.masked_fill(drop, -math.inf)).softmax(-1) @ v

    assert only_refusal(fn, *inputs()[:3]).code == "row-dependent"
    check(fn, *inputs()[:3])
