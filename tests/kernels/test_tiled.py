"""The tiled torch path: accurate for every kind of program, with memory linear in the sequence."""

import math
from collections.abc import Iterator

import pytest
import torch
from attention_cases import Call, make_call
from numerics import assert_close_to_exact, assert_lse_close_to_exact, log_sum_exp
from torch.utils._python_dispatch import TorchDispatchMode

from flashfuse.kernels import flash_cpu, tiled
from flashfuse.kernels.spec import parse
from flashfuse.kernels.tiled import attention_tiled

FP32_MIN = torch.finfo(torch.float32).min
FP16_MIN = torch.finfo(torch.float16).min
CAUSAL = "where(kv_idx <= q_idx, qk * 0.3, -inf)"
WINDOW = "where((kv_idx <= q_idx) & (kv_idx > q_idx - 9), qk * 0.3, {fill})"
# The general path takes what torch's kernel cannot: this is the identity, and no additive program.
GENERAL = "max({0}, {0})"


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny tiles, so that tiny tensors have many, and memory filled with NaN, so that an unwritten element fails."""
    monkeypatch.setattr(tiled, "BLOCK_Q", 16)
    monkeypatch.setattr(tiled, "BLOCK_KV", 8)
    monkeypatch.setattr(tiled, "WORKSPACE", 16 * 8 * 4)
    monkeypatch.setattr(flash_cpu, "BIAS_ELEMENTS", 512)
    monkeypatch.setattr(flash_cpu, "MIN_BLOCK_Q", 4)
    monkeypatch.setattr(flash_cpu, "MAX_BLOCK_Q", 16)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = attention_tiled(call)
    eager, exact = call.eager(), call.exact()
    assert (out.dtype, lse.dtype) == (call.spec.out_dtype, call.spec.compute_dtype)
    assert_close_to_exact(out, eager[0], exact[0])
    # The log-sum-exp has a wide type, but torch's kernel for narrow operands takes exponentials as exact as they are.
    assert_lse_close_to_exact(lse, eager[1], exact[1], dtype=call.spec.product_dtype)
    return out, lse


def bias(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def keep(*shape: int) -> torch.Tensor:
    return bias(*shape) < 0.5


PROGRAMS = {
    "plain": ("qk", []),
    "scaled": ("qk * 0.3", []),
    "causal": (CAUSAL, []),
    "bottom-right": ("where(kv_idx <= q_idx + (kv_len - q_len), qk, -inf)", []),
    "window": (WINDOW.format(fill="-inf"), []),
    "window-min": (WINDOW.format(fill=FP32_MIN), []),
    "window-1e4": (WINDOW.format(fill="-10000.0"), []),
    "additive-window": ("qk + where((kv_idx <= q_idx) & (kv_idx > q_idx - 9), 0.0, -3.4028234663852886e+38)", []),
    "dilated": ("where((q_idx - kv_idx) % 3 == 0, qk, -inf)", []),
    "alibi": ("qk * 0.3 + to_float(kv_idx - q_idx) * t0[n1]", [bias(3)]),
    "softcap": ("where(kv_idx <= q_idx, tanh(qk * 0.1) * 5.0, -inf)", []),
    "bias": ("qk * 0.3 + t0[n0, n1, q_idx, kv_idx]", [bias(2, 3, 45, 37)]),
    "bias-table": ("qk + t0[q_idx - kv_idx + (kv_len - 1), n1]", [bias(81, 3)]),
    "scaled-bias": ("(qk + t0[kv_idx, q_idx]) * 0.5", [bias(37, 45)]),
    "learned-scale": ("qk * t0[n1]", [bias(3).exp()]),
    "padding": ("where(t0[n0, kv_idx], qk, -3.4028234663852886e+38)", [keep(2, 37)]),
    "dropped": ("where(t0[q_idx, kv_idx], -inf, qk * 0.3) + t1[kv_idx]", [keep(45, 37), bias(37)]),
    "no-product": ("t0[q_idx, kv_idx]", [bias(45, 37)]),
    "constant": ("0.5", []),
}


@pytest.mark.parametrize("general", [False, True], ids=["", "general"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str, general: bool) -> None:
    score, captured = PROGRAMS[name]
    check(make_call(GENERAL.format(score) if general else score, (2, 3, 45, 8), 37, captured=captured))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("score", [CAUSAL, "tanh(qk)", "qk + t0[q_idx, kv_idx]"], ids=["causal", "tanh", "bias"])
def test_element_types(score: str, dtype: torch.dtype) -> None:
    check(make_call(score, (2, 33, 16), dtype=dtype, captured=[bias(33, 33, dtype=dtype)][: score.count("t0")]))


@pytest.mark.parametrize("score", [CAUSAL, "tanh(qk) + t0[n1, n2, q_idx]"], ids=["causal", "tanh"])
@pytest.mark.parametrize(
    ("k_batch", "v_batch"),
    [
        ((2, 2, 1), None),
        ((2, 1, 1), None),
        ((1, 1, 1), None),
        ((1, 2, 3), None),
        ((2, 2, 1), (2, 2, 3)),
        ((2, 1, 3), (1, 2, 1)),
    ],
)
def test_shared_keys_and_values(score: str, k_batch: tuple, v_batch: tuple | None) -> None:
    captured = [bias(2, 3, 20)][: score.count("t0")]
    check(make_call(score, (2, 2, 3, 20, 8), 21, k_batch=k_batch, v_batch=v_batch, captured=captured))


@pytest.mark.parametrize("shape", [(17, 8), (3, 17, 8), (2, 2, 1, 2, 17, 8)], ids=len)
def test_batch_axes(shape: tuple[int, ...]) -> None:
    check(make_call(CAUSAL, shape))
    check(make_call("tanh(qk)", shape))


def test_shared_by_stride_zero() -> None:
    call = make_call("qk", (2, 3, 20, 8), k_batch=(2, 1))
    expanded = Call(call.spec, call.q, call.k.expand(2, 3, 20, 8), call.v.expand(2, 3, 20, 8), [], call.sizes)
    torch.testing.assert_close(attention_tiled(expanded), attention_tiled(call), rtol=0, atol=0)


def test_any_strides() -> None:
    call = make_call(CAUSAL, (2, 3, 20, 8))
    q, k, v = (x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for x in (call.q, call.k, call.v))
    check(Call(call.spec, q, k, v, [], call.sizes))


@pytest.mark.parametrize("score", ["qk", CAUSAL])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 1), (5, 12), (24, 3), (512, 512)])
def test_widths(score: str, head_dim: int, value_dim: int) -> None:
    check(make_call(score, (2, 19, head_dim), 23, value_dim=value_dim))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3)])
def test_output_memory_order(order: tuple[int, ...]) -> None:
    out, lse = check(make_call(CAUSAL, (2, 3, 20, 8), out_order=order))
    assert out.permute(order).is_contiguous()
    assert lse.is_contiguous()


@pytest.mark.parametrize("empty_row", ["nan", "zero"])
@pytest.mark.parametrize("score", ["where({}, qk, -inf)", "where({}, tanh(qk), -inf)", "qk + where({}, 0.0, -inf)"])
@pytest.mark.parametrize("condition", ["t0[q_idx, kv_idx]", "(kv_idx <= q_idx - 3) & t0[q_idx, kv_idx]"])
def test_empty_rows(score: str, condition: str, empty_row: str) -> None:
    mask = keep(33, 33)
    mask[[0, 7, 32]] = False
    out, lse = check(make_call(score.format(condition), (2, 33, 8), captured=[mask], empty_row=empty_row))
    assert out[:, 7].isnan().all() if empty_row == "nan" else (out[:, 7] == 0).all()
    assert (lse[:, 7, 0] == -math.inf).all()
    assert (lse[:, 7, 1].isnan() if empty_row == "nan" else lse[:, 7, 1] == 0).all()


@pytest.mark.parametrize("fill", [FP32_MIN, FP16_MIN, -1e30, -1e4])
@pytest.mark.parametrize(
    "score",
    ["where({}, qk * 0.3, {})", "where({}, tanh(qk), {})", "qk + where({}, 0.0, {})", "tanh(qk) + where({}, 0.0, {})"],
)
@pytest.mark.parametrize("condition", ["t0[q_idx, kv_idx]", "(kv_idx <= q_idx - 13) & t0[q_idx, kv_idx]"])
def test_rows_masked_by_a_finite_fill_see_every_key(score: str, fill: float, condition: str) -> None:
    mask = keep(33, 33)
    mask[[0, 7, 32]] = False
    call = make_call(score.format(condition, fill), (2, 33, 8), captured=[mask])
    out, _ = check(call)
    if score.startswith("where") or fill <= -1e30:
        torch.testing.assert_close(out[:, 7], call.v.mean(1))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_masked_key_may_hold_anything(poison: float) -> None:
    """A cache's unused slots: `where` discards them, though adding -inf to them would not."""
    call = make_call("where(t0[kv_idx], qk, -inf)", (2, 20, 8), captured=[keep(20)])
    expected, expected_lse = attention_tiled(call)
    call.k[:, ~call.captured[0]] = poison
    out, lse = attention_tiled(call)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(log_sum_exp(lse), log_sum_exp(expected_lse))


@pytest.mark.parametrize("score", ["qk", CAUSAL, "tanh(qk)"])
@pytest.mark.parametrize(
    ("shape", "kv_len"), [((0, 2, 5, 8), 5), ((2, 0, 5, 8), 5), ((2, 2, 0, 8), 5), ((2, 2, 5, 8), 0), ((2, 2, 0, 8), 0)]
)
def test_zero_sizes(score: str, shape: tuple[int, ...], kv_len: int) -> None:
    call = make_call(score, shape, kv_len)
    out, lse = attention_tiled(call)
    assert out.shape == shape
    assert (out == 0).all()
    assert (log_sum_exp(lse) == -math.inf).all()


@pytest.mark.parametrize("score", [CAUSAL, "tanh(qk)"])
def test_one_query(score: str) -> None:
    check(make_call(score.replace("q_idx", "(q_idx + (kv_len - 1))"), (2, 2, 3, 1, 8), 41, k_batch=(2, 2, 1)))


def test_captured_tensors_are_left_alone() -> None:
    call = make_call("t0[q_idx, kv_idx]", (2, 45, 8), 37, captured=[bias(45, 37)])
    before = call.captured[0].clone()
    attention_tiled(call)
    torch.testing.assert_close(call.captured[0], before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("score", "split"),
    [
        ("qk * 0.5", (0.5, "0.0")),
        ("(qk + t0[kv_idx]) * 0.5", (0.5, "t0[kv_idx] * 0.5")),
        ("where(kv_idx <= q_idx, qk, -inf)", (1.0, "where(kv_idx <= q_idx, 0.0, -inf)")),
        ("where(kv_idx <= q_idx, -inf, qk)", (1.0, "where(~(kv_idx <= q_idx), 0.0, -inf)")),
        ("where(kv_idx <= q_idx, qk, -10000.0)", None),
        ("where(kv_idx <= q_idx, qk, -1e30) * 0.5", None),
        ("where(qk < 1.0, qk, -inf)", None),
        ("qk * qk", None),
        ("qk + qk", None),
        ("t0[kv_idx]", None),
    ],
)
def test_additive_programs(score: str, split: tuple[float, str] | None) -> None:
    found = flash_cpu.split_additive(parse(score, (torch.float32,)))
    expected = None if split is None else flash_cpu.AdditiveProgram(split[0], parse(split[1], (torch.float32,)))
    assert found == expected


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize(
    "score", [CAUSAL, "tanh(qk)", "qk + t0[kv_idx] * t1[q_idx]", "where(kv_idx <= q_idx, qk, -1e4)"]
)
def test_memory_is_linear_in_the_sequence(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("BLOCK_Q", 64), ("BLOCK_KV", 64), ("WORKSPACE", 64 * 64)):
        monkeypatch.setattr(tiled, name, size)
    monkeypatch.setattr(flash_cpu, "MAX_BLOCK_Q", 64)
    largest = []
    for length in (128, 512):
        captured = [bias(length), bias(length)][: score.count("t0") * 2]
        call = make_call(score, (2, length, 8), captured=captured)
        with LargestTensor() as seen:
            attention_tiled(call)
        largest.append(seen.elements)
    assert largest[1] <= 4 * largest[0]
    assert largest[1] < 512 * 512 // 8
