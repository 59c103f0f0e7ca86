"""The forward for Hopper as Python: what it computes of which elements, without a GPU.

FLASHFUSE_FULL_TABLE=1 tries every attention that the tests on a GPU try (minutes).
"""

from __future__ import annotations

import os

import pytest
import torch
from attention_cases import make_call
from numerics import assert_close_to_exact, assert_lse_close_to_exact

triton = pytest.importorskip("triton")

from emulated_gluon import start  # noqa: E402
from hopper_calls import BIAS_CALLS, FEW_HEADS, FORWARD_CALLS, nan_filled_on  # noqa: E402

from flashfuse.kernels import launch_hopper, launch_hopper_forward  # noqa: E402
from flashfuse.kernels.launch import Device  # noqa: E402
from flashfuse.kernels.launch_hopper_forward import prepare_hopper  # noqa: E402

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="another interpreter"),
    pytest.mark.skipif(not triton.__version__.startswith(launch_hopper.TRITON_RELEASE), reason="another Gluon"),
]

# One for each thing that a kernel may get wrong.
SOME = (
    "dims-80-96-plain-bf16", "dims-128-72-causal-fp16", "dims-40-64-causal-bf16", "dims-64-128-causal-fp16",
    "70-130-plain-64", "17-3-last-128", "129-127-causal-64", "300-1000-last-64", "1000-300-last-128", "window-64",
    "symmetric-128", "fill-64", "least-fill-128", "alibi-128", "causal-cap-64", "cap-128", "low-keys-128",
    "rows-64", "sink-64", "batch2x2x3-2x2x1-causal-64", "batch3x2-1x1-plain-128", "batch--causal-64", "documents-64",
    "far_apart-64", "padding-64", "padded-64", "rows_apart-128", "heads_inside-64",
    *(name for at, name in enumerate(FORWARD_CALLS) if at % 4 in (0, 3) and not name.startswith("dims")),
    "dims-256-256-plain", "dims-192-128-causal", "dims-136-200-fill", "dims-64-256-documents",
    "bias-documents-64", "bias-fp16-128", "bias-expanded-64", "bias-grouped-64", "bias-longer-64", "bias-fill-64",
    "bias-ranges-64",
)  # fmt: skip
ALL = {**FEW_HEADS, **FORWARD_CALLS, **BIAS_CALLS}


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_hopper_forward, "is_faster", lambda *_: True)
    monkeypatch.setattr(launch_hopper_forward, "device_of", lambda _: Device("cuda", 90, 232448, 2))


@pytest.mark.parametrize("name", ALL if os.environ.get("FLASHFUSE_FULL_TABLE") == "1" else SOME)
def test_output_and_log_sum_exp(name: str) -> None:
    call = ALL[name]()
    prepared = prepare_hopper(call)
    assert prepared is not None
    out, lse = prepared.compute(nan_filled_on("cpu"), start, *call.tensors)
    exact, eager = call.exact(), call.eager()
    assert_close_to_exact(out, eager[0], exact[0])
    assert_lse_close_to_exact(lse, eager[1], exact[1])


@pytest.mark.parametrize("fill", ["-inf", "-10000.0"])
@pytest.mark.parametrize("stages", [1, 2])
def test_queries_loaded_ahead(fill: str, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for the queries of one tile or of two."""
    monkeypatch.setattr(launch_hopper_forward, "WIDEST", 64 if stages == 1 else 256)
    launch_hopper_forward.forward_constants.cache_clear()
    call = make_call(f"where(kv_idx <= q_idx - 50, qk * 0.125, {fill})", (1, 3, 300, 64), dtype=torch.float16)
    prepared = prepare_hopper(call)
    launch_hopper_forward.forward_constants.cache_clear()
    assert prepared is not None
    out, lse = prepared.compute(nan_filled_on("cpu"), start, *call.tensors)
    exact, eager = call.exact(), call.eager()
    assert_close_to_exact(out, eager[0], exact[0])
    assert_lse_close_to_exact(lse, eager[1], exact[1])


def test_values_that_are_no_numbers_stay_away_from_rows_without_a_key() -> None:
    """A program visits one tile at least; a NaN that a mask rules out with its tile must not reach rows through it."""
    call = make_call(
        "where(kv_idx < q_idx - 5000, qk * 0.125, -inf)", (1, 200, 64), dtype=torch.float16, empty_row="zero"
    )
    call.v.fill_(torch.nan)
    prepared = prepare_hopper(call)
    assert prepared is not None
    out, _ = prepared.compute(nan_filled_on("cpu"), start, *call.tensors)
    assert bool((out == 0).all())
