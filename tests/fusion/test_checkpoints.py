"""Activation checkpoints inside and around compiled attention, whole and selective."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from training import (
    Inputs,
    Run,
    assert_same_use,
    assert_trains,
    attention,
    backward,
    kept_gradients,
    loss,
    qkvb,
)

from flashfuse.kernels import ops

ATTENTION = "flashfuse.attention.default"

pytestmark = pytest.mark.usefixtures("gradients")


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_checkpoint_inside(inner: str) -> None:
    def fn(*inputs: Any) -> Any:
        return checkpoint(attention, *inputs, use_reentrant=False) * 2

    assert_trains(fn, qkvb(), inner).assert_fused(sites=1)


def test_reentrant_checkpoint_inside() -> None:
    """Which torch lets `backward` alone go through."""
    report = assert_same_use(backward, lambda *inputs: checkpoint(attention, *inputs, use_reentrant=True) * 2)
    report.assert_fused(sites=1)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_checkpoint_around(reentrant: bool, inner: str) -> None:
    """Tensors of our own that were made while compiling counted as saved ones, and recomputation missed them."""

    def use(run: Run, inputs: Inputs) -> list[torch.Tensor | None]:
        loss(checkpoint(run, *inputs, use_reentrant=reentrant)).backward()
        return kept_gradients(inputs)

    assert_same_use(use, inner=inner).assert_fused(sites=1)


class Counter:
    """A selective policy for the attention, and what it was asked."""

    def __init__(self, policy: CheckpointPolicy) -> None:
        self.policy, self.asked = policy, 0

    def __call__(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if str(op) != ATTENTION:
            return CheckpointPolicy.PREFER_RECOMPUTE
        self.asked += 1
        return self.policy


POLICIES = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_selective_checkpoint_around(policy: CheckpointPolicy) -> None:
    """The operator is one that a policy can name, to keep its result or to compute it again."""
    counter = Counter(policy)

    def use(run: Run, inputs: Inputs) -> list[torch.Tensor | None]:
        contexts = functools.partial(create_selective_checkpoint_contexts, counter)
        loss(checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts)).backward()
        return kept_gradients(inputs)

    assert_same_use(use, inner="eager").assert_fused(sites=1)
    assert counter.asked


def saved(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(op) == ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE if str(op) == ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(("policy", "forwards"), [(saved, 1), (recomputed, 2)], ids=["saved", "recomputed"])
def test_selective_checkpoint_inside(
    policy: Callable[..., Any], forwards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The partitioner does as the policy says: the backward runs the forward's kernel again, or does not."""
    kernel, calls = ops.attention_tiled, []
    monkeypatch.setattr(ops, "attention_tiled", lambda *args: calls.append(args) or kernel(*args))
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def fn(*inputs: Any) -> Any:
        return checkpoint(attention, *inputs, use_reentrant=False, context_fn=contexts) * 2

    assert_same_use(backward, fn).assert_fused(sites=1)
    assert len(calls) == forwards
