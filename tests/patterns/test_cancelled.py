"""Large numbers that are added to scores and take each other away: eager code loses the scores, and so must kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import check_fused
from graphs import only_refusal, only_site

B, H, S, D = 2, 2, 7, 4


def inputs() -> tuple[torch.Tensor, ...]:
    keep = torch.rand(B, S) > 0.4
    return *(torch.randn(B, H, S, D) for _ in range(3)), keep


def of(condition: Any, number: float) -> Any:
    return torch.where(condition, 0.0, number)


def padding(keep: Any) -> Any:
    return keep[:, None, None]


def table(keep: Any, number: float) -> Any:
    return torch.tensor([number, 0.0])[keep.long()]


def ruled_out(keep: Any) -> Any:
    return (1.0 - keep.long()) * -1e30


Curve = Callable[[Any, Any], Any]

CANCELLED: dict[str, Curve] = {
    "added": lambda s, keep: s + of(padding(keep), -1e32) + of(padding(keep), 1e32),
    "spelled-twice": lambda s, keep: s + of(padding(keep), -1e32) - of(padding(keep), -1e32),
    "times": lambda s, keep: s + (1 - padding(keep).float()) * -1e20 + (1 - padding(keep).float()) * 1e20,
    "subtracted": lambda s, keep: s - 1e32 * (~padding(keep)).float() + 1e32 * (~padding(keep)).float(),
    "limited": lambda s, keep: torch.minimum(s + of(padding(keep), -1e32), torch.zeros(())) + of(padding(keep), 1e32),
    "a-constant": lambda s, keep: s + of(padding(keep), -1e32) + 1e32,
    "both-masks": lambda s, keep: s + of(padding(keep), -1e32) + of(padding(keep.flip(-1)), 1e32),
}
CANCELLED |= {
    "looked-up": lambda s, keep: s + padding(table(keep, -1e32)) + padding(table(keep, 1e32)),
    "sorted": lambda s, keep: s + padding(of(keep, -1e32).sort(-1)[0]) - padding(of(keep, -1e32).sort(-1)[0]),
}
KEPT: dict[str, Curve] = {
    "two-masks": lambda s, keep: s + of(padding(keep), -1e32) + of(padding(keep.flip(-1)), -1e30),
    "before-the-score": lambda s, keep: s + (of(padding(keep), -1e32) + of(padding(keep), 1e32)),
    "never-together": lambda s, keep: s + of(padding(keep), -1e32) - of(~padding(keep), -1e9),
    "bounded": lambda s, keep: torch.tanh(s + of(padding(keep), -1e32)) - of(padding(keep), 1e32),
    "positions": lambda s, keep: s + of(torch.arange(S) < 3, 1e16) - of(torch.arange(S) < 3, 1e16),
    "two-looked-up": lambda s, keep: s + padding(table(keep, -1e32)) + padding(table(keep.flip(-1), -1e30)),
    "integers": lambda s, keep: (
        s + padding((1.0 - keep.long()) * -1e30) + (1.0 - keep.long())[:, None, :, None] * -1e30
    ),
    "seen": lambda s, keep: s + of(torch.ones(S, S).tril() > 0, -1e20) - of(torch.ones(S, S).tril() > 0, -1e20),
}


def attention(curve: Curve) -> Callable[..., Any]:
    return lambda q, k, v, keep: curve(q @ k.mT * 0.5, keep).softmax(-1) @ v


@pytest.mark.parametrize("curve", CANCELLED.values(), ids=CANCELLED.keys())
def test_refused(curve: Curve) -> None:
    refusal = only_refusal(attention(curve), *inputs())
    assert refusal.code == "inexact"
    assert "take each other away" in refusal.reason


@pytest.mark.parametrize("curve", KEPT.values(), ids=KEPT.keys())
def test_fused(curve: Curve) -> None:
    only_site(attention(curve), *inputs())
    check_fused(attention(curve), *inputs())
