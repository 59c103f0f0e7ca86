"""What becomes of probabilities between the softmax and the values: recovered specs, numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import matched, only_refusal, only_site
from written_out import MIN, B, D, H, S, T, check, inputs, masked, scores

from flashfuse.kernels.spec import to_text

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


@pytest.mark.parametrize("name", CLEARED)
def test_a_sum_that_vanishes_is_cleared_of_nan(name: str) -> None:
    """A row of finite fills gave the average of all values; without its maximum its sum is 0, and it is zero."""

    def unshifted(q: Any, k: Any, v: Any, x: Any, keep: Any, fill: float) -> Any:
        e = masked(q, k, keep, fill).exp()
        return CLEARED[name](e / e.sum(-1, keepdim=True)) @ v

    def shifted(q: Any, k: Any, v: Any, x: Any, keep: Any) -> Any:
        s = masked(q, k, keep, MIN)
        e = (s - s.amax(-1, keepdim=True)).exp()
        return CLEARED[name](e / e.sum(-1, keepdim=True)) @ v

    for fill in (-math.inf, MIN, -1e4):
        assert only_site(unshifted, *inputs(), fill).spec.empty_row == "zero"
    check(functools.partial(unshifted, fill=MIN), *inputs())
    assert only_refusal(unshifted, *inputs(), -50.0).code == "probability-mask"
    only_site(shifted, *inputs())
    check(shifted, *inputs())


def test_a_maximum_of_more_than_the_row_is_cleared_of_nan() -> None:
    """Any maximum counted as the row's own: where other rows have larger ones, a row of fills sums to 0."""

    def whole(q: Any, k: Any, v: Any, x: Any, keep: Any) -> Any:
        s = masked(q, k, keep, MIN)
        e = (s - s.amax()).exp()
        return (e / e.sum(-1, keepdim=True)).nan_to_num() @ v

    def before(q: Any, k: Any, v: Any, x: Any, keep: Any) -> Any:
        s = scores(q, k)
        e = (s.masked_fill(~keep, MIN) - s.amax(-1, keepdim=True)).exp()
        return (e / e.sum(-1, keepdim=True)).nan_to_num() @ v

    for fn in (whole, before):
        refusal = only_refusal(fn, *inputs())
        assert refusal.code == "probability-mask"
        assert "its maximum is not subtracted" in refusal.reason


def test_a_fill_that_is_turned_around_is_cleared_of_nan() -> None:
    """Rows with a score of +inf gave NaN, where eager code's NaN is cleared."""

    def fn(q: Any, k: Any, v: Any, x: Any, keep: Any) -> Any:
        return (1 - masked(q, k, keep)).softmax(-1).nan_to_num() @ v

    assert only_refusal(fn, *inputs()).code == "probability-mask"


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("curve", [F.silu, torch.sin])
def test_cleared_rows_that_a_function_of_masked_scores_spoils(curve: Callable[..., Any], plus_one: bool) -> None:
    """Such a function makes NaN of -inf, and so of each row with a masked key; only rows without a key were 0."""

    def fn(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
        e = curve(masked(q, k, keep)).exp()
        return (e / (e.sum(-1, keepdim=True) + plus_one)).nan_to_num() @ v

    assert only_refusal(fn, *inputs()).code == "probability-mask"


def test_cleared_rows_beside_a_function_that_keeps_masked_scores() -> None:
    def fn(q: Any, k: Any, v: Any, sink: Any, keep: Any) -> Any:
        return torch.softmax(F.softplus(masked(q, k, keep)) + masked(q, k, keep), -1).nan_to_num() @ v

    check(fn, *inputs())
    assert only_site(fn, *inputs()).spec.empty_row == "zero"


UNSHIFTED_FILLS: dict[str, tuple[Callable[..., Any], str]] = {
    "limited": (lambda s, keep: s.masked_fill(~keep, -1e4).clamp(max=3), "-inf"),
    "scaled": (lambda s, keep: s.masked_fill(~keep, -1e4) * 0.5, "-inf"),
    "added": (lambda s, keep: s + torch.zeros(keep.shape).masked_fill(~keep, MIN), "-inf"),
    "two": (lambda s, keep: torch.where(keep, s, -1e4).masked_fill(~torch.ones(S, T).tril().bool(), -9e9), "-inf"),
    "small": (lambda s, keep: s.masked_fill(~keep, -50.0), "-50.0"),
    "kept-above": (lambda s, keep: s.masked_fill(~keep, -1e4).clamp(min=-20), "-20"),
}


@pytest.mark.parametrize("name", UNSHIFTED_FILLS)
def test_fills_whose_exponential_is_zero(name: str) -> None:
    """A row of such fills gave the average of all values, where exponentials without a maximum give 0 / 0."""
    change, text = UNSHIFTED_FILLS[name]

    def fn(q: Any, k: Any, v: Any, x: Any, keep: Any) -> Any:
        e = change(scores(q, k), keep).exp()
        return e / e.sum(-1, keepdim=True) @ v

    program = to_text(only_site(fn, *inputs()).spec.score)
    assert text in program
    assert ("-inf" in program) == (text == "-inf")
    check(fn, *inputs())


def test_a_fill_behind_which_its_maximum_is_subtracted() -> None:
    """The shift is taken off on the way to the product, and the exponential of such a fill is 1 in a row of fills."""

    def fn(q: Any, k: Any, v: Any, x: Any, keep: Any) -> Any:
        s = masked(q, k, keep, MIN)
        e = ((s - s.amax(-1, keepdim=True)) * 0.5).exp()
        return e / e.sum(-1, keepdim=True) @ v

    assert "-inf" not in to_text(only_site(fn, *inputs()).spec.score)
    check(fn, *inputs())


@pytest.mark.parametrize("fill", [-math.inf, MIN])
def test_rows_zeroed_as_a_whole(fill: float) -> None:
    """Also where they are NaN: `where` does not multiply."""

    def chosen(q: Any, k: Any, v: Any, x: Any, keep: Any) -> Any:
        p = masked(q, k, keep, fill).softmax(-1)
        return torch.where(keep.float().amax(-1, keepdim=True) > 0, p, 0.0) @ v

    def filled(q: Any, k: Any, v: Any, x: Any, keep: Any) -> Any:
        return masked(q, k, keep, fill).softmax(-1).masked_fill(keep.sum(-1, keepdim=True) == 0, 0.0) @ v

    for fn in (chosen, filled):
        factor = only_site(fn, *inputs()).spec.factor
        assert factor.dtype == torch.bool
        check(fn, *inputs())


EMPTIED: dict[str, tuple[Callable[..., Any], str | None]] = {
    "alone": (lambda p, empty, x, keep: p.masked_fill(empty, 0.0), None),
    "before-a-factor": (lambda p, empty, x, keep: p.masked_fill(empty, 0.0) * x[:, None, None], "t1[n1]"),
    "behind-a-factor": (lambda p, empty, x, keep: (p * x[:, None, None]).masked_fill(empty, 0.0), "t1[n1]"),
    "with-a-mask": (
        lambda p, empty, x, keep: p.masked_fill(empty | ~keep, 0.0),
        "where((~t1[n0, 0, 0, kv_idx]), 1.0, 0.0)",
    ),
}


@pytest.mark.parametrize("name", EMPTIED)
def test_rows_zeroed_that_a_bias_leaves_no_key(name: str) -> None:
    """Multiplied by 0 they stayed NaN, where the bias and no constant held the -inf; then only beside other factors."""
    change, factor = EMPTIED[name]

    def fn(q: Any, k: Any, v: Any, x: Any, keep: Any, bias: Any) -> Any:
        empty = (bias == -math.inf).all(-1, keepdim=True)
        return change((q @ k.mT + bias).softmax(-1), empty, x, keep) @ v

    bias = torch.randn(B, 1, S, T)
    bias[:, :, 2] = -math.inf
    args = (*inputs(), bias)
    spec = only_site(fn, *args).spec
    assert spec.empty_row == "zero"
    found = None if spec.factor is None else to_text(spec.factor)
    assert found == factor
    assert not fn(*args).isnan().any()
    check(fn, *args)


def test_a_fill_of_float64_does_not_overflow_in_float32() -> None:
    """It became -inf, and rows without a key NaN instead of the average of all values."""

    def fn(q: Any, k: Any, v: Any, x: Any, keep: Any) -> Any:
        return (q @ k.mT).masked_fill(~keep, torch.finfo(torch.float64).min).softmax(-1) @ v

    args = [x.double() if x.is_floating_point() else x for x in inputs()]
    assert "-1.7976931348623157e+308" in to_text(only_site(fn, *args).spec.score)
    torch._dynamo.reset()
    fused = torch.compile(fn, backend="flashfuse", options={"flashfuse.inner": "eager", "flashfuse.strict": True})
    torch.testing.assert_close(fused(*args), fn(*args))


INFINITE: dict[str, Callable[..., Any]] = {
    "scores": lambda s, p, keep: torch.where((s == -math.inf).all(-1, keepdim=True), 0.0, p),
    "number-first": lambda s, p, keep: p.masked_fill((-math.inf == s).all(-1, keepdim=True), 0.0),
    "isneginf": lambda s, p, keep: p.masked_fill(torch.isneginf(s).all(dim=-1)[..., None], 0.0),
    "some-finite": lambda s, p, keep: torch.where((s != -math.inf).any(-1, True), p, torch.zeros_like(p)),
    "some-key": lambda s, p, keep: torch.where(keep.any(-1, keepdim=True), p, 0.0),
    "no-key": lambda s, p, keep: p.masked_fill((~keep).all(-1, keepdim=True), 0.0),
    "twice": lambda s, p, keep: (p * keep.any(-1, keepdim=True)).masked_fill((s == -math.inf).all(-1, True), 0.0),
}


@pytest.mark.parametrize("name", INFINITE)
def test_empty_rows_that_are_tested_for(name: str) -> None:
    """The test used to need the scores as a whole, so the site was refused, or to stay a factor of rows."""

    def fn(q: Any, k: Any, v: Any, x: Any, keep: Any) -> Any:
        s = masked(q, k, keep)
        return INFINITE[name](s, s.softmax(-1), keep) @ v

    spec = only_site(fn, *inputs()).spec
    assert spec.empty_row == "zero"
    assert (spec.factor is None) == (name != "twice")
    check(fn, *inputs())


def part_of_the_row(s: Any, p: Any, keep: Any) -> Any:
    return p.masked_fill((s[..., :-1] == -math.inf).all(-1, keepdim=True), 0.0)


def over_the_queries(s: Any, p: Any, keep: Any) -> Any:
    return p.masked_fill((s == -math.inf).all(-2, keepdim=True), 0.0)


def some_masked(s: Any, p: Any, keep: Any) -> Any:
    return p.masked_fill((s == -math.inf).any(-1, keepdim=True), 0.0)


def another_infinity(s: Any, p: Any, keep: Any) -> Any:
    return p.masked_fill((s == math.inf).all(-1, keepdim=True), 0.0)


OTHER = {
    part_of_the_row: ("row-dependent", "masked_fill"),
    over_the_queries: ("probability-mask", "softmax"),
    some_masked: ("row-dependent", "masked_fill"),
    another_infinity: ("row-dependent", "masked_fill"),
}


@pytest.mark.parametrize("change", OTHER, ids=lambda f: f.__name__)
def test_other_tests_of_rows(change: Callable[..., Any]) -> None:
    def fn(q: Any, k: Any, v: Any, keep: Any) -> Any:
        s = masked(q, k, keep)
        return change(s, s.softmax(-1), keep) @ v

    refusal = only_refusal(fn, *inputs()[:3], inputs()[4])
    code, line = OTHER[change]
    assert refusal.code == code
    assert line in refusal.location.code


def test_a_row_may_be_empty_for_another_reason_than_the_one_tested() -> None:
    """Then it is NaN."""

    def fn(q: Any, k: Any, v: Any, keep: Any) -> Any:
        causal = torch.ones(S, T, dtype=torch.bool).tril(-1)
        return torch.where(keep.any(-1, keepdim=True), masked(q, k, causal & keep).softmax(-1), 0.0) @ v

    spec = only_site(fn, *inputs()[:3], inputs()[4]).spec
    assert spec.empty_row == "nan"
    assert spec.factor is not None
    assert spec.factor.dtype == torch.bool
    check(fn, *inputs()[:3], inputs()[4])


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
    "renormalised": (lambda p, f: p * f / (p * f).sum(-1, keepdim=True), "row-dependent"),
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


def test_report_shows_the_factor_or_no_softmax() -> None:
    from flashfuse.describe import describe_site

    plain = describe_site(only_site(lambda q, k, v: torch.sigmoid(scores(q, k)) @ v, *inputs()[:3]))
    assert plain.math.startswith("sigmoid((qk * 0.5)) @ v")
    assert plain.mask == "none"
    headed = describe_site(
        only_site(lambda q, k, v, x: (scores(q, k).softmax(-1) * x[:, None, None]) @ v, *inputs()[:4])
    )
    assert headed.math.startswith("(softmax((qk * 0.5)) * t0[n1]) @ v")


def exponentials(q: Any, k: Any, keep: Any) -> Any:
    s = masked(q, k, keep, MIN)
    return (s - s.amax(-1, keepdim=True)).exp()


LATE: dict[str, Callable[[Any, Any], Any]] = {
    "divided": lambda e, v: (e @ v) / e.sum(-1, keepdim=True),
    "inverse": lambda e, v: e.sum(-1)[..., None].reciprocal() * (e @ v),
    "in-place": lambda e, v: (e @ v).div_(e.sum(-1, keepdim=True)),
    "transposed": lambda e, v: ((v.mT @ e.mT) / e.sum(-1)[..., None, :]).mT,
    "multiplied-and-summed": lambda e, v: (e.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2) / e.sum(-1, keepdim=True),
    "by-ones": lambda e, v: (e @ v) / (e @ v.new_ones(v.shape[-2], 1)),
    "by-ones-like": lambda e, v: (e @ v) * (e @ torch.ones_like(v)).reciprocal(),
    "by-ones-before": lambda e, v: (e / torch.einsum("bhst,t->bhs", e, v.new_ones(v.shape[-2])).unsqueeze(-1)) @ v,
    "as-wide": lambda e, v: (e.to(v.dtype) @ v) / e.sum(-1, keepdim=True, dtype=torch.float32).to(v.dtype),
}


@pytest.mark.parametrize("name", LATE)
def test_divided_behind_the_product(name: str) -> None:
    """It was refused, since the sum reads exponentials that have to exist for it."""

    def fn(q: Any, k: Any, v: Any, x: Any, keep: Any) -> Any:
        return LATE[name](exponentials(q, k, keep), v)

    site = only_site(fn, *inputs())
    assert site.spec.normaliser == "softmax"
    assert site.spec.factor is None
    check(fn, *inputs())


def test_two_in_a_row_divided_behind_the_product() -> None:
    """The sum of the first was taken for a normaliser behind the second's product, which then was the first's."""

    def fn(q: Any, k: Any, v: Any, x: Any, keep: Any) -> Any:
        e = exponentials(q, k, keep)
        out = (e @ v) / e.sum(-1, keepdim=True)
        e = exponentials(out, k, keep)
        return (e @ v) / e.sum(-1, keepdim=True)

    q, k, _, x, keep = inputs()
    assert len(matched(fn, q, k, k.flip(-1).contiguous(), x, keep).sites) == 2


NOT_ITS_SUM: dict[str, Callable[[Any, Any], Any]] = {
    "by-twos": lambda e, v: (e @ v) / (e @ torch.full_like(v, 2.0)),
    "another-sum": lambda e, v: (e @ v) / (e * 2.0).sum(-1, keepdim=True),
    "of-columns": lambda e, v: (e[..., :S, :] @ v) / e.sum(-2, keepdim=True).mT[..., :S, :],
    "kept": lambda e, v: ((e @ v) / e.sum(-1, keepdim=True), e.sum(-1)),
}


@pytest.mark.parametrize("name", NOT_ITS_SUM)
def test_divided_by_something_else(name: str) -> None:
    def fn(q: Any, k: Any, v: Any, x: Any, keep: Any) -> Any:
        return NOT_ITS_SUM[name](exponentials(q, k, keep), v)

    assert not matched(fn, *inputs()).sites


@pytest.mark.parametrize("merge", [lambda t: t.flatten(0, 1), lambda t: t.reshape(1, 6, *t.shape[2:])])
def test_dropped_before_their_axes_are_merged(merge: Callable[..., Any]) -> None:
    """Quotient and remainder of one position were taken for two that share a random number."""

    def fn(q: Any, k: Any, v: Any, shared: bool = False) -> Any:
        p = F.dropout((q @ k.mT).softmax(-1), 0.3)
        return merge(p[:, :1].expand_as(p) if shared else p) @ merge(v)

    args = [torch.randn(2, 3, 5, 4) for _ in range(3)]
    assert only_site(fn, *args).spec.dropout == 0.3
    assert only_refusal(lambda *a: fn(*a, shared=True), *args).code == "dropout"
