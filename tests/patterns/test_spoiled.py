"""NaN that is cleared where a score may be +inf or NaN: eager code sets the whole row to zero, kernels would not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import check_fused, check_right
from graphs import only_refusal, only_site
from torch.nn import functional as F

B, H, S, T, D = 2, 2, 5, 6, 4
MIN = torch.finfo(torch.float32).min
INF = math.inf


def inputs() -> tuple[torch.Tensor, ...]:
    keep = torch.rand(B, 1, S, T) > 0.4
    keep[0, 0, 0] = False
    return torch.randn(B, H, S, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D), keep


def added(keep: Any, fill: float = -INF) -> Any:
    return torch.where(keep, 0.0, fill)


Curve = Callable[[Any, Any], Any]

SPOILED: dict[str, Curve] = {
    "subtracted-and-turned": lambda s, keep: -(s - added(keep, INF)),
    "subtracted-and-bent": lambda s, keep: (s - added(keep, INF)).sin(),
    "of-the-other-sign": lambda s, keep: s + added(keep, INF),
    "subtracted": lambda s, keep: s - added(keep),
    "logarithm-subtracted": lambda s, keep: s - keep.float().log(),
    "by-keys": lambda s, keep: s - torch.where(keep[:, :, :1], 0.0, -INF),
    "times": lambda s, keep: s * torch.where(keep, 1.0, INF),
    "times-nothing": lambda s, keep: s.masked_fill(~keep, -INF) * keep,
    "divided": lambda s, keep: s / keep,
    "positions": lambda s, keep: s + torch.full((S, T), INF).triu(1),
    "two": lambda s, keep: (s + added(keep)) - (s + added(keep.flip(-1))),
    "squared-fill": lambda s, keep: s.masked_fill(~keep, MIN).square(),
    "squared-and-added": lambda s, keep: (s + added(keep, -1e30)) ** 2,
    "exponential": lambda s, keep: torch.expm1(-s.masked_fill(~keep, -1e9)),
    "given": lambda s, keep: F.gelu(s + keep.float().cumsum(-1)),
    "root": lambda s, keep: s.sqrt(),
    "logarithm-of-a-difference": lambda s, keep: (4 - s).log(),
    "beyond-a-number": lambda s, keep: torch.where(s > 3.5, INF, s),
    "divided-by-a-difference": lambda s, keep: s / (4 - s).clamp(min=0),
}
KEPT: dict[str, Curve] = {
    "filled": lambda s, keep: s.masked_fill(~keep, -INF),
    "added": lambda s, keep: s + added(keep),
    "added-twice": lambda s, keep: s + added(keep) + added(keep.flip(-1), MIN),
    "logarithm": lambda s, keep: s + keep.float().log(),
    "one-minus": lambda s, keep: s + (1.0 - keep.float()) * MIN,
    "turned-before": lambda s, keep: added(keep) - s,
    "turned-and-masked-again": lambda s, keep: (-s.masked_fill(~keep, -INF)).masked_fill(~keep, -INF),
    "soft-cap": lambda s, keep: 5 * torch.tanh((s + added(keep)) / 5),
    "squared": lambda s, keep: s.masked_fill(~keep, -1e4) ** 2,
    "a-cube": lambda s, keep: s.masked_fill(~keep, MIN) ** 3,
    "decay": lambda s, keep: s.masked_fill(torch.ones(S, T).triu(1) > 0, -INF) * 0.5 - torch.arange(T).log1p(),
    "to-the-end": lambda s, keep: s.masked_fill(~keep, -INF) + (T - torch.arange(T)).float().rsqrt(),
    "of-distances": lambda s, keep: torch.where(
        torch.arange(S)[:, None] >= torch.arange(T), s - (torch.arange(S)[:, None] - torch.arange(T) + 1.0).log(), -INF
    ),
}


def cleared(curve: Curve, q: Any, k: Any, v: Any, keep: Any) -> Any:
    return curve(q @ k.mT * 0.5, keep).softmax(-1).nan_to_num() @ v


def zeroed(curve: Curve, q: Any, k: Any, v: Any, keep: Any) -> Any:
    return curve(q @ k.mT * 0.5, keep).softmax(-1).masked_fill(~keep, 0.0) @ v


@pytest.mark.parametrize("name", SPOILED)
def test_cleared_rows_that_may_be_infinite(name: str) -> None:
    """Only masks of -inf that are added under a function were seen: the others were fused, and gave NaN for 0."""
    refusal = only_refusal(lambda *args: cleared(SPOILED[name], *args), *inputs())
    assert refusal.code == "probability-mask"
    assert "may be +inf or NaN" in refusal.reason
    assert "softmax(-1)" in refusal.location.code


@pytest.mark.parametrize("name", KEPT)
def test_cleared_rows_that_are_without_a_key(name: str) -> None:
    def fn(*args: Any) -> Any:
        return cleared(KEPT[name], *args)

    assert only_site(fn, *inputs()).spec.empty_row == "zero"
    check_fused(fn, *inputs())


@pytest.mark.parametrize("given", [torch.rand(B, 1, 1, T), torch.randint(0, 2, (B, 1, 1, T))], ids=["float", "int"])
def test_cleared_beside_a_given_mask(given: torch.Tensor) -> None:
    """One that is 1 where a key is, whatever its type."""

    def fn(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return (q @ k.mT + (1.0 - mask.float()) * MIN).softmax(-1).nan_to_num() @ v

    assert only_site(fn, *inputs()[:3], given).spec.empty_row == "zero"


@pytest.mark.parametrize("given", [torch.rand(B, 1, 1, T), torch.randint(0, 2, (B, 1, 1, T))], ids=["float", "int"])
def test_cleared_beside_a_given_mask_times_infinity(given: torch.Tensor) -> None:
    """0 times it is NaN: all of a row is, with a key or without."""

    def fn(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return (q @ k.mT + (1.0 - mask.float()) * -INF).softmax(-1).nan_to_num() @ v

    assert only_refusal(fn, *inputs()[:3], given).code == "probability-mask"


@pytest.mark.parametrize("sign", [1, -1])
def test_cleared_beside_a_given_bias_of_infinities(sign: int) -> None:
    def fn(q: Any, k: Any, v: Any, bias: Any, temperature: Any) -> Any:
        return (sign * (q @ k.mT + bias) / temperature).softmax(-1).nan_to_num() @ v

    *qkv, keep = inputs()
    args = (*qkv, added(keep), torch.rand(H, 1, 1) + 1)
    if sign > 0:
        assert only_site(fn, *args).spec.empty_row == "zero"
        check_fused(fn, *args)
    else:
        assert only_refusal(fn, *args).code == "probability-mask"


@pytest.mark.parametrize("name", ["turned", "squared", "sine"])
def test_zeroed_where_rows_may_be_infinite(name: str) -> None:
    """A row without a key was NaN, where eager code sets its every probability to 0."""
    curve = {"turned": torch.neg, "squared": torch.square, "sine": torch.sin}[name]

    def fn(*args: Any) -> Any:
        return zeroed(lambda s, keep: curve(s.masked_fill(~keep, -INF)), *args)

    refusal = only_refusal(fn, *inputs())
    assert refusal.code == "probability-mask"
    assert "set to zero" in refusal.reason


def test_many_masks_are_followed() -> None:
    """Each is one more path, not twice as many."""

    def fn(q: Any, k: Any, v: Any, masks: Any) -> Any:
        s = q @ k.mT
        for n in range(12):
            s = s.masked_fill(masks[n], -INF)
        return s.softmax(-1).nan_to_num() @ v

    assert only_site(fn, *inputs()[:3], torch.rand(12, B, 1, S, T) > 0.9).spec.empty_row == "zero"


EMPTIED: dict[str, tuple[Curve, bool]] = {
    "subtracted": (lambda s, keep: s - added(keep, INF), True),
    "overflow": (lambda s, keep: (s - added(keep, INF)) ** 3, True),
    "logarithm": (lambda s, keep: s + keep.float().log(), True),
    "by-keys": (lambda s, keep: (s + added(keep)).clamp(max=5), True),
    "large": (lambda s, keep: (s + added(keep, MIN)) ** 3, True),
    "another": (lambda s, keep: (s + added(keep.flip(-1), MIN)) ** 3, False),
}


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("name", EMPTIED)
def test_zeroed_rows_without_a_key(name: str, by_keys: bool) -> None:
    """Unless a fill said -inf in so many words such a row was NaN, where eager code sets its every probability to 0."""
    curve, read = EMPTIED[name]

    def fn(q: Any, k: Any, v: Any, keep: Any) -> Any:
        return zeroed(curve, q, k, v, keep[:, :, :1] if by_keys else keep)

    if read:
        spec = only_site(fn, *inputs()).spec
        assert (spec.empty_row, spec.factor) == ("zero", None)
        check_fused(fn, *inputs())
    else:
        assert only_refusal(fn, *inputs()).code == "probability-mask"


def test_zeroed_where_a_given_mask_is_infinite() -> None:
    def fn(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return (q @ k.mT + bias).softmax(-1).masked_fill(bias == -INF, 0.0) @ v

    *qkv, keep = inputs()
    assert only_site(fn, *qkv, added(keep)).spec.empty_row == "zero"
    check_fused(fn, *qkv, added(keep))


@pytest.mark.parametrize("by_keys", [False, True])
def test_a_mask_that_is_taken_away_again(by_keys: bool) -> None:
    """-1e30 + 1e30 is 0, whatever score was beside it: it was masked, or kept its score."""

    def fn(q: Any, k: Any, v: Any, keep: Any) -> Any:
        mask = added(keep[:, :, :1] if by_keys else keep, -1e30)
        return (q @ k.mT * 0.5 + mask - mask).softmax(-1) @ v

    only_site(fn, *inputs())
    check_fused(fn, *inputs())


def test_small_probabilities_set_to_zero() -> None:
    """p < 0.05 was computed at sample numbers, for the bias in it, and taken for the mask that it is made of."""

    def fn(q: Any, k: Any, v: Any, keep: Any, bias: Any) -> Any:
        scores = q @ k.mT + bias
        e = torch.where(keep, (scores - scores.amax(-1, keepdim=True)).exp(), 0.0)
        p = e / e.sum(-1, keepdim=True)
        return p.masked_fill(p < 0.05, 0.0) @ v

    assert only_refusal(fn, *inputs(), torch.randn(S, T)).code == "probability-mask"


THRESHOLDS: dict[str, Callable[[Any], Any]] = {
    "negative": lambda m: m <= 0,
    "low": lambda m: m < -1e4,
    "near": lambda m: m <= 0.1,
    "rows": lambda m: ~(m > -1).any(-1, keepdim=True),
    "all-of-a-row": lambda m: (m <= -1e8).all(-1, keepdim=True),
}


@pytest.mark.parametrize("dropped", THRESHOLDS.values(), ids=THRESHOLDS.keys())
def test_an_added_tensor_below_a_number_is_no_mask(dropped: Callable[[Any], Any]) -> None:
    """Of what is added only -inf is known: below a number lies more than that."""

    def fn(q: Any, k: Any, v: Any, added: Any) -> Any:
        return (q @ k.mT + added).softmax(-1).masked_fill(dropped(added), 0.0) @ v

    q, k, v, keep = inputs()
    for given in (torch.randn(B, 1, S, T), added(keep, -1e9)):
        check_right(fn, q, k, v, given)


@pytest.mark.parametrize("log", [torch.log, lambda m: 1 - 1 / m])
def test_zeroed_by_what_makes_a_mask(log: Callable[[Any], Any]) -> None:
    """log(0) and 1 / 0 rule keys out, and a row of them is NaN, which times 0 is not 0."""

    def fn(q: Any, k: Any, v: Any, given: Any) -> Any:
        return (q @ k.mT + log(given)).softmax(-1).masked_fill(given == 0, 0.0) @ v

    q, k, v, keep = inputs()
    check_right(fn, q, k, v, keep.float())


def test_positions_beyond_those_of_the_samples() -> None:
    """A factor of positions is 0 near the first ones, which decides nothing of what it is a factor of."""

    def fn(q: Any, k: Any, v: Any, given: Any) -> Any:
        far = (torch.arange(T) // 4).float()
        scores = torch.where(far * given > 0.5, -INF, q @ k.mT + given)
        return scores.softmax(-1).masked_fill(far * given > 0.4, 0.0) @ v

    q, k, v, _ = inputs()
    check_right(fn, q, k, v, 0.2 + 0.4 * torch.rand(B, 1, S, T))


def test_a_logarithm_of_what_may_vanish() -> None:
    """In float16 a sigmoid may be 0, of which the logarithm is -inf, and never negative."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        return (q @ k.mT).sigmoid().log().softmax(-1).nan_to_num(0.0) @ v

    q, k, v, _ = inputs()
    only_site(fn, q.half(), k.half(), v.half())
    check_fused(fn, q.half(), k.half(), v.half())
