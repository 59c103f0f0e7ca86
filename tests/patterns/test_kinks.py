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


# Where these have kinks, ties and steps, and beside them; odd ones are asked at both signs.
POINTS = torch.tensor([0.0, 1e-3, 0.5, 1.0, 1.5, 2.0, 2.7, 3.0, 4.5, 6.0, 25.0], dtype=torch.float64)
HALF = torch.full((), 0.5, dtype=torch.float64)

FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "elu": lambda s: F.elu(s, 0.7),
    "selu": F.selu,
    "celu": lambda s: F.celu(s, 1.3),
    "hardtanh": F.hardtanh,
    "hardtanh between": lambda s: F.hardtanh(s, -2.0, 1.5),
    "relu6": F.relu6,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "threshold": lambda s: F.threshold(s, 0.5, -3.0),
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "softplus": F.softplus,
    "softplus, sharp": lambda s: F.softplus(s, 2.0, 3.0),
    "logsigmoid": F.logsigmoid,
    "prelu": lambda s: F.prelu(s, HALF[None]),
    "logaddexp": lambda s: torch.logaddexp(s, -s),
    "logaddexp2": lambda s: torch.logaddexp2(s, s * s),
    "frac": torch.frac,
    "degrees": lambda s: torch.rad2deg(torch.deg2rad(s) * 2),
    "lerp": lambda s: torch.lerp(s, s * s, 0.3),
    "lerp by a tensor": lambda s: torch.lerp(HALF, s, s),
    "addcmul": lambda s: torch.addcmul(s, s, s, value=0.1),
    "addcdiv": lambda s: torch.addcdiv(s, HALF, s + 30, value=0.1),
    "fmax": lambda s: torch.fmax(s, s * s),
    "fmin": lambda s: torch.fmin(s, s * s),
    "sign": lambda s: torch.sign(s) + s.sgn() * s,
    "round": lambda s: torch.round(s) * s,
    "ceil": lambda s: torch.ceil(s) - s,
    "trunc": lambda s: torch.trunc(s) * s,
    "fmod": lambda s: torch.fmod(s, 1.5) + torch.fmod(s + 40, s + 40.5),
    "remainder": lambda s: s % 1.5 + s % -0.7 + torch.remainder(s, s + 40),
    "exp2": lambda s: torch.exp2(s) + 2**s + 3.0**s,
    "expm1": torch.expm1,
    "logarithms": lambda s: torch.log2(s.abs() + 1) + torch.log10(s.abs() + 1) + torch.log1p(s.abs()),
    "atan": torch.atan,
    "asinh": torch.asinh,
    "tan": torch.tan,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_their_derivatives_are_torch_s(name: str) -> None:
    """These had no row, and an attention with one of them in its scores was left alone."""
    fn = FUNCTIONS[name]
    q, k = torch.stack([POINTS, 0 * POINTS], -1), torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    site = only_site(lambda q, k, v: torch.softmax(fn(q @ k.mT), -1) @ v, q, k, torch.randn(2, 2).double())
    scores = (q @ k.mT).requires_grad_()
    expected = fn(scores)
    (slope,) = torch.autograd.grad(expected.sum(), scores)
    axes = ((Q_IDX, range(len(q))), (KV_IDX, range(len(k))))
    captured = [HALF for _ in site.captured]
    tile = Tile(axes, {}, (scores.detach(),), captured, torch.float64, torch.device("cpu"))
    (product, *_) = leaves(site.spec.score)
    torch.testing.assert_close(evaluate(site.spec.score, tile).expand(scores.shape), expected.detach())
    torch.testing.assert_close(evaluate(derivative(site.spec.score, product), tile).expand(scores.shape), slope)
    # A mask's -inf is one of their arguments: hardswish gave 0 for it, where torch gives NaN.
    ends = torch.tensor([-torch.inf, torch.inf, torch.nan], dtype=torch.float64)[:, None].expand(3, 2)
    tile = Tile(((Q_IDX, range(3)), axes[1]), {}, (ends,), captured, torch.float64, torch.device("cpu"))
    found = evaluate(site.spec.score, tile).expand(ends.shape)
    torch.testing.assert_close(found, fn(ends), equal_nan=True)
