"""What the kernels for Hopper ask of a call: a device and a Gluon they run on, and tensors that TMA can read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import triton

from flashfuse.kernels.codegen_hopper import TileReads
from flashfuse.kernels.expr import Expr, Pointwise, walk
from flashfuse.kernels.launch import Device, padded, triton_dtype
from flashfuse.kernels.prepared import Buffer

# Gluon is experimental: another release may read the kernels otherwise.
TRITON_RELEASE = "3.6."
# Columns of a tile, which matrix instructions and the registers behind them take.
BLOCKS = (64, 128, 256)
# Columns that a matrix instruction multiplies at a time.
DEPTH = 16
# Batch axes of a tensor map, which has five axes.
BATCH_AXES = 3
# Functions that take many instructions, and registers.
SPECIAL = frozenset({
    "pow", "exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt", "tanh", "sigmoid", "erf", "sin", "cos",
    "atan", "asinh", "fmod",
})  # fmt: skip
# Positions whose keys and values stay in the cache while tiles of as much work run.
MAX_SPREAD = 8
# Bytes that a tensor map's strides are multiples of.
STRIDE_BYTES = 16


def read_constants(reads: TileReads) -> Mapping[str, Any]:
    """Compile-time arguments that say what a kernel reads itself."""
    return {
        "PAIRS_AT": reads.pairs_at,
        "COLUMNS": reads.columns,
        "CODED_ROWS": reads.coded_rows,
        "CODE_OF": reads.code_of,
        "COLUMN_TYPES": tuple(map(triton_dtype, reads.column_types)),
    }


def has_gluon() -> bool:
    """Whether this Triton compiles the kernels; interpreted, its functions are none that they can call."""
    return triton.__version__.startswith(TRITON_RELEASE) and not triton.knobs.runtime.interpret


def is_computed_by(of: Expr, functions: Collection[str]) -> bool:
    """Whether one of some functions is in an expression."""
    return any(isinstance(e, Pointwise) and e.op in functions for e in walk(of))


def is_hopper(device: Device, shared_bytes: int) -> bool:
    """Whether a device is one, with room for a program of so much shared memory."""
    return (device.backend, device.arch) == ("cuda", 90) and device.shared_bytes >= shared_bytes


def blocks_of(head_dim: int, value_dim: int) -> tuple[int, int] | None:
    """The columns of tiles of keys and of values, None where there are no such, or less than half would be in use."""
    columns = padded(head_dim), padded(value_dim)
    return columns if set(columns) <= set(BLOCKS) else None


def depth_of(head_dim: int) -> int:
    """The columns of a tile that are multiplied."""
    return -(-head_dim // DEPTH) * DEPTH


def is_read(x: torch.Tensor) -> bool:
    """Whether TMA reads this tensor."""
    return x.data_ptr() % STRIDE_BYTES == 0 and has_map(Buffer.like(x))


def has_map(of: Buffer) -> bool:
    """Whether TMA reads tensors like this one: rows of neighbours, and no two of the others in one place."""
    outer = [stride for n, stride in zip(of.size[:-1], of.strides[:-1], strict=True) if n > 1]
    itemsize = of.dtype.itemsize
    return of.strides[-1] == 1 and all(stride > 0 and stride * itemsize % STRIDE_BYTES == 0 for stride in outer)


def tensor_map(of: Buffer, rows: int, columns: int, batch_axes: int = BATCH_AXES) -> Any:
    """How TMA sees tensors like this one, [n.., rows, columns], a tile at a time; without a tensor yet."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    more = (1,) * (batch_axes - (len(of.size) - 2))
    size, strides = (*of.size[:-2], *more, *of.size[-2:]), (*of.strides[:-2], *more, *of.strides[-2:])
    # Along an axis of size 1 nothing is skipped, and its stride has to be allowed and no more: as if all lay densely.
    least = STRIDE_BYTES // of.dtype.itemsize
    allowed = [1]
    inside = -(-size[-1] // least) * least
    for n, stride in zip(reversed(size[:-1]), reversed(strides[:-1]), strict=True):
        allowed.append(inside if n == 1 else stride)
        inside = max(inside, n * allowed[-1])
    block = [*(1,) * batch_axes, rows, columns]
    dtype = getattr(gl, str(of.dtype).removeprefix("torch."))
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(_Like(of.dtype), list(size), allowed[::-1], block, layout)


class _Like:
    """In the place of a tensor."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 0
