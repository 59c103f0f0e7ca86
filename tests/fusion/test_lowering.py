"""What Inductor's code calls for an attention: a call site on a GPU, the operator elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import flashfuse
from flashfuse import lowering

plans = pytest.importorskip("flashfuse.kernels.plans")

OPERATOR = "torch.ops.flashfuse.attention.default("
SITE = "CallSite(attention_plans.attention)"
GPU = torch.cuda.is_available()


def two_layers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    for _ in range(2):
        late = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.125
        q = torch.softmax(scores.masked_fill(late, float("-inf")), -1) @ v
    return q.cos()


def checkpointed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.utils.checkpoint.checkpoint(two_layers, q, k, v, use_reentrant=False)


def qkv(length: int = 64) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, 4, length, 32) for _ in range(3))


class RecordedSite:
    """A call site that the CPU can follow, and how often each was called."""

    made: list[RecordedSite]

    def __init__(self, operator: Any) -> None:
        self.made.append(self)
        self.calls = 0
        self.is_backward = operator is plans.attention_backward

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        ops = torch.ops.flashfuse
        return (ops.attention_backward if self.is_backward else ops.attention)(*arguments)


@pytest.fixture
def sites(monkeypatch: pytest.MonkeyPatch) -> list[RecordedSite]:
    """The CPU is treated as a GPU is."""
    RecordedSite.made = []
    monkeypatch.setattr(lowering, "DEVICES", ("cpu",))
    monkeypatch.setattr(plans, "CallSite", RecordedSite)
    return RecordedSite.made


@pytest.mark.parametrize(("dynamic", "cpp"), [(False, False), (True, False), (False, True)])
def test_each_attention_has_a_site(sites: list[RecordedSite], dynamic: bool, cpp: bool) -> None:
    """Not in C++, where no Python object can be called, and where the spec's quotes ended a string too early."""
    run = torch.compile(two_layers, backend="flashfuse", dynamic=dynamic, options={"cpp_wrapper": cpp})
    for length in (64, 80) if dynamic else (64, 64):
        inputs = qkv(length)
        torch.testing.assert_close(run(*inputs), two_layers(*inputs))
    flashfuse.reports()[0].assert_fused(sites=2)
    assert [site.calls for site in sites] == ([] if cpp else [2, 2])


def test_gradients(sites: list[RecordedSite]) -> None:
    """Forward and backward are called at sites in training, also when a checkpoint runs one again in the other."""
    run = torch.compile(checkpointed, backend="flashfuse")
    with torch.enable_grad():
        inputs, same = ([x.requires_grad_() for x in qkv()] for _ in range(2))
        for x, y in zip(inputs, same, strict=True):
            y.data.copy_(x.data)
        run(*inputs).sum().backward()
        two_layers(*same).sum().backward()
    assert [site.calls for site in sites] == [1] * 6
    assert sum(site.is_backward for site in sites) == 2
    for x, y in zip(inputs, same, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def in_a_branch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.cond(q.sum() > 0, two_layers, lambda q, k, v: q.cos(), (q, k, v))


def test_branches_have_sites_of_their_own(sites: list[RecordedSite]) -> None:
    """The code of a branch has no header in which to make them."""
    inputs = [x.abs() for x in qkv()]
    torch.testing.assert_close(torch.compile(in_a_branch, backend="flashfuse")(*inputs), in_a_branch(*inputs))
    assert [site.calls for site in sites] == [1, 1]


def test_a_cpu_calls_the_operator() -> None:
    _, (code,) = run_and_get_code(torch.compile(two_layers, backend="flashfuse"), *qkv())
    assert code.count("= " + OPERATOR) == 2
    assert "CallSite" not in code


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_gpu_calls_sites(mode: str) -> None:
    run = torch.compile(two_layers, backend="flashfuse", mode=mode)
    inputs = [x.cuda() for x in qkv()]
    out, (code,) = run_and_get_code(run, *inputs)
    assert OPERATOR not in code.replace(f"'{OPERATOR[:-1]}'", "")
    assert code.count(SITE) == 2
    torch.testing.assert_close(out, two_layers(*inputs))
    for _ in range(3):
        other = [torch.randn_like(x) for x in inputs]
        torch.testing.assert_close(run(*other), two_layers(*other))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_gpu_calls_sites_in_the_backward() -> None:
    run = torch.compile(two_layers, backend="flashfuse")
    with torch.enable_grad():
        for _ in range(3):
            inputs, same = ([x.cuda().requires_grad_() for x in qkv()] for _ in range(2))
            for x, y in zip(inputs, same, strict=True):
                y.data.copy_(x.data)
            _, codes = run_and_get_code(lambda x: run(*x).sum().backward(), inputs)
            two_layers(*same).sum().backward()
            for x, y in zip(inputs, same, strict=True):
                torch.testing.assert_close(x.grad, y.grad)
    assert not any("torch.ops.flashfuse.attention_backward.default(" in code.replace("'", "") for code in codes)
