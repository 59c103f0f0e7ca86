"""Variants of the backward kernels: tiles for a device and a shape, and compile-time arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from flashfuse.kernels import dropout
from flashfuse.kernels.codegen_backward import BackwardProgram
from flashfuse.kernels.launch import Device, Launch, Shape, padded, precision_of, subtracts_scores, triton_dtype
from flashfuse.kernels.spec import AttentionSpec


@dataclass(frozen=True)
class BackwardLaunch:
    """Tiles and resources of the kernels that pass by key tile, by query tile, and by pairs.

    dense: by the rows of pairs, see `backward_dense` and `choose_dense`.
    """

    keys: Launch
    queries: Launch
    pairs: Launch
    dense: Launch

    def shared_bytes(self, shape: Shape) -> int:
        """Shared memory of the largest: resident and pipelined operands, and tiles of gradients as operands."""
        columns = (shape.block_d + shape.block_dv) * shape.element_bytes
        found = []
        for launch, resident, passing, pair_tiles in (
            (self.keys, self.keys.block_kv, self.keys.block_q, 2),
            (self.queries, self.queries.block_q, self.queries.block_kv, 1),
            (self.pairs, 0, self.pairs.block_q + self.pairs.block_kv, 1),
        ):
            stages = max(launch.num_stages, 1)
            pair = launch.block_q * launch.block_kv
            captured = pair * ((stages - 1) * shape.captured_bytes + shape.drop_bytes)
            found.append(columns * (resident + stages * passing) + pair * pair_tiles * shape.element_bytes + captured)
        return max(found)


# What rows of pairs take when more positions share them than the table's tile has room for, and the most that do.
SHARED_ROWS = (Launch(64, 32, 4, 3), Launch(64, 32, 4, 2), Launch(32, 32, 4, 2))
MAX_SHARED = 4


def choose_dense(device: Device, shape: Shape, table: Launch, shared_by: int) -> Launch | None:
    """The tile for rows of pairs that so many positions share: the table's, or the first that fits in shared memory."""
    if shared_by > MAX_SHARED:
        return None
    columns = (shape.block_d + shape.block_dv) * shape.element_bytes
    for launch in (table, *SHARED_ROWS):
        stages = max(launch.num_stages, 1)
        pair = launch.block_q * launch.block_kv
        # Each position copies what it reads ahead; a tile of gradients passes from who holds it to who moves it.
        captured = shared_by * (stages - 1) * shape.captured_bytes
        of_pairs = pair * (captured + shape.drop_bytes + stages * shape.element_bytes)
        rows = launch.block_q + stages * launch.block_kv
        if shared_by * columns * rows + of_pairs <= device.shared_bytes:
            return launch
    return None


@dataclass(frozen=True)
class Row:
    """A row of the launch table: for head dims up to `head_dim`, elements up to `element_bytes`, at least `arch`.

    alone: only where a tile holds no captured elements.
    """

    head_dim: int
    element_bytes: int
    backend: str
    arch: int
    launch: BackwardLaunch
    alone: bool = False


def _row(
    head_dim: int, element_bytes: int, backend: str, arch: int, *tiles: tuple[int, int, int, int], alone: bool = False
) -> Row:
    """tiles: (block_q, block_kv, num_warps, num_stages) for keys, queries, pairs and rows of pairs.

    Without the last, rows of pairs take the tile of the queries: they load more, and hold no sum.
    """
    keys, queries, pairs, *given = (Launch(*t) for t in tiles)
    dense = given[0] if given else replace(queries, num_stages=min(queries.num_stages, 2))
    return Row(head_dim, element_bytes, backend, arch, BackwardLaunch(keys, queries, pairs, dense), alone)


# The first row that applies and fits in shared memory is used. On sm_90 head dims to 256 have the fastest measured
# (docs/performance.md); the others are chosen to compile without spills.
TABLE = (
    # The keys' pass holds two accumulators and numbers of rows along its columns, so its query tiles are narrow.
    _row(64, 2, "cuda", 90, (64, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 2), alone=True),
    _row(64, 2, "cuda", 90, (64, 128, 8, 3), (64, 64, 4, 3), (128, 64, 8, 2)),
    # Of a tile of 64 queries by 64 keys the loads take longer than the products.
    _row(128, 2, "cuda", 90, (64, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), alone=True),
    _row(128, 2, "cuda", 90, (32, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3)),
    _row(128, 2, "cuda", 90, (32, 128, 8, 2), (64, 64, 4, 2), (128, 64, 8, 1)),
    _row(256, 2, "cuda", 90, (64, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 1), alone=True),
    _row(256, 2, "cuda", 90, (32, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 1)),
    _row(256, 2, "cuda", 90, (32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    # Without warp-group instructions, and with less shared memory.
    _row(512, 2, "cuda", 120, (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    _row(512, 2, "cuda", 90, (16, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    _row(64, 2, "cuda", 80, (32, 64, 4, 1), (64, 64, 4, 2), (64, 32, 4, 1)),
    _row(128, 2, "cuda", 80, (32, 64, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1)),
    _row(256, 2, "cuda", 80, (32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    _row(512, 2, "cuda", 80, (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    _row(64, 2, "hip", 0, (32, 64, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
    _row(128, 2, "hip", 0, (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    _row(256, 2, "hip", 0, (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    _row(512, 2, "hip", 0, (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    _row(64, 4, "", 0, (32, 32, 8, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    _row(128, 4, "", 0, (16, 32, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1)),
    _row(256, 4, "", 0, (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    _row(512, 4, "", 0, (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
)


def choose_backward(device: Device, shape: Shape) -> BackwardLaunch | None:
    """The launch for a shape on a device, None where no tile fits. Short queries take fewer rows."""
    rows = max(16, triton.next_power_of_2(shape.q_len))
    for row in TABLE:
        tiles = (row.launch.keys, row.launch.queries, row.launch.pairs, row.launch.dense)
        launch = BackwardLaunch(*(replace(tile, block_q=min(tile.block_q, rows)) for tile in tiles))
        if (
            max(shape.block_d, shape.block_dv) <= row.head_dim
            and shape.element_bytes <= row.element_bytes
            and row.backend in ("", device.backend)
            and device.arch >= row.arch
            and not (row.alone and shape.captured_bytes)
            and launch.shared_bytes(shape) <= device.shared_bytes
        ):
            return launch
    return None


# --------------------------------------------------------------------------------------------------------------------
# Compile-time arguments and options of each kernel


def rows_constants(
    spec: AttentionSpec, program: BackwardProgram, head_dim: int, value_dim: int, block_q: int, with_sink: bool
) -> Mapping[str, Any]:
    """Of the kernel that makes the numbers of rows; with_sink: the gradients of sinks among them."""
    return {
        "SINK": program.forward.sink if with_sink else None,
        "ROW_KEPT": program.forward.row_kept,
        "SCALE": program.derivatives.scale,
        "SLACK": slack_in(spec, program),
        "FILLS": program.forward.fills,
        "APART": _apart(spec),
        "PRECISION": precision_of(spec),
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": padded(head_dim),
        "BLOCK_DV": padded(value_dim),
        "BLOCK_Q": block_q,
    }


def keys_constants(
    spec: AttentionSpec,
    program: BackwardProgram,
    head_dim: int,
    value_dim: int,
    launch: Launch,
    rows_contiguous: bool = False,
) -> Mapping[str, Any]:
    """Of the kernel that passes by key tile; rows_contiguous: those of q or of the output's gradient."""
    masked, full = program.key_sums
    return {
        **_shared_constants(spec, program, head_dim, value_dim, launch),
        **_slope_constants(program),
        "QUERY_BOUNDS": program.query_bounds,
        "ROWS_CONTIGUOUS": rows_contiguous,
        "GRADS_FULL": program.derivatives.score_and_grad_full,
        "FACTOR_FULL": program.forward.factor_full,
        "SUMS_MASKED": masked,
        "SUMS_FULL": full,
        "NUM_SUMS": len(program.key_terms),
    }


def queries_constants(
    spec: AttentionSpec, program: BackwardProgram, head_dim: int, value_dim: int, launch: Launch
) -> Mapping[str, Any]:
    """Of the kernel that passes by query tile."""
    masked, full = program.row_sums
    return {
        **_shared_constants(spec, program, head_dim, value_dim, launch),
        **_slope_constants(program),
        "KV_BOUNDS": program.forward.kv_bounds,
        "FILL_THRESHOLD": program.fill_threshold,
        "LONGEST_FIRST": program.forward.longest_first,
        "GRADS_FULL": program.derivatives.score_and_grad_full,
        "FACTOR_FULL": program.forward.factor_full,
        "SUMS_MASKED": masked,
        "SUMS_FULL": full,
        "NUM_SUMS": program.num_row_sums,
    }


def pairs_constants(
    spec: AttentionSpec, program: BackwardProgram, number: int, head_dim: int, value_dim: int, launch: Launch
) -> Mapping[str, Any]:
    """Of the kernel that writes the gradient of pair term `number`."""
    return {
        **_shared_constants(spec, program, head_dim, value_dim, launch),
        "BY_DISTANCE": program.pair_terms[number].by_distance is not None,
        "PAIR_GRAD": program.pair_grads[number][0],
        "PAIR_SCALE": program.pair_terms[number].scale,
        "SKIPS": program.skips,
        "KV_BOUNDS": program.forward.kv_bounds,
        "FILL_THRESHOLD": program.fill_threshold,
    }


def dense_constants(
    spec: AttentionSpec,
    program: BackwardProgram,
    number: int,
    head_dim: int,
    value_dim: int,
    launch: Launch,
    shared_by: int,
) -> Mapping[str, Any]:
    """Of the kernel that writes the gradient of pair term `number` by rows, which so many positions share."""
    masked, full = program.pair_grads[number]
    return {
        **_shared_constants(spec, program, head_dim, value_dim, launch),
        "PAIR_GRAD_MASKED": masked,
        "PAIR_GRAD_FULL": full,
        "PAIR_SCALE": program.pair_terms[number].scale,
        "SHARED_BY": shared_by,
        "STAGES": launch.num_stages,
        "GRADS_FULL": program.derivatives.score_and_grad_full,
        "FACTOR_FULL": program.forward.factor_full,
        "KV_BOUNDS": program.forward.kv_bounds,
        "FILL_THRESHOLD": program.fill_threshold,
        "LONGEST_FIRST": program.forward.longest_first,
    }


def slack_in(spec: AttentionSpec, program: BackwardProgram) -> float | None:
    """How far below a row's largest score another may be, as a part of it, and count as equal to it when a score is
    found again from scale * score; None where none is large.

    Powers of two lose nothing. Products of float32 may be large themselves, and come out larger than the largest.
    """
    if not subtracts_scores(spec, program.forward, precision_of(spec)):
        return None
    if math.frexp(program.forward.scale)[0] != 0.5:
        return 2.0**-22
    return 2.0**-26 if spec.product_dtype == torch.float32 else 0.0


def _apart(spec: AttentionSpec) -> bool:
    """Whether a row's sum stays a number: an exponent with its logarithm in it is rounded where digits show."""
    return torch.float32 in (spec.product_dtype, spec.probs_dtype)


def _slope_constants(program: BackwardProgram) -> dict[str, Any]:
    """Of the kernels that pass on what a product gets."""
    of = program.derivatives
    return {"SLOPE": of.slope, "MASKED_WHERE": of.masked_where, "FULL_WHERE": of.full_where}


def _shared_constants(
    spec: AttentionSpec, program: BackwardProgram, head_dim: int, value_dim: int, launch: Launch
) -> dict[str, Any]:
    normalised = spec.normaliser == "softmax"
    return {
        "GRADS_MASKED": program.derivatives.score_and_grad_masked,
        "SCALE": program.derivatives.scale,
        "SLACK": slack_in(spec, program),
        "APART": _apart(spec),
        "NORMALISED": normalised,
        "FACTOR_MASKED": program.forward.factor_masked,
        # The rows kernel has taken rows that are not kept out of a softmax.
        "ROW_FACTOR": program.forward.row_factor or (None if normalised else program.forward.row_kept),
        **dropout.compile_time(spec.dropout),
        "PRODUCT_DTYPE": triton_dtype(spec.product_dtype),
        "PROBS_DTYPE": triton_dtype(spec.probs_dtype),
        "PRECISION": precision_of(spec),
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": padded(head_dim),
        "BLOCK_DV": padded(value_dim),
        "BLOCK_Q": launch.block_q,
        "BLOCK_KV": launch.block_kv,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
