"""The one-pass backward on a Hopper GPU: every kind of attention it takes, held to the rule of numerics.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Call, make_call
from gradient_cases import Gradients, check_gradients, differentiable, grad_out

triton = pytest.importorskip("triton")

from flashfuse.kernels import launch_hopper, plans  # noqa: E402
from flashfuse.kernels.launch import attention_forward  # noqa: E402
from flashfuse.kernels.launch_backward import attention_backward, prepare_backward  # noqa: E402
from flashfuse.kernels.prepared import empty_on, start  # noqa: E402
from flashfuse.kernels.ranges import mask_ranges, ranges_program  # noqa: E402

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0"),
    pytest.mark.skipif(not triton.__version__.startswith(launch_hopper.TRITON_RELEASE), reason="another Gluon"),
]

BF16, FP16 = torch.bfloat16, torch.float16
TYPES = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
PLAIN = "qk * 0.125"
CAUSAL = "where(kv_idx <= q_idx, qk * 0.125, -inf)"
LAST = "where(kv_idx <= q_idx + (kv_len - q_len), qk * 0.125, -inf)"
# Launches of one small problem: what is missing between a store and a read of it shows in some.
LAUNCHES = 30


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launch_hopper, "HOPPER_BACKWARD", True)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False)
    plans.attention_backward.plans.clear()
    yield
    plans.attention_backward.plans.clear()


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def nan_filled(size: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An element that nobody writes fails."""
    found = torch.empty_strided(size, strides, dtype=dtype, device="cuda")
    return found.fill_(torch.nan) if dtype.is_floating_point else found.fill_(-1)


def backward(call: Call, grad: torch.Tensor, wanted: Sequence[int]) -> Gradients:
    """Of q, k and v, by the one pass and nothing else."""
    needs = [at in wanted for at in differentiable(call)]
    out, lse = attention_forward(call)
    prepared = prepare_backward(call, grad, out, lse, needs)
    assert prepared is not None
    assert prepared.one_pass is not None, "the plain passes were chosen"
    assert prepared.queries is None
    return prepared.compute(nan_filled, start, grad, out, lse, *call.tensors)


def check(call: Call) -> None:
    check_gradients(call.to("cuda"), backward, wanted=(0, 1, 2), draws=2)


def with_ranges(call: Call) -> Call:
    """With the ranges of keys that a compiled graph would compute."""
    program = ranges_program(call.spec, call.batch, call.kv_len)
    assert program is not None
    rank = call.spec.batch_axes
    batch = [size if axis in program.batch else 1 for axis, size in enumerate(call.sizes[:rank])]
    captured = [call.captured[slot] for slot in program.captured]
    ranges = mask_ranges(captured, batch, rank, call.q_len, call.kv_len, program.needed, program.idle)
    return call.on(call.operands, ranges)


@TYPES
@pytest.mark.parametrize("score", [PLAIN, CAUSAL], ids=["plain", "causal"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (40, 64), (80, 96), (64, 128), (128, 72)], ids=str)
def test_head_dims(dims: tuple[int, int], score: str, dtype: torch.dtype) -> None:
    head_dim, value_dim = dims
    check(make_call(score, (2, 3, 640, head_dim), value_dim=value_dim, dtype=dtype))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("score", [PLAIN, CAUSAL, LAST], ids=["plain", "causal", "last"])
@pytest.mark.parametrize(
    ("q_len", "kv_len"), [(577, 577), (70, 130), (300, 1000), (1000, 300), (1, 1000), (17, 3), (129, 127), (1025, 2049)]
)
def test_lengths(q_len: int, kv_len: int, score: str, head_dim: int) -> None:
    """Where queries see nothing their row is 0, and so is its gradient."""
    check(make_call(score, (1, 2, q_len, head_dim), kv_len, empty_row="zero", dtype=BF16))


PROGRAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("where((kv_idx <= q_idx) & (kv_idx > q_idx - 100), qk * 0.125, -inf)", {}),
    "symmetric": ("where((kv_idx <= q_idx + 50) & (kv_idx >= q_idx - 50), qk * 0.125, -inf)", {}),
    "chunked": ("where((kv_idx <= q_idx) & (kv_idx // 64 == q_idx // 64), qk * 0.125, -inf)", {}),
    "fill": ("where(kv_idx <= q_idx - 200, qk * 0.125, -10000.0)", {}),
    "least-fill": (f"where(kv_idx <= q_idx - 200, qk * 0.125, {torch.finfo(torch.float32).min!r})", {}),
    "alibi": (
        "where(kv_idx <= q_idx, qk * 0.125 + to_float(kv_idx - q_idx) * t0[n1], -inf)",
        {"captured": [noise(4).exp() * 0.1]},
    ),
    "constant-slope": ("where(kv_idx <= q_idx, qk * 0.125 + to_float(kv_idx - q_idx) * 0.01, -inf)", {}),
    "cap": ("tanh(qk * 0.0025) * 50.0", {}),
    "causal-cap": ("where(kv_idx <= q_idx, tanh(qk * 0.0025) * 50.0, -inf)", {}),
    "keys": ("qk * 0.3 + t0[n1, kv_idx]", {"captured": [noise(4, 417)]}),
    "rows": ("qk * 0.3 + t0[n1, q_idx] * to_float(kv_idx) * 0.01", {"captured": [noise(4, 301)]}),
    "padding": ("where(t0[n0, kv_idx], qk * 0.125, -inf)", {"captured": [torch.arange(417).expand(2, 417) % 3 > 0]}),
    "sink": (CAUSAL, {"sink": "t0[n1]", "captured": [noise(4)]}),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_programs(head_dim: int, name: str) -> None:
    score, changes = PROGRAMS[name]
    check(make_call(score, (2, 4, 301, head_dim), 417, dtype=BF16, **changes))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_ranges(head_dim: int) -> None:
    """Documents, of which the last keys have no query; and padding of a batch."""
    ids = torch.tensor([70, 230, 130, 170]).cumsum(0)
    documents = torch.bucketize(torch.arange(600), ids, right=True).expand(2, 600).contiguous()
    score = "where((t0[n0, q_idx] == t0[n0, kv_idx]) & (kv_idx <= q_idx), qk * 0.125, -inf)"
    check(with_ranges(make_call(score, (2, 2, 600, head_dim), captured=[documents], dtype=BF16)))
    kept = torch.arange(600)[None] < torch.tensor([[600], [333]])
    score = "where((kv_idx <= q_idx) & t0[n0, kv_idx], qk * 0.125, -3.4028234663852886e+38)"
    check(with_ranges(make_call(score, (2, 2, 600, head_dim), captured=[kept], dtype=BF16)))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("score", [PLAIN, CAUSAL], ids=["plain", "causal"])
@pytest.mark.parametrize(
    ("batch", "k_batch"), [((2, 2, 3), (2, 2, 1)), ((2, 5), (2, 1)), ((3, 2), (1, 1)), ((3,), (3,)), ((), ())], ids=str
)
def test_batch_axes(batch: tuple[int, ...], k_batch: tuple[int, ...], score: str, head_dim: int) -> None:
    check(make_call(score, (*batch, 330, head_dim), 290, k_batch=k_batch, dtype=BF16))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_layouts(head_dim: int) -> None:
    """Heads behind positions, as a projection gives them, and rows with some elements between."""
    call = make_call(CAUSAL, (2, 3, 330, head_dim), dtype=BF16)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (call.q, call.k, call.v))
    check(replace(call, q=q, k=k, v=v))
    q, k, v = (torch.nn.functional.pad(x, (0, 8))[..., :head_dim] for x in (call.q, call.k, call.v))
    check(replace(call, q=q, k=k, v=v))


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
        ulps = 2.0**-7 * first[0].float().abs().clamp(min=first[0].float().abs().max() * 2.0**-9)
        assert bool(((dq.float() - first[0].float()).abs() <= ulps).all())


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
