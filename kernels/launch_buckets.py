"""Launch the kernel that adds up gradients of pairs in buckets."""

from __future__ import annotations

import torch
import triton

from flashfuse.kernels.backward_buckets import bucket_sums_kernel
from flashfuse.kernels.buckets import BucketSums
from flashfuse.kernels.prepared import Empty, KernelLaunch, Start

# Of a program: at most so many buckets, of a tile of so many rows and keys at a time.
BLOCK_B, BLOCK_Q, BLOCK_KV = 32, 4, 64
# As many programs share all pairs, where they own them together.
ENOUGH_PROGRAMS = 1024


def sum_buckets(empty: Empty, start: Start, of: BucketSums) -> torch.Tensor:
    """The sums of each owner [N, owners, buckets], float32."""
    values, (count, rows, keys) = of.values, of.values.shape
    block = min(BLOCK_B, triton.next_power_of_2(of.buckets))
    blocks = count * -(-of.buckets // block)
    row_blocks = -(-rows // BLOCK_Q)
    rows_each = BLOCK_Q * -(-row_blocks // max(1, min(row_blocks, ENOUGH_PROGRAMS // blocks)))
    owners, owner_blocks = {
        "rows": (rows, row_blocks),
        "keys": (keys, -(-keys // BLOCK_KV)),
        "pairs": (-(-rows // rows_each), -(-rows // rows_each)),
    }[of.owner]
    sums = empty((count, owners, of.buckets), (owners * of.buckets, of.buckets, 1), torch.float32)
    variant = {
        "OF_ROWS": of.owner == "rows",
        "OF_KEYS": of.owner == "keys",
        "BLOCK_B": block,
        "BLOCK_Q": BLOCK_Q,
        "BLOCK_KV": BLOCK_KV,
    }
    numbers = (rows, keys, of.buckets, rows_each, values.stride(0), values.stride(1), *of.strides)
    start(KernelLaunch(bucket_sums_kernel, blocks * owner_blocks, variant), (values, of.at, sums, *numbers))
    return sums
