"""Prepare `hopper_forward` for a call: whether it takes it, and how its operands are described."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch

from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.codegen_hopper import HopperForwardProgram, load_hopper_forward, pair_read
from flashfuse.kernels.expr import Product, walk
from flashfuse.kernels.hopper_pairs import of_pairs, own_axes, own_positions, pair_axes, slot_of
from flashfuse.kernels.launch import (
    LOG2_E,
    Device,
    device_index,
    device_of,
    in_torch,
    padded,
    shape_of,
    subtracts_scores,
)
from flashfuse.kernels.launch_hopper import (
    BATCH_AXES,
    MAX_SPREAD,
    SPECIAL,
    blocks_of,
    depth_of,
    has_gluon,
    has_map,
    is_computed_by,
    is_hopper,
    is_read,
    read_constants,
    tensor_map,
)
from flashfuse.kernels.output import empty_output
from flashfuse.kernels.prepared import Buffer, KernelLaunch, Prepared, padded_axes, strides_of
from flashfuse.kernels.spec import AttentionSpec

# Shared memory of the program with the most.
SHARED_BYTES = 227 * 1024
# Keys of a tile, and how many tiles of keys and values are loaded ahead, by their wider columns.
TILES = {64: (128, 4), 128: (128, 2), 256: (64, 2)}
# Columns for which there is room once, of queries and no tiles of pairs beside them.
WIDEST = 256
# Columns that three groups take, and the share of rows that their tiles may waste; columns of an output that are stored
# at a time.
MANY_GROUPS = 64
MOST_WASTED = 0.05
OUT_COLUMNS = 128
# By groups of warps that multiply, the registers of each of their threads, and of all at first, to be shared out.
REGISTERS = {2: (240, 168), 3: (160, 128)}
# How many queries, keys, and tiles of BLOCK of both it takes to be faster than the plain kernel, whose programs
# are smaller, and whose launch takes the host 20 us less: by the columns of tiles where positions alone say what is
# seen, and in general.
BLOCK = 128
LEAST_LENGTH = 128
LEAST_TILES = {64: 1024, 128: 1024, 256: 512}
LEAST_LENGTH_OF_OTHERS, LEAST_TILES_OF_OTHERS = 1024, 8192
# The part of the processors that have a tile of queries to begin with.
BUSY = 0.9


def takes(device: Device, call: AttentionCall) -> bool:
    """Whether the kernel computes this."""
    blocks = blocks_of(call.head_dim, call.value_dim)
    out = Buffer.like(empty_output(call)[0])
    pairs = of_pairs(call)
    return (
        is_hopper(device, SHARED_BYTES)
        and blocks is not None
        and len(call.batch) <= BATCH_AXES
        and takes_program(call.spec)
        and all(x.dtype == call.spec.product_dtype for x in (call.q, call.k, call.v))
        and all(is_read(own_positions(x)) for x in (call.q, call.k, call.v))
        and has_map(out)
        and (pairs is None or (max(blocks) < WIDEST and is_read(own_positions(pairs))))
    )


def is_faster(device: Device, call: AttentionCall) -> bool:
    """Whether the kernel is faster than the plain one, of which a processor runs several programs at a time.

    That is so where there is much to multiply between loads and stores, and little to do for each score.
    """
    taken, block = _tiles(call, BLOCK), max(padded(call.head_dim), padded(call.value_dim))
    length, tiles = LEAST_LENGTH_OF_OTHERS, LEAST_TILES_OF_OTHERS
    if call.kv_ranges is None and pair_read(call.spec) is None:
        length, tiles = LEAST_LENGTH, LEAST_TILES.get(block, tiles)
    return (
        min(call.q_len, call.kv_len) >= length
        and taken >= BUSY * device.multiprocessors
        and taken * -(-call.kv_len // BLOCK) >= tiles
        and not is_computed_by(call.spec.score, SPECIAL)
    )


def _tiles(call: AttentionCall, block_q: int) -> int:
    """How many tiles of queries there are."""
    return math.prod(call.batch) * -(-call.q_len // block_q)


@functools.lru_cache(maxsize=4096)
def takes_program(spec: AttentionSpec) -> bool:
    """Whether its numbers are those that the kernel reads, and of pairs are none or one tensor's tiles."""
    shape = shape_of(spec, 1, 1, 1)
    return (
        spec.product_dtype in (torch.float16, torch.bfloat16)
        and spec.probs_dtype == spec.out_dtype == spec.product_dtype
        and spec.normaliser == "softmax"
        and spec.key is None
        and spec.value is None
        and not spec.dropout
        and ((shape.captured_bytes, shape.looked_up) == (0, False) or pair_read(spec) is not None)
        and load_hopper_forward(spec, False, False).factor_masked is None
        and any(isinstance(e, Product) for e in walk(spec.score))
    )


@functools.lru_cache(maxsize=4096)
def forward_constants(
    spec: AttentionSpec,
    head_dim: int,
    value_dim: int,
    axes: tuple[tuple[bool, ...], ...],
    ranged: bool,
    fewer_queries: bool,
    positions: int,
    groups: int = 2,
) -> Mapping[str, Any]:
    """Compile-time arguments and options.

    axes: of q, k, v and what is read for each pair, on which of three they have positions of their own.
    positions: how many of the batch there are. groups: see `_groups`.
    """
    program = load_hopper_forward(spec, ranged, fewer_queries)
    block_d, block_dv = padded(head_dim), padded(value_dim)
    block = max(block_d, block_dv)
    registers, max_registers = REGISTERS[groups]
    block_kv, stages = TILES[block]
    return {
        "SCORE_MASKED": program.score_masked,
        "SCORE_FULL": program.score_full,
        "KV_BOUNDS": program.kv_bounds,
        "LOG2_SCALE": program.scale * LOG2_E,
        "FILL_THRESHOLD": program.fill_threshold,
        "LARGE_SCORES": subtracts_scores(spec, program, "ieee"),
        "FILLS": program.fills,
        "ZERO_EMPTY_ROWS": spec.empty_row == "zero",
        "LONGEST_FIRST": program.longest_first,
        "SINK": program.sink,
        "ROW_FACTOR": program.row_factor,
        "ROW_KEPT": program.row_kept,
        "Q_AXES": axes[0],
        "K_AXES": axes[1],
        "V_AXES": axes[2],
        **read_constants(program),
        "PAIRS_AXES": axes[3],
        "SHARED_BATCH": program.shared_batch,
        "DEPTH": depth_of(head_dim),
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "BLOCK_KV": block_kv,
        "GROUPS": groups,
        "Q_STAGES": 2 if program.pairs_at is None and block < WIDEST else 1,
        "STAGES": stages,
        "SPREAD": math.gcd(MAX_SPREAD, positions) if program.longest_first or program.pairs_at is not None else 1,
        "REGISTERS": registers,
        "num_warps": 4,
        "maxnreg": max_registers,
    }


def _groups(program: HopperForwardProgram, block: int, q_len: int, rows: int) -> int:
    """Of warps that multiply: three where the fewer registers of each suffice and their tiles waste few rows, or two.

    Where tiles start at the mask's diagonal, those of three reach farther across it. rows: queries of a group.
    """
    wasted = -q_len % (3 * rows) - -q_len % (2 * rows)
    of_pairs = program.columns is not None or program.pairs_at is not None
    return (
        3 if block == MANY_GROUPS and not (of_pairs or program.longest_first) and wasted <= MOST_WASTED * q_len else 2
    )


def prepare_hopper(call: AttentionCall, searched: bool = False) -> Prepared | None:
    """What launches a validated call by the kernel for Hopper; None where another one computes it.

    searched: whether the one that is faster is being measured, and not taken as it is known to be.
    """
    blocks = blocks_of(call.head_dim, call.value_dim)
    if blocks is None or not has_gluon() or in_torch(call):
        return None
    device = device_of(device_index(call))
    if not (searched or is_faster(device, call)) or not takes(device, call):
        return None
    # It takes Gluon, which the other kernels do without.
    from flashfuse.kernels.hopper_forward import GROUP_Q, attention_hopper_forward_kernel

    rows = GROUP_Q.value
    out, lse = empty_output(call)
    own = [own_positions(x) for x in (call.q, call.k, call.v)]
    read, pairs = pair_read(call.spec), of_pairs(call)
    axes = (*(own_axes(x, call.batch) for x in own), pair_axes(pairs))
    positions, fewer_queries = math.prod(call.batch), call.q_len <= call.kv_len
    ranged = call.kv_ranges is not None
    groups = _groups(load_hopper_forward(call.spec, ranged, fewer_queries), max(blocks), call.q_len, rows)
    variant = forward_constants(
        call.spec, call.head_dim, call.value_dim, axes, ranged, fewer_queries, positions, groups
    )
    of_ranges = (0,) * 6 if call.kv_ranges is None else strides_of(call.kv_ranges, call.batch)
    keys = variant["BLOCK_KV"]
    tiles = ((rows, blocks[0]), (keys, blocks[0]), (keys, blocks[1]), (rows, min(blocks[1], OUT_COLUMNS)))
    operands = zip((*own, out), tiles, strict=True)
    descriptors = [tensor_map(Buffer.like(x), rows, columns) for x, (rows, columns) in operands]
    # Behind the last query and key it gives 0, whatever is there.
    pairs_map = None if pairs is None else tensor_map(Buffer.like(own_positions(pairs)), rows, keys)
    taken = _tiles(call, rows * groups)
    programs = min(taken, device.multiprocessors)
    return Prepared(
        launches=(KernelLaunch(attention_hopper_forward_kernel, programs, variant),),
        out=Buffer.like(out),
        lse=Buffer.like(lse),
        workspace=None,
        numbers=(of_ranges, *padded_axes(call.batch), call.q_len, call.kv_len, call.program_sizes),
        captured_strides=tuple(c.stride() for c in call.captured),
        counted=programs < taken,
        descriptors=(*descriptors, pairs_map),
        pairs=None if read is None else slot_of(read),
    )
