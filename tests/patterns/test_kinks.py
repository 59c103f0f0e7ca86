"""Functions that agree in value and differ in derivative where they have a kink are told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import only_site, score_of

from flashfuse.kernels.derivative import derivative, leaves
from flashfuse.kernels.evaluate import Tile, evaluate
from flashfuse.kernels.spec import KV_IDX, Q_IDX

# Products of these are whole numbers: 0, 1 and -1 among them.
Q = torch.tensor([[1.0, 0.0], [0.0, -1.0], [1.0, 1.0]])
K = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0], [0.0, 0.0]])

KINKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "relu": (torch.relu, "max(0.0, qk)"),
    "F.relu": (F.relu, "max(0.0, qk)"),
    "in place": (lambda s: s.clone().relu_(), "max(0.0, qk)"),
    "clamp below": (lambda s: s.clamp(min=0), "max(qk, 0)"),
    "clamp_min": (lambda s: torch.clamp_min(s, 1.0), "max(qk, 1.0)"),
    "clamp above": (lambda s: s.clamp(max=1.0), "min(qk, 1.0)"),
    "clamp between": (lambda s: s.clamp(-1.0, 1.0), "min(max(qk, -1.0), 1.0)"),
    "clamp to a tensor": (lambda s: torch.clamp(s, max=torch.ones(())), "min(qk, 1.0)"),
    "maximum": (lambda s: torch.maximum(s, torch.zeros(())), "maximum(qk, 0.0)"),
    "minimum": (lambda s: torch.minimum(torch.ones(()), s), "minimum(1.0, qk)"),
    "abs": (torch.abs, "abs(qk)"),
}


@pytest.mark.parametrize("name", KINKS)
def test_derivative_at_a_kink_is_autograd_s(name: str) -> None:
    """relu, clamp and maximum used to become one operator, though at 0 their derivatives are 0, 1 and one half."""
    fn, expected = KINKS[name]
    site = only_site(lambda q, k, v: torch.softmax(fn(q @ k.mT), -1) @ v, Q, K, torch.randn(4, 2))
    assert score_of(site.spec) == expected
    scores = (Q @ K.mT).requires_grad_()
    (slope,) = torch.autograd.grad(fn(scores).sum(), scores)
    axes = ((Q_IDX, range(len(Q))), (KV_IDX, range(len(K))))
    tile = Tile(axes, {}, (scores.detach(),), (), torch.float32, torch.device("cpu"))
    (product,) = leaves(site.spec.score)
    found = evaluate(derivative(site.spec.score, product), tile).expand(scores.shape)
    torch.testing.assert_close(found, slope, rtol=0, atol=0)
