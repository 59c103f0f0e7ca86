"""The Triton backward kernels on attention calls, in tiles so small that small tensors have many.

On a GPU where there is one, otherwise in Triton's interpreter, which is chosen when triton is imported: without a GPU
the tests that use this run in a process of their own, which test_interpreter.py starts.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from attention_cases import Call
from gradient_cases import Gradients, check_gradients, differentiable

from flashfuse.kernels.backward_variants import BackwardLaunch
from flashfuse.kernels.launch import Launch, attention_forward
from flashfuse.kernels.launch_backward import attention_backward
from flashfuse.kernels.ranges import mask_ranges, ranges_program

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1; test_interpreter.py runs them",
)

SMALL = Launch(block_q=16, block_kv=16, num_warps=4, num_stages=2)
WIDE, TALL = replace(SMALL, block_kv=32), replace(SMALL, block_q=32)
TILES = BackwardLaunch(keys=WIDE, queries=TALL, pairs=SMALL, dense=WIDE)
LARGE = Launch(block_q=64, block_kv=64, num_warps=4, num_stages=1)
# A gradient of so few numbers is held to the rule over several gradients of the output.
FEW = 2


def backward(
    call: Call,
    grad: torch.Tensor,
    wanted: Sequence[int],
    kv_ranges: torch.Tensor | None = None,
    tiles: BackwardLaunch = TILES,
) -> Gradients:
    needs = [at in wanted for at in differentiable(call)]
    call, out, lse = _forward(call, kv_ranges)
    return attention_backward(call, grad.to(DEVICE), out, lse, needs, tiles)


@functools.lru_cache(maxsize=1)
def _forward(call: Call, kv_ranges: torch.Tensor | None) -> tuple[Call, torch.Tensor, torch.Tensor]:
    """The call on the device, its output and log-sum-exps: once for all gradients of one call."""
    call = replace(call, kv_ranges=kv_ranges).to(DEVICE)
    return call, *attention_forward(call, SMALL if kv_ranges is None else LARGE)


def check(call: Call, wanted: Sequence[int] | None = None) -> Gradients:
    draws = 12 if any(c.numel() <= FEW for c in call.captured) else 1
    return check_gradients(call, backward, wanted, draws, FEW)


def check_ranged(call: Call, wanted: Sequence[int] | None = None) -> torch.Tensor:
    """With the ranges that a compiled graph would compute; returns them."""
    q_len, kv_len, rank = call.q.shape[-2], call.k.shape[-2], call.spec.batch_axes
    program = ranges_program(call.spec, call.sizes[:rank], kv_len)
    assert program is not None
    captured = [call.captured[slot] for slot in program.captured]
    batch = [size if axis in program.batch else 1 for axis, size in enumerate(call.sizes[:rank])]
    ranges = mask_ranges(captured, batch, rank, q_len, kv_len, program.needed, program.idle)
    check_gradients(call, lambda *arguments: backward(*arguments, kv_ranges=ranges), wanted)
    return ranges


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
