"""The captured tensor whose elements for each pair of a query and a key the kernels for Hopper load by tiles."""

from __future__ import annotations

import itertools
import math

import torch

from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.codegen_hopper import pair_read
from flashfuse.kernels.expr import Load, free_symbols
from flashfuse.kernels.launch_hopper import BATCH_AXES
from flashfuse.kernels.spec import batch_symbol


def of_pairs(call: AttentionCall) -> torch.Tensor | None:
    """[n.., Tq, Tkv]: that tensor as far as there are queries and keys, None where there is none."""
    read = pair_read(call.spec)
    return None if read is None else call.captured[slot_of(read)][..., : call.q_len, : call.kv_len]


def slot_of(read: Load) -> int:
    """Its place among the captured tensors."""
    assert isinstance(read.tensor, int)
    return read.tensor


def pair_axes(pairs: torch.Tensor | None) -> tuple[bool, ...]:
    """On which of three axes that tensor is not the same everywhere."""
    found = () if pairs is None else tuple(stride != 0 for stride in pairs.stride()[:-2])
    return (*found, *(True,) * (BATCH_AXES - len(found)))


def sharing(read: Load | None, batch: tuple[int, ...], shared_batch: bool) -> int:
    """How many positions in a row read the same elements; shared_batch: those of the first axis lie in a row."""
    if read is None:
        return 1
    if shared_batch:
        return math.prod(batch[:1])
    symbols = free_symbols(read)
    axes = itertools.takewhile(lambda axis: batch_symbol(axis) not in symbols, reversed(range(len(batch))))
    return math.prod(batch[axis] for axis in axes)


def own_positions(x: torch.Tensor) -> torch.Tensor:
    """The positions of a tensor [n.., T, D] that are its own: one along an axis that it is shared over."""
    return x[tuple(slice(None) if stride else slice(1) for stride in x.stride()[:-2])]


def own_axes(own: torch.Tensor, batch: tuple[int, ...]) -> tuple[bool, ...]:
    """On which of three axes an operand has a position for each of the batch."""
    return (*(n == size for n, size in zip(own.shape, batch, strict=False)), *(True,) * (BATCH_AXES - len(batch)))
