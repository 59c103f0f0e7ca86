"""The forward kernel on a GPU: element types, head dims, sizes, masks and layouts, through the launch table."""

from typing import Any

import pytest
import torch
from attention_cases import Call, make_call
from numerics import assert_close_to_exact, assert_lse_close_to_exact

pytest.importorskip("triton")

from flashfuse.kernels.launch import attention_forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP32_MIN = torch.finfo(torch.float32).min
CAUSAL = "where(kv_idx <= q_idx, qk * 0.125, -inf)"


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False)


def check(call: Call) -> torch.Tensor:
    call = call.to("cuda")
    exact, eager = call.exact(), call.eager()
    out, lse = attention_forward(call)
    assert_close_to_exact(out, eager[0], exact[0])
    assert_lse_close_to_exact(lse, eager[1], exact[1])
    return out


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("head_dim", [16, 32, 40, 64, 72, 80, 96, 128, 192, 256, 320, 512])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check(make_call(CAUSAL, (2, 3, 203, head_dim), 331, dtype=dtype))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 5), (192, 128), (64, 256), (576, 512)])
def test_value_dim_differs(head_dim: int, value_dim: int) -> None:
    check(make_call(CAUSAL, (1, 2, 150, head_dim), 150, value_dim=value_dim, dtype=BF16))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 1000), (17, 3), (129, 127), (1000, 1), (1025, 2049)])
@pytest.mark.parametrize("score", ["qk * 0.125", "where(kv_idx <= q_idx + (kv_len - q_len), qk * 0.125, -inf)"])
def test_lengths(score: str, q_len: int, kv_len: int, dtype: torch.dtype) -> None:
    check(make_call(score, (1, 2, q_len, 64), kv_len, dtype=dtype))


PROGRAMS: dict[str, tuple[str, list[torch.Tensor]]] = {
    "window": ("where((kv_idx <= q_idx) & (kv_idx > q_idx - 100), qk * 0.125, -inf)", []),
    "symmetric": ("where((kv_idx <= q_idx + 50) & (kv_idx >= q_idx - 50), qk * 0.125, -inf)", []),
    "chunked": ("where((kv_idx <= q_idx) & (kv_idx // 64 == q_idx // 64), qk * 0.125, -inf)", []),
    "additive-minimum": (f"qk * 0.125 + where(kv_idx <= q_idx - 200, 0.0, {FP32_MIN!r})", []),
    "filled-minimum": (f"where(kv_idx <= q_idx - 200, qk * 0.125, {FP32_MIN!r})", []),
    "filled-1e4": ("where(kv_idx <= q_idx - 200, qk * 0.125, -10000.0)", []),
    "empty-rows": ("where(kv_idx <= q_idx - 200, qk * 0.125, -inf)", []),
    "alibi": ("where(kv_idx <= q_idx, qk * 0.125 + to_float(kv_idx - q_idx) * t0[n1], -inf)", [noise(4).exp() * 0.1]),
    "softcap": ("where(kv_idx <= q_idx, tanh(qk * 0.0025) * 50.0, -inf)", []),
    "bias": ("qk * 0.125 + t0[0, n1, q_idx, kv_idx]", [noise(1, 4, 301, 417, dtype=BF16)]),
    "transposed-bias": ("qk * 0.125 + t0[kv_idx, q_idx]", [noise(417, 301)]),
    "table": ("qk * 0.125 + t0[q_idx - kv_idx + (kv_len - 1), n1]", [noise(717, 4)]),
    "bool": ("where(t0[n0, q_idx, kv_idx], qk * 0.125, -inf)", [noise(2, 301, 417) < 1.0]),
    "padding": (f"qk * 0.125 + where(t0[n0, kv_idx], 0.0, {FP32_MIN!r})", [noise(2, 417) < 0.5]),
    "documents": ("where(t0[q_idx] == t0[kv_idx], qk * 0.125, -inf)", [torch.arange(417) // 100]),
    "sigmoid-gate": ("qk * sigmoid(t0[n1])", [noise(4)]),
}


@pytest.mark.parametrize("empty_row", ["nan", "zero"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str, dtype: torch.dtype, empty_row: str) -> None:
    score, captured = PROGRAMS[name]
    check(make_call(score, (2, 4, 301, 64), 417, captured=captured, dtype=dtype, empty_row=empty_row))


@pytest.mark.parametrize("groups", [2, 8])
def test_grouped_heads_share_keys(groups: int) -> None:
    check(make_call(CAUSAL, (2, 3, groups, 513, 128), k_batch=(2, 3, 1), dtype=BF16))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_strided_layouts(dtype: torch.dtype) -> None:
    """Queries of a fused projection, keys stored transposed, values and output with heads innermost."""
    call = make_call(CAUSAL, (2, 4, 300, 64), dtype=dtype, out_order=(0, 2, 1, 3)).to("cuda")
    q = torch.cat([call.q, call.q, call.q], dim=-1)[..., 64:128]
    k = call.k.mT.contiguous().mT
    v = call.v.transpose(1, 2).contiguous().transpose(1, 2)
    out = check(Call(call.spec, q, k, v, [], call.sizes))
    assert out.transpose(1, 2).is_contiguous()


def test_expanded_and_unaligned_operands() -> None:
    call = make_call(CAUSAL, (2, 4, 200, 64), dtype=BF16).to("cuda")
    k = call.k[:1].expand(2, -1, -1, -1)
    storage = torch.zeros(call.v.numel() + 1, dtype=BF16, device="cuda")
    v = storage[1:].view_as(call.v).copy_(call.v)
    check(Call(call.spec, call.q, k, v, [], call.sizes))


def test_offsets_past_32_bits() -> None:
    """One head's keys lie more than 2**31 elements apart in a layout with a long row."""
    rows, width = 40, 1 << 26
    storage = torch.empty(rows, width, dtype=BF16, device="cuda")
    call = make_call("qk * 0.125", (1, 1, 64, 64), rows, dtype=BF16).to("cuda")
    k = storage[:, -64:].copy_(call.k[0, 0])[None, None]
    check(Call(call.spec, call.q, k, call.v, [], call.sizes))


def test_many_batches() -> None:
    """More (batch, head) pairs than a grid has along y or z."""
    check(make_call("qk * 0.125", (70000, 3, 16), 5, dtype=FP16))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_sequence_is_deterministic(head_dim: int) -> None:
    call = make_call(CAUSAL, (1, 2, 4096, head_dim), dtype=BF16).to("cuda")
    first, second = attention_forward(call)[0], check(call)
    assert torch.equal(first, second)


def test_inside_a_cuda_graph_and_on_a_side_stream() -> None:
    call = make_call(CAUSAL, (2, 4, 300, 64), dtype=BF16).to("cuda")
    expected = attention_forward(call)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_forward(call)[0]
    captured.fill_(torch.nan)
    graph.replay()
    assert torch.equal(captured, expected)


def test_lengths_do_not_recompile() -> None:
    from flashfuse.kernels.forward import attention_forward_kernel

    def compiled() -> int:
        caches: Any = attention_forward_kernel.device_caches[torch.cuda.current_device()]
        return len(caches[0])

    attention_forward(make_call("qk * 0.77", (2, 3, 301, 64), 500, dtype=BF16).to("cuda"))
    before = compiled()
    for q_len, kv_len, batch in ((302, 512, 16), (512, 77, 2), (999, 1, 5)):
        attention_forward(make_call("qk * 0.77", (batch, 3, q_len, 64), kv_len, dtype=BF16).to("cuda"))
    assert compiled() == before
