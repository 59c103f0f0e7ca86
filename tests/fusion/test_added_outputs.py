"""Operators that add something to a product with values: they are taken apart where that product is an attention's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import check_fused
from graphs import graph_of

import flashfuse
from flashfuse.transform import transform

OPTIONS = {"flashfuse.inner": "eager", "flashfuse.strict": True}


def probs(q: Any, k: Any) -> Any:
    return (q @ k.mT * 0.5).softmax(-1)


WAYS: dict[str, Callable[..., Any]] = {
    "baddbmm": lambda x, q, k, v: torch.baddbmm(x, probs(q, k), v),
    "method": lambda x, q, k, v: x.baddbmm(probs(q, k), v, beta=0.5, alpha=2),
    "not-read": lambda x, q, k, v: torch.baddbmm(x * torch.nan, probs(q, k), v, beta=0),
    "broadcast": lambda x, q, k, v: torch.baddbmm(x[:, :1, :1], probs(q, k), v, alpha=0.5),
    "addmm": lambda x, q, k, v: torch.addmm(x[0], probs(q[0], k[0]), v[0], beta=3),
    "scores-too": lambda x, q, k, v: torch.baddbmm(x, torch.baddbmm(x @ q.mT, q, k.mT).softmax(-1), v),
}


def inputs() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(4, 6, 8) for _ in range(4))


@pytest.mark.parametrize("way", WAYS)
def test_product_and_sum_in_one_operator(way: str) -> None:
    """They were refused, `value-product`: a kernel's output takes the place of a whole node."""
    check_fused(WAYS[way], *inputs())


def test_gradients() -> None:
    args = [x.requires_grad_() for x in inputs()]
    with torch.enable_grad():
        fused, eager = torch.compile(WAYS["method"], backend="flashfuse", options=OPTIONS)(*args), WAYS["method"](*args)
        found, expected = (torch.autograd.grad(out.square().sum(), args) for out in (fused, eager))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_under_autocast() -> None:
    def fn(*args: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return WAYS["baddbmm"](*args)

    flashfuse.reset()
    fused = torch.compile(fn, backend="flashfuse", options=OPTIONS)(*inputs())
    flashfuse.reports()[0].assert_fused(sites=1)
    assert fused.dtype == torch.bfloat16


def test_what_is_refused_stays_whole() -> None:
    def fn(x: Any, q: Any, k: Any, v: Any) -> Any:
        p = probs(q, k)
        return torch.baddbmm(x, p, v), p

    gm = graph_of(fn, *inputs())
    result, report = transform(gm, [], strict=True)
    assert result is gm
    assert [refusal.code for refusal in report.refusals] == ["probabilities-used"]
