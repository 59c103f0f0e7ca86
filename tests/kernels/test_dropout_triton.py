"""Dropout in the Triton kernels: the mask is the definition's bit by bit, in every pass.

The interpreter is chosen when triton is imported, so without a GPU these tests run in a process of their own, which
test_interpreter.py starts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from attention_cases import Call
from dropout_cases import PROGRAMS, program
from gradient_cases import Gradients, check_gradients, differentiable
from numerics import assert_close_to_exact, assert_lse_close_to_exact

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device; test_interpreter.py runs it", allow_module_level=True)

import triton
import triton.language as tl

from flashfuse.kernels.backward_variants import BackwardLaunch
from flashfuse.kernels.dropout import keep_scale, kept, threshold
from flashfuse.kernels.launch import Launch, attention_forward
from flashfuse.kernels.launch_backward import attention_backward
from flashfuse.kernels.philox import kept_scales

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Launch(block_q=16, block_kv=16, num_warps=4, num_stages=1)
# Gradients of more numbers are taken for one gradient of the output.
FEW = 64
TILES = BackwardLaunch(keys=replace(SMALL, block_kv=32), queries=replace(SMALL, block_kv=32), pairs=SMALL, dense=SMALL)


@triton.jit
def _kept_kernel(
    seed_ptr, out_ptr, position, q_start, kv_start,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, LEAST: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    q_idx = q_start + tl.arange(0, BLOCK_Q)
    scales = kept_scales((tl.load(seed_ptr), position), q_idx, kv_start, BLOCK_KV, LEAST, SCALE)
    tl.store(out_ptr + tl.arange(0, BLOCK_Q)[:, None] * BLOCK_KV + tl.arange(0, BLOCK_KV)[None, :], scales)


@pytest.mark.parametrize("seed", [0, 0x123456789ABCDEF, 2**63 - 1, -1])
@pytest.mark.parametrize(("p", "block_kv"), [(0.1, 16), (0.5, 32), (0.9, 64)])
def test_the_mask_is_the_definitions(seed: int, p: float, block_kv: int) -> None:
    number, position, q_start, kv_start = torch.tensor(seed, device=DEVICE), 70001, 123456, 3 * block_kv
    found = torch.full((16, block_kv), torch.nan, device=DEVICE)
    _kept_kernel[(1,)](number, found, position, q_start, kv_start, 16, block_kv, threshold(p), keep_scale(p))
    box = range(q_start, q_start + 16), range(kv_start, kv_start + block_kv)
    expected = kept(torch.tensor([seed]), p, torch.tensor([position]), *box, torch.float32)[0] * keep_scale(p)
    assert torch.equal(found.cpu(), expected)


def backward(call: Call, grad: torch.Tensor, wanted: Sequence[int]) -> Gradients:
    needs = [at in wanted for at in differentiable(call)]
    call = call.to(DEVICE)
    return attention_backward(call, grad.to(DEVICE), *attention_forward(call, SMALL), needs, TILES)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_pass_drops_the_same(name: str) -> None:
    call = program(name, 0.4, dim=16)
    out, lse = attention_forward(call.to(DEVICE), SMALL)
    assert_close_to_exact(out, call.eager()[0], call.exact()[0])
    assert_lse_close_to_exact(lse, call.eager()[1], call.exact()[1])
    check_gradients(call, backward, draws=4, few=FEW)


def test_narrow_types() -> None:
    call = program("bias", 0.1, torch.float16, dim=16)
    assert_close_to_exact(attention_forward(call.to(DEVICE), SMALL)[0], call.eager()[0], call.exact()[0])
    check_gradients(call, backward, draws=2, few=FEW)
