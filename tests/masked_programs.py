"""Score programs with every kind of mask and captured tensor, for batch axes [2, 3], 45 queries and 37 keys."""

from __future__ import annotations

import torch

FP32_MIN = torch.finfo(torch.float32).min
CAUSAL = "where(kv_idx <= q_idx, qk * 0.3, -inf)"


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


# A score and its captured tensors.
PROGRAMS: dict[str, tuple[str, list[torch.Tensor]]] = {
    "plain": ("qk", []),
    "scaled": ("qk * 0.3", []),
    "causal": (CAUSAL, []),
    "bottom-right": ("where(kv_idx <= q_idx + (kv_len - q_len), qk, -inf)", []),
    "window": ("where((kv_idx <= q_idx) & (kv_idx > q_idx - 9), qk * 0.3, -inf)", []),
    "dilated": ("where((q_idx - kv_idx) % 3 == 0, qk, -inf)", []),
    "chunked": ("where((kv_idx <= q_idx) & (kv_idx // 8 == q_idx // 8), qk, -inf)", []),
    "alibi": ("qk * 0.3 + to_float(kv_idx - q_idx) * t0[n1]", [noise(3)]),
    "softcap": ("where(kv_idx <= q_idx, tanh(qk * 0.1) * 5.0, -inf)", []),
    "bias": ("qk * 0.3 + t0[n0, n1, q_idx, kv_idx]", [noise(2, 3, 45, 37)]),
    "causal-bias": ("where(kv_idx <= q_idx, qk + t0[0, n1, q_idx, kv_idx], -inf)", [noise(1, 3, 45, 37)]),
    "bias-table": ("qk + t0[q_idx - kv_idx + (kv_len - 1), n1]", [noise(81, 3, dtype=torch.float16)]),
    "scalar": ("qk * t0[()]", [torch.tensor(0.7)]),
    "padding": (f"where(t0[n0, kv_idx], qk * 0.3, {FP32_MIN!r})", [noise(2, 37) < 0.5]),
    "documents": ("where(t0[kv_idx] == t0[kv_idx * 0], qk, -inf)", [torch.arange(37) // 20]),
    "concatenated": ("qk + where(kv_idx < 20, t0[kv_idx], t1[kv_idx - 20])", [noise(20), noise(17)]),
    "constant": ("0.5", []),
    "no-product": ("t0[kv_idx]", [noise(37)]),
}
