"""The Triton forward kernel at small odd sizes: on a GPU where there is one, otherwise in Triton's interpreter.

The interpreter is chosen when triton is imported, so without a GPU these tests run in a process of their own, which
test_interpreter.py starts.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from attention_cases import Call, make_call
from masked_programs import CAUSAL, FP32_MIN, PROGRAMS, noise
from numerics import assert_close_to_exact, assert_lse_close_to_exact, log_sum_exp

triton = pytest.importorskip("triton")

from flashfuse.kernels.launch import Launch, attention_forward  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1; test_interpreter.py runs them",
)

# Tiles so small that small tensors have many.
TILES = Launch(block_q=16, block_kv=16, num_warps=4, num_stages=2)


@pytest.fixture(autouse=True)
def _nan_filled_outputs() -> Iterator[None]:
    """An element that the kernel does not write stays NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(call: Call, launch: Launch | None = TILES) -> tuple[torch.Tensor, torch.Tensor]:
    exact, eager = call.exact(), call.eager()
    out, lse = attention_forward(call.to(DEVICE), launch)
    assert (out.dtype, lse.dtype) == (call.spec.out_dtype, call.spec.compute_dtype)
    assert_close_to_exact(out, eager[0], exact[0])
    assert_lse_close_to_exact(lse, eager[1], exact[1])
    return out, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str, dtype: torch.dtype) -> None:
    score, captured = PROGRAMS[name]
    check(make_call(score, (2, 3, 45, 20), 37, value_dim=12, captured=captured, dtype=dtype))


@pytest.mark.parametrize("fill", ["-inf", repr(FP32_MIN), "-10000.0"])
@pytest.mark.parametrize("empty_row", ["nan", "zero"])
def test_rows_without_a_key(fill: str, empty_row: str) -> None:
    """-inf gives NaN or zeros, a finite fill the average over all keys, those of skipped tiles included."""
    score = f"where((kv_idx <= q_idx - 20) & (kv_idx > q_idx - 30), qk * 0.1, {fill})"
    out, _ = check(make_call(score, (1, 2, 70, 16), 50, empty_row=empty_row))
    if fill == "-inf":
        assert out[0, 0, 0].isnan().all() if empty_row == "nan" else (out[0, 0, 0] == 0).all()


@pytest.mark.parametrize("scale", [0.01, 1.0, 7.0])
def test_additive_minimum_never_overflows(scale: float) -> None:
    """Neither the scale nor log2(e) may turn finfo.min into minus infinity: such a row averages over all keys."""
    check(make_call(f"qk * {scale} + where(kv_idx <= q_idx - 20, 0.0, {FP32_MIN!r})", (1, 1, 40, 16), 33))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("fill", [-1e4, -1e6, -1e8, -1e9, -3e10, -1e20])
def test_fills_of_any_size(fill: float, dtype: torch.dtype) -> None:
    """In rows that had seen only fills the rounding of fill * log2(e) stood in the exponent, and could overflow it.

    An added fill leaves scores some digits, and divided by a scale it left them others than eager code has.
    """
    keep = noise(40, 50) < 0.5
    keep[3] = False
    keep[5, :40] = False
    for score in ("where(t0[q_idx, kv_idx], qk * 0.1, {})", "qk * 0.1 + where(t0[q_idx, kv_idx], 0.0, {})"):
        check(make_call(score.format(fill), (1, 2, 40, 16), 50, captured=[keep], dtype=dtype))


@pytest.mark.parametrize("kind", ["additive", "filled", "bias"])
def test_minimum_from_a_captured_tensor(kind: str) -> None:
    keep = noise(40, 33) < -1.0
    keep[3] = False
    bias = torch.where(keep, 0.0, FP32_MIN)
    score = {"additive": f"qk + where(t0[q_idx, kv_idx], 0.0, {FP32_MIN!r})", "bias": "qk + t0[q_idx, kv_idx]"}
    text = score.get(kind, f"where(t0[q_idx, kv_idx], qk * 0.1, {FP32_MIN!r})")
    check(make_call(text, (1, 1, 40, 16), 33, captured=[bias if kind == "bias" else keep]))


@pytest.mark.parametrize(
    ("q_shape", "kv_len", "k_batch", "v_batch"),
    [
        ((17, 16), 9, (), ()),
        ((3, 17, 16), 9, (1,), (3,)),
        ((2, 2, 3, 17, 16), 9, (2, 2, 1), (2, 2, 1)),
        ((2, 1, 2, 3, 17, 16), 9, (1, 1, 2, 3), (2, 1, 1, 1)),
        ((2, 3, 1, 16), 40, None, None),
        ((2, 3, 40, 16), 1, None, None),
        ((0, 3, 40, 16), 5, None, None),
        ((2, 3, 0, 16), 5, None, None),
    ],
)
def test_batch_axes_and_lengths(
    q_shape: tuple[int, ...], kv_len: int, k_batch: tuple[int, ...] | None, v_batch: tuple[int, ...] | None
) -> None:
    check(make_call("qk * 0.3", q_shape, kv_len, k_batch=k_batch, v_batch=v_batch))


def test_no_keys_give_zeros() -> None:
    call = make_call("qk", (2, 5, 16), 0)
    out, lse = attention_forward(call.to(DEVICE))
    assert (out == 0).all()
    assert (log_sum_exp(lse) == -torch.inf).all()


@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 3), (8, 40), (80, 16), (96, 96)])
def test_head_dims(head_dim: int, value_dim: int) -> None:
    check(make_call(CAUSAL, (2, 19, head_dim), 35, value_dim=value_dim, dtype=torch.float16))


def test_strides_and_output_order() -> None:
    """Keys stored transposed, values with heads innermost, every other query: nothing is copied."""
    call = make_call(CAUSAL, (2, 3, 20, 16), 37, out_order=(0, 2, 1, 3))
    q = torch.stack([call.q, call.q], dim=-2).flatten(-3, -2)[..., ::2, :]
    k = call.k.mT.contiguous().mT
    v = call.v.transpose(1, 2).contiguous().transpose(1, 2)
    out, _ = check(Call(call.spec, q, k, v, [], call.sizes))
    assert out.transpose(1, 2).is_contiguous()


def test_sizes_reach_the_program_and_its_bounds() -> None:
    check(make_call("where(kv_idx < size0, qk, -inf)", (2, 20, 16), 40, sizes=[23]))


@pytest.mark.parametrize("condition", [
    "q_idx * 500000000 > kv_idx * 400000000",
    "q_idx - kv_idx * 3000000000 < -40000000000",
    "t0[(q_idx * 1103515245 + kv_idx * 1234567) % 7]",
    "q_idx * q_idx + kv_idx * size0 < 700",
])  # fmt: skip
def test_positions_beyond_32_bits(condition: str) -> None:
    """They wrapped around, without a word."""
    captured = [torch.arange(7) % 2 == 0] if "t0" in condition else []
    check(make_call(f"where({condition}, qk, -9.0)", (1, 20, 16), 40, sizes=[23], captured=captured))


def test_table_launch() -> None:
    check(make_call(CAUSAL, (2, 200, 64), 150, dtype=torch.float16), launch=None)
    check(make_call(CAUSAL, (2, 5, 64), 150, dtype=torch.float16), launch=None)


def test_float64() -> None:
    check(make_call(CAUSAL, (2, 20, 16), 37, dtype=torch.float64))
