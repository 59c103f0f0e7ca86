"""Compiling kernels for GPUs this machine does not have."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from flashfuse.kernels.launch import Device
from flashfuse.kernels.spec import AttentionSpec

DEVICES = {
    "sm80": (Device("cuda", 80, 166912, 108), GPUTarget("cuda", 80, 32)),
    "sm86": (Device("cuda", 86, 101376, 84), GPUTarget("cuda", 86, 32)),
    "sm89": (Device("cuda", 89, 101376, 128), GPUTarget("cuda", 89, 32)),
    "sm90": (Device("cuda", 90, 232448, 132), GPUTarget("cuda", 90, 32)),
    "sm100": (Device("cuda", 100, 232448, 148), GPUTarget("cuda", 100, 32)),
    "sm120": (Device("cuda", 120, 101376, 170), GPUTarget("cuda", 120, 32)),
    "gfx942": (Device("hip", 0, 65536, 304), GPUTarget("hip", "gfx942", 64)),
}
# Than the compiler whose code is measured on GPUs: some limits are wider for later ones.
IS_LATER = tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6)
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.bool: "*i1", torch.int8: "*i8",
    torch.int64: "*i64", torch.uint8: "*u8", torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5",
}  # fmt: skip


def source_of(
    kernel: Any,
    spec: AttentionSpec,
    ranks: tuple[int, ...],
    arguments: dict[str, Any],
    ranged: bool,
    filled: bool = False,
    parts: bool = True,
    sums: bool = False,
    stored: torch.dtype | None = None,
    ones: Sequence[str] = (),
    unit: int = 1,
) -> ASTSource:
    """The kernel as the launcher would specialise it for aligned operands with contiguous rows.

    ranged: for a call with `kv_ranges`. filled: with rows that may see every key. parts: with several splits of keys.
    sums: with those of the one pass, which start at 0.
    stored: the element type of k and v, by default the output's.
    ones: numbers that are 1. unit: what strides are multiples of, if not of 16, see `tiles.in_units`.
    """
    signature: dict[str, Any] = {}
    constant: dict[tuple[int, ...], Any] = {}
    aligned: list[tuple[int, ...]] = []

    def strides(path: tuple[int, ...], rank: int) -> tuple[str, ...]:
        aligned.extend((*path, axis) for axis in range(rank - 1) if unit == 1)
        constant[*path, rank - 1] = 1
        return (*("i32",) * (rank - 1), "constexpr")

    for i, name in enumerate(kernel.arg_names):
        if name in arguments:
            signature[name], constant[i,] = "constexpr", arguments[name]
        elif name in ("UNITS", "CAPTURED_UNITS"):
            signature[name], constant[i,] = "constexpr", (unit,) * (7 if name == "UNITS" else len(ranks))
        elif name in ("ranges_ptr", "filled_ptr"):
            given = ranged if name == "ranges_ptr" else filled
            signature[name] = "*i32" if given else "constexpr"
            constant |= {} if given else {(i,): None}
        elif (name == "parts_ptr" and not parts) or (name == "sums_ptr" and not sums):
            signature[name], constant[i,] = "constexpr", None
        elif name == "seed_ptr":
            signature[name] = "*i64" if spec.dropout else "constexpr"
            constant |= {} if spec.dropout else {(i,): None}
        elif name == "sums_ptrs":
            signature[name] = ("*fp32",) * arguments["NUM_SUMS"]
        elif name.endswith("_ptr"):
            wide = name in ("lse_ptr", "rows_ptr", "sums_ptr", "parts_ptr") or (
                name == "dt_ptr" and arguments.get("BY_DISTANCE")
            )
            narrow = stored if name in ("k_ptr", "v_ptr") else None
            signature[name] = POINTERS[spec.compute_dtype if wide else narrow or spec.out_dtype]
            aligned.append((i,))
        elif name == "captured":
            signature[name] = tuple(POINTERS[c] for c in spec.captured)
            aligned.extend((i, slot) for slot in range(len(ranks)))
        elif name == "captured_strides":
            signature[name] = tuple(strides((i, slot), rank) for slot, rank in enumerate(ranks))
        elif name.endswith("_strides"):
            signature[name] = strides((i,), 6)
        elif name in ones:
            signature[name], constant[i,] = "constexpr", 1
        else:
            signature[name] = ("i32",) * spec.num_sizes if name == "sizes" else "i32"
    return ASTSource(kernel, signature, constant, {path: [["tt.divisibility", 16]] for path in aligned})


def accumulators(kernel: Any) -> list[str]:
    """What each matrix product of a compiled kernel is added to."""
    return re.findall(r"= tt\.dot %\w+, %\w+, (%\w+)", kernel.asm["ttir"])


def compiled(source: Any, target: GPUTarget, options: dict[str, Any]) -> tuple[Any, str]:
    """A kernel, and what ptxas said about registers, spills and serialised matrix instructions; empty for AMD GPUs."""
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        # A kernel from the cache would come without the log.
        triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
        # Instructions are the same, and made faster.
        triton.knobs.compilation.disable_line_info = True
        kernel = triton.compile(source, target=target, options=options)
    assert target.backend != "cuda" or "bytes spill stores" in log.getvalue()
    return kernel, log.getvalue()


def spilled_bytes(report: str) -> int:
    """The most that a function of the report stores."""
    return max(int(number) for number in re.findall(r"(\d+) bytes spill stores", report))


def assembler_report(ptx: str, arch: int, folder: Path) -> str:
    """What ptxas says without the options that later compilers give it, as the spills were measured."""
    file = folder / "kernel.ptx"
    file.write_text(ptx)
    gpu = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
    command = [get_ptxas(arch).path, "-v", gpu, file, "-o", folder / "kernel.cubin"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr
