"""The one-pass backward for Hopper as Python: what it computes of which elements, without a GPU.

FLASHFUSE_FULL_TABLE=1 tries every attention that the tests on a GPU try (minutes).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from attention_cases import Call, make_call
from gradient_cases import Gradients, check_gradients, differentiable, grad_out, reference_gradients
from numerics import assert_close_to_exact

triton = pytest.importorskip("triton")

from emulated_gluon import start  # noqa: E402
from hopper_calls import (  # noqa: E402
    BACKWARD_BIAS_CALLS,
    FEW_HEADS,
    FP16,
    ROWS_OF_PAIRS_CALLS,
    bias,
    nan_filled_on,
    wanted,
)

from flashfuse.kernels import launch_backward, launch_hopper, launch_hopper_backward, launch_hopper_dense  # noqa: E402
from flashfuse.kernels.backward_tiled import attention_backward_tiled  # noqa: E402
from flashfuse.kernels.launch import Device  # noqa: E402
from flashfuse.kernels.launch_backward import prepare_backward  # noqa: E402
from flashfuse.kernels.prepared_backward import HopperPairs  # noqa: E402
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
    "bias-cap-64", "bias-sink-128", "bias-ends-64", "rows-of-bias-documents-128", "rows-of-bias-causal-64",
    "rows-of-bias-grouped-64", "rows-of-bias-longer-128", "rows-of-bias-fill-64", "rows-of-bias-ranges-64",
)  # fmt: skip

ALL = {**FEW_HEADS, **BACKWARD_BIAS_CALLS, **ROWS_OF_PAIRS_CALLS}


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_hopper_backward, "LEAST_QUERIES", {64: 0, 128: 0})
    monkeypatch.setattr(launch_hopper_dense, "LEAST_LENGTH", 0)
    monkeypatch.setattr(launch_backward, "device_of", lambda _: Device("cuda", 90, 232448, 2))


def backward(call: Call, grad: torch.Tensor, needed: Sequence[int]) -> Gradients:
    needs = [at in needed for at in differentiable(call)]
    out, lse = attention_tiled(call)
    prepared = prepare_backward(call, grad, out, lse, needs)
    assert prepared is not None
    assert prepared.one_pass is not None
    # Rows of gradients at multiples of 16 bytes.
    by_rows = [isinstance(of, HopperPairs) for (of,) in prepared.pairs]
    assert by_rows == [c.shape[-1] % 8 == 0 for c in call.captured[: len(by_rows)]]
    return prepared.compute(nan_filled_on("cpu"), start, grad, out, lse, *call.tensors)


@pytest.mark.parametrize("name", ALL if os.environ.get("FLASHFUSE_FULL_TABLE") == "1" else SOME)
def test_gradients(name: str) -> None:
    check_gradients(ALL[name](), backward, wanted=wanted(name))


def test_rows_of_a_bias() -> None:
    """Its gradient may be summed up over many keys: what rounding the output leaves in delta is not in it.

    Keys that a mask takes count as well in rows that see little beside its fill, and have no gradient.
    """
    score = "where(kv_idx < q_idx + 80, qk * 0.3 + t0[q_idx, kv_idx], -2.0)"
    call = make_call(score, (1, 70, 64), 200, captured=[bias(FP16, 70, 200)], dtype=FP16)
    grad = grad_out(call)
    exact, eager = (reference_gradients(call, [grad], [3], dtype)[0] for dtype in (torch.float64, None))
    found = backward(call, grad, (0, 1, 2, 3))[3]
    seen = torch.arange(200) < torch.arange(70)[:, None] + 80
    assert not bool(found[~seen].any())
    assert_close_to_exact(found.float().sum(-1)[None], eager.float().sum(-1), exact.sum(-1))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_without_a_key_spread_nan(head_dim: int) -> None:
    """The last query sees no key: NaN gets to where it gets in torch."""
    call = make_call("where(kv_idx > q_idx, qk * 0.125, -inf)", (1, 2, 300, head_dim), dtype=torch.bfloat16)
    out, lse = attention_tiled(call)
    expected = attention_backward_tiled(call, grad_out(call), out, lse, [True] * 3)
    for mine, other in zip(backward(call, grad_out(call), (0, 1, 2)), expected, strict=True):
        assert torch.equal(mine.isnan(), other.isnan())
