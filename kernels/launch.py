"""Launch the forward kernel: choose tiles, describe operands to it, allocate its outputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from flashfuse.kernels import dropout
from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.codegen import ScoreProgram, load_program
from flashfuse.kernels.expr import Gather, Load, free_symbols, loads
from flashfuse.kernels.forward import attention_forward_kernel
from flashfuse.kernels.prepared import KernelLaunch, Prepared
from flashfuse.kernels.spec import KV_IDX, MAX_BATCH_AXES, Q_IDX, AttentionSpec
from flashfuse.kernels.tiled import attention_tiled

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Shape:
    """What the choice of tiles depends on in an attention.

    block_d, block_dv: padded head dims; element_bytes: of the wider product's operands; captured_bytes: of the captured
    elements loaded for each (query, key) pair, which the pipeline keeps in shared memory; drop_bytes: of
    the mark that dropout makes for each pair, which passes through it from the threads that draw to those that use it;
    looked_up: whether elements are looked up for each pair, which wait for their positions. long: whether a program has
    many keys.
    """

    q_len: int
    block_d: int
    block_dv: int
    element_bytes: int
    captured_bytes: int
    drop_bytes: int = 0
    looked_up: bool = False
    long: bool = False


@dataclass(frozen=True)
class Launch:
    """Tiles and resources of one kernel instance."""

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, shape: Shape) -> int:
        """Shared memory of the query tile and of every pipeline stage's key, value and captured tiles."""
        columns = shape.block_d + shape.block_dv
        operands = self.block_q * shape.block_d + max(self.num_stages, 1) * self.block_kv * columns
        captured = self.block_q * self.block_kv * (self.num_stages - 1) * shape.captured_bytes
        return shape.element_bytes * operands + captured + shape.drop_bytes * self.block_q * self.block_kv


# What the interpreter is said to have.
INTERPRETED_MULTIPROCESSORS = 8


@dataclass(frozen=True)
class Device:
    """What it depends on in a device: "cuda" or "hip", compute capability times ten, shared memory per block, size."""

    backend: str
    arch: int
    shared_bytes: int
    multiprocessors: int

    @property
    def overlaps(self) -> bool:
        """Whether a kernel can be launched while the one it waits for runs: programmatic dependent launch."""
        return self.backend == "cuda" and self.arch >= 90


@dataclass(frozen=True)
class Row:
    """A row of the launch table: for head dims up to `head_dim`, elements up to `element_bytes`, at least `arch`.

    captured: only for programs that load a captured element for each score. max_rows: only for so few rows. long: only
    for programs of many keys.
    """

    head_dim: int
    element_bytes: int
    backend: str
    arch: int
    launch: Launch
    captured: bool = False
    max_rows: int | None = None
    long: bool = False


# The first row that applies and fits in shared memory is used: measured choices first, then ever smaller tiles.
TABLE = (
    # Warp-group matrix instructions: 64 query rows a group of four warps.
    Row(64, 2, "cuda", 90, Launch(128, 64, 4, 3)),
    Row(128, 2, "cuda", 90, Launch(128, 64, 8, 3), captured=True),
    Row(128, 2, "cuda", 90, Launch(64, 64, 4, 3)),
    Row(256, 2, "cuda", 90, Launch(128, 64, 8, 2)),
    Row(256, 2, "cuda", 90, Launch(128, 32, 8, 2)),
    Row(512, 2, "cuda", 90, Launch(64, 32, 8, 2)),
    # Matrix instructions of one warp: query tile and accumulator share the registers.
    Row(64, 2, "cuda", 80, Launch(128, 64, 8, 3)),
    Row(64, 2, "cuda", 80, Launch(128, 64, 8, 2)),
    Row(128, 2, "cuda", 80, Launch(128, 32, 8, 2), captured=True),
    Row(128, 2, "cuda", 80, Launch(128, 64, 8, 2)),
    Row(128, 2, "cuda", 80, Launch(128, 32, 8, 2)),
    Row(256, 2, "cuda", 80, Launch(64, 64, 8, 2)),
    Row(256, 2, "cuda", 80, Launch(64, 32, 8, 1)),
    Row(512, 2, "cuda", 80, Launch(32, 32, 8, 2)),
    Row(512, 2, "cuda", 80, Launch(32, 16, 8, 1)),
    Row(64, 2, "hip", 0, Launch(128, 64, 4, 1)),
    Row(128, 2, "hip", 0, Launch(64, 64, 4, 1)),
    Row(256, 2, "hip", 0, Launch(64, 32, 4, 1)),
    Row(512, 2, "hip", 0, Launch(16, 16, 4, 1)),
    # float32: without TF32 the products run on the ordinary units, out of registers.
    Row(64, 4, "", 0, Launch(64, 32, 8, 2)),
    Row(128, 4, "", 0, Launch(32, 32, 4, 2)),
    Row(128, 4, "", 0, Launch(32, 16, 4, 1)),
    Row(256, 4, "", 0, Launch(32, 16, 8, 1)),
    Row(256, 4, "", 0, Launch(16, 16, 4, 1)),
    Row(512, 4, "", 0, Launch(16, 16, 8, 1)),
)


def choose_launch(device: Device, shape: Shape, table: Sequence[Row] = TABLE) -> Launch | None:
    """The launch for a shape on a device, None where no tile fits. Short queries take fewer rows."""
    rows = max(16, triton.next_power_of_2(shape.q_len))
    for row in table:
        launch = replace(row.launch, block_q=min(row.launch.block_q, rows))
        if (
            max(shape.block_d, shape.block_dv) <= row.head_dim
            and shape.element_bytes <= row.element_bytes
            and row.backend in ("", device.backend)
            and device.arch >= row.arch
            and (shape.captured_bytes > 0 or shape.looked_up or not row.captured)
            and (row.max_rows is None or rows <= row.max_rows)
            and (shape.long or not row.long)
            and launch.shared_bytes(shape) <= device.shared_bytes
        ):
            return launch
    return None


@functools.cache
def device_of(index: int | None) -> Device:
    """The device's properties; None is the interpreter, which has no limits of its own."""
    if index is None:
        return Device("cuda", 80, 1 << 30, INTERPRETED_MULTIPROCESSORS)
    multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
    shared_bytes = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    if torch.version.hip is not None:
        return Device("hip", 0, shared_bytes, multiprocessors)
    major, minor = torch.cuda.get_device_capability(index)
    return Device("cuda", 10 * major + minor, shared_bytes, multiprocessors)


@functools.lru_cache(maxsize=4096)
def constants(
    spec: AttentionSpec,
    head_dim: int,
    value_dim: int,
    precision: str,
    launch: Launch,
    ranged: bool = False,
    fewer_queries: bool = False,
) -> Mapping[str, Any]:
    """The compile-time arguments and options of the kernel, for calls with or without `kv_ranges`."""
    program = load_program(spec, ranged, fewer_queries)
    return {
        "SCORE_MASKED": program.score_masked,
        "SCORE_FULL": program.score_full,
        "KV_BOUNDS": program.kv_bounds,
        "LOG2_SCALE": program.scale * LOG2_E,
        "FILL_THRESHOLD": program.fill_threshold,
        "LARGE_SCORES": subtracts_scores(spec, program, precision),
        "FILLS": program.fills,
        "ZERO_EMPTY_ROWS": spec.empty_row == "zero",
        "LONGEST_FIRST": program.longest_first,
        "NORMALISED": spec.normaliser == "softmax",
        "SINK": program.sink,
        "FACTOR_MASKED": program.factor_masked,
        "FACTOR_FULL": program.factor_full,
        "ROW_FACTOR": program.row_factor,
        "ROW_KEPT": program.row_kept,
        "KEY": program.key,
        "VALUE": program.value,
        **dropout.compile_time(spec.dropout),
        "SHARED_BATCH": program.shared_batch,
        "PRODUCT_DTYPE": triton_dtype(spec.product_dtype),
        "PROBS_DTYPE": triton_dtype(spec.probs_dtype),
        "PRECISION": precision,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": padded(head_dim),
        "BLOCK_DV": padded(value_dim),
        "BLOCK_Q": launch.block_q,
        "BLOCK_KV": launch.block_kv,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def shape_of(spec: AttentionSpec, q_len: int, head_dim: int, value_dim: int) -> Shape:
    """The properties of an attention that its launch depends on."""
    reads = dict.fromkeys(read for program in spec.programs for read in loads(program))
    of_pairs = [read for read in reads if {Q_IDX, KV_IDX} <= free_symbols(read)]
    return Shape(
        q_len=q_len,
        block_d=padded(head_dim),
        block_dv=padded(value_dim),
        element_bytes=max(spec.product_dtype.itemsize, spec.probs_dtype.itemsize),
        captured_bytes=sum(read.dtype.itemsize for read in of_pairs if isinstance(read, Load)),
        drop_bytes=4 if spec.dropout else 0,
        looked_up=any(isinstance(read, Gather) for read in of_pairs),
    )


@functools.lru_cache(maxsize=4096)
def _launch(spec: AttentionSpec, q_len: int, head_dim: int, value_dim: int, device: int | None) -> Launch | None:
    return choose_launch(device_of(device), shape_of(spec, q_len, head_dim, value_dim))


def padded(head_dim: int) -> int:
    """The tile width for a head dim: a power of two that a matrix instruction takes."""
    return max(16, triton.next_power_of_2(head_dim))


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """The element type by Triton's name."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def precision_of(spec: AttentionSpec) -> str:
    """How float32 products are formed: TF32 where torch's own matrix products may use it."""
    widest = max(spec.product_dtype.itemsize, spec.probs_dtype.itemsize)
    return "tf32" if widest == 4 and allows_tf32() else "ieee"


def allows_tf32() -> bool:
    """Whether torch's own float32 matrix products may use TF32."""
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        # It was set by the newer name, beside which torch does not tell the older one.
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def subtracts_scores(spec: AttentionSpec, program: ScoreProgram, precision: str) -> bool:
    """Whether exponents are of differences of scores, and not differences of exponents: an operation more for a score.

    Where large scores are to be expected, and where it is nothing beside products of float32 in full.
    """
    return program.large_scores or (spec.product_dtype == torch.float32 and precision == "ieee")


def prepare(call: AttentionCall, launch: Launch | None = None) -> Prepared | None:
    """What launches a validated call; None where torch computes it. `launch` overrides the table, for searching."""
    spec, q_len, batch, ranged = call.spec, call.q_len, call.batch, call.kv_ranges is not None
    if in_torch(call):
        return None
    if launch is None:
        launch = _launch(spec, q_len, call.head_dim, call.value_dim, device_index(call))
    if launch is None:
        return None
    variant = constants(spec, call.head_dim, call.value_dim, precision_of(spec), launch, ranged, q_len <= call.kv_len)
    lengths = (*batch, *(1,) * (MAX_BATCH_AXES - len(batch)), q_len, call.kv_len)
    programs = math.prod(batch) * -(-q_len // launch.block_q)
    return Prepared.of(call, (KernelLaunch(attention_forward_kernel, programs, variant),), lengths)


def in_torch(call: AttentionCall) -> bool:
    """Whether no kernel takes the call, whatever its tiles."""
    # Triton 3.6 aborts the process on some float64 products.
    return call.spec.compute_dtype == torch.float64 or math.prod(call.batch) * call.q_len * call.kv_len == 0


def device_index(call: AttentionCall) -> int | None:
    """The number of the GPU, None for the interpreter."""
    return call.device.index if call.q.is_cuda else None


def attention_forward(call: AttentionCall, launch: Launch | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` [N.., Tq, Dv] and `lse` [N.., Tq, 2] of a validated call, by the forward kernel."""
    prepared = prepare(call, launch)
    return attention_tiled(call) if prepared is None else prepared.run(call)
