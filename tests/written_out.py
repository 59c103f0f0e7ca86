"""Attention written out in eager code, for tests of its spellings: inputs, scores, masks, and a check of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from numerics import assert_close_to_exact

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
