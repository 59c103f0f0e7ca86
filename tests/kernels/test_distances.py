"""Reads that depend on the distance of a pair alone, and sums of pairs by distance."""

from __future__ import annotations

import pytest
import torch

from flashfuse.kernels.derivative import leaves
from flashfuse.kernels.distances import DistanceSums, by_distance
from flashfuse.kernels.expr import Gather, Load
from flashfuse.kernels.spec import parse, to_text

F32, I64 = torch.float32, torch.int64


BY_DISTANCE = {
    "t0[n1, kv_idx - q_idx + 3]": "t0[n1, (3 + distance)]",
    "t0[2 * (q_idx - kv_idx) + (q_len - 1)]": "t0[(-1 + q_len + (-2 * distance))]",
    "t0[(kv_idx - q_idx + 9) // 2]": "t0[((9 + distance) // 2)]",
    "t0[max(kv_idx - q_idx, 0) + 50]": "t0[(max(distance, 0) + 50)]",
    "t0[abs(kv_idx - q_idx)]": "t0[abs(distance)]",
    "t0[where(kv_idx < q_idx, 1, 0)]": "t0[where((distance < 0), 1, 0)]",
    "t0[t1[kv_idx - q_idx + 9]]": "t0[t1[(9 + distance)]]",
    "t0[kv_idx]": None,
    "t0[q_idx, kv_idx - q_idx]": None,
    "t0[kv_idx // 2 - q_idx // 2]": None,
    "t0[t1[q_idx], kv_idx - q_idx]": None,
}


@pytest.mark.parametrize("read", BY_DISTANCE)
def test_by_distance(read: str) -> None:
    """A position is never negative and a distance may be, so that max(distance, 0) stays what it is."""
    (leaf,) = (e for e in leaves(parse(f"qk + {read}", (F32, I64))) if isinstance(e, (Load, Gather)))
    found = by_distance(leaf)
    assert (None if found is None else to_text(found)) == BY_DISTANCE[read]


SQUARE, TALL, FLAT = (16, 16), (64, 16), (16, 32)


@pytest.mark.parametrize(
    ("lengths", "blocks"),
    [
        ((q, kv), blocks)
        for q, kv in ((1, 1), (16, 16), (41, 35), (3, 50), (70, 3), (133, 7))
        for blocks in (SQUARE, TALL)
    ]
    + [((1, 40), FLAT), ((16, 77), FLAT)],
)
def test_sums_of_tiles(lengths: tuple[int, int], blocks: tuple[int, int]) -> None:
    """All tiles of a matrix added up at their distances leave the sums of its diagonals."""
    (q_len, kv_len), (block_q, block_kv) = lengths, blocks
    values = torch.randint(-99, 99, (2, q_len, kv_len), generator=torch.Generator().manual_seed(0)).float()
    target = DistanceSums.zeros((2, 1), q_len, kv_len, block_q, block_kv, values.device)
    lowest = (-(-q_len // block_q) - 1) * block_q
    for i in range(0, q_len, block_q):
        for j in range(0, kv_len, block_kv):
            tile = values[:, None, i : i + block_q, j : j + block_kv]
            column = j - i + lowest
            target.tiles[..., : tile.shape[-2], column : column + tile.shape[-1]] += tile
    sums = [values.diagonal(d, -2, -1).sum(-1) for d in range(1 - q_len, kv_len)]
    assert torch.equal(target.sums(), torch.stack(sums, -1)[:, None, None])
