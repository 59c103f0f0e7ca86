"""The one-pass backward for Hopper as Python: what it computes of which elements, without a GPU.

FLASHFUSE_FULL_TABLE=1 tries every attention that the tests on a GPU try (minutes).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from attention_cases import Call, make_call
from gradient_cases import Gradients, check_gradients, differentiable, grad_out

triton = pytest.importorskip("triton")

from emulated_gluon import start  # noqa: E402
from hopper_calls import FEW_HEADS, nan_filled_on  # noqa: E402

from flashfuse.kernels import launch_backward, launch_hopper, launch_hopper_backward  # noqa: E402
from flashfuse.kernels.backward_tiled import attention_backward_tiled  # noqa: E402
from flashfuse.kernels.launch import Device  # noqa: E402
from flashfuse.kernels.launch_backward import prepare_backward  # noqa: E402
from flashfuse.kernels.tiled import attention_tiled  # noqa: E402

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="another interpreter"),
    pytest.mark.skipif(not triton.__version__.startswith(launch_hopper.TRITON_RELEASE), reason="another Gluon"),
]

# One for each thing that a kernel may get wrong.
SOME = (
    "dims-80-96-plain-bf16", "dims-128-72-causal-fp16", "dims-40-64-causal-bf16", "70-130-plain-64", "17-3-last-128",
    "129-127-causal-64", "300-1000-last-64", "1000-300-last-128", "window-64", "symmetric-128", "fill-64",
    "least-fill-128", "alibi-128", "causal-cap-64", "low-keys-128", "rows-64", "sink-64",
    "batch2x2x3-2x2x1-causal-64", "batch3x2-1x1-plain-128", "batch--causal-64", "documents-64", "far_apart-64",
    "padding-64", "padded-64", "rows_apart-128", "heads_inside-64",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_hopper_backward, "LEAST_QUERIES", {64: 0, 128: 0})
    monkeypatch.setattr(launch_backward, "device_of", lambda _: Device("cuda", 90, 232448, 2))


def backward(call: Call, grad: torch.Tensor, wanted: Sequence[int]) -> Gradients:
    needs = [at in wanted for at in differentiable(call)]
    out, lse = attention_tiled(call)
    prepared = prepare_backward(call, grad, out, lse, needs)
    assert prepared is not None
    assert prepared.one_pass is not None
    return prepared.compute(nan_filled_on("cpu"), start, grad, out, lse, *call.tensors)


@pytest.mark.parametrize("name", FEW_HEADS if os.environ.get("FLASHFUSE_FULL_TABLE") == "1" else SOME)
def test_gradients(name: str) -> None:
    check_gradients(FEW_HEADS[name](), backward, wanted=(0, 1, 2))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_without_a_key_spread_nan(head_dim: int) -> None:
    """The last query sees no key: NaN gets to where it gets in torch."""
    call = make_call("where(kv_idx > q_idx, qk * 0.125, -inf)", (1, 2, 300, head_dim), dtype=torch.bfloat16)
    out, lse = attention_tiled(call)
    expected = attention_backward_tiled(call, grad_out(call), out, lse, [True] * 3)
    for mine, other in zip(backward(call, grad_out(call), (0, 1, 2)), expected, strict=True):
        assert torch.equal(mine.isnan(), other.isnan())
