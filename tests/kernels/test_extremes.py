"""Numbers at the ends of their type, on every implementation: huge fills, sinks of their size, huge products.

The Triton kernels take part on a GPU and in Triton's interpreter, in which test_interpreter.py runs this file.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from attention_cases import Call, make_call
from gradient_cases import Gradients, check_gradients, check_rows_of_one_value, differentiable, grad_out
from numerics import assert_close_to_exact

from flashfuse.kernels.backward_tiled import attention_backward_tiled
from flashfuse.kernels.tiled import attention_tiled

MIN = torch.finfo(torch.float32).min
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or INTERPRETED)
KERNELS = [*([] if INTERPRETED else ["tiled"]), *(["triton"] if TRITON else [])]
# Rows of the first batch position have no key.
KEEP = torch.tensor([[False] * 5, [True, True, False, True, False]])


@pytest.fixture(autouse=True)
def _nan_filled_outputs() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def backward(call: Call, grad: torch.Tensor, wanted: Sequence[int], kernel: str) -> Gradients:
    needs = [at in wanted for at in differentiable(call)]
    if kernel == "tiled":
        return attention_backward_tiled(call, grad, *forward(call, kernel), needs)
    import triton_backward

    return triton_backward.backward(call, grad, wanted)


def forward(call: Call, kernel: str) -> tuple[torch.Tensor, torch.Tensor]:
    if kernel == "tiled":
        return attention_tiled(call)
    import triton_backward

    from flashfuse.kernels.launch import attention_forward

    return attention_forward(call.to(triton_backward.DEVICE), triton_backward.SMALL)


def check(call: Call, kernel: str, wanted: Sequence[int] | None = None) -> None:
    assert_close_to_exact(forward(call, kernel)[0], call.eager()[0], call.exact()[0])
    check_gradients(call, lambda *arguments: backward(*arguments, kernel=kernel), wanted)


SCORES = {
    "filled": "where(t0[n0, kv_idx], qk * 0.3, {fill})",
    "added": "qk * 0.3 + where(t0[n0, kv_idx], 0.0, {fill})",
    "fill-scaled": "where(t0[n0, kv_idx], qk, {fill}) * 0.25",
    "sum-scaled": "(qk + where(t0[n0, kv_idx], 0.0, {fill})) * 0.3",
    "sum-divided": "(qk * 0.7071 + where(t0[n0, kv_idx], 0.0, {fill})) / 5.0",
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sink", [MIN, -2.5e38, -1e30])
@pytest.mark.parametrize(("fill", "dtype"), [(MIN, torch.float32), (MIN, torch.float16), (-1e30, torch.float32)])
@pytest.mark.parametrize("name", SCORES)
def test_a_sink_beside_huge_fills(name: str, fill: float, sink: float, dtype: torch.dtype, kernel: str) -> None:
    """A fill times a scale that is no power of two was a last digit off a sink of its size, a fill that the source
    scales counted as one that it does not, and gradients took a sink between fill and its quotient for the fill.
    """
    call = make_call(
        SCORES[name].format(fill=fill), (2, 3, 16), 5, captured=[KEEP], sink=repr(sink), empty_row="zero", dtype=dtype
    )
    check(call, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("fill", [-1e12, -1e29])
@pytest.mark.parametrize("scale", [0.3, 96**-0.5])
def test_rows_that_see_only_a_scaled_fill(scale: float, fill: float, kernel: str) -> None:
    """Large as it is, its quotient by the scale was rounded past the threshold below which skipped keys are visited."""
    check(make_call(f"where(kv_idx > 500, qk, {fill}) * {scale}", (2, 2, 8), 133), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sink", [-1e30, 0.5])
def test_fills_that_add_up(sink: float, kernel: str) -> None:
    """Two masks give a fill of their own, which has its own share beside a sink."""
    score = "qk * 0.3 + where(kv_idx <= q_idx - 1, 0.0, -1e+30) + where(t0[n0, kv_idx], 0.0, -1e+30)"
    check(make_call(score, (2, 4, 16), 5, captured=[KEEP], sink=repr(sink), empty_row="zero"), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sink", [MIN, -2.5e38, 1e10, 1e20, 3e38])
def test_huge_sinks(sink: float, dtype: torch.dtype, kernel: str) -> None:
    """Times log2(e) a sink near the ends of float32 was infinite, and gradients of rows without a key were NaN; what a
    large one loses by its rounding was taken for an exponent.
    """
    score = "where(t0[n0, kv_idx], qk * 0.3, -inf)"
    call = make_call(score, (2, 3, 16), 5, captured=[KEEP, torch.full((3,), sink)], sink="t1[q_idx]", empty_row="zero",
                     dtype=dtype)  # fmt: skip
    check(call, kernel, [0, 1, 2])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [0.25, 0.3])
@pytest.mark.parametrize("size", [1e4, 1e6, 1e9])
def test_products_of_any_size(size: float, scale: float, kernel: str) -> None:
    """From 1e9 on the rounding of a score times log2(e) was an exponent that overflows: NaN without any mask."""
    call = make_call(f"qk * {scale}", (2, 20, 16), 37)
    call = replace(call, q=call.q * size, k=call.k * size)
    check(call, kernel, [2])
    assert all(grad.isfinite().all() for grad in backward(call, grad_out(call), [0, 1, 2], kernel))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kv_len", [37, 1100])
def test_rows_that_are_one_value(kv_len: int, kernel: str) -> None:
    """The sum that their derivative subtracts is the one product that it is subtracted from, which another order of
    adding up rounded otherwise: gradients of 1e-4 where the exact ones are 0.
    """
    call = make_call("qk * 300.0", (2, 21, 16), kv_len)
    check_rows_of_one_value(call, lambda *arguments: backward(*arguments, kernel=kernel))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sink", [None, "0.5"])
def test_rows_that_are_mostly_one_value(sink: str | None, kernel: str) -> None:
    """A log-sum-exp in one number, as torch's kernel gives it, was taken for a sum of 1, and the gradient of each score
    with more than half of its row was 0.
    """
    check(make_call("qk * 1.5", (2, 9, 16), 1100, sink=sink), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sink", [None, "0.5"])
@pytest.mark.parametrize("size", [1e6, 1e12])
def test_scaled_biases_of_any_size(size: float, sink: str | None, kernel: str) -> None:
    """Large positive scores kept a correction that only small ones have room for."""
    bias = torch.randn(5, generator=torch.Generator().manual_seed(1)) * size
    call = make_call("(qk + t0[kv_idx]) * 0.3", (2, 3, 16), 5, captured=[bias], sink=sink)
    check(call, kernel, [2])
    assert all(grad.isfinite().all() for grad in backward(call, grad_out(call), [0, 1, 3], kernel))
