"""Biases, temperatures and scales of every broadcast shape: what is added to a score or multiplies it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import check_fused
from graphs import only_site, score_of

B, H, S, D, WINDOWS = 2, 4, 6, 8, 3


def qkv(*batch: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(*(batch or (B, H)), S, D) for _ in range(3))


def attend(s: Any, v: Any) -> Any:
    return torch.softmax(s, -1) @ v


SHAPES = {
    (S, S): "t0[q_idx, kv_idx]",
    (H, S, S): "t0[n1, q_idx, kv_idx]",
    (B, 1, S, S): "t0[n0, 0, q_idx, kv_idx]",
    (1, H, 1, S): "t0[0, n1, 0, kv_idx]",
    (B, H, S, 1): "t0[n0, n1, q_idx, 0]",
    (B, 1, 1, S): "t0[n0, 0, 0, kv_idx]",
    (H, 1, 1): "t0[n1, 0, 0]",
    (S,): "t0[kv_idx]",
    (): "t0[()]",
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("first", [False, True], ids=["scores + bias", "bias + scores"])
def test_every_broadcast_shape(shape: tuple[int, ...], first: bool) -> None:
    def fn(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return attend(bias + q @ k.mT if first else q @ k.mT + bias, v)

    args = (*qkv(), torch.randn(shape))
    text = SHAPES[shape]
    assert score_of(only_site(fn, *args).spec) == (f"({text} + qk)" if first else f"(qk + {text})")
    check_fused(fn, *args)


def shifted_windows(q: Any, k: Any, v: Any, bias: Any, mask: Any) -> Any:
    s = q @ k.mT * 0.25 + bias.unsqueeze(0)
    s = s.view(B, WINDOWS, H, S, S) + mask.unsqueeze(1).unsqueeze(0)
    return attend(s.view(-1, H, S, S), v)


def shifted_windows_repeated(q: Any, k: Any, v: Any, bias: Any, mask: Any) -> Any:
    return attend(q @ k.mT * 0.25 + bias + mask.repeat(B, 1, 1)[:, None], v)


@pytest.mark.parametrize("fn", [shifted_windows, shifted_windows_repeated], ids=lambda f: f.__name__)
def test_window_masks_split_the_batch(fn: Callable[..., Any]) -> None:
    args = (*qkv(B * WINDOWS, H), torch.randn(H, S, S), torch.randn(WINDOWS, S, S))
    site = only_site(fn, *args)
    assert site.batch == (B, WINDOWS, H)
    assert score_of(site.spec) == "(((qk * 0.25) + t0[n2, q_idx, kv_idx]) + t1[n1, q_idx, kv_idx])"
    check_fused(fn, *args)


def pair_bias(q: Any, k: Any, v: Any, mask: Any, pair: Any) -> Any:
    return attend(q @ k.mT + mask + pair, v)


def pair_bias_summed_first(q: Any, k: Any, v: Any, mask: Any, pair: Any) -> Any:
    return attend(q @ k.mT + (mask + pair), v)


@pytest.mark.parametrize("fn", [pair_bias, pair_bias_summed_first], ids=lambda f: f.__name__)
def test_two_biases_over_five_dimensions(fn: Callable[..., Any]) -> None:
    """Summed first, they would be a bias of the full size [B, N, H, S, S]."""
    args = (*qkv(B, WINDOWS, H), torch.randn(B, WINDOWS, 1, 1, S), torch.randn(B, 1, H, S, S))
    site = only_site(fn, *args)
    assert site.batch == (B, WINDOWS, H)
    assert [n.op for n in site.captured] == ["placeholder"] * 2
    assert {"t0[n0, n1, 0, 0, kv_idx]", "t1[n0, 0, n2, q_idx, kv_idx]"} <= set(score_of(site.spec).split(" + ")) | {
        part.strip("()") for part in score_of(site.spec).replace(" + ", "|").split("|")
    }
    check_fused(fn, *args)


def alibi_added(q: Any, k: Any, v: Any, slopes: Any) -> Any:
    return attend(q @ k.mT * 0.25 + slopes[:, None, None] * torch.arange(S), v)


def alibi_baddbmm(q: Any, k: Any, v: Any, slopes: Any) -> Any:
    alibi = (slopes[:, None, None] * torch.arange(S)).repeat(B, 1, 1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    s = torch.baddbmm(alibi, q, k.mT, beta=1.0, alpha=0.25)
    return torch.bmm(s.softmax(-1), v).view(B, H, S, D)


@pytest.mark.parametrize("fn", [alibi_added, alibi_baddbmm], ids=lambda f: f.__name__)
def test_linear_biases(fn: Callable[..., Any]) -> None:
    site = only_site(fn, *qkv(), torch.rand(H))
    assert "(qk * 0.25)" in score_of(site.spec)
    assert site.batch == (B, H)
    check_fused(fn, *qkv(), torch.rand(H))


def test_baddbmm_scales_its_bias() -> None:
    def fn(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return torch.bmm(torch.baddbmm(bias, q, k.mT, beta=0.5, alpha=0.25).softmax(-1), v)

    args = (*qkv(B * H), torch.randn(B * H, 1, S))
    assert score_of(only_site(fn, *args).spec) == "((t0[n0, 0, kv_idx] * 0.5) + (qk * 0.25))"
    check_fused(fn, *args)


def cosine(q: Any, k: Any, v: Any, logit_scale: Any) -> Any:
    s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    return attend(s * torch.clamp(logit_scale, max=math.log(100)).exp(), v)


def cosine_on_the_queries(q: Any, k: Any, v: Any, logit_scale: Any) -> Any:
    scale = torch.clamp(logit_scale, max=math.log(100)).exp()
    return attend((F.normalize(q, dim=-1) * scale) @ F.normalize(k, dim=-1).transpose(-2, -1), v)


@pytest.mark.parametrize("fn", [cosine, cosine_on_the_queries], ids=lambda f: f.__name__)
def test_cosine_attention_with_a_temperature_for_each_head(fn: Callable[..., Any]) -> None:
    args = (*qkv(), torch.randn(H, 1, 1))
    site = only_site(fn, *args)
    assert score_of(site.spec) == "(qk * t0[n1, 0, 0])"
    assert site.q.node.name.startswith("normalize")
    check_fused(fn, *args)


def row_temperature(q: Any, k: Any, v: Any, t: Any) -> Any:
    return attend(q @ k.mT * t[:, None, :, None], v)


def row_temperature_divided(q: Any, k: Any, v: Any, t: Any) -> Any:
    return attend((q @ k.mT) / (1 / t)[:, None, :, None], v)


def test_a_temperature_for_each_query() -> None:
    args = (*qkv(), torch.rand(B, S) + 0.5)
    assert score_of(only_site(row_temperature, *args).spec) == "(qk * t0[n0, q_idx])"
    assert score_of(only_site(row_temperature_divided, *args).spec) == "(qk / t0[n0, q_idx])"
    check_fused(row_temperature, *args)
    check_fused(row_temperature_divided, *args)


def logarithm_of_length(q: Any, k: Any, v: Any) -> Any:
    return attend((q * torch.log(torch.arange(1, S + 1).float())[:, None]) @ k.mT, v)


def logarithm_of_length_on_scores(q: Any, k: Any, v: Any) -> Any:
    return attend(q @ k.mT * torch.log(torch.arange(1, S + 1).float())[:, None], v)


@pytest.mark.parametrize("fn", [logarithm_of_length, logarithm_of_length_on_scores], ids=lambda f: f.__name__)
def test_logarithmic_scaling_with_length(fn: Callable[..., Any]) -> None:
    site = only_site(fn, *qkv())
    assert site.spec.captured == ()
    check_fused(fn, *qkv())


def test_zero_dimensional_scales() -> None:
    def fn(q: Any, k: Any, v: Any, t: Any) -> Any:
        return attend(q @ k.mT / t, v)

    def on_both(q: Any, k: Any, v: Any, t: Any) -> Any:
        return attend((q * t) @ (k * t).mT, v)

    assert score_of(only_site(fn, *qkv(), torch.tensor(0.3)).spec) == "(qk / t0[()])"
    assert score_of(only_site(on_both, *qkv(), torch.tensor(0.3)).spec) == "((qk * t0[()]) * t0[()])"
    check_fused(fn, *qkv(), torch.tensor(0.3))
    check_fused(on_both, *qkv(), torch.tensor(0.3))


ROUNDED: dict[str, tuple[Callable[..., Any], str]] = {
    "tensor": (lambda s, dtype: s * torch.tensor(0.1, dtype=dtype), "(qk * {})"),
    "full": (lambda s, dtype: s + torch.full((10,), 0.1, dtype=dtype), "(qk + {})"),
    "scalar_tensor": (lambda s, dtype: torch.minimum(s, torch.scalar_tensor(0.1, dtype=dtype)), "minimum(qk, {})"),
    "masked_fill": (
        lambda s, dtype: s + torch.zeros(10, dtype=dtype).masked_fill(torch.arange(10) < 3, 0.1),
        "(qk + where((kv_idx < 3), {}, 0.0))",
    ),
    "pad": (
        lambda s, dtype: s + F.pad(torch.zeros(7, dtype=dtype), (3, 0), value=0.1),
        "(qk + where((2 < kv_idx), 0.0, {}))",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROUNDED)
def test_numbers_in_tensors_of_a_narrow_type(name: str, dtype: torch.dtype) -> None:
    """They kept the digits that the tensor had rounded away, which shows beside scores of a wider type."""
    change, text = ROUNDED[name]
    q, k, v = (torch.randn(2, 3, 10, 8, dtype=torch.float64) for _ in range(3))
    site = only_site(lambda q, k, v: change(q @ k.mT, dtype).softmax(-1) @ v, q, k, v)
    assert score_of(site.spec) == text.format(torch.tensor(0.1, dtype=dtype).item())


def test_numbers_beside_wide_tensors_are_not_rounded() -> None:
    q, k, v = (torch.randn(2, 3, 10, 8, dtype=torch.float64) for _ in range(3))
    causal = torch.arange(10) <= torch.arange(10)[:, None]
    site = only_site(lambda q, k, v: torch.where(causal, q @ k.mT * 0.1, -0.7).softmax(-1) @ v, q, k, v)
    assert score_of(site.spec).endswith("(qk * 0.1), -0.7)")


def test_the_branches_of_a_choice_are_elements_of_its_type() -> None:
    q, k, v = (torch.randn(2, 3, 10, 8, dtype=torch.float64) for _ in range(3))

    def fn(q: Any, k: Any, v: Any) -> Any:
        ahead = torch.arange(10) > torch.arange(10)[:, None]
        return (q @ k.mT + torch.where(ahead, 0.1, 0.0)).softmax(-1) @ v

    assert repr(torch.tensor(0.1).item()) in score_of(only_site(fn, q, k, v).spec)
