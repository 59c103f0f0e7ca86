"""Sinks, void shifts, scores without a normaliser, what becomes of probabilities: recovered specs, and the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import matched, only_refusal, only_site, score_of
from numerics import assert_close_to_exact

from flashfuse.kernels.spec import to_text

B, H, S, T, D, E = 2, 4, 6, 10, 8, 3
MIN = torch.finfo(torch.float32).min


def inputs() -> tuple[torch.Tensor, ...]:
    """q, k, v, one number a head, and which keys count: none at all in the second batch element."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, n, d, generator=generator) for n, d in ((S, D), (T, D), (T, E)))
    keep = torch.rand(B, 1, 1, T, generator=generator) < 0.7
    keep[1] = False
    return q, k, v, torch.randn(H, generator=generator), keep


def check(fn: Callable[..., Any], *args: torch.Tensor) -> None:
    """The compiled function against eager code, both measured against float64; NaN where eager gives NaN."""
    torch._dynamo.reset()
    options = {"flashfuse.inner": "eager", "flashfuse.strict": True}
    with torch.no_grad():
        fused = torch.compile(fn, backend="flashfuse", options=options)(*args)
        exact = fn(*(a.double() if a.is_floating_point() else a for a in args))
        assert_close_to_exact(fused, fn(*args), exact)


def scores(q: Any, k: Any) -> Any:
    return q @ k.transpose(-1, -2) * 0.5


def column(s: Any, x: Any) -> Any:
    """One number a head as a further column of the scores."""
    return x.reshape(1, -1, 1, 1).expand(s.shape[0], -1, s.shape[2], -1)


def masked(q: Any, k: Any, keep: Any, fill: float = -math.inf) -> Any:
    return scores(q, k).masked_fill(~keep, fill)


# --------------------------------------------------------------------------------------------------------------------
# Sinks


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


SINKS = [appended_without_maximum, appended_to_empty_rows, in_front, in_front_in_another_type]


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


# --------------------------------------------------------------------------------------------------------------------
# Shifts

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


def test_logarithm_that_a_fill_absorbs() -> None:
    """A row of nothing but finfo.min gives exp(0) = 1 for every key in eager code, and no average."""

    def fn(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
        s = masked(q, k, keep, MIN)
        return torch.exp(s - torch.logsumexp(s, -1, keepdim=True)) @ v

    assert only_refusal(fn, *inputs()).code == "log-sum-exp"


# --------------------------------------------------------------------------------------------------------------------
# No normaliser

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


def test_weights_without_a_normaliser_that_are_returned() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        weights = torch.sigmoid(scores(q, k))
        return weights @ v, weights

    assert only_refusal(fn, *inputs()[:3]).code == "scores-used"


# --------------------------------------------------------------------------------------------------------------------
# After the softmax

FACTORS: dict[str, tuple[Callable[..., Any], str]] = {
    "head-mask": (lambda p, x, keep: p * x.view(H, 1, 1), "t1[n1]"),
    "head-mask-argument": (lambda p, x, keep: x[None, :, None, None] * p, "t1[n1]"),
    "divided": (lambda p, x, keep: p / x.view(1, H, 1, 1), "(1.0 / t1[n1])"),
    "number": (lambda p, x, keep: p * 3.0, "3.0"),
    "count": (lambda p, x, keep: p / p.shape[-1], repr(torch.tensor(0.1).item())),
    "mask": (lambda p, x, keep: p * keep, "where(t1[n0, 0, 0, kv_idx], 1.0, 0.0)"),
    "float-mask": (lambda p, x, keep: keep.to(p.dtype) * p, "t1[n0, 0, 0, kv_idx]"),
    "positions": (
        lambda p, x, keep: p * torch.tril(torch.ones(S, T)),
        "where((kv_idx <= q_idx), 1.0, 0.0)",
    ),
    "two": (lambda p, x, keep: p * 2.0 * x.view(H, 1, 1), "(2.0 * t1[n1])"),
}


@pytest.mark.parametrize("fill", [-math.inf, MIN])
@pytest.mark.parametrize("name", FACTORS)
def test_factor_on_the_probabilities(name: str, fill: float) -> None:
    change, text = FACTORS[name]

    def fn(q: Any, k: Any, v: Any, x: Any, keep: Any) -> Any:
        return change(masked(q, k, keep, fill).softmax(-1), x, keep) @ v

    site = only_site(fn, *inputs())
    assert to_text(site.spec.factor) == text
    assert site.spec.empty_row == "nan"
    check(fn, *inputs())


ZEROED: dict[str, Callable[..., Any]] = {
    "masked_fill": lambda p, keep: p.masked_fill(~keep, 0.0),
    "where": lambda p, keep: torch.where(keep, p, 0.0),
    "comparison": lambda p, keep: p.masked_fill(keep == 0, 0),
    "in-place": lambda p, keep: p.masked_fill_(keep.logical_not(), 0),
}


@pytest.mark.parametrize("name", ZEROED)
def test_zeroed_where_masked_already(name: str) -> None:
    """With -inf only rows without a key change, from NaN to zero; with a finite fill those become zero too."""
    zeroed = ZEROED[name]

    def mask(s: Any, keep: Any, fill: float) -> Any:
        return s.masked_fill(keep == 0, fill) if name == "comparison" else s.masked_fill(~keep, fill)

    def infinite(q: Any, k: Any, v: Any, x: Any, keep: Any) -> Any:
        return zeroed(mask(scores(q, k), keep, -math.inf).softmax(-1), keep) @ v

    def finite(q: Any, k: Any, v: Any, x: Any, keep: Any) -> Any:
        return zeroed(mask(scores(q, k), keep, MIN).softmax(-1), keep) @ v

    assert (only_site(infinite, *inputs()).spec.factor, only_site(infinite, *inputs()).spec.empty_row) == (None, "zero")
    assert only_site(finite, *inputs()).spec.factor.op == "where"
    check(infinite, *inputs())
    check(finite, *inputs())


CLEARED: dict[str, Callable[..., Any]] = {
    "nan_to_num": lambda p: torch.nan_to_num(p),
    "nan_to_num-method": lambda p: p.nan_to_num(nan=0.0),
    "masked_fill": lambda p: p.masked_fill(p.isnan(), 0.0),
    "where": lambda p: torch.where(torch.isnan(p), torch.zeros_like(p), p),
    "where-not": lambda p: torch.where(~torch.isnan(p), p, 0.0),
}


@pytest.mark.parametrize("name", CLEARED)
def test_rows_without_a_key_cleared_of_nan(name: str) -> None:
    def fn(q: Any, k: Any, v: Any, x: Any, keep: Any) -> Any:
        return CLEARED[name](masked(q, k, keep).softmax(-1)) @ v

    site = only_site(fn, *inputs())
    assert site.spec.empty_row == "zero"
    assert site.spec.factor is None
    check(fn, *inputs())


@pytest.mark.parametrize("fill", [-math.inf, MIN])
def test_rows_zeroed_as_a_whole(fill: float) -> None:
    """Also where they are NaN: `where` does not multiply."""

    def chosen(q: Any, k: Any, v: Any, x: Any, keep: Any) -> Any:
        p = masked(q, k, keep, fill).softmax(-1)
        return torch.where(keep.any(-1, keepdim=True), p, 0.0) @ v

    def filled(q: Any, k: Any, v: Any, x: Any, keep: Any) -> Any:
        return masked(q, k, keep, fill).softmax(-1).masked_fill(keep.sum(-1, keepdim=True) == 0, 0.0) @ v

    for fn in (chosen, filled):
        factor = only_site(fn, *inputs()).spec.factor
        assert (factor.dtype == torch.bool) == (fill == -math.inf)
        check(fn, *inputs())


def test_zeroed_under_another_mask() -> None:
    """Left padding under a causal mask of -inf: a row without a key is NaN, and stays so in columns that are kept."""

    def fn(q: Any, k: Any, v: Any, keep: Any) -> Any:
        causal = torch.ones(S, T, dtype=torch.bool).tril()
        return masked(q, k, causal & keep).softmax(-1).masked_fill(~keep, 0.0) @ v

    refusal = only_refusal(fn, *inputs()[:3], inputs()[4])
    assert refusal.code == "probability-mask"


def test_factor_as_large_as_the_scores() -> None:
    """Read through to what it is made of, or given from outside; a second matrix of scores is neither."""

    def outside(q: Any, k: Any, v: Any, f: Any) -> Any:
        return (scores(q, k).softmax(-1) * f) @ v

    def made(q: Any, k: Any, v: Any, f: Any) -> Any:
        return (scores(q, k).softmax(-1) * f.cumsum(-1)) @ v

    args = (*inputs()[:3], torch.rand(B, H, S, T))
    assert to_text(only_site(outside, *args).spec.factor) == "t0[n0, n1, q_idx, kv_idx]"
    check(outside, *args)
    assert only_refusal(made, *args).code == "probability-factor"


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "added": (lambda p, f: p + f, "probability-term"),
    "mixed-with-uniform": (lambda p, f: 0.9 * p + 0.1 / T, "probability-term"),
    "squared": (lambda p, f: p * p, "probability-factor"),
    "bent": (lambda p, f: p.sqrt(), "probability-factor"),
    "limited": (lambda p, f: p.clamp(max=0.5), "probability-factor"),
    "renormalised": (lambda p, f: p / p.sum(-1, keepdim=True), "row-dependent"),
    "top-k": (lambda p, f: p * (p >= p.topk(3, -1).values[..., -1:]), "probability-factor"),
    "chosen": (lambda p, f: F.one_hot(p.argmax(-1), T).to(p.dtype), "no-value-product"),
    "cumulative": (lambda p, f: p.cumsum(-1), "unknown-operator"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_functions_of_the_probabilities(name: str) -> None:
    change, code = REFUSED[name]
    refusal = only_refusal(lambda q, k, v, f: change(scores(q, k).softmax(-1), f) @ v, *inputs()[:3], torch.rand(S, T))
    assert refusal.code == code, refusal


# --------------------------------------------------------------------------------------------------------------------
# Several softmaxes

DIFFERENCES: dict[str, Callable[..., Any]] = {
    "before-values": lambda p1, p2, v, x: (p1 - x.view(H, 1, 1) * p2) @ v,
    "behind-values": lambda p1, p2, v, x: p1 @ v - x.view(H, 1, 1) * (p2 @ v),
    "weighted-sum": lambda p1, p2, v, x: torch.einsum("bhij,bhjd->bhid", 0.25 * p1 + p2 * 0.75, v),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DIFFERENCES)
def test_difference_of_two_softmaxes(name: str, dtype: torch.dtype) -> None:
    """The product with the values is linear: two attentions, added before they are rounded."""

    def fn(q: Any, k: Any, v: Any, x: Any) -> Any:
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        return DIFFERENCES[name](scores(q1, k1).softmax(-1), scores(q2, k2).softmax(-1), v, x)

    args = tuple(a.to(dtype) for a in inputs()[:4])
    result = matched(fn, *args)
    assert not result.refusals
    apart = name == "behind-values"
    assert [len(site.plus) for site in result.sites] == ([0, 0] if apart else [1])
    if not apart:
        (site,) = result.sites
        assert {s.spec.out_dtype for s in (site, *site.plus)} == {torch.float32}
        assert site.head_dim == D // 2
    check(fn, *args)


def test_report_shows_every_part() -> None:
    from flashfuse.describe import describe_site

    assert "softmax([where(" in describe_site(only_site(in_front, *inputs())).math
    assert ", t1[n1]])[:-1] @ v" in describe_site(only_site(in_front, *inputs())).math
    plain = describe_site(only_site(lambda q, k, v: torch.sigmoid(scores(q, k)) @ v, *inputs()[:3]))
    assert plain.math.startswith("sigmoid((qk * 0.5)) @ v")
    assert plain.mask == "none"
    headed = describe_site(
        only_site(lambda q, k, v, x: (scores(q, k).softmax(-1) * x[:, None, None]) @ v, *inputs()[:4])
    )
    assert headed.math.startswith("(softmax((qk * 0.5)) * t0[n1]) @ v")
