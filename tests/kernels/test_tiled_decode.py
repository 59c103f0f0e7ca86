"""The CPU path where queries are few and share their keys: each key is read once, and none is copied."""

import pytest
import torch
from attention_cases import Call, make_call
from masked_programs import FP32_MIN, noise
from numerics import assert_close_to_exact, assert_lse_close_to_exact
from torch.utils._python_dispatch import TorchDispatchMode

from flashfuse.kernels import flash_cpu
from flashfuse.kernels.tiled import attention_tiled

HEADS, GROUPS, KV_LEN = 2, 3, 700
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Seen(TorchDispatchMode):
    """The shapes of q and k that torch's kernel was given, and the elements of the largest tensor made."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.largest = 0
        self._given = {x.untyped_storage().data_ptr() for x in call.operands}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is flash:
            self.shapes.append((tuple(args[0].shape), tuple(args[1].shape)))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self._given:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return result


def check(call: Call) -> Seen:
    exact, eager = call.exact(), call.eager()
    with Seen(call) as seen:
        out, lse = attention_tiled(call)
    assert_close_to_exact(out, eager[0], exact[0])
    assert_lse_close_to_exact(lse, eager[1], exact[1], dtype=call.spec.product_dtype)
    return seen


def decode(score: str, q_len: int = 2, **more: object) -> Call:
    return make_call(score, (2, HEADS, GROUPS, q_len, 32), KV_LEN, k_batch=(2, HEADS, 1), **more)  # type: ignore[arg-type]


PROGRAMS = {
    "plain": ("qk * 0.3", []),
    "bottom-right": ("where(kv_idx <= q_idx + (kv_len - q_len), qk * 0.3, -inf)", []),
    "static-cache": ("where(kv_idx <= t0[q_idx], qk * 0.3, -inf)", [torch.tensor([200, 201])]),
    "padding": (f"where(t0[n0, kv_idx], qk * 0.3, {FP32_MIN!r})", [noise(2, KV_LEN) < 0.5]),
    "by-head": ("qk * 0.3 + t0[n1, n2] * to_float(kv_idx - q_idx)", [noise(HEADS, GROUPS) * 0.01]),
    "bias": ("qk * 0.3 + t0[0, n2, q_idx, kv_idx]", [noise(1, GROUPS, 2, KV_LEN)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_heads_that_share_keys_are_rows(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each query head of a group read all keys for itself, in a call of its own."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    score, captured = PROGRAMS[name]
    seen = check(decode(score, captured=captured, dtype=dtype))
    assert seen.shapes == [((2, HEADS, GROUPS * 2, 32), (2, HEADS, KV_LEN, 32))]
    assert seen.largest < 2 * HEADS * KV_LEN * 32


def test_with_a_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    seen = check(decode("qk * 0.3", sink="t0[n1, n2]", captured=[noise(HEADS, GROUPS)]))
    assert len(seen.shapes) == 1


@pytest.mark.parametrize(("threads", "rows"), [(16, 64), (4, 4)])
def test_heads_stay_apart(threads: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where threads would be left without work, or the rows would be many."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(flash_cpu, "FOLDED_ROWS", rows)
    seen = check(decode("qk * 0.3"))
    assert {q[-2] for q, _ in seen.shapes} == {2}


@pytest.mark.parametrize("q_len", [1, 16])
def test_no_keys_are_expanded_in_the_general_path(q_len: int) -> None:
    seen = check(decode("tanh(qk * 0.1) * 5.0", q_len))
    assert not seen.shapes
    assert seen.largest < 2 * HEADS * GROUPS * KV_LEN * 32
