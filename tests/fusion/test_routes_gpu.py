"""Plain attention routed to torch's own kernels on the GPU: the error rule held, for outputs and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from numerics import assert_close_to_exact

import flashfuse

pytestmark = [
    pytest.mark.usefixtures("gradients"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """q [B, S, H, D], k and v [B, S, Hkv, D], as models have them before they are transposed."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * 0.125
    if causal:
        kept = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~kept, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_forward_and_gradients(dtype: torch.dtype, causal: bool, kv_heads: int) -> None:
    given = [torch.randn(2, 256, heads, 64, device="cuda", dtype=dtype) for heads in (4, kv_heads, kv_heads)]
    upstream = torch.randn_like(given[0])
    compiled = torch.compile(
        attend, backend="flashfuse", dynamic=False, options={"flashfuse.route": "always", "flashfuse.strict": True}
    )

    def run(fn: object, wide: bool = False) -> list[torch.Tensor]:
        inputs = [x.double() if wide else x.clone() for x in given]
        out = fn(*(x.requires_grad_() for x in inputs), causal)  # type: ignore[operator]
        return [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]

    actual, eager, exact = run(compiled), run(attend), run(attend, wide=True)
    (report,) = flashfuse.reports()
    assert report.count("routed") == 1, str(report)
    for a, e, x in zip(actual, eager, exact, strict=True):
        assert_close_to_exact(a, e, x)


def test_never_keeps_the_kernel_here() -> None:
    given = [torch.randn(2, 128, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    torch.compile(attend, backend="flashfuse", options={"flashfuse.route": "never"})(*given, True)
    flashfuse.reports()[-1].assert_fused(sites=1)
