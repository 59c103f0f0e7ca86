"""Which gradients of pairs the kernel of rows of pairs for Hopper writes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Call

pytest.importorskip("triton")

from hopper_calls import FP16, bias, call_of

from flashfuse.kernels import launch_hopper_dense
from flashfuse.kernels.backward_variants import choose_backward
from flashfuse.kernels.captured_grad import CapturedProgram
from flashfuse.kernels.codegen_backward import load_backward
from flashfuse.kernels.launch import Device, shape_of

HOPPER = Device("cuda", 90, 232448, 132)
PAIRS = "t0[n1, q_idx, kv_idx]"


@pytest.fixture(autouse=True)
def _at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_hopper_dense, "LEAST_LENGTH", 0)


def rows_of_pairs(call: Call, device: Device = HOPPER, **changes: Any) -> bool:
    """Whether they are written by the kernel of rows of pairs."""
    program = load_backward(call.spec, (True,) * len(call.captured), False, call.q_len <= call.kv_len)
    captured = CapturedProgram.of(call, program, (True,) * len(call.captured))
    launch = choose_backward(HOPPER, shape_of(call.spec, call.q_len, call.head_dim, call.value_dim))
    assert launch is not None
    targets = captured.pair_targets(launch)
    grad_out = torch.empty(*call.batch, call.q_len, call.value_dim, dtype=call.spec.out_dtype)
    return launch_hopper_dense.takes(device, replace(call, **changes), grad_out, program, targets[0])


@pytest.mark.parametrize(
    ("score", "shape", "tensor"),
    [
        (f"qk * 0.125 + {PAIRS}", (4, 2, 72, 64), bias(FP16, 2, 72, 72)),
        (f"where(kv_idx <= q_idx, (qk + {PAIRS}) * 0.125, -inf)", (2, 2, 72, 128), bias(torch.bfloat16, 2, 72, 72)),
        ("qk * 0.125 + t0[n0, n1, q_idx, kv_idx] * to_float(kv_idx)", (2, 2, 72, 64), bias(FP16, 2, 2, 72, 72)),
        ("qk * 0.125 + t0[n1, q_idx, kv_idx]", (2, 2, 72, 64), bias(FP16, 2, 90, 80)),
    ],
)
def test_rows_of_pairs(
    score: str, shape: tuple[int, ...], tensor: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = call_of(score, shape, captured=[tensor])
    assert rows_of_pairs(call)
    assert not rows_of_pairs(call, replace(HOPPER, arch=100))
    assert not rows_of_pairs(call, q=call.q.float())
    assert not rows_of_pairs(call, q=call.q[:1].expand_as(call.q))
    assert rows_of_pairs(call, k=call.k[:1].expand_as(call.k))
    monkeypatch.undo()
    assert not rows_of_pairs(call)


@pytest.mark.parametrize(
    ("score", "shape", "tensor"),
    [
        (f"qk * 0.125 + {PAIRS}", (5, 2, 72, 64), bias(FP16, 2, 72, 72)),
        (f"qk * 0.125 + {PAIRS}", (3, 2, 72, 128), bias(FP16, 2, 72, 72)),
        (f"qk * 0.125 + {PAIRS}", (2, 2, 70, 64), bias(FP16, 2, 70, 70)),
        (f"qk * 0.125 + {PAIRS}", (2, 2, 72, 64), torch.zeros(2, 72, 72)),
        (f"tanh((qk + {PAIRS}) * 0.0025) * 50.0", (2, 2, 72, 64), bias(FP16, 2, 72, 72)),
        (f"qk * {PAIRS}", (2, 2, 72, 64), bias(FP16, 2, 72, 72)),
        # Two reads of one tensor: what either gives is a part of its gradient.
        (f"qk * 0.125 + {PAIRS} + t0[n1, 0, kv_idx]", (2, 2, 72, 64), bias(FP16, 2, 72, 72)),
    ],
)
def test_what_is_left_to_the_plain_kernel_of_pairs(score: str, shape: tuple[int, ...], tensor: torch.Tensor) -> None:
    assert not rows_of_pairs(call_of(score, shape, captured=[tensor]))
