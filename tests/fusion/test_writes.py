"""Attentions whose scores, masks and biases are written, compiled: gradients, lengths that change, inner compilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numerics import assert_close_to_exact
from training import assert_trains, qkvb

import flashfuse

S = 12
OPTIONS = {"flashfuse.inner": "eager", "flashfuse.strict": True}

pytestmark = pytest.mark.usefixtures("gradients")


def scores(q: Any, k: Any) -> Any:
    return (q @ k.mT) * 0.3


def masked(q: Any, k: Any, v: Any, bias: Any) -> Any:
    s = scores(q, k) + bias
    s[:, :, torch.ones(s.shape[-2:], dtype=torch.bool).triu(1)] = float("-inf")
    return s.softmax(-1) @ v


def bias_by_head(q: Any, k: Any, v: Any, bias: Any) -> Any:
    """The gradient comes to the tensor that was assigned."""
    made = torch.zeros_like(bias)
    for head in range(bias.shape[0]):
        made[head] = bias[head] * (head + 1)
    made[..., 0] *= 0.5
    made[..., 1] = 0.0
    return (scores(q, k) + made).softmax(-1) @ v


def everything_masked(q: Any, k: Any, v: Any, bias: Any) -> Any:
    """Queries and keys get zeros, where they got nothing."""
    s = scores(q, k)
    s[torch.ones_like(s, dtype=torch.bool)] = -1e4
    return (s + bias).softmax(-1) @ v


@pytest.mark.parametrize(
    ("fn", "inner"),
    [(masked, "eager"), (masked, "inductor"), (bias_by_head, "aot_eager"), (everything_masked, "aot_eager")],
)
def test_gradients(fn: Callable[..., Any], inner: str) -> None:
    assert_trains(fn, qkvb(), inner).assert_fused(sites=1)


def written_behind_detach(q: Any, k: Any, v: Any, bias: Any) -> Any:
    s = scores(q, k) + bias
    s.detach()[..., 0] = -1.0
    return s.softmax(-1) @ v


def assigned_without_grad(q: Any, k: Any, v: Any, bias: Any) -> Any:
    s = scores(q, k) + bias
    with torch.no_grad():
        s[..., 0] = -1.0
    return s.softmax(-1) @ v


@pytest.mark.parametrize("fn", [written_behind_detach, assigned_without_grad], ids=lambda fn: fn.__name__)
def test_a_write_that_a_gradient_knows_nothing_of(fn: Callable[..., Any]) -> None:
    """Scores get the gradient of what was written over them."""
    report = assert_trains(fn, qkvb())
    report.assert_fused(sites=0)
    (refusal,) = report.refusals
    assert refusal.code == "unknown-operator"
    assert "`setitem`" in refusal.reason


def test_lengths_that_change() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        s, t = q.shape[2], k.shape[2]
        bias = torch.zeros(s, t)
        bias[:, t // 2 :] = -1.0
        bias[s - 2 :] += torch.arange(t) * 0.1
        dots = scores(q, k) + bias
        dots[..., t - s :].masked_fill_(torch.ones(s, s, dtype=torch.bool).triu(1), float("-inf"))
        return dots.softmax(-1) @ v

    compiled = torch.compile(fn, backend="flashfuse", dynamic=True, options={"flashfuse.strict": True})
    for s, t in ((5, 9), (8, 20), (3, 7)):
        q, k, v = torch.randn(2, 3, s, 8), torch.randn(2, 3, t, 8), torch.randn(2, 3, t, 8)
        assert_close_to_exact(compiled(q, k, v), fn(q, k, v), fn(q.double(), k.double(), v.double()))
    (report,) = flashfuse.reports()
    report.assert_fused(sites=1)
    assert not report.refusals


def test_keys_written_into_a_cache() -> None:
    """They are read where they were written, and what was written stays."""

    def fn(q: Any, k: Any, v: Any, keys: Any, values: Any) -> Any:
        keys[:, :, 4 : 4 + k.shape[2]] = k
        values[:, :, 4 : 4 + k.shape[2]] = v
        dots = scores(q, keys[:, :, : 4 + k.shape[2]])
        return dots.softmax(-1) @ values[:, :, : 4 + k.shape[2]]

    q, k, v = (torch.randn(2, 3, 2, 8) for _ in range(3))
    caches = [torch.randn(2, 3, S, 8) for _ in range(2)]
    one, other = ([x.clone() for x in caches] for _ in range(2))
    with torch.no_grad():
        compiled = torch.compile(fn, backend="flashfuse", options={"flashfuse.strict": True})
        torch.testing.assert_close(compiled(q, k, v, *one), fn(q, k, v, *other))
    assert all(map(torch.equal, one, other))
    (report,) = flashfuse.reports()
    report.assert_fused(sites=1)


def assigned(keep: Any) -> None:
    keep[:, 3:] = False


def multiplied(keep: Any) -> None:
    keep *= False


def given_as_out(keep: Any) -> None:
    np.logical_xor(keep, True, keep)


def sorted_in_place(keep: Any) -> None:
    keep.sort()


@pytest.mark.parametrize("write", [assigned, multiplied, given_as_out, sorted_in_place], ids=lambda fn: fn.__name__)
def test_what_numpy_writes(write: Callable[..., Any]) -> None:
    """Writes of NumPy's methods and operators were taken for reads: what was read before them was read behind them."""

    def fn(q: Any, k: Any, v: Any, keep: Any) -> Any:
        before = scores(q, k).masked_fill(~keep, -1e9)
        write(keep.numpy())
        return before.softmax(-1) @ v, scores(q, k).masked_fill(~keep, -1e9).softmax(-1) @ v

    q, k, v, _ = (x.detach() for x in qkvb())
    keep = torch.arange(q.shape[-2])[:, None] % torch.arange(2, k.shape[-2] + 2) < 2
    ours = keep.clone()
    expected = fn(q, k, v, keep)
    torch.testing.assert_close(torch.compile(fn, backend="flashfuse", options=OPTIONS)(q, k, v, ours), expected)
    assert torch.equal(ours, keep)
