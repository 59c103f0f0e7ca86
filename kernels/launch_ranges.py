"""Prepare the kernels that find what the pass by key tile asks of data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from flashfuse.kernels.backward_ranges import filled_rows_kernel, query_ranges_kernel
from flashfuse.kernels.prepared import Buffer, KernelLaunch, strides_of
from flashfuse.kernels.prepared_backward import Found, Launched
from flashfuse.kernels.spec import MAX_BATCH_AXES

# Key tiles of one program that turns ranges round, and the blocks of queries that it reads at a time.
RANGES_TILES, RANGES_BLOCKS = 16, 64
# Queries that one program of the kernel for filled rows reads at a time.
FILLED_BLOCK = 8192


def query_ranges(kv_ranges: torch.Tensor, q_len: int, kv_len: int, block_kv: int) -> Found:
    """The queries that visit each `block_kv` keys, int32 [N'.., ceil(kv_len / block_kv), 4], as `KvRange`s of queries.

    kv_ranges: [N'.., at least ceil(q_len / MASK_BLOCK), 4], the keys that each block of queries visits.
    """
    *batch, _, _ = kv_ranges.shape
    tiles = -(-kv_len // block_kv)
    variant = {"BLOCK_KV": block_kv, "TILES": RANGES_TILES, "BLOCKS": RANGES_BLOCKS}
    sizes = (*batch, *(1,) * (MAX_BATCH_AXES - len(batch)), q_len, kv_len)
    launch = KernelLaunch(query_ranges_kernel, math.prod(batch) * -(-tiles // RANGES_TILES), variant)
    buffer = Buffer.contiguous((*batch, tiles, 4), torch.int32)
    return Found(buffer, Launched(launch, (strides_of(kv_ranges, tuple(batch)), *sizes)))


def filled_rows(batch: Sequence[int], q_len: int, threshold: float) -> Found:
    """The queries [first, stop) that may have gradients through all keys, int32 [N.., 2], from lse [N.., q_len, 2].

    threshold: see `BackwardProgram.fill_threshold`.
    """
    variant = {"FILL_THRESHOLD": None if threshold == -math.inf else threshold, "BLOCK_Q": FILLED_BLOCK, "num_warps": 8}
    launch = KernelLaunch(filled_rows_kernel, math.prod(batch), variant)
    return Found(Buffer.contiguous((*batch, 2), torch.int32), Launched(launch, (q_len,)))
