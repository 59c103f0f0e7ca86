"""Sinks in all their spellings: the recovered spec, and the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import matched, only_refusal, only_site, score_of
from written_out import MIN, B, D, E, H, T, check, column, inputs, masked, scores

from flashfuse.kernels.spec import to_text


def appended_without_maximum(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
    s = masked(q, k, keep, MIN)
    combined = torch.cat([s, column(s, sink)], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    return F.softmax(combined, dim=-1, dtype=combined.dtype)[..., :-1] @ v


def appended_to_empty_rows(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
    s = masked(q, k, keep)
    return torch.cat([s, column(s, sink)], dim=-1).softmax(-1)[..., :T] @ v


def in_front(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
    s = masked(q, k, keep)
    return torch.einsum("bhij,bhjd->bhid", torch.cat([column(s, sink), s], -1).softmax(-1)[..., 1:], v)


def in_front_in_another_type(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
    s = masked(q, k, keep)
    combined = torch.cat((column(s, sink), s), -1).to(torch.promote_types(s.dtype, torch.float32))
    return combined.softmax(-1).to(v.dtype).split([1, T], -1)[1] @ v


def by_logarithm(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
    s = masked(q, k, keep)
    return (s - torch.cat([s, column(s, sink)], -1).logsumexp(-1, keepdim=True)).exp() @ v


def by_logarithm_in_front(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
    s = masked(q, k, keep)
    return (s - torch.logsumexp(torch.cat([column(s, sink), s], -1), -1)[..., None]).exp() @ v


def by_logarithm_of_a_sum(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
    s = masked(q, k, keep)
    return (s - (s.exp().sum(-1, keepdim=True) + column(s, sink).exp()).log()).exp() @ v


# Beside a logarithm of all columns the scores are a part of what is summed; they were "needed as a whole".
BY_LOGARITHM = [by_logarithm, by_logarithm_in_front, by_logarithm_of_a_sum]
SINKS = [appended_without_maximum, appended_to_empty_rows, in_front, in_front_in_another_type, *BY_LOGARITHM]


@pytest.mark.parametrize("fn", SINKS, ids=lambda f: f.__name__)
def test_sink_of_each_head(fn: Callable[..., Any]) -> None:
    """A column of the softmax that meets no value; a row without a key leaves everything to it."""
    site = only_site(fn, *inputs())
    fill = repr(MIN) if fn is appended_without_maximum else "-inf"
    assert score_of(site.spec) == f"where(t0[n0, 0, 0, kv_idx], {fill}, (qk * 0.5))"
    assert to_text(site.spec.sink) == "t1[n1]"
    assert site.spec.empty_row == "zero"
    assert site.captured[1].op == "placeholder"
    check(fn, *inputs())


def test_sinks_and_keys_of_symbolic_number() -> None:
    site = only_site(in_front, *inputs(), dynamic=True)
    assert to_text(site.spec.sink) == "t1[n1]"
    assert not site.kv_len.is_Integer


def gated_with_sigmoid(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
    s = masked(q, k, keep)
    lse = torch.logsumexp(s, dim=-1, keepdim=True)
    return (s.softmax(-1) @ v) * torch.sigmoid(lse - sink.view(1, -1, 1, 1))


def gated_with_quotient(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
    s = masked(q, k, keep)
    lse = s.exp().sum(-1).log()
    out = (s.softmax(-1) @ v).transpose(1, 2)
    return (1 / (1 + torch.exp(sink.view(1, -1, 1) - lse))).transpose(1, 2).unsqueeze(-1) * out


def gated_finite(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
    s = masked(q, k, keep, MIN)
    return torch.sigmoid(s.logsumexp(-1) - sink[:, None])[..., None] * torch.matmul(s.softmax(-1), v)


@pytest.mark.parametrize("fn", [gated_with_sigmoid, gated_with_quotient, gated_finite], ids=lambda f: f.__name__)
def test_output_times_sigmoid_is_a_sink(fn: Callable[..., Any]) -> None:
    """Where the softmax itself has no sink, a row without a key is NaN and stays so."""
    site = only_site(fn, *inputs())
    assert to_text(site.spec.sink) == "t1[n1]"
    assert site.spec.empty_row == "nan"
    check(fn, *inputs())


def test_gate_of_other_scores_is_no_sink() -> None:
    """The log-sum-exp of scores before their mask leaves the attention alone."""

    def fn(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
        s = scores(q, k)
        lse = torch.logsumexp(s, dim=-1, keepdim=True)
        return (s.masked_fill(~keep, MIN).softmax(-1) @ v) * torch.sigmoid(lse - sink.view(1, -1, 1, 1))

    assert only_refusal(fn, *inputs()).code == "scores-used"


def plus_one(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
    e = masked(q, k, keep).exp()
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


def plus_one_shifted(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
    s = masked(q, k, keep)
    m = s.amax(-1, keepdim=True)
    e = torch.exp(s - m)
    return (e / (torch.exp(-m) + e.sum(-1, keepdim=True))) @ v


def plus_one_shifted_from_zero(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
    s = masked(q, k, keep)
    m = s.amax(-1, keepdim=True).clamp(min=0)
    e = torch.exp(s - m)
    return (e / (e.sum(-1, keepdim=True) + torch.exp(-m))) @ v


def plus_one_as_column(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
    s = masked(q, k, keep)
    return torch.cat([s, s.new_zeros(*s.shape[:-1], 1)], -1).softmax(-1)[..., :-1] @ v


def plus_one_padded(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
    return F.softmax(F.pad(masked(q, k, keep), (1, 0)), dim=-1)[..., 1:] @ v


PLUS_ONE = [plus_one, plus_one_shifted, plus_one_shifted_from_zero, plus_one_as_column, plus_one_padded]


@pytest.mark.parametrize("fn", PLUS_ONE, ids=lambda f: f.__name__)
def test_softmax_plus_one(fn: Callable[..., Any]) -> None:
    site = only_site(fn, *inputs())
    assert score_of(site.spec) == "where(t0[n0, 0, 0, kv_idx], -inf, (qk * 0.5))"
    assert to_text(site.spec.sink) == "0.0"
    # -inf minus the row's own maximum, -inf, is NaN; with another shift, or none, it is an ordinary sink.
    assert site.spec.empty_row == ("nan" if fn is plus_one_shifted else "zero")
    check(fn, *inputs())


def test_sink_to_another_base() -> None:
    def fn(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
        s = scores(q, k)
        m = s.amax(-1, keepdim=True)
        e, rest = torch.exp2(s - m), torch.exp2(sink.view(1, -1, 1, 1) - m)
        return (e / (rest + e.sum(-1, keepdim=True))) @ v

    assert to_text(only_site(fn, *inputs()).spec.sink) == f"(t0[n1] * {math.log(2)!r})"
    check(fn, *inputs())


def test_several_columns_are_one_sink() -> None:
    def zeros(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
        s = scores(q, k)
        return torch.cat([s, s.new_zeros(*s.shape[:-1], 2)], -1).softmax(-1)[..., :T] @ v

    def around(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
        s = scores(q, k)
        return torch.cat([column(s, sink), s, column(s, sink * 2)], -1).softmax(-1)[..., 1:-1] @ v

    assert to_text(only_site(zeros, *inputs()).spec.sink) == repr(math.log(2))
    assert only_site(around, *inputs()).spec.sink.op == "add"
    for fn in (zeros, around):
        check(fn, *inputs())


def test_column_of_a_key_is_no_sink() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        return scores(q, k).softmax(-1)[..., :-1] @ v[:, :, :-1]

    assert only_refusal(fn, *inputs()[:3]).code == "extra-columns"


def test_sum_plus_epsilon_after_the_maximum_is_no_sink() -> None:
    """The epsilon counts for more in rows of small scores, so it would need the row's maximum."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        s = scores(q, k)
        e = torch.exp(s - s.amax(-1, keepdim=True))
        return (e / (e.sum(-1, keepdim=True) + 1e-6)) @ v

    assert not matched(fn, *inputs()[:3]).sites


def test_memory_keys() -> None:
    """Learned keys and values in front of the others are part of two concatenations."""

    def fn(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
        k = torch.cat([mk.expand(B, -1, -1, -1), k], dim=2)
        v = torch.cat([mv.expand(B, -1, -1, -1), v], dim=2)
        return scores(q, k).softmax(-1) @ v

    args = (*inputs()[:3], torch.randn(1, H, 2, D), torch.randn(1, H, 2, E))
    assert only_site(fn, *args).kv_len == T + 2
    check(fn, *args)


def test_report_shows_the_sink() -> None:
    from flashfuse.describe import describe_site

    math = describe_site(only_site(in_front, *inputs())).math
    assert math.startswith("softmax([where(t0[n0, 0, 0, kv_idx], -inf, (qk * 0.5)), t1[n1]])[:-1] @ v")


def test_maximum_below_a_relative_sink_is_kept() -> None:
    """A maximum was dropped from the scores and not from the 1 beside them: softmax-plus-one of s, not of s - max s."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        s = scores(q, k)
        s = s - s.amax(-1, keepdim=True)
        m = s.amax(-1, keepdim=True)
        e = torch.exp(s - m)
        return (e / (torch.exp(-m) + e.sum(-1, keepdim=True))) @ v

    assert not matched(fn, *inputs()[:3]).sites
    check(fn, *inputs()[:3])


def test_sinks_that_are_all_minus_infinity() -> None:
    """The sinks' joint logarithm was -inf - -inf, so a head whose sinks are switched off gave NaN."""

    def fn(q: Any, k: Any, v: Any, sink: Any) -> Any:
        s = scores(q, k)
        return torch.cat([column(s, sink), s, column(s, sink)], -1).softmax(-1)[..., 1:-1] @ v

    def constant(q: Any, k: Any, v: Any) -> Any:
        return F.pad(scores(q, k), (1, 1), value=-math.inf).softmax(-1)[..., 1:-1] @ v

    sink = inputs()[3].clone()
    sink[0] = -math.inf
    assert only_site(fn, *inputs()[:3], sink).spec.sink is not None
    check(fn, *inputs()[:3], sink)
    check(constant, *inputs()[:3])


@pytest.mark.parametrize("dim", [-1, -2], ids=["columns", "rows"])
def test_columns_with_values_are_no_keys(dim: int) -> None:
    """Scores in a further column that has a value, or a further row, made an operator of too few keys: a crash."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        s = scores(q, k)
        s = torch.cat([s, s.new_zeros(()).expand(s.narrow(dim, 0, 1).shape)], dim)
        return s.softmax(-1) @ (F.pad(v, (0, 0, 0, 1)) if dim == -1 else v)

    assert only_refusal(fn, *inputs()[:3]).code == "extra-columns"
    check(fn, *inputs()[:3])


def test_sink_beside_scores_as_large() -> None:
    """On the CPU the sink was compared with a log-sum-exp whose last digits were gone: half instead of 10 / 11."""

    def fn(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
        s = masked(q, k, keep, -1e30)
        return torch.cat([s, column(s, sink)], -1).softmax(-1)[..., :-1] @ v

    def large(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
        s = scores(q, k) + 4096.0
        return torch.cat([s, column(s, sink + 4096.0)], -1).softmax(-1)[..., :-1] @ v

    q, k, v, sink, keep = inputs()
    v = torch.randn(B, H, T, D, generator=torch.Generator().manual_seed(1))
    check(fn, q, k, v, torch.full_like(sink, -1e30), keep)
    check(large, q, k, v, sink, keep)
