"""The one-pass backward for Hopper as Python: what it computes of which elements, without a GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from attention_cases import Call, make_call
from gradient_cases import Gradients, check_gradients, differentiable, grad_out

triton = pytest.importorskip("triton")

from emulated_gluon import start  # noqa: E402
from hopper_calls import CALLS  # noqa: E402

from flashfuse.kernels import launch_backward, launch_hopper  # noqa: E402
from flashfuse.kernels.backward_tiled import attention_backward_tiled  # noqa: E402
from flashfuse.kernels.launch import Device  # noqa: E402
from flashfuse.kernels.launch_backward import prepare_backward  # noqa: E402
from flashfuse.kernels.tiled import attention_tiled  # noqa: E402

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="another interpreter"),
    pytest.mark.skipif(not triton.__version__.startswith(launch_hopper.TRITON_RELEASE), reason="another Gluon"),
]


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_hopper, "HOPPER_BACKWARD", True)
    monkeypatch.setattr(launch_backward, "device_of", lambda _: Device("cuda", 90, 232448))


def nan_filled(size: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    found = torch.empty_strided(size, strides, dtype=dtype)
    return found.fill_(torch.nan) if dtype.is_floating_point else found.fill_(-1)


def backward(call: Call, grad: torch.Tensor, wanted: Sequence[int]) -> Gradients:
    needs = [at in wanted for at in differentiable(call)]
    out, lse = attention_tiled(call)
    prepared = prepare_backward(call, grad, out, lse, needs)
    assert prepared is not None
    assert prepared.one_pass is not None
    return prepared.compute(nan_filled, start, grad, out, lse, *call.tensors)


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name: str) -> None:
    check_gradients(CALLS[name](), backward, wanted=(0, 1, 2))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_without_a_key_spread_nan(head_dim: int) -> None:
    """The last query sees no key: NaN gets to where it gets in torch."""
    call = make_call("where(kv_idx > q_idx, qk * 0.125, -inf)", (1, 2, 300, head_dim), dtype=torch.bfloat16)
    out, lse = attention_tiled(call)
    expected = attention_backward_tiled(call, grad_out(call), out, lse, [True] * 3)
    for mine, other in zip(backward(call, grad_out(call), (0, 1, 2)), expected, strict=True):
        assert torch.equal(mine.isnan(), other.isnan())
