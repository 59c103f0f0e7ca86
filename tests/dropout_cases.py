"""Attention calls with dropout, of every kind of program."""

from __future__ import annotations

from typing import Any

import torch
from attention_cases import Call, make_call

CAUSAL = "where(kv_idx <= q_idx, qk * 0.3, -inf)"
B, H, SQ, SK = 2, 3, 21, 19


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# Score, captured tensors, and the spec's other fields.
PROGRAMS: dict[str, tuple[str, list[torch.Tensor], dict[str, Any]]] = {
    "plain": ("qk", [], {}),
    "causal": (CAUSAL, [], {}),
    "bias": ("qk * 0.3 + t0[n1, q_idx, kv_idx]", [noise(H, SQ, SK)], {}),
    "window-min": (f"where(kv_idx > q_idx - 5, qk * 0.3, {torch.finfo(torch.float32).min})", [], {}),
    "factor": ("qk", [noise(H, SK)], {"factor": "t0[n1, kv_idx]"}),
    "rows-kept": ("where(t0[kv_idx], qk, -inf)", [noise(SK) < 0.5], {"factor": "q_idx > 2"}),
    "sink": (CAUSAL, [noise(H)], {"sink": "t0[n1]"}),
    "no-normaliser": ("sigmoid(qk + t0[n1])", [noise(H)], {"normaliser": "none"}),
    "empty-rows": ("where(kv_idx <= q_idx - 3, qk, -inf)", [], {}),
    "empty-rows-zero": ("where(kv_idx <= q_idx - 3, qk, -inf)", [], {"empty_row": "zero"}),
}


def program(name: str, p: float, dtype: torch.dtype = torch.float32, dim: int = 8) -> Call:
    score, captured, fields = PROGRAMS[name]
    captured = [c.to(dtype) if c.is_floating_point() else c for c in captured]
    return make_call(score, (B, H, SQ, dim), SK, captured=captured, dtype=dtype, dropout=p, **fields)
