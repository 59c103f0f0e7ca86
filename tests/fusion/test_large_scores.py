"""Beside a fill a score keeps few digits, and what is a factor of all scores does not take more of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_close_to_exact

import flashfuse

pytestmark = pytest.mark.usefixtures("gradients")

SHAPE = 64, 2, 6, 16


def attention(q: Any, k: Any, v: Any, keep: Any, bias: Any) -> Any:
    """A softmax to the base 1.5, most of whose rows have no key."""
    scores = q @ k.mT * 0.3 + bias.sin() + (1.0 - keep.to(q.dtype)) * -30000.0
    powers = torch.pow(1.5, scores - scores.amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True) @ v


def sunk(q: Any, k: Any, v: Any, keep: Any, bias: Any) -> Any:
    scores = q @ k.mT * 0.3 + bias.sin() + (1.0 - keep.to(q.dtype)) * -30000.0
    highest = torch.maximum(scores.amax(-1, keepdim=True), bias[:, :, :1] - 30000.0)
    powers = torch.pow(1.5, scores - highest)
    rest = torch.pow(1.5, bias[:, :, :1] - 30000.0 - highest)
    return powers / (powers.sum(-1, keepdim=True) + rest) @ v


@pytest.mark.parametrize("function", [attention, sunk])
@pytest.mark.parametrize("trains", [False, True])
def test_rounded_as_often_as_in_the_source(function: Any, trains: bool) -> None:
    torch.manual_seed(0)
    given = *(torch.randn(SHAPE) for _ in range(3)), torch.rand(64, 1, 6, 6) < 0.1, torch.randn(2, 6, 6)
    upstream = torch.randn(SHAPE)
    options = {"flashfuse.inner": "eager", "flashfuse.strict": True}
    fused = torch.compile(function, backend="flashfuse", options=options)

    def results(run: Any, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        xs = [x.to(dtype, copy=True).requires_grad_(trains) if x.is_floating_point() else x for x in given]
        out = run(*xs)
        learned = [x for x in xs if x.requires_grad]
        return [out.detach(), *(torch.autograd.grad(out, learned, upstream.to(dtype)) if trains else ())]

    flashfuse.reset()
    for ours, eager, exact in zip(results(fused), results(function), results(function, torch.float64), strict=True):
        assert_close_to_exact(ours, eager, exact)
    flashfuse.reports()[0].assert_fused(sites=1)


def test_gradients_of_a_mask_that_is_multiplied_by_the_lowest_number() -> None:
    """Terms of a sum were infinite, and of both signs, where eager code adds them up first."""
    lowest = torch.finfo(torch.float32).min

    def biased(q: Any, k: Any, v: Any, keep: Any) -> Any:
        return torch.softmax(q @ k.mT + 0.5 * ((1 - keep) * lowest), -1) @ v

    def gradient(run: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        q, k, v, upstream = (torch.randn(1, 1, 6, 8, generator=generator) for _ in range(4))
        keep = torch.ones(1, 1, 6, 6, requires_grad=True)
        # Two heads that are one, with gradients that nearly add up to 0.
        out = run(torch.cat([q, q], 1), torch.cat([k, k], 1), torch.cat([v, v], 1) * 8, keep)
        return torch.autograd.grad(out, keep, torch.cat([upstream, -0.99 * upstream], 1))[0]

    ours, eager = gradient(torch.compile(biased, backend="flashfuse")), gradient(biased)
    assert not ours.isnan().any()
    torch.testing.assert_close(ours.isfinite(), eager.isfinite())
    torch.testing.assert_close(ours / lowest, eager / lowest)
    flashfuse.reports()[0].assert_fused(sites=1)
