"""Kernels that are given the key ranges of a mask that depends on data: tiled torch, and Triton.

The interpreter is chosen when triton is imported, so without a GPU the Triton half runs in a process of its own, which
test_interpreter.py starts.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import replace

import pytest
import torch
from attention_cases import Call, make_call
from numerics import assert_close_to_exact, assert_lse_close_to_exact

from flashfuse.kernels.evaluate import position_symbols, size_values
from flashfuse.kernels.problem import Problem
from flashfuse.kernels.ranges import mask_ranges, ranges_program
from flashfuse.kernels.spec import AttentionSpec, parse
from flashfuse.kernels.tiled import attention_tiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32_MIN = torch.finfo(torch.float32).min
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = importlib.util.find_spec("triton") and (DEVICE == "cuda" or INTERPRETED)
KERNELS = [
    *([] if INTERPRETED else ["tiled"]),
    pytest.param("triton", marks=pytest.mark.skipif(not TRITON, reason="test_interpreter.py runs it")),
]
B, H, TQ, TKV = 2, 4, 150, 200


def ranges_of(call: Call) -> torch.Tensor:
    """The ranges that a compiled graph would compute for the call."""
    q_len, kv_len = call.q.shape[-2], call.k.shape[-2]
    rank = call.spec.batch_axes
    program = ranges_program(call.spec, call.sizes[:rank], kv_len)
    assert program is not None
    captured = [call.captured[slot] for slot in program.captured]
    batch = [size if axis in program.batch else 1 for axis, size in enumerate(call.sizes[:rank])]
    sizes = [*batch, *(call.sizes[rank + slot] for slot in program.sizes)]
    return mask_ranges(captured, sizes, rank, q_len, kv_len, program.needed, program.idle)


def run(kernel: str, call: Call, kv_ranges: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    call = replace(call, kv_ranges=kv_ranges).to(DEVICE)
    if kernel == "tiled":
        return attention_tiled(call)
    from flashfuse.kernels.launch import Launch, attention_forward

    tiles = Launch(block_q=128, block_kv=64, num_warps=4, num_stages=2)
    return attention_forward(call, tiles)


def check(kernel: str, call: Call) -> torch.Tensor:
    kv_ranges = ranges_of(call)
    exact, eager = call.exact(), call.eager()
    out, lse = run(kernel, call, kv_ranges)
    assert_close_to_exact(out, eager[0], exact[0])
    assert_lse_close_to_exact(lse, eager[1], exact[1])
    return kv_ranges


LENGTHS = torch.tensor([60, TKV])
KEEP = torch.arange(TKV) < LENGTHS[:, None]
LEFT = torch.arange(TKV) >= TKV - LENGTHS[:, None]
EIGHT_LENGTHS = torch.arange(1, 9).view(B, H, 1) * 25
DOCUMENTS = torch.arange(TKV) // 70
DENSE = (torch.arange(TKV) <= torch.arange(TQ)[:, None]).expand(B, 1, TQ, TKV)


def additive(fill: float) -> torch.Tensor:
    return torch.zeros(DENSE.shape).masked_fill(~DENSE, fill)


PROGRAMS = {
    "padding": (f"where(t0[n0, kv_idx], qk * 0.3, {FP32_MIN!r})", [KEEP]),
    "left-padding": (f"qk * 0.3 + where(t0[n0, kv_idx] & (kv_idx <= q_idx), 0.0, {FP32_MIN!r})", [LEFT]),
    "documents": ("where((t0[q_idx] == t0[kv_idx]) & (kv_idx <= q_idx), qk * 0.3, -inf)", [DOCUMENTS]),
    "lengths": ("where(kv_idx < t0[n0], qk * 0.3, -inf)", [LENGTHS]),
    "positions": ("where(kv_idx <= t0[n0, q_idx], qk * 0.3, -inf)", [torch.arange(2 * TQ).view(2, TQ) // 2]),
    "dense": ("where(t0[n0, 0, q_idx, kv_idx], qk * 0.3, -inf)", [DENSE]),
    "dense-inverted": ("where(t0[n0, 0, q_idx, kv_idx], -inf, qk * 0.3)", [~DENSE]),
    "additive-min": ("qk * 0.3 + t0[n0, 0, q_idx, kv_idx]", [additive(FP32_MIN)]),
    "additive-inf": ("(qk + t0[n0, 0, q_idx, kv_idx]) * 0.3", [additive(-math.inf)]),
    "additive-padding": (
        "qk * 0.3 + t0[n0, 0, 0, kv_idx]",
        [torch.zeros(B, 1, 1, TKV).masked_fill(~KEEP.view(B, 1, 1, TKV), FP32_MIN)],
    ),
    "moderate": ("where(t0[n0, kv_idx], qk * 0.3, -10000.0)", [KEEP]),
    "prefix": ("where((kv_idx <= q_idx) | (kv_idx < t0[n0]), qk * 0.3, -inf)", [LENGTHS]),
    "per-head": ("where(t0[n0, n1, kv_idx], qk * 0.3, -inf)", [torch.arange(TKV) < EIGHT_LENGTHS]),
}  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str, kernel: str) -> None:
    score, captured = PROGRAMS[name]
    kv_ranges = check(kernel, make_call(score, (B, H, TQ, 16), TKV, captured=captured))
    assert (kv_ranges[..., 3] < TKV).any() or (kv_ranges[..., 0] > 0).any(), "nothing is skipped"
    # Here every block of queries holds the end of a document.
    assert (kv_ranges[..., 1] < kv_ranges[..., 2]).any() or name == "documents", "no tile is full"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("empty_row", ["nan", "zero"])
@pytest.mark.parametrize("fill", ["-inf", repr(FP32_MIN), "-10000.0"])
def test_rows_without_a_key(fill: str, empty_row: str, kernel: str) -> None:
    """A sequence that is padding throughout: all its rows average over all keys, or hold nothing."""
    keep = KEEP & torch.tensor([[True], [False]])
    score = f"where(t0[n0, kv_idx] & (kv_idx <= q_idx - 20), qk * 0.3, {fill})"
    kv_ranges = check(kernel, make_call(score, (B, H, TQ, 16), TKV, captured=[keep], empty_row=empty_row))
    assert kv_ranges[1].eq(0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_additive_rows_of_the_minimum(kernel: str) -> None:
    """Rows whose every addend is finfo.min average over all keys, though positions leave some of them out."""
    mask = additive(FP32_MIN)
    mask[1, :, 10:140] = FP32_MIN
    score = f"where(kv_idx <= q_idx + 20, qk * 0.3 + t0[n0, 0, q_idx, kv_idx], {FP32_MIN!r})"
    check(kernel, make_call(score, (B, H, TQ, 16), TKV, captured=[mask]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_ranges_are_what_is_visited(kernel: str) -> None:
    """Keys outside the given range are not read, and inside the full range no mask is."""
    call = make_call("where(t0[n0, kv_idx], qk * 0.3, -inf)", (1, 1, 64, 16), 256, captured=[torch.zeros(1, 256) > 0])
    exact, eager = (attention_over(call, range(64, 192), dtype) for dtype in (torch.float64, torch.float32))
    kv_ranges = torch.tensor([64, 64, 192, 192], dtype=torch.int32).view(1, 1, 1, 4)
    out, _ = run(kernel, call, kv_ranges)
    assert_close_to_exact(out, eager, exact)


def attention_over(call: Call, keys: range, dtype: torch.dtype) -> torch.Tensor:
    q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
    where = slice(keys.start, keys.stop)
    return torch.softmax(q @ k[..., where, :].mT * 0.3, -1) @ v[..., where, :]


def spec_of(score: str, *captured: torch.dtype) -> AttentionSpec:
    f32 = torch.float32
    return AttentionSpec(2, parse(score, captured), captured, 0, f32, f32, f32, "nan", (0, 1, 2, 3))


def test_when_ranges_pay() -> None:
    """Always along one axis, over queries and keys where several heads share the mask, and never in one granule."""
    padding = spec_of("where(t0[n0, kv_idx], qk, -inf)", torch.bool)
    dense = spec_of("where(t0[n0, 0, q_idx, kv_idx], qk, -inf)", torch.bool)
    assert ranges_program(padding, [1, 1], 65) is not None
    assert ranges_program(padding, [1, 1], 64) is None
    assert ranges_program(dense, [8, 4], 512) is not None
    assert ranges_program(dense, [8, 2], 512) is None
    assert ranges_program(spec_of("where(kv_idx <= q_idx, qk, -inf)"), [8, 8], 512) is None
    assert ranges_program(spec_of("where(t0[t0[kv_idx]] < 3, qk, -inf)", torch.int64), [8, 8], 512) is None
    assert ranges_program(spec_of("qk + t0[n0, n1, q_idx, kv_idx]", torch.float32), [1, 8], 512) is None


def test_a_part_that_does_not_pay_is_left_out() -> None:
    """The rest still skips, but no tile is known to be unmasked."""
    spec = spec_of("where(t0[n0, n1, q_idx, kv_idx] & t1[n0, kv_idx], qk, -inf)", torch.bool, torch.bool)
    program = ranges_program(spec, [2, 8], 512)
    assert program is not None
    assert (program.needed, program.idle, program.captured) == ("t0[n0, kv_idx]", "False", (1,))


def test_layers_with_one_mask_have_one_program() -> None:
    """Whatever else the scores hold, and in whatever order."""
    plain = spec_of("where(t0[n0, kv_idx], qk * 0.5, -inf)", torch.bool)
    biased = spec_of("where(t1[n0, kv_idx], tanh(qk) + t0[n1, q_idx, kv_idx], -inf)", torch.float16, torch.bool)
    found = [ranges_program(spec, [2, 8], 512) for spec in (plain, biased)]
    assert found[0] is not None
    assert found[1] is not None
    assert (found[0].captured, found[1].captured) == ((0,), (1,))
    assert (found[0].needed, found[0].idle) == (found[1].needed, found[1].idle)


def test_boxes_over_several_ranges_visit_what_any_row_needs() -> None:
    """And count as full only what is full for all of them."""
    call = make_call("where(t0[n0, kv_idx], qk, -inf)", (2, 150, 16), 400, captured=[torch.ones(2, 400) > 0])
    ranges = torch.tensor([[[0, 64, 256, 320], [64, 128, 256, 256], [0, 0, 0, 0]], [[128, 128, 320, 400]] * 3])
    sizes = size_values(call.spec, 150, 400, call.sizes)
    symbols = position_symbols(call.spec)
    problem = Problem(call.spec, symbols, sizes, call.captured, call.q, call.k, call.v, ranges.int())
    assert problem.kv_range((range(0, 1), range(0, 64))) == (0, 64, 256, 320)
    assert problem.kv_range((range(0, 1), range(0, 128))) == (0, 128, 256, 320)
    assert problem.kv_range((range(0, 2), range(50, 100))) == (0, 128, 256, 400)
    assert problem.kv_range((range(0, 1), range(128, 150))) == (0, 0, 0, 0)
