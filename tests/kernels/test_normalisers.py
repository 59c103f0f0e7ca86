"""Sinks, factors on the probabilities and scores without a normaliser, on every implementation of the operator.

The Triton kernel takes part on a GPU and in Triton's interpreter, in which test_interpreter.py runs this file.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from attention_cases import Call, make_call
from numerics import assert_close_to_exact, assert_lse_close_to_exact

from flashfuse.kernels import flash_cpu, tiled
from flashfuse.kernels.spec import AttentionSpec
from flashfuse.kernels.tiled import attention_tiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
FP32_MIN = torch.finfo(torch.float32).min
CAUSAL = "where(kv_idx <= q_idx, qk * 0.3, -inf)"
SHAPE, KV_LEN = (2, 2, 43, 8), 37
B, H, S = SHAPE[:3]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny tiles, so that tiny tensors have many, and memory filled with NaN, so that an unwritten element fails."""
    monkeypatch.setattr(tiled, "BLOCK_Q", 16)
    monkeypatch.setattr(tiled, "BLOCK_KV", 8)
    monkeypatch.setattr(tiled, "WORKSPACE", 16 * 8 * 4)
    monkeypatch.setattr(flash_cpu, "BIAS_ELEMENTS", 512)
    monkeypatch.setattr(flash_cpu, "MAX_BLOCK_Q", 16)
    torch.use_deterministic_algorithms(DEVICE == "cpu")
    yield
    torch.use_deterministic_algorithms(False)


def kernels() -> Iterator[Callable[[Call], tuple[torch.Tensor, torch.Tensor]]]:
    if not INTERPRETED:
        yield attention_tiled
        if DEVICE == "cpu":
            return
    from flashfuse.kernels.launch import Launch, attention_forward

    tiles = Launch(block_q=16, block_kv=16, num_warps=4, num_stages=2)
    yield lambda call: attention_forward(call.to(DEVICE), tiles)


def check(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    exact, eager = call.exact(), call.eager()
    for kernel in kernels():
        out, lse = kernel(call)
        assert (out.dtype, lse.dtype) == (call.spec.out_dtype, call.spec.compute_dtype)
        assert_close_to_exact(out, eager[0], exact[0])
        assert_lse_close_to_exact(lse, eager[1], exact[1], dtype=call.spec.product_dtype)
    assert AttentionSpec.from_text(call.spec.to_text()) == call.spec
    return exact


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


SINKS = {"per-head": ("t0[n1]", (H,)), "per-row": ("t0[n0, q_idx] * 3.0", (B, S)), "one": ("0.0", ())}
SCORES = {
    "plain": "qk * 0.3",
    "causal": CAUSAL,
    "window-min": f"where((kv_idx <= q_idx) & (kv_idx > q_idx - 9), qk * 0.3, {FP32_MIN!r})",
    "softcap": "tanh(qk * 0.1) * 5.0",
}


# Every two of what follows are met together, not every three.
TYPES = (torch.float32, torch.float16, torch.float64)


@pytest.mark.parametrize(
    ("sink", "score", "dtype"),
    [(sink, score, TYPES[(i + j) % 3]) for i, sink in enumerate(SINKS) for j, score in enumerate(SCORES)],
)
def test_sink_takes_part_in_the_sum(sink: str, score: str, dtype: torch.dtype) -> None:
    text, shape = SINKS[sink]
    captured = [noise(*shape, dtype=dtype)] if shape else []
    check(make_call(SCORES[score], SHAPE, KV_LEN, sink=text, captured=captured, dtype=dtype))


@pytest.mark.parametrize("empty_row", ["nan", "zero"])
@pytest.mark.parametrize("fill", ["-inf", repr(FP32_MIN), "-10000.0"])
def test_row_without_a_key_leaves_everything_to_the_sink(fill: str, empty_row: str) -> None:
    """Skipped tiles included: nothing that is masked comes near a sink of ordinary size."""
    score = f"where((kv_idx <= q_idx - 20) & (kv_idx > q_idx - 30), qk * 0.1, {fill})"
    out, lse = check(make_call(score, (1, 2, 70, 16), 50, sink="t0[n1]", captured=[noise(2)], empty_row=empty_row))
    nothing = fill == "-inf" and empty_row == "nan"
    assert (out[0, :, 0].isnan() if nothing else out[0, :, 0] == 0).all()
    torch.testing.assert_close(lse[0, :, 0, 0], noise(2).double())
    assert (lse[0, :, 0, 1].isnan() if nothing else lse[0, :, 0, 1] == 1).all()


@pytest.mark.parametrize("fill", [FP32_MIN, -1e31, -10000.0])
def test_sink_as_low_as_the_fill(fill: float) -> None:
    """A row of nothing but fills shares its probability with a sink of that size, and with keys of skipped tiles."""
    score = f"where((kv_idx <= q_idx - 20) & (kv_idx > q_idx - 30), qk, {fill!r})"
    check(make_call(score, (1, 2, 70, 16), 50, sink="t0[0]", captured=[torch.tensor([fill])]))


@pytest.mark.parametrize("scale", [0.01, 7.0])
def test_sink_beside_scaled_minimum(scale: float) -> None:
    """The scale inside the exponential neither reaches the sink nor makes the fill infinite."""
    score = f"qk * {scale} + where(kv_idx <= q_idx - 20, 0.0, {FP32_MIN!r})"
    for sink in (0.5, FP32_MIN):
        check(make_call(score, (1, 1, 40, 16), 33, sink="t0[0]", captured=[torch.tensor([sink])]))


@pytest.mark.parametrize("empty_row", ["nan", "zero"])
def test_sink_of_minus_infinity_is_no_sink(empty_row: str) -> None:
    call = make_call(CAUSAL.replace("q_idx", "q_idx - 3"), (2, 20, 16), empty_row=empty_row)
    sunk = make_call(CAUSAL.replace("q_idx", "q_idx - 3"), (2, 20, 16), empty_row=empty_row, sink="-inf")
    for one, other in zip(check(call), check(sunk), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


FACTORS = {
    "per-head": ("t0[n1]", noise(H), True),
    "per-row": ("t0[n0, q_idx] * 2.0", noise(B, S), True),
    "per-key": ("t0[kv_idx]", noise(KV_LEN), False),
    "matrix": ("t0[n0, 0, q_idx, kv_idx]", noise(B, 1, S, KV_LEN), False),
    "kept": ("where(t0[n0, kv_idx], 1.0, 0.0)", noise(B, KV_LEN) < 0.5, False),
    "positions": ("where(kv_idx <= q_idx - t0[()], 1.0, 0.0)", torch.tensor(3), False),
    "inverse": ("1.0 / t0[kv_idx]", noise(KV_LEN).abs() + 0.5, False),
}


@pytest.mark.parametrize(
    ("name", "score", "dtype"),
    [
        (name, score, TYPES[(i + j) % 2])
        for i, name in enumerate(FACTORS)
        for j, score in enumerate(["qk * 0.3", CAUSAL, f"where(kv_idx <= q_idx - 9, qk, {FP32_MIN!r})"])
    ],
)
def test_factor_leaves_the_sum_alone(name: str, score: str, dtype: torch.dtype) -> None:
    factor, captured, _ = FACTORS[name]
    check(make_call(score, SHAPE, KV_LEN, factor=factor, captured=[captured], dtype=dtype))


@pytest.mark.parametrize("sink", [None, "0.5"])
@pytest.mark.parametrize("fill", ["-inf", repr(FP32_MIN)])
def test_rows_that_become_zero(fill: str, sink: str | None) -> None:
    """Also those that are NaN: rows without a key, of which the others stay NaN."""
    kept = torch.arange(45) % 2 == 0
    score = f"where(kv_idx <= q_idx - 20, qk, {fill})"
    out, _ = check(make_call(score, (2, 45, 16), sink=sink, factor="t0[q_idx]", captured=[kept]))
    assert (out[:, ~kept] == 0).all()
    assert out[:, kept][:, :5].isnan().all() == (fill == "-inf")


def test_boolean_factor_is_of_rows() -> None:
    with pytest.raises(ValueError, match="rows"):
        make_call("qk", (2, 5, 16), factor="kv_idx < 3")


def test_factor_with_sink() -> None:
    check(make_call(CAUSAL, SHAPE, KV_LEN, factor="t0[n1]", sink="t0[n1] * 2.0", captured=[noise(H)]))


@pytest.mark.parametrize("name", FACTORS)
def test_factor_of_a_row_multiplies_the_output(name: str) -> None:
    """Where it does not depend on the key, no tile pays for it."""
    pytest.importorskip("triton")
    from flashfuse.kernels.codegen import load_program

    factor, captured, whole_row = FACTORS[name]
    program = load_program(make_call("qk", SHAPE, KV_LEN, factor=factor, captured=[captured]).spec)
    assert (program.row_factor is not None) == whole_row
    assert (program.factor_full is None) == (program.factor_masked is None) == whole_row


UNNORMALISED = {
    "sigmoid": "sigmoid(qk * 0.3 + -3.0)",
    "causal": "sigmoid(where(kv_idx <= q_idx, qk * 0.3, -inf))",
    "relu": "max(qk, 0.0) / to_float(kv_len)",
    "scaled": "where(kv_idx <= q_idx, sigmoid(qk) * 0.5, 0.0)",
    "no-mask": "where(kv_idx <= q_idx, sigmoid(qk), 0.25)",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", UNNORMALISED)
def test_scores_as_weights(name: str, dtype: torch.dtype) -> None:
    _, lse = check(make_call(UNNORMALISED[name], SHAPE, KV_LEN, normaliser="none", dtype=dtype))
    assert (lse == 0).all()


def test_scores_as_weights_with_a_factor() -> None:
    check(make_call("sigmoid(qk)", SHAPE, KV_LEN, normaliser="none", factor="t0[n1]", captured=[noise(H)]))
    check(make_call("sigmoid(qk)", SHAPE, KV_LEN, normaliser="none", factor="t0[kv_idx]", captured=[noise(KV_LEN)]))


def test_no_keys() -> None:
    """Zeros, and the log-sum-exp of the sink alone."""
    for kernel in kernels():
        for more, expected in (({"sink": "t0[n0]"}, noise(2)), ({"normaliser": "none", "factor": "t0[n0]"}, 0.0)):
            call = make_call("qk", (2, 5, 16), 0, captured=[noise(2)], **more)
            out, lse = (x.cpu() for x in kernel(call))
            assert (out == 0).all()
            torch.testing.assert_close(lse[..., 0], torch.as_tensor(expected).reshape(-1, 1).expand(2, 5))
            assert (lse[..., 1] == (1 if "sink" in more else 0)).all()


def test_sink_needs_a_softmax() -> None:
    with pytest.raises(ValueError, match="sink"):
        make_call("qk", (2, 5, 16), normaliser="none", sink="0.0")
