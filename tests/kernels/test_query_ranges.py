"""Which queries a key tile is visited by: never too few, and none counted as full whose score may be masked."""

import math

import pytest
import torch

from flashfuse.kernels.bounds import Q_START, Q_STOP, KvRange
from flashfuse.kernels.evaluate import Tile, evaluate, position_symbols, size_values
from flashfuse.kernels.expr import Expr
from flashfuse.kernels.mask import mask_of
from flashfuse.kernels.query_ranges import query_bounds
from flashfuse.kernels.spec import KV_LEN, Q_LEN, AttentionSpec, parse

Q, KV, BLOCK = 37, 45, 8
MASKS = {
    "none": "True",
    "causal": "kv_idx <= q_idx",
    "bottom-right": "kv_idx <= q_idx + (kv_len - q_len)",
    "shifted": "kv_idx <= q_idx - 20",
    "window": "(kv_idx <= q_idx) & (kv_idx > q_idx - 9)",
    "symmetric": "abs(kv_idx - q_idx) < 5",
    "chunked": "(kv_idx <= q_idx) & (kv_idx // 8 == q_idx // 8)",
    "dilated": "((q_idx - kv_idx) % 3 == 0) & (kv_idx <= q_idx)",
    "prefix": "(kv_idx <= q_idx) | (kv_idx < 10)",
    "strided-queries": "kv_idx <= q_idx * 2 + 1",
    "negated": "~(kv_idx > q_idx + 3)",
}


def spec_of(score: str, *captured: torch.dtype) -> AttentionSpec:
    f32 = torch.float32
    return AttentionSpec(0, parse(score, captured), captured, 0, f32, f32, f32, "nan", (0, 1))


def scores(spec: AttentionSpec, program: Expr) -> torch.Tensor:
    axes = tuple(zip(position_symbols(spec), (range(Q), range(KV)), strict=True))
    product = torch.arange(1.0, Q * KV + 1).view(Q, KV)
    tile = Tile(axes, size_values(spec, Q, KV, []), (product,), (), torch.float32, torch.device("cpu"))
    return evaluate(program, tile).expand(Q, KV)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_bounds_by_positions(mask: str) -> None:
    spec = spec_of(f"where({mask}, qk, -inf)")
    score, full = scores(spec, spec.score), scores(spec, mask_of(spec).full)
    for start in range(0, KV, BLOCK):
        keys = slice(start, min(start + BLOCK, KV))
        # Queries and keys have changed places.
        found = query_bounds(spec).kv_range({Q_START: keys.start, Q_STOP: keys.stop, Q_LEN: KV, KV_LEN: Q})
        assert 0 <= found.start <= found.full_start <= found.full_end <= found.end <= Q
        outside = torch.cat([score[: found.start, keys], score[found.end :, keys]])
        assert (outside == -math.inf).all()
        inside = slice(found.full_start, found.full_end)
        assert torch.equal(score[inside, keys], full[inside, keys])


@pytest.mark.parametrize(
    ("mask", "first_keys"),
    [("causal", KvRange(0, 7, Q, Q)), ("window", KvRange(0, 7, 9, 16)), ("shifted", KvRange(20, 27, Q, Q))],
)
def test_bounds_are_tight(mask: str, first_keys: KvRange) -> None:
    bounds = query_bounds(spec_of(f"where({MASKS[mask]}, qk, -inf)"))
    assert bounds.kv_range({Q_START: 0, Q_STOP: BLOCK, Q_LEN: KV, KV_LEN: Q}) == first_keys
