"""Sums in a narrow type that a mask's number takes the scores' digits from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import only_site, score_of

import flashfuse
from flashfuse.kernels.mask import kernel_spec, mask_of
from flashfuse.kernels.spec import to_text

LOWEST = torch.finfo(torch.float16).min


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values and a mask whose third row is without a key."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 6, 8, generator=generator).to(dtype) for _ in range(3))
    keep = torch.rand(2, 1, 6, 6, generator=generator) < 0.6
    keep[:, :, 2] = False
    return q, k, v, keep


def added(keep: torch.Tensor, fill: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, fill)


# Scores, the mask, its number and the scores' type.
SUMS: dict[str, Callable[..., Any]] = {
    "chosen": lambda s, keep, fill, dtype: s + added(keep, fill, dtype),
    "multiplied": lambda s, keep, fill, dtype: s + (1.0 - keep.to(dtype)) * fill,
    "subtracted": lambda s, keep, fill, dtype: s - (~keep).to(dtype) * -fill,
    "widened": lambda s, keep, fill, dtype: (s + added(keep, fill, dtype)).float(),
    "scaled": lambda s, keep, fill, dtype: s * 0.3 + added(keep, fill, dtype),
    "twice": lambda s, keep, fill, dtype: s + added(keep, fill, dtype) + added(keep, fill, dtype),
    "grown": lambda s, keep, fill, dtype: (s + added(keep, fill, dtype)) * 3.0,
    "tempered": lambda s, keep, fill, dtype: s.masked_fill(~keep, fill) * torch.full((3, 1, 1), 3.0, dtype=dtype),
    "divided": lambda s, keep, fill, dtype: s.masked_fill(~keep, fill) / 0.25,
    "before": lambda s, keep, fill, dtype: s + (added(keep, fill, dtype) + added(keep, fill, dtype)),
}
FILLS = ((torch.float16, LOWEST), (torch.float16, -1e4), (torch.bfloat16, -1e4), (torch.bfloat16, -1e9))


@pytest.mark.parametrize(("dtype", "fill"), FILLS, ids=lambda x: str(x))
@pytest.mark.parametrize("name", SUMS)
def test_a_row_of_sums_that_lost_their_scores_is_what_eager_code_gives(
    name: str, dtype: torch.dtype, fill: float
) -> None:
    """Such a row was a softmax of the scores, which float32 keeps beside -65504, where eager code gives an average.

    Where two masks add up to less than float16 holds, eager code gives NaN.
    """

    def fn(q: Any, k: Any, v: Any, keep: Any) -> Any:
        return SUMS[name](q @ k.mT, keep, fill, dtype).softmax(-1).to(dtype) @ v

    assert_like_eager(fn, *inputs(dtype))


def test_a_mask_that_is_given() -> None:
    """The same of a tensor that is added."""

    def fn(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return torch.softmax(q @ k.mT + mask, -1) @ v

    q, k, v, keep = inputs(torch.float16)
    assert_like_eager(fn, q, k, v, added(keep, LOWEST, torch.float16))


@pytest.mark.parametrize(("dtype", "fill"), FILLS, ids=lambda x: str(x))
def test_a_mask_of_keys_that_the_graph_makes(dtype: torch.dtype, fill: float) -> None:
    """It is smaller than the scores, and stays a tensor."""

    def fn(q: Any, k: Any, v: Any, keep: Any) -> Any:
        return torch.softmax(q @ k.mT + (1.0 - keep[:, None, None].to(dtype)) * fill, -1) @ v

    q, k, v, keep = inputs(dtype)
    keep = keep[:, 0, 0].clone()
    keep[1] = False
    assert_like_eager(fn, q, k, v, keep)
    assert only_site(fn, q, k, v, keep).captured[0].op != "placeholder"


def assert_like_eager(fn: Callable[..., Any], *args: torch.Tensor) -> None:
    """Rows with a key too: a narrow type's rounding of the output is all that differs."""
    torch._dynamo.reset()
    options = {"flashfuse.inner": "eager", "flashfuse.strict": True}
    with torch.no_grad():
        expected, found = fn(*args), torch.compile(fn, backend="flashfuse", options=options)(*args)
    flashfuse.reports()[-1].assert_fused(sites=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * torch.finfo(found.dtype).eps, equal_nan=True)


KEEPING = ((torch.float16, -20.0), (torch.bfloat16, torch.finfo(torch.bfloat16).min), (torch.float32, -1e4))


@pytest.mark.parametrize(("dtype", "fill"), KEEPING, ids=lambda x: str(x))
def test_other_sums_are_not_rounded(dtype: torch.dtype, fill: float) -> None:
    """The scores keep their digits, or have none beside such a number in float32 either."""

    def fn(q: Any, k: Any, v: Any, keep: Any) -> Any:
        return (q @ k.mT + added(keep, fill, dtype)).softmax(-1) @ v

    assert score_of(only_site(fn, *inputs(dtype)).spec) == f"(qk + where((~t0[n0, 0, q_idx, kv_idx]), {fill}, 0.0))"


def test_torch_adds_a_mask_in_float32() -> None:
    """Its own attention, which keeps the scores."""

    def fn(q: Any, k: Any, v: Any, keep: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added(keep, LOWEST, torch.float16), scale=1.0)

    args = inputs(torch.float16)
    assert "to_float16" not in score_of(only_site(fn, *args).spec)
    assert_like_eager(fn, *args)


def test_kernels_round_no_sums_where_every_row_keeps_a_key() -> None:
    """Nothing is left of such a sum beside a score."""

    def fn(q: Any, k: Any, v: Any, keep: Any) -> Any:
        later = torch.ones(6, 6, dtype=torch.bool).triu(1)
        return (q @ k.mT + added(~later, LOWEST, torch.float16)).softmax(-1) @ v

    spec = only_site(fn, *inputs(torch.float16)).spec
    assert "to_float16" in score_of(spec)
    assert "to_float16" not in to_text(kernel_spec(spec).score)


def test_tiles_of_a_given_mask_are_skipped_as_before() -> None:
    """What asks whether a sum is rounded is no mask, and does not hide one."""

    def fn(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return torch.softmax(q @ k.mT + mask, -1) @ v

    q, k, v, keep = inputs(torch.float16)
    spec = only_site(fn, q, k, v, added(keep, LOWEST, torch.float16)).spec
    assert to_text(mask_of(spec).needed) == "(t0[n0, 0, q_idx, kv_idx] > -1e+30)"
