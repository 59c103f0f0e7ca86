"""Which attentions the one-pass backward for Hopper takes, and what the host does for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Call
from gradient_cases import differentiable

triton = pytest.importorskip("triton")

from hopper_calls import CAUSAL, FP16, bias, call_of, spaced  # noqa: E402
from idle_driver import IdleDriver, idle_driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from flashfuse.kernels import launch_backward, launch_hopper, launch_hopper_backward, launch_hopper_dense, plans  # noqa: E402
from flashfuse.kernels.codegen_backward import load_backward  # noqa: E402
from flashfuse.kernels.launch import Device  # noqa: E402
from flashfuse.kernels.launch_hopper_backward import backward_constants, block_of, takes  # noqa: E402
from flashfuse.kernels.prepared import Buffer  # noqa: E402
from flashfuse.kernels.prepared_backward import Gradient  # noqa: E402

HOPPER = Device("cuda", 90, 232448, 132)
KERNELS = ["attention_rows_backward_kernel", "attention_hopper_backward_kernel", "scaled_rows_kernel"]
PAIRS = "t0[n1, q_idx, kv_idx]"
PLAIN = [f"attention_{kind}_backward_kernel" for kind in ("rows", "queries", "keys")]


@pytest.fixture(autouse=True)
def _at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_hopper_backward, "LEAST_QUERIES", {64: 0, 128: 0})
    monkeypatch.setattr(launch_hopper_dense, "LEAST_LENGTH", 0)


def taken(call: Call, device: Device = HOPPER, deterministic: bool = False, **changes: Any) -> bool:
    wanted = changes.get("wanted", (0, 1, 2))
    needs = tuple(3 + slot in wanted for slot in range(len(call.captured)))
    program = load_backward(call.spec, needs, False, call.q_len <= call.kv_len)
    grad_out = changes.get("grad_out", torch.empty(*call.batch, call.q_len, call.value_dim, dtype=call.spec.out_dtype))
    gradients = []
    for x in (call.q, call.k, call.v):
        own = Buffer.like(torch.empty_like(x))
        of_each = Buffer.contiguous((*call.batch, *x.shape[-2:]), torch.float32)
        gradients.append(Gradient(own, own if changes.get("owned", True) else of_each))
    return takes(device, call, grad_out, program, wanted, gradients, deterministic)


@pytest.mark.parametrize(
    ("score", "changes"),
    [
        ("qk * 0.125", {}),
        (CAUSAL, {"dtype": torch.bfloat16}),
        (CAUSAL, {"shape": (1, 2, 3, 70, 128), "k_batch": (1, 2, 1)}),
        (CAUSAL, {"shape": (2, 70, 80), "value_dim": 96}),
        (CAUSAL, {"shape": (2, 70, 64), "value_dim": 128, "kv_len": 90}),
        ("where((kv_idx <= q_idx) & (kv_idx > q_idx - 20), qk * 0.125, -inf)", {}),
        ("tanh(qk * 0.0025) * 50.0", {}),
        ("qk * 0.125 + t0[n1, kv_idx]", {"captured": [torch.zeros(2, 70)]}),
        ("qk * 0.125", {"sink": "0.5"}),
        # Rows without any key, of which every key's gradient has to hear.
        ("where(kv_idx > q_idx, qk * 0.125, -inf)", {}),
    ],
)
def test_what_is_taken(score: str, changes: dict[str, Any]) -> None:
    assert taken(call_of(score, **changes))


@pytest.mark.parametrize(
    ("score", "changes"),
    [
        (CAUSAL, {"dtype": torch.float32}),
        (CAUSAL, {"shape": (2, 2, 70, 32)}),
        (CAUSAL, {"shape": (2, 2, 70, 256)}),
        (CAUSAL, {"shape": (2, 2, 70, 68)}),
        (CAUSAL, {"shape": (1, 2, 1, 2, 70, 64)}),
        ("qk * 0.125 + t0[q_idx, kv_idx]", {"captured": [torch.zeros(70, 70)]}),
        ("qk * 0.125 + t0[min(abs(kv_idx - q_idx), 31)]", {"captured": [torch.zeros(32)]}),
        (f"qk * {PAIRS}", {"captured": [bias(FP16, 2, 70, 70)]}),
        ("sin(qk * 0.125)", {}),
        ("qk * 0.125", {"dropout": 0.1}),
        ("qk * 0.125", {"factor": "0.5 + to_float(q_idx)"}),
        ("qk * 0.125", {"factor": "0.5 + to_float(kv_idx)"}),
        ("qk / (1.0 + abs(qk))", {"normaliser": "none"}),
        ("qk * 0.125", {"key": "x * 2.0"}),
    ],
)
def test_what_is_left_to_the_plain_passes(score: str, changes: dict[str, Any]) -> None:
    assert not taken(call_of(score, **changes))


@pytest.mark.parametrize(
    ("score", "dtype"),
    [
        (f"qk * 0.125 + {PAIRS}", FP16),
        (f"(qk + {PAIRS}) * 0.125", torch.bfloat16),
        (f"where(kv_idx <= q_idx, qk * 0.125 + {PAIRS}, -inf)", FP16),
        (f"qk * 0.125 + {PAIRS} + where(kv_idx <= q_idx, 0.0, -10000.0)", FP16),
        (f"qk * 0.125 + {PAIRS} * to_float(kv_idx)", FP16),
    ],
)
def test_pairs_with_a_gradient(score: str, dtype: torch.dtype) -> None:
    call = call_of(score, captured=[bias(dtype, 2, 70, 70)])
    assert taken(call)
    assert taken(call, wanted=(0, 1, 2, 3))
    assert not taken(call, wanted=(0, 1, 2, 3), deterministic=True)
    assert not taken(call, wanted=(0, 1, 3))
    assert not taken(call, wanted=(3,))
    assert not taken(replace(call, captured=[torch.zeros(2, 70, 70, dtype=dtype)]))


def test_pairs_under_a_cap() -> None:
    """What is summed for the gradient of pairs is a score's gradient, and what is left of it the product's."""
    call = call_of(f"tanh((qk + {PAIRS}) * 0.0025) * 50.0", captured=[bias(FP16, 2, 70, 70)])
    assert taken(call)
    assert not taken(call, wanted=(0, 1, 2, 3))


def test_pairs_beside_other_reads() -> None:
    slopes = call_of(f"qk * 0.125 + {PAIRS} + t1[n1, kv_idx]", captured=[bias(FP16, 2, 70, 70), torch.zeros(2, 70)])
    assert taken(slopes)
    assert taken(slopes, wanted=(0, 1, 2, 3))
    assert not taken(slopes, wanted=(0, 1, 2, 4))
    assert not taken(slopes, wanted=(0, 1, 2, 3, 4))
    of_rows = call_of(f"qk * 0.125 + {PAIRS} + t0[n1, 0, kv_idx]", captured=[bias(FP16, 2, 70, 70)])
    assert taken(of_rows)
    assert not taken(of_rows, wanted=(0, 1, 2, 3))
    assert not taken(call_of(f"qk * 0.125 + {PAIRS} + t0[0, kv_idx, q_idx]", captured=[bias(FP16, 2, 70, 70)]))


@pytest.mark.parametrize(
    ("read", "batch", "spread"),
    [
        ("t0[n1, q_idx, kv_idx]", (2, 3), 2),
        ("t0[q_idx, kv_idx]", (2, 4), 2),
        ("t0[n0, q_idx, kv_idx]", (2, 4), 4),
        ("t0[n0, q_idx, kv_idx]", (2, 2, 4), 8),
        ("t0[n0 * 2 + n1, q_idx, kv_idx]", (2, 4), 1),
        ("t0[q_idx, kv_idx]", (), 1),
    ],
)
def test_positions_that_share_pairs_come_together(read: str, batch: tuple[int, ...], spread: int) -> None:
    captured = [bias(FP16, *(8,) * (read.count(",") - 1), 70, 70)]
    call = call_of(f"qk * 0.125 + {read}", (*batch, 70, 64), captured=captured)
    program = load_backward(call.spec, (True,), False, True)
    found = backward_constants(call.spec, program, 64, 64, (True,) * 3, False, True, batch)
    assert found["SPREAD"] == spread


def test_the_device_and_the_setting_decide() -> None:
    call = call_of()
    for device in (replace(HOPPER, arch=80), replace(HOPPER, arch=100), replace(HOPPER, shared_bytes=101376)):
        assert not taken(call, device)
    assert not taken(call, replace(HOPPER, backend="hip"))
    assert not taken(call, deterministic=True)
    assert not taken(call, wanted=(0, 2))
    assert not taken(call, owned=False)


def test_layouts_that_a_tensor_map_has() -> None:
    """Rows of neighbours at multiples of 16 bytes; a gradient of a sum is one number everywhere."""
    call = call_of()
    assert taken(replace(call, q=spaced(call.q, 8)))
    assert taken(replace(call, q=call.q.transpose(1, 2).contiguous().transpose(1, 2)))
    assert not taken(replace(call, q=spaced(call.q, 4)))
    assert not taken(replace(call, k=call.k.mT.contiguous().mT))
    shifted = torch.cat([call.v.new_zeros(1), call.v.flatten()])[1:].view(call.v.shape)
    assert not taken(replace(call, v=shifted))
    assert not taken(call, grad_out=torch.ones((), dtype=FP16).expand(2, 2, 70, 64))
    one_row = call_of("qk * 0.125", (2, 1, 1, 64), kv_len=70)
    assert taken(replace(one_row, q=one_row.q.as_strided((2, 1, 1, 64), (64, 3, 5, 1))))


def test_few_queries_are_left_to_the_plain_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for columns, least in launch_hopper_backward.LEAST_QUERIES.items():
        assert taken(call_of(shape=(1, 1, least, columns), kv_len=70))
        assert not taken(call_of(shape=(1, 1, least - 1, columns), kv_len=5000))


def test_columns_of_tiles() -> None:
    assert [block_of(*dims) for dims in ((64, 64), (33, 64), (80, 64), (128, 72))] == [64, 64, 128, 128]
    assert [block_of(*dims) for dims in ((32, 64), (64, 16), (129, 128))] == [None] * 3


# --------------------------------------------------------------------------------------------------------------------
# What the host does


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[IdleDriver]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("nothing is compiled when interpreted")
    if not triton.__version__.startswith(launch_hopper.TRITON_RELEASE):
        pytest.skip("another Gluon")
    monkeypatch.setattr(launch_backward, "device_of", lambda _: HOPPER)
    launch_backward._launch.cache_clear()
    plans.attention_backward.plans.clear()
    with idle_driver(90) as found:
        yield found
    plans.attention_backward.plans.clear()
    launch_backward._launch.cache_clear()


def arguments_of(call: Call, needed: tuple[int, ...] = (0, 1, 2)) -> tuple[Any, ...]:
    out = torch.zeros(*call.batch, call.q_len, call.value_dim, dtype=call.spec.out_dtype)
    q, k, v, *rest = call.arguments
    lse = torch.zeros(*call.batch, call.q_len, 2)
    needs = [at in needed for at in differentiable(call)]
    return torch.ones_like(out), q, k, v, out, lse, *rest, needs


def names(idle: IdleDriver) -> list[str]:
    return [name for name, _ in idle.taken()]


@pytest.mark.parametrize(
    "call",
    [
        call_of(),
        call_of(shape=(1, 2, 3, 70, 128), k_batch=(1, 2, 1)),
        call_of("qk * 0.125 + to_float(kv_idx - q_idx) * t0[n1]", captured=[torch.ones(2)]),
    ],
    ids=["causal", "grouped", "slopes"],
)
def test_three_kernels(call: Call, idle: IdleDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call like an earlier one asks nothing of Triton."""
    arguments, site = arguments_of(call), plans.CallSite(plans.attention_backward)
    found = plans.attention_backward(*arguments)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, FP16) for x in (call.q, call.k, call.v)]
    assert names(idle) == KERNELS
    monkeypatch.setattr(JITFunction, "run", None)
    monkeypatch.setattr(plans, "BackwardArguments", None)
    for run in (plans.attention_backward, site, site):
        run(*arguments)
        assert names(idle) == KERNELS


def test_pairs_come_behind_the_one_pass(idle: IdleDriver) -> None:
    """Their gradient waits for sums that it forms."""
    call = call_of(f"qk * 0.125 + {PAIRS}", (2, 2, 72, 64), captured=[bias(FP16, 2, 72, 72)])
    arguments, site = arguments_of(call, (0, 1, 2, 3)), plans.CallSite(plans.attention_backward)
    for run in (plans.attention_backward, site):
        assert [x.shape for x in run(*arguments)] == [x.shape for x in call.operands]
        assert names(idle) == [*KERNELS, "attention_hopper_dense_backward_kernel"]


def test_the_setting_is_asked_at_each_call(idle: IdleDriver) -> None:
    """A compiled graph's backward pass runs under the setting of its own time."""
    arguments, site = arguments_of(call_of()), plans.CallSite(plans.attention_backward)
    for run in (plans.attention_backward, site):
        for deterministic, kernels in ((False, KERNELS), (True, PLAIN), (False, KERNELS), (True, PLAIN)):
            torch.use_deterministic_algorithms(deterministic)
            try:
                run(*arguments)
            finally:
                torch.use_deterministic_algorithms(False)
            assert names(idle) == kernels
