"""What the pass by keys asks of data, as kernels find it: on a GPU where there is one, otherwise interpreted."""

import math

import pytest
import torch

pytest.importorskip("triton")

from triton_backward import DEVICE, RUNS

from flashfuse.kernels.launch_ranges import filled_rows, query_ranges
from flashfuse.kernels.mask import MASK_BLOCK
from flashfuse.kernels.prepared import empty_on, start
from flashfuse.kernels.prepared_backward import Found
from flashfuse.kernels.ranges import hull_and_run

pytestmark = RUNS


def found(asked: Found, of: torch.Tensor) -> torch.Tensor:
    result = empty_on(of.device)(*asked.buffer).fill_(-7)
    start(asked.launched.launch, (of, result, *asked.launched.numbers))
    return result.cpu()


def turned_round(kv_ranges: torch.Tensor, q_len: int, kv_len: int, block: int) -> torch.Tensor:
    """`query_ranges` in torch."""
    blocks = -(-q_len // MASK_BLOCK)
    # [N.., 1, blocks of queries] each
    visited, full_start, full_end, end = kv_ranges[..., None, :blocks, :].unbind(-1)
    # [key tiles, 1]
    first = torch.arange(0, kv_len, block)[:, None]
    last = (first + block).clamp(max=kv_len)
    some = (visited < last) & (end > first)
    every = some & (full_start <= first) & (full_end >= last)
    ranges = torch.stack(hull_and_run(some, every, torch.arange(blocks)), -1) * MASK_BLOCK
    return ranges.clamp(max=q_len).to(torch.int32)


def edges(*shape: int, kv_len: int) -> torch.Tensor:
    """Ranges of keys: any, wide ones that leave many tiles alone, and empty ones."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(3, (*shape, 1), generator=generator)
    some = (torch.rand(*shape, 4, generator=generator) * (kv_len + 1)).int().sort(-1).values
    wide = torch.stack(
        [some[..., 0] // 8, some[..., 1] // 8, kv_len - some[..., 0] // 8, some[..., 0] * 0 + kv_len], -1
    )
    return torch.where(kind == 0, some, torch.where(kind == 1, wide, some[..., :1])).int()


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (3 * MASK_BLOCK - 5, 250), (70 * MASK_BLOCK, 300), (40, 1100)])
@pytest.mark.parametrize("batch", [(), (2,), (2, 1, 3, 1)])
def test_ranges_turned_round(batch: tuple[int, ...], q_len: int, kv_len: int, block: int) -> None:
    """As torch turns them round, with more rows than there are blocks, and in any strides."""
    kv_ranges = edges(*batch, -(-q_len // MASK_BLOCK) + 2, kv_len=kv_len)
    expected = turned_round(kv_ranges, q_len, kv_len, block)
    for laid_out in (kv_ranges, kv_ranges.mT.contiguous().mT):
        moved = laid_out.to(DEVICE)
        assert torch.equal(found(query_ranges(moved, q_len, kv_len, block), moved), expected)


def test_every_pair_is_visited() -> None:
    """Every pair of a query block and a key tile that meet is kept, and full only where the whole tile is."""
    q_len, kv_len, block = 3 * MASK_BLOCK - 5, 250, 32
    kv_ranges = edges(2, 4, kv_len=kv_len)
    moved = kv_ranges.to(DEVICE)
    result = found(query_ranges(moved, q_len, kv_len, block), moved)
    assert result.shape == (2, -(-kv_len // block), 4)
    assert result.dtype == torch.int32
    for n in range(2):
        for tile, (first_query, full_start, full_end, end) in enumerate(result[n].tolist()):
            first, last = tile * block, min(tile * block + block, kv_len)
            assert 0 <= first_query <= full_start <= full_end <= end <= q_len
            for number, (visited, full, full_stop, stop) in enumerate(kv_ranges[n, :3].tolist()):
                position = number * MASK_BLOCK
                if visited < last and stop > first:
                    assert first_query <= position < end
                if full_start <= position < full_end:
                    assert full <= first
                    assert last <= full_stop


@pytest.mark.parametrize("threshold", [-math.inf, -1e4])
@pytest.mark.parametrize("q_len", [1, 100, 2048, 5000])
def test_filled_rows(q_len: int, threshold: float) -> None:
    """From the first to the last row that is NaN or, with a fill, not above it; none where there is no such row."""
    lse = torch.rand(2, 4, q_len, 2) + 0.5
    generator = torch.Generator().manual_seed(0)
    for n, number in enumerate((-1e4, -math.inf, -2e4)):
        lse[1, n, torch.randint(q_len, (2,), generator=generator), 0] = number
    lse[0, 1, q_len // 2, 1] = math.nan
    lse[0, 2, -1, 1] = math.nan
    lse[0, 3] = torch.tensor([-math.inf, 0.0])
    rows = lse[..., 1].isnan() | ((lse[..., 0] <= threshold) & (threshold > -math.inf))
    expected = [[int(r.nonzero()[0]), int(r.nonzero()[-1]) + 1] if r.any() else [q_len, 0] for r in rows.flatten(0, 1)]
    result = found(filled_rows((2, 4), q_len, threshold), lse.to(DEVICE))
    assert result.flatten(0, 1).tolist() == expected
