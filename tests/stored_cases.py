"""Caches as they are stored: what a key or value is of its stored element, for calls of every implementation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from attention_cases import Call, make_call

BATCH, HEADS, GROUPS, KV_LEN, DIM, VALUE_DIM = 2, 2, 3, 37, 16, 12
INT8, UINT8, FP16, BF16 = torch.int8, torch.uint8, torch.float16, torch.bfloat16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def scales(*shape: int) -> torch.Tensor:
    """What 127 and its like are multiplied by."""
    return 0.004 + 0.016 * torch.rand(shape, generator=torch.Generator().manual_seed(1))


def zeros(*shape: int) -> torch.Tensor:
    """Zero points of bytes."""
    return torch.randint(90, 160, shape, generator=torch.Generator().manual_seed(2), dtype=UINT8)


@dataclass(frozen=True)
class Cache:
    """k and v of `stored` type; `key` and `value` over two batch axes, KV_LEN keys, DIM and VALUE_DIM columns."""

    stored: torch.dtype
    key: str | None
    value: str | None
    captured: tuple[torch.Tensor, ...] = ()
    score: str = "qk * 0.3"

    def call(self, dtype: torch.dtype, q_len: int, score: str | None = None) -> Call:
        """Two key heads, each shared by `GROUPS` query heads."""
        return make_call(
            score or self.score, (BATCH, HEADS, GROUPS, q_len, DIM), KV_LEN, k_batch=(BATCH, HEADS, 1),
            value_dim=VALUE_DIM, captured=[c if c.dtype == UINT8 else c.to(dtype) for c in self.captured],
            dtype=dtype, key=self.key, value=self.value, stored=self.stored,
        )  # fmt: skip


CACHES = {
    "int8-as-it-is": Cache(INT8, None, None, score="qk * 0.003"),
    "int8-by-tensor": Cache(INT8, "x * t0[()]", "x * t0[()]", (scales(),)),
    "int8-by-head": Cache(INT8, "x * t0[n1]", "x * t1[n0, n1]", (scales(HEADS), scales(BATCH, HEADS))),
    "int8-by-token": Cache(
        INT8, "x * t0[n0, n1, kv_idx, 0]", "x * t1[n0, n1, kv_idx, 0]",
        (scales(BATCH, HEADS, KV_LEN, 1), scales(BATCH, HEADS, KV_LEN, 1)),
    ),
    "int8-by-channel": Cache(INT8, "x * t0[n1, d_idx]", "x / t1[d_idx]", (scales(HEADS, DIM), 1 / scales(VALUE_DIM))),
    "int8-by-group": Cache(
        INT8, "x * t0[n1, kv_idx, d_idx // 4]", "x * t1[kv_idx // 8, d_idx]",
        (scales(HEADS, KV_LEN, DIM // 4), scales(5, VALUE_DIM)),
    ),
    "zero-points": Cache(
        UINT8, "(x - to_float(t0[n0, n1, kv_idx])) * t1[n1]", "x * t2[d_idx] - t3[d_idx]",
        (zeros(BATCH, HEADS, KV_LEN), scales(HEADS), scales(VALUE_DIM), 128 * scales(VALUE_DIM)),
    ),
    "e4m3-as-it-is": Cache(E4M3, None, None),
    "e4m3-by-head": Cache(E4M3, "x * t0[n1]", "x * t1[n1]", (60 * scales(HEADS), 60 * scales(HEADS))),
    "e5m2-by-token": Cache(E5M2, "x * t0[kv_idx]", "x * t0[kv_idx]", (60 * scales(KV_LEN),)),
    "values-alone": Cache(INT8, None, "where(kv_idx < 5, x * 0.01, x * t0[kv_idx])", (scales(KV_LEN),), "qk * 0.003"),
    "by-query-head": Cache(INT8, "x * t0[n1, n2]", "x * t0[n1, n2]", (scales(HEADS, GROUPS),)),
}  # fmt: skip
