"""The flash-decoding kernels on a GPU: types, sizes, masks, long caches and CUDA graphs, through their table."""

from typing import Any

import pytest
import torch
from attention_cases import Call, make_call
from masked_programs import FP32_MIN, noise
from numerics import assert_close_to_exact, assert_lse_close_to_exact

pytest.importorskip("triton")

from flashfuse.kernels.decode import attention_split_kernel
from flashfuse.kernels.launch_decode import attention_decode, prepare_decode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BOTTOM_RIGHT = "where(kv_idx <= q_idx + (kv_len - q_len), qk * 0.125, -inf)"


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False)


def check(call: Call, splits: int | None = None) -> torch.Tensor:
    call = call.to("cuda")
    exact, eager = call.exact(), call.eager()
    out, lse = attention_decode(call, splits=splits)
    assert_close_to_exact(out, eager[0], exact[0])
    assert_lse_close_to_exact(lse, eager[1], exact[1])
    return out


def grouped(score: str, q_len: int, kv_len: int, groups: int = 4, head_dim: int = 64, **more: Any) -> Call:
    return make_call(score, (2, 3, groups, q_len, head_dim), kv_len, k_batch=(2, 3, 1), **{"dtype": BF16, **more})


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("head_dim", [16, 40, 64, 80, 128, 192, 256, 512])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    score = BOTTOM_RIGHT.replace("0.125", f"{head_dim**-0.5}")
    check(grouped(score, 1, 1003, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("q_len", [1, 2, 5, 16])
@pytest.mark.parametrize("groups", [1, 3, 4, 7, 8, 12, 28])
def test_groups_and_queries(groups: int, q_len: int) -> None:
    check(grouped(BOTTOM_RIGHT, q_len, 777, groups))


@pytest.mark.parametrize("splits", [1, 2, 5, 64, None])
@pytest.mark.parametrize("kv_len", [1, 17, 64, 1000, 8191])
def test_lengths_and_splits(kv_len: int, splits: int | None) -> None:
    check(grouped("qk * 0.125", 1, kv_len), splits)


PROGRAMS: dict[str, tuple[str, list[torch.Tensor], dict[str, Any]]] = {
    "window": ("where(kv_idx > q_idx + (kv_len - q_len) - 100, qk * 0.125, -inf)", [], {}),
    "alibi": ("qk * 0.125 + to_float(kv_idx - q_idx) * t0[n1, n2]", [noise(3, 4).exp() * 0.01], {}),
    "softcap": ("tanh(qk * 0.0025) * 50.0", [], {}),
    "bias": ("qk * 0.125 + t0[0, n1, n2, q_idx, kv_idx]", [noise(1, 3, 4, 2, 917, dtype=BF16)], {}),
    "padding": (f"where(t0[n0, kv_idx], qk * 0.125, {FP32_MIN!r})", [noise(2, 917) < 0.5], {}),
    "moderate": ("where(t0[n0, kv_idx], qk * 0.125, -10000.0)", [noise(2, 917) < 0.5], {}),
    "nothing": (f"where(t0[n0, kv_idx], qk * 0.125, {FP32_MIN!r})", [torch.zeros(2, 917) > 0], {}),
    "filled-by-position": (f"where(kv_idx < q_idx * 300, qk * 0.125, {FP32_MIN!r})", [], {}),
    "sink": ("qk * 0.125", [noise(3, 4)], {"sink": "t0[n1, n2]"}),
    "factor": ("qk * 0.125", [noise(3, 4, 917)], {"factor": "t0[n1, n2, kv_idx]"}),
    "sigmoid": ("sigmoid(qk * 0.125)", [], {"normaliser": "none"}),
}


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("splits", [1, 6])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str, splits: int, dtype: torch.dtype) -> None:
    score, captured, more = PROGRAMS[name]
    check(grouped(score, 2, 917, captured=captured, dtype=dtype, **more), splits)


def test_a_million_keys() -> None:
    """More than 2**31 elements lie between the first key and the last."""
    call = make_call("qk * 0.125", (1, 8, 4, 1, 64), 8, k_batch=(1, 8, 1), dtype=BF16)
    keys = [torch.randn(1, 1 << 20, 36, 64, dtype=BF16, device="cuda")[:, :, -8:].transpose(1, 2) for _ in range(2)]
    k, v = (x.unsqueeze(2) for x in keys)
    assert k.stride(-2) * k.shape[-2] > 2**31
    check(call.on([call.q.to("cuda"), k, v]))


def test_a_growing_cache_does_not_recompile() -> None:
    def compiled() -> int:
        caches: Any = attention_split_kernel.device_caches[torch.cuda.current_device()]
        return len(caches[0])

    counts = []
    for kv_len in (1000, 1001, 1024, 2047, 5000, 20000):
        call = grouped("qk * 0.77", 1, kv_len).to("cuda")
        prepared = prepare_decode(call)
        assert prepared is not None
        assert len(prepared.launches) == 2
        attention_decode(call)
        counts.append(compiled())
    assert counts[0] == counts[-1]


def test_inside_a_cuda_graph_with_another_cache_position() -> None:
    """A replay reads the length on the device, and leaves the same bits as a launch."""
    length = torch.tensor(300, device="cuda")
    call = grouped("where(kv_idx < t0[()], qk * 0.125, -inf)", 1, 4096, captured=[length]).to("cuda")
    attention_decode(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_decode(call)[0]
    for n in (300, 4000, 17):
        call.captured[0].fill_(n)
        graph.replay()
        assert torch.equal(captured, attention_decode(call)[0])
        check(call)
