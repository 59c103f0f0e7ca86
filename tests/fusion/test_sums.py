"""Operators that multiply matrices and add something, also in place: `baddbmm`, `addmm`, `addmv`, `addbmm`, `addr`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashfuse

pytestmark = pytest.mark.usefixtures("gradients")

B, S, T, D, E = 2, 5, 6, 8, 4


def inputs() -> dict[str, torch.Tensor]:
    shapes = {"q": (B, S, D), "k": (B, T, D), "v": (B, T, E), "o": (B, S, E), "b": (B, S, T)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def weights(q: Any, k: Any) -> Any:
    return (q @ k.mT * 0.5).softmax(-1)


VALUES: dict[str, Callable[..., Any]] = {
    "baddbmm_": lambda q, k, v, o, b: o.clone().baddbmm_(weights(q, k), v),
    "baddbmm_-scaled": lambda q, k, v, o, b: (o * 1).baddbmm_(weights(q, k), v, beta=0.5, alpha=-2),
    "baddbmm_-not-read": lambda q, k, v, o, b: torch.empty_like(o).baddbmm_(weights(q, k), v, beta=0),
    "addmm_": lambda q, k, v, o, b: o[0].clone().addmm_(weights(q[0], k[0]), v[0]),
    "addmv": lambda q, k, v, o, b: torch.addmv(o[0, :, 0], weights(q[0], k[0]), v[0, :, 0], beta=0.3),
    "addmv_": lambda q, k, v, o, b: o[0, :, 0].clone().addmv_(weights(q[0], k[0]), v[0, :, 0]),
    "addmv-of-one-query": lambda q, k, v, o, b: torch.addmv(o[0, 0], v[0].T, weights(q[0, 0], k[0])),
    "addbmm": lambda q, k, v, o, b: torch.addbmm(o[0], weights(q, k), v, alpha=2),
    "addbmm_": lambda q, k, v, o, b: o[0].clone().addbmm_(weights(q, k), v),
}


def through_a_view(q: Any, k: Any, v: Any, o: Any, b: Any) -> Any:
    whole = o * 2
    whole[:, 1:4].baddbmm_(weights(q, k)[:, 1:4], v)
    return whole, whole.mT


def twice(q: Any, k: Any, v: Any, o: Any, b: Any) -> Any:
    out = o * 2
    out.baddbmm_(weights(q, k), v)
    return out.baddbmm_(weights(q.flip(0), k), v)


VALUES |= {"through-a-view": through_a_view, "twice": twice}


def in_place(q: Any, k: Any, v: Any, o: Any, b: Any) -> Any:
    scores = b.clone()
    scores.baddbmm_(q, k.mT, alpha=0.3)
    return scores.softmax(-1) @ v


def partly_in_place(q: Any, k: Any, v: Any, o: Any, b: Any) -> Any:
    scores = b.clone()
    scores[:, :3].baddbmm_(q[:, :3], k.mT, beta=0)
    return scores.softmax(-1) @ v


SCORES: dict[str, Callable[..., Any]] = {
    "baddbmm_": in_place,
    "baddbmm_-of-some": partly_in_place,
    "addmm_": lambda q, k, v, o, b: b[0].clone().addmm_(q[0], k[0].mT).softmax(-1) @ v[0],
    "addmv": lambda q, k, v, o, b: torch.addmv(b[0, 0], k[0], q[0, 0], alpha=0.3).softmax(-1) @ v[0],
    "addr": lambda q, k, v, o, b: torch.addr(b[0], q[0, :, 0], k[0, :, 0], alpha=0.5).softmax(-1) @ v[0],
}


def held(fn: Callable[..., Any], sites: int, *, training: bool) -> None:
    """The numbers and gradients of eager code, with so many sites."""
    given = inputs()

    def run(f: Callable[..., Any]) -> list[torch.Tensor]:
        tensors = [t.clone().requires_grad_(training) for t in given.values()]
        outs = f(*tensors)
        outs = outs if isinstance(outs, tuple) else (outs,)
        found = [*outs]
        if training:
            found += [
                g for g in torch.autograd.grad(outs, tensors, [*map(torch.ones_like, outs)], allow_unused=True)
                if g is not None
            ]  # fmt: skip
        return found

    options = {"flashfuse.inner": "eager", "flashfuse.strict": True}
    fused = run(torch.compile(fn, backend="flashfuse", options=options, fullgraph=True))
    report = flashfuse.reports()[-1]
    assert (len(report.sites), report.refusals) == (sites, ())
    torch.testing.assert_close(fused, run(fn))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", VALUES)
def test_products_with_values(name: str, training: bool) -> None:
    """In place, of a vector and over the batch they were said to be no product with values."""
    held(VALUES[name], 2 if name == "twice" else 1, training=training)


@pytest.mark.parametrize("name", SCORES)
def test_scores(name: str) -> None:
    """In place, of a vector and of one feature they were left alone without a refusal."""
    held(SCORES[name], 1, training=True)


def test_values_that_are_written() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        out = k.clone()
        return out.baddbmm_(weights(k, k), out)

    given = inputs()
    refusal, *_ = flashfuse.explain(fn)(given["q"], given["k"], given["v"]).refusals
    assert refusal.code == "opaque-function"
    assert "writes what it reads" in refusal.reason
    assert "out.baddbmm_" in refusal.location.code
