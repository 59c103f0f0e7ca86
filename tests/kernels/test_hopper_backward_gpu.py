"""The one-pass backward on a Hopper GPU: every kind of attention it takes, held to the rule of numerics.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import pytest
import torch
from attention_cases import Call, make_call
from gradient_cases import (
    Gradients,
    check_gradients,
    check_rows_of_one_value,
    differentiable,
    grad_out,
    reference_gradients,
)
from numerics import assert_close_to_exact

triton = pytest.importorskip("triton")

from hopper_calls import (  # noqa: E402
    BACKWARD_BIAS_CALLS,
    BF16,
    CALLS,
    CAUSAL,
    FP16,
    PLAIN,
    ROWS_OF_PAIRS_CALLS,
    bias,
    nan_filled_on,
    wanted,
)

from flashfuse.kernels import launch_hopper, launch_hopper_backward, launch_hopper_dense, plans  # noqa: E402
from flashfuse.kernels.launch import attention_forward  # noqa: E402
from flashfuse.kernels.launch_backward import attention_backward, prepare_backward  # noqa: E402
from flashfuse.kernels.prepared import empty_on, start  # noqa: E402
from flashfuse.kernels.prepared_backward import HopperPairs  # noqa: E402

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0"),
    pytest.mark.skipif(not triton.__version__.startswith(launch_hopper.TRITON_RELEASE), reason="another Gluon"),
]

# Launches of one small problem: what is missing between a store and a read of it shows in some.
LAUNCHES = 30
ALL = {**CALLS, **BACKWARD_BIAS_CALLS, **ROWS_OF_PAIRS_CALLS}


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launch_hopper_backward, "LEAST_QUERIES", {64: 0, 128: 0})
    monkeypatch.setattr(launch_hopper_dense, "LEAST_LENGTH", 0)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False)
    plans.attention_backward.plans.clear()
    yield
    plans.attention_backward.plans.clear()


def backward(call: Call, grad: torch.Tensor, needed: Sequence[int], by_rows: bool = False) -> Gradients:
    """Those of q, k and v by the one pass and nothing else; by_rows: those of pairs by rows of them."""
    needs = [at in needed for at in differentiable(call)]
    out, lse = attention_forward(call)
    prepared = prepare_backward(call, grad, out, lse, needs)
    assert prepared is not None
    assert prepared.one_pass is not None, "the plain passes were chosen"
    assert prepared.queries is None
    assert not by_rows or isinstance(prepared.pairs[0][0], HopperPairs)
    return prepared.compute(nan_filled_on("cuda"), start, grad, out, lse, *call.tensors)


@pytest.mark.parametrize("name", ALL)
def test_gradients(name: str) -> None:
    by_rows = name in ROWS_OF_PAIRS_CALLS
    check_gradients(ALL[name]().to("cuda"), partial(backward, by_rows=by_rows), wanted=wanted(name), draws=2)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_that_are_one_value(head_dim: int, dtype: torch.dtype) -> None:
    check_rows_of_one_value(make_call("qk * 300.0", (2, 3, 640, head_dim), dtype=dtype).to("cuda"), backward)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("score", [PLAIN, CAUSAL], ids=["plain", "causal"])
@pytest.mark.parametrize("shape", [(2, 3, 640), (1, 4, 1152), (1, 2, 70), (4, 40, 200)], ids=str)
def test_every_launch_gives_the_same(shape: tuple[int, int, int], score: str, head_dim: int) -> None:
    """dk and dv to the bit; dq is added up in any order, in float32, and rounded to 16 bits: mostly the same.

    A missing fence has been right at long shapes, and wrong in some rows of short ones.
    """
    call = make_call(score, (*shape, head_dim), dtype=BF16).to("cuda")
    grad = grad_out(call)
    first = backward(call, grad, (0, 1, 2))
    for _ in range(LAUNCHES):
        dq, dk, dv = backward(call, grad, (0, 1, 2))
        assert torch.equal(dk, first[1])
        assert torch.equal(dv, first[2])
        assert_near(dq, first[0])


def assert_near(mine: torch.Tensor, other: torch.Tensor) -> None:
    """Two roundings of sums in different orders."""
    mine, other = mine.float(), other.float()
    ulps = 2.0**-7 * other.abs().clamp(min=other.abs().max() * 2.0**-9)
    assert bool(((mine - other).abs() <= ulps).all())


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("score", ["qk * 0.125 + {}", "where(kv_idx <= q_idx, (qk + {}) * 0.125, -inf)"])
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("shape", [(2, 3, 640), (1, 4, 1152), (1, 2, 72), (4, 40, 200)], ids=str)
def test_every_launch_gives_the_same_with_a_bias(
    shape: tuple[int, int, int], dtype: torch.dtype, score: str, head_dim: int
) -> None:
    """All but dq to the bit. Its tiles are read by ordinary loads, behind which TMA writes the next."""
    _, heads, length = shape
    captured = [bias(dtype, heads, length, length)]
    call = make_call(
        score.format("t0[n1, q_idx, kv_idx]"), (*shape, head_dim), captured=captured, dtype=BF16
    ).to("cuda")  # fmt: skip
    grad = grad_out(call)
    by_rows = (head_dim, shape[0]) in launch_hopper_dense.STAGES
    first = check_gradients(call, partial(backward, by_rows=by_rows), wanted=(0, 1, 2, 3))
    for _ in range(LAUNCHES):
        dq, dk, dv, of_bias = backward(call, grad, (0, 1, 2, 3))
        assert torch.equal(dk, first[1])
        assert torch.equal(dv, first[2])
        assert_near(dq, first[0])
        assert torch.equal(of_bias, first[3])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["documents", "rows-of-bias-documents"])
def test_every_launch_gives_the_same_with_documents(name: str, head_dim: int) -> None:
    """Alone and beside a bias: all but dq to the bit."""
    call = ALL[f"{name}-{head_dim}"]().to("cuda")
    grad, needed = grad_out(call), wanted(f"{name}-{head_dim}")
    first = backward(call, grad, needed)
    for _ in range(LAUNCHES):
        dq, *others = backward(call, grad, needed)
        assert_near(dq, first[0])
        assert all(map(torch.equal, others, first[1:]))


def test_rows_of_a_bias() -> None:
    """Its gradient may be summed up over many keys: what rounding the output leaves in delta is not in it."""
    call = make_call(
        "where(kv_idx < q_idx + 80, qk * 0.3 + t0[q_idx, kv_idx], -2.0)", (1, 70, 128), 200,
        captured=[bias(FP16, 70, 200)], dtype=FP16,
    ).to("cuda")  # fmt: skip
    grad = grad_out(call)
    exact, eager = (reference_gradients(call, [grad], [3], dtype)[0] for dtype in (torch.float64, None))
    found = backward(call, grad, (0, 1, 2, 3))[3]
    assert_close_to_exact(found.float().sum(-1)[None], eager.float().sum(-1), exact.sum(-1))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_without_a_key_spread_nan(head_dim: int) -> None:
    """The last query sees no key: NaN gets where the plain passes bring it."""
    call = make_call("where(kv_idx > q_idx, qk * 0.125, -inf)", (1, 2, 300, head_dim), dtype=BF16).to("cuda")
    out, lse = attention_forward(call)
    grad = grad_out(call)
    found = backward(call, grad, (0, 1, 2))
    torch.use_deterministic_algorithms(True)
    try:
        plain = attention_backward(call, grad, out, lse, [True] * 3)
    finally:
        torch.use_deterministic_algorithms(False)
    for mine, other in zip(found, plain, strict=True):
        assert torch.equal(mine.isnan(), other.isnan())


def test_the_operator_and_its_plan() -> None:
    """The second and third call launch what the first has prepared, with descriptors of other tensors."""
    call = make_call(CAUSAL, (2, 3, 200, 64), dtype=BF16).to("cuda")
    site = plans.CallSite(plans.attention_backward)
    for seed in range(4):
        torch.manual_seed(seed)
        other = call.on([torch.randn_like(x) for x in call.operands])
        q, k, v, *rest = other.arguments
        out, lse = attention_forward(other)
        grad = torch.randn_like(out)
        _, dk, dv = site(grad, q, k, v, out, lse, *rest, [True] * 3)
        prepared = prepare_backward(other, grad, out, lse, [True] * 3)
        assert prepared is not None
        expected = prepared.compute(empty_on(q.device), start, grad, out, lse, *other.tensors)
        assert torch.equal(dk, expected[1])
        assert torch.equal(dv, expected[2])
