"""Score programs of every form with their captured tensors, among them kinks and masked positions."""

from __future__ import annotations

import math

import torch

F64 = torch.float64
HEADS, QUERIES, KEYS, SIZE0 = 2, 5, 7, 6
MIN = torch.finfo(torch.float32).min


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)), dtype=F64)


def product() -> torch.Tensor:
    """Products with exact zeros, ones and equal neighbours, where programs have their kinks."""
    qk = random(HEADS, QUERIES, KEYS) * 2
    qk[0, 1, :5] = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0])
    return qk


BIAS, KEEP = random(HEADS, QUERIES, KEYS), random(QUERIES, KEYS) > -0.5
TABLE, BUCKET = random(4, HEADS), torch.arange(QUERIES * KEYS).view(QUERIES, KEYS) % 4
PADDING = torch.tensor([True] * 5 + [False] * 2)
INF_BIAS = torch.where(KEEP, 0.0, -math.inf).to(F64)
SLOPE, CAP = torch.tensor([0.5, 0.25], dtype=F64), torch.tensor(3.0, dtype=F64)
# The products' own values here and there: ties.
TIES = torch.where(KEEP, product()[0], 0.5)
ZEROS = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0, 2.0, -0.0], dtype=F64)
EXPONENTS = torch.tensor([0.0, 1.0, 2.0, 3.5, 0.0, -1.0, 2.0], dtype=F64)

# A score, sink or factor program, and its captured tensors.
PROGRAMS: dict[str, tuple[str, tuple[torch.Tensor, ...]]] = {
    "plain": ("qk * 0.125", ()),
    "causal": ("where(kv_idx <= q_idx, qk * 0.125, -inf)", ()),
    "finite fill": (f"where(kv_idx <= q_idx, qk / 8.0, {MIN!r})", ()),
    "filled above": ("maximum((qk * 0.125) + where(t0[q_idx, kv_idx], 0.0, -1e9), -1e9)", (KEEP,)),
    "bias": ("qk * 0.125 + t0[n0, q_idx, kv_idx]", (BIAS,)),
    "bias of -inf": ("(qk + t0[q_idx, kv_idx]) * 0.125", (INF_BIAS,)),
    "two biases": ("(qk * 0.125 + t0[n0, q_idx, kv_idx]) + t1[kv_idx]", (BIAS, random(KEYS))),
    "one bias read twice": ("qk + t0[n0, q_idx, kv_idx] * t0[n0, q_idx, 0]", (BIAS,)),
    "linear bias": ("qk * 0.125 + t0[n0] * to_float(kv_idx - q_idx)", (SLOPE,)),
    "linear bias, distance": ("qk * 0.125 - abs(to_float(kv_idx - q_idx)) * t0[n0]", (SLOPE,)),
    "logarithm of a distance": ("qk - log(abs(kv_idx - q_idx) + 1) * t0[n0]", (SLOPE,)),
    "soft cap": ("tanh(qk * 0.02) * 50.0", ()),
    "soft cap, bias": ("tanh((qk + t0[n0, q_idx, kv_idx]) / 3.0) * 3.0 + t0[n0, q_idx, kv_idx]", (BIAS,)),
    "soft cap, masked": ("where(t0[q_idx, kv_idx] & (kv_idx <= q_idx), tanh(qk / t1[()]) * t1[()], -inf)", (KEEP, CAP)),
    "clamp": ("min(max(qk, -1.0), 1.0)", ()),
    "clamp between tensors": ("min(max(qk, t0[q_idx, kv_idx]), t1[()])", (TIES, CAP)),
    "maximum": ("maximum(qk, t0[q_idx, kv_idx]) + minimum(t0[q_idx, kv_idx], qk * 2.0)", (TIES,)),
    "maximum with itself": ("maximum(qk, qk * 2.0)", ()),
    "relu": ("max(0.0, qk)", ()),
    "relu squared": ("max(0.0, qk) * max(0.0, qk)", ()),
    "sigmoid": ("sigmoid(qk * 0.125 + t0[()])", (CAP,)),
    "temperature": ("qk / t0[()]", (CAP,)),
    "temperature of heads": ("qk * exp(min(t0[n0], 0.25))", (SLOPE,)),
    "temperature of roots": ("(qk * sqrt(t0[n0])) / (rsqrt(t0[n0]) + 1.0)", (SLOPE,)),
    "look-up": ("qk * 0.125 + t0[t1[q_idx, kv_idx], n0]", (TABLE, BUCKET)),
    "concatenation": ("qk + where(kv_idx < 3, t0[kv_idx], t1[kv_idx - 3])", (random(3), random(4))),
    "padding": ("where((kv_idx < size0) & t0[kv_idx], qk * 0.125, -10000.0)", (PADDING,)),
    "distance penalty": ("qk - abs(qk - t0[q_idx, kv_idx]) * 0.5", (TIES,)),
    "powers": ("pow(qk, 2.0) + pow(qk, 3) - pow(qk, 1.0) + pow(qk, 0.0)", ()),
    "power of a tensor": ("pow(abs(qk) + 0.5, t0[n0]) + pow(2.0, qk)", (SLOPE,)),
    "powers of zero": ("pow(t0[kv_idx], t1[kv_idx])", (ZEROS, EXPONENTS)),
    "waves": ("sin(qk) * cos(t0[n0] * qk) - sin(to_float(q_idx)) * qk", (SLOPE,)),
    "gelu": ("qk * 0.5 * (1.0 + erf(qk * 0.7071067811865476))", ()),
    "softplus": ("where(qk > 20.0, qk, log(1.0 + exp(qk)))", ()),
    "curves": (
        "exp2(qk * 0.3) + expm1(qk * t0[n0]) - log2(abs(qk) + 1.0) + log1p(abs(qk)) + atan(qk) * asinh(qk * t0[n0])",
        (SLOPE,),
    ),
    "remainders": ("fmod(qk, 1.3) * sign(qk) + fmod(3.0, t0[n0]) * qk", (SLOPE,)),
    "rounded": ("to_float16(qk) * 0.125 + to_float16(to_float32(t0[n0, q_idx, kv_idx]))", (BIAS,)),
    "rounded to bfloat16": ("to_bfloat16(qk * 0.125) + to_bfloat16(t0[n0, q_idx, kv_idx])", (BIAS,)),
    "steps": ("qk * floor(qk) + to_float(to_int(qk))", ()),
    "nothing": ("where(kv_idx <= q_idx, 1.0, -inf)", ()),
    "sink": ("t0[n0] * 2.0", (SLOPE,)),
    "head factor": ("where(t0[q_idx, kv_idx], t1[n0] * 1.25, 0.0)", (KEEP, SLOPE)),
    "nested": (
        "where(t0[q_idx, kv_idx], exp(where(kv_idx <= q_idx, qk, -inf)) + t1[n0], -(qk * t1[n0]))",
        (KEEP, SLOPE),
    ),
}  # fmt: skip
