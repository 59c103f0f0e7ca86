"""Which attentions the forward for Hopper takes, and what the host does for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Call

triton = pytest.importorskip("triton")

from hopper_calls import BIAS_CALLS, CAUSAL, FP16, bias, call_of, documents, spaced  # noqa: E402
from idle_driver import IdleDriver, idle_driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from flashfuse.kernels import launch_hopper, launch_hopper_forward, plans  # noqa: E402
from flashfuse.kernels.launch import Device  # noqa: E402
from flashfuse.kernels.launch_hopper_forward import is_faster, prepare_hopper, takes  # noqa: E402

HOPPER = Device("cuda", 90, 232448, 132)


@pytest.fixture(autouse=True)
def _taken_when_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_hopper_forward, "is_faster", lambda *_: True)


@pytest.mark.parametrize(
    ("score", "changes"),
    [
        ("qk * 0.125", {}),
        (CAUSAL, {"dtype": torch.bfloat16}),
        (CAUSAL, {"shape": (1, 2, 3, 70, 128), "k_batch": (1, 2, 1)}),
        (CAUSAL, {"shape": (2, 70, 80), "value_dim": 96}),
        (CAUSAL, {"shape": (2, 2, 70, 256)}),
        (CAUSAL, {"shape": (2, 70, 64), "value_dim": 128, "kv_len": 90}),
        ("where((kv_idx <= q_idx) & (kv_idx > q_idx - 20), qk * 0.125, -inf)", {}),
        ("tanh(qk * 0.0025) * 50.0", {}),
        ("qk * 0.125 + t0[n1, kv_idx]", {"captured": [torch.zeros(2, 70)]}),
        ("qk * 0.125", {"sink": "0.5"}),
        ("qk * 0.125", {"factor": "0.5 + to_float(q_idx)"}),
        ("where(kv_idx <= q_idx - 20, qk * 0.125, -1000000000.0)", {}),
        ("where(kv_idx > q_idx, qk * 0.125, -inf)", {}),
        ("qk * 0.125 + t0[q_idx, kv_idx]", {"captured": [bias(FP16, 70, 70)]}),
        ("(qk + t0[n0, 0, q_idx, kv_idx]) * 0.125", {"captured": [bias(torch.bfloat16, 2, 1, 70, 70)]}),
        ("qk * t0[0, q_idx, kv_idx] + t0[0, q_idx, kv_idx]", {"captured": [bias(FP16, 1, 70, 70)]}),
        ("qk * 0.125 + t0[n0 * 2 + n1, q_idx, kv_idx]", {"captured": [bias(FP16, 4, 70, 70)]}),
        ("qk * 0.125 + t0[n0, q_idx, kv_idx]", {"captured": [bias(FP16, 1, 70, 70).expand(2, 70, 70)]}),
        ("qk * 0.125 + t0[q_idx, kv_idx] + t1[kv_idx]", {"captured": [bias(FP16, 70, 70), torch.zeros(70)]}),
    ],
)
def test_what_is_taken(score: str, changes: dict[str, Any]) -> None:
    assert takes(HOPPER, call_of(score, **changes))


@pytest.mark.parametrize(
    ("score", "changes"),
    [
        (CAUSAL, {"dtype": torch.float32}),
        (CAUSAL, {"shape": (2, 2, 70, 32)}),
        (CAUSAL, {"shape": (2, 2, 70, 264)}),
        ("qk * 0.125 + t0[q_idx, kv_idx]", {"captured": [bias(FP16, 70, 70)], "shape": (2, 2, 70, 256)}),
        (CAUSAL, {"shape": (2, 2, 70, 68)}),
        (CAUSAL, {"shape": (1, 2, 1, 2, 70, 64)}),
        ("qk * 0.125 + t0[q_idx, kv_idx]", {"captured": [torch.zeros(70, 70)]}),
        ("qk * 0.125 + t0[q_idx, kv_idx]", {"captured": [bias(FP16, 70, 70).mT.contiguous().mT]}),
        ("qk * 0.125 + t0[q_idx, kv_idx]", {"captured": [bias(FP16, 1, 70).expand(70, 70)]}),
        ("qk * 0.125 + t0[n1, q_idx, kv_idx]", {"captured": [bias(torch.float32, 2, 70, 70)]}),
        ("qk * 0.125 + t0[kv_idx, q_idx]", {"captured": [bias(FP16, 70, 70)]}),
        ("qk * 0.125 + t0[q_idx, kv_idx + 1]", {"captured": [bias(FP16, 70, 71)]}),
        ("qk * 0.125 + t0[q_idx, q_idx, kv_idx]", {"captured": [bias(FP16, 70, 70, 70)]}),
        ("qk * 0.125 + t0[0, 0, n0, n1, q_idx, kv_idx]", {"captured": [bias(FP16, 1, 1, 2, 2, 70, 70)]}),
        ("qk * 0.125 + t0[q_idx, kv_idx] * t1[q_idx, kv_idx]", {"captured": [bias(FP16, 70, 70)] * 2}),
        ("qk * 0.125 + t0[q_idx, kv_idx] * t0[kv_idx, q_idx]", {"captured": [bias(FP16, 70, 70)]}),
        ("where(t0[q_idx, kv_idx], qk * 0.125, -inf)", {"captured": [torch.ones(70, 80, dtype=torch.bool)]}),
        ("qk * 0.125", {"factor": "t0[q_idx, kv_idx]", "captured": [bias(FP16, 70, 70)]}),
        ("qk * 0.125 + t0[min(abs(kv_idx - q_idx), 31)]", {"captured": [torch.zeros(32)]}),
        ("qk * 0.125 + t0[69 + kv_idx - q_idx]", {"captured": [bias(FP16, 139)]}),
        ("qk * 0.125", {"dropout": 0.1}),
        ("qk * 0.125", {"factor": "0.5 + to_float(kv_idx)"}),
        ("qk / (1.0 + abs(qk))", {"normaliser": "none"}),
        ("qk * 0.125", {"key": "x * 2.0"}),
        ("t0[kv_idx]", {"captured": [torch.zeros(70)]}),
    ],
)
def test_what_is_left_to_the_plain_kernel(score: str, changes: dict[str, Any]) -> None:
    assert not takes(HOPPER, call_of(score, **changes))


def test_the_device_decides() -> None:
    for device in (replace(HOPPER, arch=80), replace(HOPPER, arch=100), replace(HOPPER, shared_bytes=101376)):
        assert not takes(device, call_of())
    assert not takes(replace(HOPPER, backend="hip"), call_of())


def test_layouts_that_a_tensor_map_has() -> None:
    """Rows of neighbours at multiples of 16 bytes; an axis along which all is one position is no axis."""
    call = call_of()
    assert takes(HOPPER, replace(call, q=spaced(call.q, 8)))
    assert takes(HOPPER, replace(call, q=call.q.transpose(1, 2).contiguous().transpose(1, 2)))
    assert takes(HOPPER, replace(call, k=call.k[:, :1].expand_as(call.k)))
    assert not takes(HOPPER, replace(call, q=spaced(call.q, 4)))
    assert not takes(HOPPER, replace(call, k=call.k.mT.contiguous().mT))
    shifted = torch.cat([call.v.new_zeros(1), call.v.flatten()])[1:].view(call.v.shape)
    assert not takes(HOPPER, replace(call, v=shifted))


def test_what_the_plain_kernel_is_faster_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    least, small = launch_hopper_forward.LEAST_LENGTH, replace(HOPPER, multiprocessors=8)

    def faster(
        score: str, heads: int, q_len: int, kv_len: int, device: Device = HOPPER, dim: int = 64, **changes: Any
    ) -> bool:
        captured = changes.pop("captured", ())
        call = call_of(score, (1, heads, q_len, dim), kv_len=kv_len, captured=captured)
        return is_faster(device, replace(call, **changes))

    assert not faster(CAUSAL, 1024, least - 1, least)
    assert not faster(CAUSAL, 1024, least, least - 1)
    assert faster(CAUSAL, 1024, least, least)
    assert not faster(CAUSAL, 1023, least, least)
    assert faster(CAUSAL, 512, least, least, dim=256)
    assert faster(CAUSAL, 16, 1024, 1024)
    # Fewer programs than processors.
    assert faster(CAUSAL, 1, 1024, 128 * 1024, small)
    assert not faster(CAUSAL, 1, 1024, 128 * 1024)
    assert not faster("tanh(qk * 0.0025) * 50.0", 1024, least, least)
    # Beside what is read for each pair that was measured for long rows alone.
    biased = "qk * 0.125 + t0[q_idx, kv_idx]"
    assert faster(biased, 128, 1024, 1024, dim=128, captured=[bias(FP16, 1024, 1024)])
    assert not faster(biased, 512, 256, 256, dim=128, captured=[bias(FP16, 256, 256)])


@pytest.mark.skipif(not launch_hopper.has_gluon(), reason="another Gluon")
def test_a_program_for_each_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where they do not have one tile each, programs count those that are taken: a counter has to be made 0."""
    monkeypatch.setattr(launch_hopper_forward, "device_of", lambda _: replace(HOPPER, multiprocessors=6))
    for q_len, programs, counted in ((128, 2, False), (300, 6, False), (400, 6, True)):
        prepared = prepare_hopper(call_of(shape=(1, 2, q_len, 64)))
        assert prepared is not None
        assert (prepared.launches[0].programs, prepared.counted) == (programs, counted)


# --------------------------------------------------------------------------------------------------------------------
# What the host does


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[IdleDriver]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("nothing is compiled when interpreted")
    if not launch_hopper.has_gluon():
        pytest.skip("another Gluon")
    monkeypatch.setattr(launch_hopper_forward, "device_of", lambda _: HOPPER)
    plans.attention.plans.clear()
    with idle_driver(90) as found:
        yield found
    plans.attention.plans.clear()


def names(idle: IdleDriver) -> list[str]:
    return [name for name, _ in idle.taken()]


@pytest.mark.parametrize(
    "call",
    [
        call_of(),
        call_of(shape=(1, 2, 3, 70, 128), k_batch=(1, 2, 1)),
        call_of("qk * 0.125 + to_float(kv_idx - q_idx) * t0[n1]", captured=[torch.ones(2)]),
        documents(64),
        BIAS_CALLS["bias-bf16-64"](),
        call_of(shape=(2, 40, 150, 64)),
    ],
    ids=["causal", "grouped", "slopes", "documents", "bias", "counted"],
)
def test_one_kernel(call: Call, idle: IdleDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call like an earlier one asks nothing of Triton."""
    site = plans.CallSite(plans.attention)
    out, lse = plans.attention(*call.arguments)
    assert (out.shape, out.dtype) == ((*call.batch, call.q_len, call.value_dim), call.q.dtype)
    assert (lse.shape, lse.dtype) == ((*call.batch, call.q_len, 2), torch.float32)
    assert names(idle) == ["attention_hopper_forward_kernel"]
    monkeypatch.setattr(JITFunction, "run", None)
    monkeypatch.setattr(plans, "Arguments", None)
    for run in (plans.attention, site, site):
        run(*call.arguments)
        assert names(idle) == ["attention_hopper_forward_kernel"]


def test_few_queries_go_to_flash_decoding(idle: IdleDriver) -> None:
    plans.attention(*call_of(shape=(2, 2, 1, 64), kv_len=70).arguments)
    assert "attention_split_kernel" in names(idle)


def test_one_instance_for_all_lengths(idle: IdleDriver) -> None:
    """And for all batches, one of a single position too; but one more of three groups where they waste few rows."""
    for shape, kv_len in (((2, 4, 70, 64), 70), ((4, 8, 300, 64), 512), ((1, 8, 17, 64), 64)):
        plans.attention(*call_of("qk * 0.125", shape, kv_len=kv_len).arguments)
    found = idle.taken()
    assert [name for name, _ in found] == ["attention_hopper_forward_kernel"] * 3
    assert found[0] == found[2] != found[1]
