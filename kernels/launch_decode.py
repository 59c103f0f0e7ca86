"""Launch the flash-decoding kernels: when they are taken, which rows share keys, and into how many shares keys go."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.decode import attention_combine_kernel, attention_split_kernel
from flashfuse.kernels.launch import (
    Launch,
    Row,
    Shape,
    choose_launch,
    constants,
    device_index,
    device_of,
    in_torch,
    padded,
    precision_of,
    prepare,
    shape_of,
)
from flashfuse.kernels.launch_hopper_forward import prepare_hopper
from flashfuse.kernels.mask import MASK_BLOCK, mask_of
from flashfuse.kernels.prepared import KernelLaunch, Prepared
from flashfuse.kernels.spec import MAX_BATCH_AXES, AttentionSpec, batch_symbol
from flashfuse.kernels.tiled import attention_tiled

# Where the flash-decoding kernels are faster than the forward (docs/performance.md, "Decode"): with so few queries, ..
FEW_QUERIES = 16
# .. and with as many as one block of the ranges of keys, each of which has so many keys, ..
MAX_Q_LEN = MASK_BLOCK
KEYS_PER_QUERY = 32
# .. where all rows that share keys are no more than this, so that keys are read once or twice, ..
MAX_ROWS = 128
# .. or a program for each batch position would leave so much of the device idle.
IDLE = 2 / 3

# As `launch.TABLE`; block_q: the most rows. Several programs of a multiprocessor keep reads under way.
TABLE = (
    # What is under way at a time is the same; fewer tiles are waited for.
    Row(128, 2, "cuda", 90, Launch(16, 128, 4, 3), max_rows=16, long=True),
    # Few rows have their products done by two warps as soon as by four.
    Row(64, 2, "cuda", 90, Launch(16, 64, 2, 3), max_rows=16),
    Row(128, 2, "cuda", 90, Launch(16, 32, 2, 3), max_rows=16),
    Row(256, 2, "cuda", 90, Launch(16, 32, 4, 4), max_rows=16),
    Row(64, 2, "cuda", 90, Launch(64, 64, 4, 4)),
    Row(128, 2, "cuda", 90, Launch(64, 64, 4, 3)),
    Row(64, 2, "cuda", 80, Launch(32, 64, 4, 3)),
    Row(128, 2, "cuda", 80, Launch(32, 64, 4, 3)),
    Row(128, 2, "cuda", 80, Launch(32, 64, 4, 2)),
    Row(256, 2, "cuda", 80, Launch(32, 32, 4, 3)),
    Row(256, 2, "cuda", 80, Launch(32, 32, 4, 2)),
    Row(512, 2, "cuda", 80, Launch(16, 32, 4, 2)),
    Row(512, 2, "cuda", 80, Launch(16, 16, 4, 2)),
    Row(128, 2, "hip", 0, Launch(32, 64, 4, 1)),
    Row(256, 2, "hip", 0, Launch(16, 32, 4, 1)),
    Row(512, 2, "hip", 0, Launch(16, 16, 4, 1)),
    Row(64, 4, "", 0, Launch(16, 32, 4, 2)),
    Row(128, 4, "", 0, Launch(16, 16, 8, 2)),
    Row(256, 4, "", 0, Launch(16, 16, 4, 1)),
    Row(512, 4, "", 0, Launch(16, 16, 8, 1)),
)

# From how many keys on, and how many of all for each multiprocessor, a program has many.
LONG, LONG_SHARE = 8192, 1500
# What the programs of a multiprocessor should have on its way from memory, and how many they are at most.
BYTES_UNDER_WAY = 110_000
MAX_PROGRAMS_PER_MULTIPROCESSOR = 2
# The most shares that keys go into.
MAX_SPLITS = 128
# The part of a device's slots that reads about as much as all of them, and how much longer is as early.
BUSY = 0.8
NEARLY = 1.1
# In the time of a tile: what a share takes beside its tiles and its part of the rows, what it takes to put shares
# together, and how many rows are put together for each program that reads.
SHARE = 0.5
MERGE = 2.0
MERGED_ROWS = 4
# A program of the combine kernel holds so many numbers of accumulators at a time.
COMBINED_ELEMENTS = 4096


def takes(call: AttentionCall) -> bool:
    """Whether the flash-decoding kernels are the ones for a call."""
    if call.q_len <= FEW_QUERIES:
        return True
    if call.q_len > MAX_Q_LEN or call.kv_len < KEYS_PER_QUERY * call.q_len:
        return False
    _, packed = _split_axes(call.batch, packed_axes(call))
    multiprocessors = device_of(device_index(call)).multiprocessors
    return math.prod(packed) * call.q_len <= MAX_ROWS or math.prod(call.batch) <= (1 - IDLE) * multiprocessors


def prepare_any(call: AttentionCall) -> Prepared | None:
    """What launches a validated call, by the kernels for its lengths and device; None where torch computes it."""
    return (prepare_decode(call) if takes(call) else None) or prepare_hopper(call) or prepare(call)


def prepare_decode(
    call: AttentionCall, launch: Launch | None = None, splits: int | None = None, share: float = 1.0
) -> Prepared | None:
    """What launches a validated call here; None where it cannot be. `launch` and `splits` override the tables.

    share: of the number of splits that is worked out, how many there are.
    """
    spec, kv_len = call.spec, call.kv_len
    if in_torch(call):
        return None
    is_packed = packed_axes(call)
    outer, packed = _split_axes(call.batch, is_packed)
    rows, device = math.prod(packed) * call.q_len, device_index(call)
    if launch is None:
        # What reads something beside keys and values, or stored ones, or drops, was not measured so.
        is_plain = not spec.captured and not spec.dropout and spec.key is None and spec.value is None
        is_long = is_plain and has_many_keys(math.prod(outer), kv_len, device_of(device).multiprocessors)
        launch = _launch(spec, rows, call.head_dim, call.value_dim, device, is_long)
    if launch is None:
        return None
    row_tiles = -(-rows // launch.block_q)
    programs = math.prod(outer) * row_tiles
    tiles = -(-kv_len // launch.block_kv)
    if splits is None:
        shape = shape_of(spec, rows, call.head_dim, call.value_dim)
        slots = _slots(device, launch.shared_bytes(shape))
        part = _part(launch, shape, rows)
        splits = num_splits(programs, tiles, slots, math.prod(outer) * rows, part)
        splits = max(1, min(round(share * splits), tiles, MAX_SPLITS))
    split, combine = variants(
        spec, call.head_dim, call.value_dim, precision_of(spec), launch, call.kv_ranges is not None,
        call.q_len <= kv_len, is_packed, device_of(device).overlaps,
    )  # fmt: skip
    launches = [KernelLaunch(attention_split_kernel, programs * splits, split)]
    workspace = 0
    if splits > 1:
        workspace = math.prod(outer) * splits * rows * (padded(call.value_dim) + 2)
        launches.append(KernelLaunch(attention_combine_kernel, math.prod(outer) * rows, combine))
    lengths = (*outer, *packed, call.q_len, kv_len, row_tiles, splits)
    return Prepared.of(call, tuple(launches), lengths, workspace)


def attention_decode(
    call: AttentionCall, launch: Launch | None = None, splits: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` [N.., Tq, Dv] and `lse` [N.., Tq, 2] of a validated call, by the flash-decoding kernels."""
    prepared = prepare_decode(call, launch, splits)
    return attention_tiled(call) if prepared is None else prepared.run(call)


def rows_of(call: AttentionCall) -> int:
    """How many rows meet the same keys."""
    return math.prod(_split_axes(call.batch, packed_axes(call))[1]) * call.q_len


def packed_axes(call: AttentionCall) -> tuple[bool, ...]:
    """Which of four batch axes lie along the rows of a tile: those along which a tile's keys are the same.

    That is keys, values, what makes them of those stored, and which of them are visited. An axis of size 1 is none.
    """
    shared = [x for x in (call.k, call.v, call.kv_ranges) if x is not None]
    bounds = mask_of(call.spec).bounds
    packed = (
        size > 1
        and all(x.shape[axis] == 1 or x.stride(axis) == 0 for x in shared)
        and call.spec.shares_stored(axis)
        and not bounds.depends_on({batch_symbol(axis)})
        for axis, size in enumerate(call.batch)
    )
    return (*packed, *(False,) * (MAX_BATCH_AXES - len(call.batch)))


def _split_axes(batch: tuple[int, ...], is_packed: tuple[bool, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of four axes: those of the programs and those of the rows, each 1 where the axis is the other's."""
    sizes = (*batch, *(1,) * (MAX_BATCH_AXES - len(batch)))
    axes = list(zip(sizes, is_packed, strict=True))
    return tuple(1 if along else size for size, along in axes), tuple(size if along else 1 for size, along in axes)


def has_many_keys(programs: int, kv_len: int, multiprocessors: int) -> bool:
    """Whether the keys of so many programs, before they are shared out, are long rows of tiles on each processor."""
    return kv_len >= LONG and programs * kv_len >= LONG_SHARE * multiprocessors


@functools.lru_cache(maxsize=4096)
def num_splits(programs: int, tiles: int, slots: int, rows: int, part: float) -> int:
    """Into how many shares the key tiles of each program go, on a device that runs `slots` programs at a time.

    The fewest with which it is done nearly as early as can be; 1 where it is busy anyway, or done before shares are put
    together. rows: of all programs. part: how long a share's rows take to be written and read, in the time of a tile.
    """
    most = min(tiles, MAX_SPLITS)
    if most < 2 or programs >= BUSY * slots:
        return 1
    # In the time of one tile: how often every slot takes a share, times what the longest takes.
    times = {n: -(-programs * n // slots) * (-(-tiles // n) + part + SHARE) for n in range(2, most + 1)}
    least = min(times.values())
    splits = next(n for n, time in times.items() if time <= NEARLY * least)
    return splits if times[splits] + MERGE + rows / (MERGED_ROWS * slots) < tiles else 1


def _part(launch: Launch, shape: Shape, rows: int) -> float:
    """The bytes written and read of the float32 sums of a share's rows, in those of a tile of keys and values."""
    tile = launch.block_kv * (shape.block_d + shape.block_dv) * shape.element_bytes
    return 2 * 4 * min(rows, launch.block_q) * shape.block_dv / tile


@functools.cache
def _slots(device: int | None, bytes_under_way: int) -> int:
    """How many programs with so much on its way a device runs at a time."""
    programs = min(max(1, BYTES_UNDER_WAY // bytes_under_way), MAX_PROGRAMS_PER_MULTIPROCESSOR)
    return device_of(device).multiprocessors * programs


@functools.lru_cache(maxsize=4096)
def _launch(
    spec: AttentionSpec, rows: int, head_dim: int, value_dim: int, device: int | None, is_long: bool
) -> Launch | None:
    shape = replace(shape_of(spec, rows, head_dim, value_dim), long=is_long)
    return choose_launch(device_of(device), shape, TABLE)


@functools.lru_cache(maxsize=4096)
def variants(
    spec: AttentionSpec,
    head_dim: int,
    value_dim: int,
    precision: str,
    launch: Launch,
    ranged: bool,
    fewer_queries: bool,
    is_packed: tuple[bool, ...],
    overlapped: bool,
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The compile-time arguments and options of the split kernel and of the combine kernel.

    overlapped: the combine kernel is launched while the split kernel runs.
    """
    common = dict(constants(spec, head_dim, value_dim, precision, launch, ranged, fewer_queries))
    del common["LONGEST_FIRST"], common["SHARED_BATCH"]
    common["PACKED"], common["OVERLAPPED"] = is_packed, overlapped
    splits = max(1, COMBINED_ELEMENTS // common["BLOCK_DV"])
    combine = {**common, "SPLITS": splits, "num_warps": max(4, launch.num_warps), "num_stages": 1}
    del combine["SCORE_FULL"], combine["FACTOR_FULL"], combine["BLOCK_Q"]
    if overlapped:
        combine["launch_pdl"] = True
    return common, combine
