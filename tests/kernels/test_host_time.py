"""What the host does for a call like an earlier one: it starts the kernels, and asks neither Triton nor torch more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import Call, make_call
from gradient_cases import differentiable
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")

from idle_driver import IdleDriver, idle_driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from flashfuse.kernels import plans  # noqa: E402
from flashfuse.kernels.ranges import mask_ranges, ranges_program  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled when interpreted"
)
ROWS, QUERIES, KEYS, DENSE = (f"attention_{kind}_backward_kernel" for kind in ("rows", "queries", "keys", "dense"))


@pytest.fixture
def idle() -> Iterator[IdleDriver]:
    for operator in (plans.attention, plans.attention_backward):
        operator.plans.clear()
    with idle_driver() as found:
        yield found
    for operator in (plans.attention, plans.attention_backward):
        operator.plans.clear()


class Recorded(TorchDispatchMode):
    """The operators of torch that are called within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


def documents() -> Call:
    ids = torch.arange(200).expand(2, 200) // 70
    score = "where((t0[n0, q_idx] == t0[n0, kv_idx]) & (kv_idx <= q_idx), qk * 0.125, -inf)"
    call = make_call(score, (2, 2, 200, 32), captured=[ids.contiguous()], dtype=torch.float16)
    program = ranges_program(call.spec, call.batch, call.kv_len)
    assert program is not None
    ranges = mask_ranges(call.captured, [2, 1], 2, 200, 200, program.needed, program.idle)
    return call.on(call.operands, ranges)


def plain() -> Call:
    return make_call("where(kv_idx <= q_idx, qk * 0.125, -inf)", (2, 2, 200, 32), dtype=torch.float16)


def biased() -> Call:
    bias = torch.randn(2, 200, 200, dtype=torch.float16)
    return make_call("qk * 0.125 + t0[n1, q_idx, kv_idx]", (2, 2, 200, 32), captured=[bias], dtype=torch.float16)


def backward_arguments(call: Call) -> tuple[Any, ...]:
    out, lse = torch.zeros(*call.batch, 200, 32, dtype=torch.float16), torch.zeros(*call.batch, 200, 2)
    q, k, v, *rest = call.arguments
    return torch.ones_like(out), q, k, v, out, lse, *rest, [True] * len(differentiable(call))


def names(idle: IdleDriver) -> list[str]:
    return [name for name, _ in idle.taken()]


@pytest.mark.parametrize(
    ("make", "kernels", "others"),
    [
        (plain, [ROWS, QUERIES, KEYS], set()),
        # Where documents decide which keys a row has, none may be left.
        (documents, [ROWS, QUERIES, "query_ranges_kernel", "filled_rows_kernel", KEYS], set()),
        (biased, [ROWS, QUERIES, KEYS, DENSE], {"zero_", "as_strided", "select", "slice", "add_"}),
    ],
)
def test_a_backward_starts_its_kernels(
    make: Any, kernels: list[str], others: set[str], idle: IdleDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows from layouts was worked out each time, and documents took 30 operators of torch: up to 0.5 ms."""
    arguments, site = backward_arguments(make()), plans.CallSite(plans.attention_backward)
    plans.attention_backward(*arguments)
    assert names(idle) == kernels
    monkeypatch.setattr(JITFunction, "run", None)
    monkeypatch.setattr(plans, "BackwardArguments", None)
    for run in (plans.attention_backward, site, site):
        with Recorded() as recorded:
            run(*arguments)
        assert names(idle) == kernels
        called = {name.removeprefix("aten::").split(".")[0] for name in recorded.names}
        assert called <= {"empty_strided", *others}


@pytest.mark.parametrize("place", [0, 2, 4, 5])
def test_instances_are_for_alignment(place: int, idle: IdleDriver) -> None:
    """Tensors at addresses that vectors cannot be loaded from have kernels of their own, and others keep theirs."""
    aligned, site = backward_arguments(plain()), plans.CallSite(plans.attention_backward)
    x = aligned[place]
    shifted = (*aligned[:place], torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape), *aligned[place + 1 :])
    for run in (plans.attention_backward, site):
        for arguments in (aligned, shifted, aligned, shifted):
            run(*arguments)
        launches = idle.taken()
        first, second, third, fourth = (launches[at : at + 3] for at in range(0, 12, 3))
        assert first == third
        assert second == fourth
        assert first != second
