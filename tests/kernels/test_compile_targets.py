"""The forward kernel compiles for GPUs this machine does not have: tensor cores, shared memory, spills.

FLASHFUSE_FULL_TABLE=1 compiles every head dim and element type of the launch table (minutes).
"""

import itertools
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from flashfuse.kernels.spec import AttentionSpec, parse

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from flashfuse.kernels.forward import attention_forward_kernel  # noqa: E402
from flashfuse.kernels.launch import Device, choose_launch, constants, shape_of  # noqa: E402
from flashfuse.kernels.mask import mask_of  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled when interpreted"
)

DEVICES = {
    "sm80": (Device("cuda", 80, 166912), GPUTarget("cuda", 80, 32)),
    "sm86": (Device("cuda", 86, 101376), GPUTarget("cuda", 86, 32)),
    "sm90": (Device("cuda", 90, 232448), GPUTarget("cuda", 90, 32)),
    "sm100": (Device("cuda", 100, 232448), GPUTarget("cuda", 100, 32)),
    "gfx942": (Device("hip", 0, 65536), GPUTarget("hip", "gfx942", 64)),
}
# Score text, captured element types, and the rank of each captured tensor.
PROGRAMS: dict[str, tuple[str, tuple[torch.dtype, ...], tuple[int, ...]]] = {
    "plain": ("qk * 0.125", (), ()),
    "causal": ("where(kv_idx <= q_idx, qk * 0.125, -inf)", (), ()),
    "bias": ("where(kv_idx <= q_idx, qk * 0.125 + t0[0, n1, q_idx, kv_idx], -inf)", (torch.bfloat16,), (4,)),
    "padding": ("where((kv_idx <= q_idx) & t0[n0, kv_idx], qk * 0.125, -3.4028234663852886e+38)", (torch.bool,), (2,)),
}
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.bool: "*i1"}
BF16, FP32 = torch.bfloat16, torch.float32

CASES = [
    ("sm80", "causal", 128, BF16),
    ("sm86", "bias", 128, BF16),
    ("sm90", "plain", 64, BF16),
    ("sm90", "causal", 128, BF16),
    ("sm90", "bias", 128, BF16),
    ("sm90", "padding", 80, BF16),
    ("sm90", "causal", 256, BF16),
    ("sm100", "causal", 128, BF16),
    ("gfx942", "bias", 128, BF16),
    ("sm90", "causal", 64, FP32),
]
if os.environ.get("FLASHFUSE_FULL_TABLE") == "1":
    CASES = list(itertools.product(DEVICES, PROGRAMS, (16, 64, 80, 128, 256, 512), (BF16, FP32)))


def source_of(spec: AttentionSpec, ranks: tuple[int, ...], arguments: dict[str, Any], ranged: bool) -> ASTSource:
    """The kernel as the launcher would specialise it for aligned operands with contiguous rows.

    ranged: for a call with `kv_ranges`.
    """
    signature: dict[str, Any] = {}
    constant: dict[tuple[int, ...], Any] = {}
    aligned: list[tuple[int, ...]] = []

    def strides(path: tuple[int, ...], rank: int) -> tuple[str, ...]:
        aligned.extend((*path, axis) for axis in range(rank - 1))
        constant[*path, rank - 1] = 1
        return (*("i32",) * (rank - 1), "constexpr")

    for i, name in enumerate(attention_forward_kernel.arg_names):
        if name in arguments:
            signature[name], constant[i,] = "constexpr", arguments[name]
        elif name == "ranges_ptr":
            signature[name] = "*i32" if ranged else "constexpr"
            constant |= {} if ranged else {(i,): None}
        elif name.endswith("_ptr"):
            signature[name] = POINTERS[spec.compute_dtype if name == "lse_ptr" else spec.out_dtype]
            aligned.append((i,))
        elif name == "captured":
            signature[name] = tuple(POINTERS[c] for c in spec.captured)
            aligned.extend((i, slot) for slot in range(len(ranks)))
        elif name == "captured_strides":
            signature[name] = tuple(strides((i, slot), rank) for slot, rank in enumerate(ranks))
        elif name.endswith("_strides"):
            signature[name] = strides((i,), 6)
        else:
            signature[name] = ("i32",) * spec.num_sizes if name == "sizes" else "i32"
    return ASTSource(
        attention_forward_kernel, signature, constant, {path: [["tt.divisibility", 16]] for path in aligned}
    )


def assembler_report(ptx: str, arch: int, folder: Path) -> str:
    """What ptxas says about registers, spills and serialised matrix instructions."""
    file = folder / "kernel.ptx"
    file.write_text(ptx)
    command = [
        get_ptxas(arch).path,
        "-v",
        f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}",
        file,
        "-o",
        folder / "kernel.cubin",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize(("device", "program", "head_dim", "dtype"), CASES)
def test_compiles_within_limits(device: str, program: str, head_dim: int, dtype: torch.dtype, tmp_path: Path) -> None:
    limits, target = DEVICES[device]
    text, captured, ranks = PROGRAMS[program]
    spec = AttentionSpec(2, parse(text, captured), captured, 0, dtype, dtype, dtype, "nan", (0, 1, 2, 3))
    launch = choose_launch(limits, shape_of(spec, 4096, head_dim, head_dim))
    assert launch is not None
    ranged = mask_of(spec).depends_on_data
    arguments = dict(constants(spec, head_dim, head_dim, "ieee", launch, ranged))
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages")}
    kernel = triton.compile(source_of(spec, ranks, arguments, ranged), target=target, options=options)

    assert kernel.metadata.shared <= limits.shared_bytes
    if limits.backend == "hip":
        return
    ptx = kernel.asm["ptx"]
    if dtype == BF16:
        instruction = {80: "mma.sync", 86: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[limits.arch]
        assert instruction in ptx
    if limits.arch in (80, 90):
        report = assembler_report(ptx, limits.arch, tmp_path)
        spilled = max((int(n) for n in re.findall(r"(\d+) bytes spill stores", report)), default=0)
        assert "C75" not in report, "matrix instructions are serialised"
        assert spilled <= (0 if program in ("plain", "causal") and head_dim in (64, 128) else 512)
