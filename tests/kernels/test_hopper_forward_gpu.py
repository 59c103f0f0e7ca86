"""The forward on a Hopper GPU: every kind of attention it takes, held to the rule of numerics.md."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attention_cases import Call, make_call
from numerics import assert_close_to_exact, assert_lse_close_to_exact

triton = pytest.importorskip("triton")

from hopper_calls import BF16, BIAS_CALLS, CALLS, CAUSAL, FORWARD_CALLS, PLAIN, bias, nan_filled_on  # noqa: E402

from flashfuse.kernels import launch_hopper, launch_hopper_forward, plans  # noqa: E402
from flashfuse.kernels.launch import attention_forward  # noqa: E402
from flashfuse.kernels.launch_hopper_forward import prepare_hopper  # noqa: E402
from flashfuse.kernels.prepared import start  # noqa: E402

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0"),
    pytest.mark.skipif(not triton.__version__.startswith(launch_hopper.TRITON_RELEASE), reason="another Gluon"),
]

# Launches of one small problem: what is missing between a store and a read of it shows in some.
LAUNCHES = 30
ALL = {**CALLS, **FORWARD_CALLS, **BIAS_CALLS}


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launch_hopper_forward, "is_faster", lambda *_: True)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False)
    plans.attention.plans.clear()
    yield
    plans.attention.plans.clear()


def forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """By the kernel for Hopper and no other."""
    prepared = prepare_hopper(call)
    assert prepared is not None, "another kernel was chosen"
    return prepared.compute(nan_filled_on("cuda"), start, *call.tensors)


@pytest.mark.parametrize("name", ALL)
def test_output_and_log_sum_exp(name: str) -> None:
    call = ALL[name]().to("cuda")
    exact, eager = call.exact(), call.eager()
    out, lse = forward(call)
    assert_close_to_exact(out, eager[0], exact[0])
    assert_lse_close_to_exact(lse, eager[1], exact[1])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("score", [PLAIN, CAUSAL, "where(kv_idx <= q_idx - 200, qk * 0.125, -10000.0)"])
@pytest.mark.parametrize("shape", [(2, 3, 640), (1, 4, 1152), (1, 2, 70), (4, 40, 200), (2, 25, 777)], ids=str)
def test_every_launch_gives_the_same(shape: tuple[int, int, int], score: str, head_dim: int) -> None:
    """A missing fence has been right at long shapes, and wrong in some rows of short ones."""
    call = make_call(score, (*shape, head_dim), dtype=BF16).to("cuda")
    first = forward(call)
    for _ in range(LAUNCHES):
        assert all(map(torch.equal, forward(call), first))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("score", ["qk * 0.125 + {}", "where(kv_idx <= q_idx, (qk + {}) * 0.125, -inf)"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 640), (1, 4, 1152), (1, 2, 72), (4, 40, 200)], ids=str)
def test_every_launch_gives_the_same_with_a_bias(
    shape: tuple[int, int, int], dtype: torch.dtype, score: str, head_dim: int
) -> None:
    """Its tiles are read by ordinary loads, behind which TMA writes the next."""
    _, heads, length = shape
    captured = [bias(dtype, heads, length, length)]
    call = make_call(
        score.format("t0[n1, q_idx, kv_idx]"), (*shape, head_dim), captured=captured, dtype=BF16
    ).to("cuda")  # fmt: skip
    first = forward(call)
    exact, eager = call.exact(), call.eager()
    assert_close_to_exact(first[0], eager[0], exact[0])
    assert_lse_close_to_exact(first[1], eager[1], exact[1])
    for _ in range(LAUNCHES):
        assert all(map(torch.equal, forward(call), first))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["documents", "padded", "bias-documents"])
def test_every_launch_gives_the_same_with_ranges(name: str, head_dim: int) -> None:
    call = ALL[f"{name}-{head_dim}"]().to("cuda")
    first = forward(call)
    for _ in range(LAUNCHES):
        assert all(map(torch.equal, forward(call), first))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("empty_row", ["nan", "zero"])
def test_rows_without_a_key(head_dim: int, empty_row: str) -> None:
    """They are what the plain kernel gives, also where a value that none of them sees is NaN.

    A row whose tile of keys holds that value is NaN too, as it is in torch, and the kernels' tiles are not of one size.
    """
    score = "where(kv_idx > q_idx, qk * 0.125, -inf)"
    call = make_call(score, (1, 2, 300, head_dim), dtype=BF16, empty_row=empty_row).to("cuda")
    call.v[..., 0, :] = torch.nan
    (out, lse), (plain, plain_lse) = forward(call), attention_forward(call)
    assert torch.equal(out[..., 192:, :].isnan(), plain[..., 192:, :].isnan())
    assert bool(out[..., 192:-1, :].isfinite().all())
    assert torch.equal(lse.isnan(), plain_lse.isnan())
    assert torch.equal(out[..., -1, :].nan_to_num(1.0), plain[..., -1, :].nan_to_num(1.0))


def test_the_operator_and_its_plan() -> None:
    """The second and third call launch what the first has prepared, with descriptors of other tensors."""
    call = make_call(CAUSAL, (8, 12, 200, 64), dtype=BF16).to("cuda")
    site = plans.CallSite(plans.attention)
    for seed in range(4):
        torch.manual_seed(seed)
        other = call.on([torch.randn_like(x) for x in call.operands])
        assert all(map(torch.equal, site(*other.arguments), forward(other)))


def test_inside_a_cuda_graph() -> None:
    """Its programs count the tiles they take from 0 on at each replay."""
    call = make_call(CAUSAL, (8, 8, 300, 64), dtype=BF16).to("cuda")
    prepared = prepare_hopper(call)
    assert prepared is not None
    assert prepared.counted
    site = plans.CallSite(plans.attention)
    expected = site(*call.arguments)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = site(*call.arguments)[0]
    for _ in range(3):
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, expected)
