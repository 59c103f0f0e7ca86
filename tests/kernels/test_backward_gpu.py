"""The backward kernels on a GPU: element types, head dims, sizes, masks and layouts, through the launch table."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from attention_cases import Call, make_call
from gradient_cases import Gradients, check_gradients, check_rows_of_one_value, differentiable, grad_out

pytest.importorskip("triton")

from flashfuse.kernels import captured_grad, launch_backward
from flashfuse.kernels.launch import attention_forward
from flashfuse.kernels.launch_backward import attention_backward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
FP32_MIN = torch.finfo(torch.float32).min
CAUSAL = "where(kv_idx <= q_idx, qk * 0.125, -inf)"


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False)


def backward(call: Call, grad: torch.Tensor, wanted: Sequence[int]) -> Gradients:
    needs = [at in wanted for at in differentiable(call)]
    return attention_backward(call, grad, *attention_forward(call), needs)


@pytest.fixture
def _by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that are left to torch would pass without one."""
    monkeypatch.setattr(launch_backward, "attention_backward_tiled", None)


def check(call: Call) -> Gradients:
    return check_gradients(call.to("cuda"), backward, draws=4)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@TYPES
@pytest.mark.parametrize("head_dim", [16, 32, 40, 64, 72, 80, 96, 128, 192, 256, 320, 512])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check(make_call(CAUSAL, (2, 3, 203, head_dim), 331, dtype=dtype))


@TYPES
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256, 512])
def test_rows_that_are_one_value(head_dim: int, dtype: torch.dtype) -> None:
    """In every tile shape, and by every instruction, the product of rows is rounded as that of tiles."""
    call = make_call("qk * 300.0", (2, 3, 203, head_dim), 331, dtype=dtype)
    check_rows_of_one_value(call.to("cuda"), backward)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 5), (192, 128), (64, 256)])
def test_value_dim_differs(head_dim: int, value_dim: int) -> None:
    check(make_call(CAUSAL, (1, 2, 150, head_dim), 150, value_dim=value_dim, dtype=BF16))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1000), (17, 3), (129, 127), (1025, 2049)])
@pytest.mark.parametrize("score", ["qk * 0.125", "where(kv_idx <= q_idx + (kv_len - q_len), qk * 0.125, -inf)"])
def test_lengths(score: str, q_len: int, kv_len: int, dtype: torch.dtype) -> None:
    check(make_call(score, (1, 2, q_len, 64), kv_len, sink="0.5", empty_row="zero", dtype=dtype))


PROGRAMS: dict[str, tuple[str, list[torch.Tensor]]] = {
    "window": ("where((kv_idx <= q_idx) & (kv_idx > q_idx - 100), qk * 0.125, -inf)", []),
    "symmetric": ("where((kv_idx <= q_idx + 50) & (kv_idx >= q_idx - 50), qk * 0.125, -inf)", []),
    "chunked": ("where((kv_idx <= q_idx) & (kv_idx // 64 == q_idx // 64), qk * 0.125, -inf)", []),
    "additive-minimum": (f"qk * 0.125 + where(kv_idx <= q_idx - 200, 0.0, {FP32_MIN!r})", []),
    "filled-minimum": (f"where(kv_idx <= q_idx - 200, qk * 0.125, {FP32_MIN!r})", []),
    "filled-1e4": ("where(kv_idx <= q_idx - 200, qk * 0.125, -10000.0)", []),
    "filled-1e9": ("where(kv_idx <= q_idx - 200, qk * 0.125, -1000000000.0)", []),
    "additive-1e4": ("qk * 0.125 + where(kv_idx <= q_idx - 200, 0.0, -10000.0)", []),
    "alibi": ("where(kv_idx <= q_idx, qk * 0.125 + to_float(kv_idx - q_idx) * t0[n1], -inf)", [noise(4).exp() * 0.1]),
    "temperature": ("qk * (t0[n1] * 0.125)", [noise(4)]),
    "softcap": ("where(kv_idx <= q_idx, tanh(qk * 0.0025) * 50.0, -inf)", []),
    "bias": ("qk * 0.125 + t0[0, n1, q_idx, kv_idx]", [noise(1, 4, 301, 417, dtype=BF16)]),
    "transposed-bias": ("qk * 0.125 + t0[kv_idx, q_idx]", [noise(417, 301)]),
    "shifted-bias": ("qk * 0.125 + t0[n1, q_idx, kv_idx - q_idx + 300]", [noise(4, 301, 717)]),
    "distances": ("qk * 0.125 + t0[n1, kv_idx - q_idx + 300]", [noise(4, 717)]),
    "distances-causal": ("where(kv_idx <= q_idx, qk * 0.125 + t0[n1, q_idx - kv_idx], -inf)", [noise(4, 301)]),
    "distances-window": (
        "where((kv_idx <= q_idx) & (kv_idx > q_idx - 100), qk * 0.125 + t0[n0, n1, kv_idx - q_idx + 300], -inf)",
        [noise(2, 4, 717)],
    ),
    "distances-minimum": (
        f"where(kv_idx <= q_idx - 200, qk * 0.125 + t0[kv_idx - q_idx + 300], {FP32_MIN!r})",
        [noise(717)],
    ),
    "buckets": ("qk * 0.125 + t0[min(max(kv_idx - q_idx, -20), 20) + 20, n1]", [noise(41, 4)]),
    "decomposed": (
        "qk * 0.125 + t0[n1 + 4 * n0, q_idx // 20, q_idx % 20, kv_idx // 20]"
        " + t1[n1 + 4 * n0, q_idx // 20, q_idx % 20, kv_idx % 20]",
        [noise(8, 16, 20, 21, dtype=BF16), noise(8, 16, 20, 20, dtype=BF16)],
    ),
    "buckets-of-rows": ("qk * 0.125 + t0[n1, q_idx, min(max(kv_idx - q_idx, -9), 9) + 9]", [noise(4, 301, 19)]),
    "buckets-of-keys": (
        "where(kv_idx <= q_idx, qk * 0.125 + t0[n0, n1, kv_idx, min(q_idx - kv_idx, 31)], -inf)",
        [noise(2, 4, 417, 32, dtype=BF16)],
    ),
    "looked-up": (
        "qk * 0.125 + t0[t1[q_idx, kv_idx], n1]",
        [noise(50, 4), (torch.arange(301)[:, None] * 7 + torch.arange(417) * 3) % 50],
    ),
    "sums": ("qk * 0.125 + t0[q_idx + kv_idx]", [noise(717)]),
    "key-bias": ("qk * 0.125 + t0[n0, kv_idx]", [noise(2, 417)]),
    "bool": ("where(t0[n0, q_idx, kv_idx], qk * 0.125, -inf)", [noise(2, 301, 417) < 1.0]),
    "padding": (f"qk * 0.125 + where(t0[n0, kv_idx], 0.0, {FP32_MIN!r})", [noise(2, 417) < 0.5]),
}


@TYPES
@pytest.mark.usefixtures("_by_the_kernels")
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str, dtype: torch.dtype) -> None:
    score, captured = PROGRAMS[name]
    check(make_call(score, (2, 4, 301, 64), 417, captured=captured, dtype=dtype))


@pytest.mark.parametrize("empty_row", ["nan", "zero"])
def test_rows_without_a_key(empty_row: str) -> None:
    score = "where(kv_idx <= q_idx - 200, qk * 0.125, -inf)"
    check(make_call(score, (2, 4, 301, 64), 417, empty_row=empty_row, dtype=BF16))


@TYPES
@pytest.mark.parametrize("fill", ["-inf", repr(FP32_MIN), "-10000.0"])
def test_sinks(fill: str, dtype: torch.dtype) -> None:
    score = f"where(kv_idx <= q_idx - 200, qk * 0.125, {fill})"
    check(make_call(score, (2, 4, 301, 64), 417, sink="t0[n1]", captured=[noise(4)], empty_row="zero", dtype=dtype))


@TYPES
@pytest.mark.parametrize("factor", ["t0[n1]", "where(kv_idx <= q_idx, t0[n1], 0.5)"])
def test_factors(factor: str, dtype: torch.dtype) -> None:
    check(make_call(CAUSAL, (2, 4, 301, 64), 417, factor=factor, captured=[noise(4)], dtype=dtype))


@TYPES
def test_scores_as_weights(dtype: torch.dtype) -> None:
    score = "sigmoid(where(kv_idx <= q_idx, qk * 0.125 + t0[n1], -inf))"
    check(make_call(score, (2, 4, 301, 64), 417, normaliser="none", captured=[noise(4)], dtype=dtype))


@pytest.mark.parametrize("groups", [2, 8])
def test_grouped_heads_share_keys(groups: int) -> None:
    check(make_call(CAUSAL, (2, 3, groups, 513, 128), k_batch=(2, 3, 1), dtype=BF16))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_strided_layouts(dtype: torch.dtype) -> None:
    """Queries of a fused projection, keys stored transposed, values and output with heads innermost."""
    call = make_call(CAUSAL, (2, 4, 300, 64), dtype=dtype, out_order=(0, 2, 1, 3)).to("cuda")
    q = torch.cat([call.q, call.q, call.q], dim=-1)[..., 64:128]
    k, v = call.k.mT.contiguous().mT, call.v.transpose(1, 2).contiguous().transpose(1, 2)
    _, dk, dv = check(replace(call, q=q, k=k, v=v))
    assert (dk.stride(), dv.stride()) == (k.stride(), v.stride())
    check(replace(call, q=call.q.mT.contiguous().mT))


@TYPES
@pytest.mark.usefixtures("_by_the_kernels")
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256, 512])
def test_distances_at_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    """A table shared over the batch, in the tiles of each row of the launch table, with dropout."""
    score = "where(kv_idx <= q_idx + 50, qk * 0.125 + t0[n1, kv_idx - q_idx + 202], -inf)"
    check(make_call(score, (3, 2, 203, head_dim), 331, captured=[noise(2, 533)], dropout=0.1, dtype=dtype))


@pytest.mark.usefixtures("_by_the_kernels")
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1000), (17, 3), (129, 127), (1025, 2049)])
def test_distances_of_any_lengths(q_len: int, kv_len: int) -> None:
    score = "qk * 0.125 + t0[n1, kv_idx - q_idx + (q_len - 1)]"
    call = make_call(score, (2, 2, q_len, 64), kv_len, sink="0.5", captured=[noise(2, q_len + kv_len - 1)], dtype=BF16)
    check(call)


LONG = {
    "alibi": ("to_float(kv_idx - q_idx) * t0[n1]", torch.tensor([0.5, 0.01])),
    "distances": ("t0[n1, q_idx - kv_idx]", noise(2, 4096)),
    "buckets": ("t0[min(q_idx - kv_idx, 31), n1]", noise(32, 2)),
    "buckets-of-rows": ("t0[n1, q_idx, min(q_idx - kv_idx, 31)]", noise(2, 4096, 32)),
    "sums": ("t0[n1, q_idx + kv_idx]", noise(2, 8192)),
}


@pytest.mark.usefixtures("_by_the_kernels")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", LONG)
def test_long_sequence_is_deterministic(name: str, head_dim: int) -> None:
    added, captured = LONG[name]
    score = f"where(kv_idx <= q_idx, qk * 0.125 + {added}, -inf)"
    call = make_call(score, (1, 2, 4096, head_dim), captured=[captured], dtype=BF16).to("cuda")
    first, second = backward(call, grad_out(call), [0, 1, 2, 3]), check(call)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["alibi", "buckets", "decomposed", "buckets-of-rows", "looked-up"])
def test_inside_a_cuda_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the device; the check of positions that are looked up did."""
    monkeypatch.setattr(captured_grad, "WORKSPACE", 2**20)
    score, captured = PROGRAMS[name]
    call = make_call(score, (2, 4, 301, 64), 417, captured=captured, dtype=BF16).to("cuda")
    grad, wanted = grad_out(call), differentiable(call)
    expected = backward(call, grad, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backward(call, grad, wanted)
    for x in captured:
        x.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.usefixtures("_by_the_kernels")
@pytest.mark.parametrize("read", ["", "t0[q_idx - kv_idx]", "t0[min(q_idx - kv_idx, q_idx // 2)]"])
def test_memory_is_linear_in_the_sequence(read: str) -> None:
    """Beside the gradients, numbers of rows only, and a tile for each distance of tiles where a table has them, or
    gradients of as many pairs at a time where they share elements."""

    def peak(length: int) -> int:
        score = f"where(kv_idx <= q_idx, qk * 0.125 + {read}, -inf)" if read else CAUSAL
        call = make_call(score, (1, 2, length, 64), captured=[noise(length)] if read else [], dtype=BF16).to("cuda")
        grad, (out, lse) = grad_out(call), attention_forward(call)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention_backward(call, grad, out, lse, [True] * len(call.operands))
        return torch.cuda.max_memory_allocated() - before

    peak(2048)
    assert peak(16384) <= 9 * peak(2048)
