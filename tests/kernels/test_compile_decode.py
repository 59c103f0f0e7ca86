"""The flash-decoding kernels compile for GPUs this machine does not have: shared memory, spills, wide loads.

FLASHFUSE_FULL_TABLE=1 compiles every head dim and element type of the launch table (minutes).
"""

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from flashfuse.kernels.spec import AttentionSpec, parse

triton = pytest.importorskip("triton")

from compile_targets import DEVICES, IS_LATER, compiled, source_of, spilled_bytes  # noqa: E402

from flashfuse.kernels.decode import attention_combine_kernel, attention_split_kernel  # noqa: E402
from flashfuse.kernels.launch import choose_launch, shape_of  # noqa: E402
from flashfuse.kernels.launch_decode import TABLE, has_many_keys, variants  # noqa: E402
from flashfuse.kernels.mask import mask_of  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled when interpreted"
)

# Score text, captured element types, the rank of each captured tensor, and what the spec has besides.
PROGRAMS: dict[str, tuple[str, tuple[torch.dtype, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ("qk * 0.125", (), (), {}),
    "causal": ("where(kv_idx <= q_idx + (kv_len - q_len), qk * 0.125, -inf)", (), (), {}),
    "padding": ("where(t0[n0, kv_idx], qk * 0.125, -3.4028234663852886e+38)", (torch.bool,), (2,), {}),
    "bias": ("qk * 0.125 + t0[n0, 0, 0, q_idx, kv_idx]", (torch.bfloat16,), (5,), {}),
    "key bias": ("qk * 0.125 + t0[n0, 0, 0, 0, kv_idx]", (torch.bfloat16,), (5,), {}),
    "alibi": ("qk * 0.125 + t0[n1, n2] * to_float(kv_idx - q_idx)", (torch.float32,), (2,), {}),
    "sink": ("tanh(qk * 0.125) * 30.0", (torch.bfloat16,), (2,), {"sink": "t0[n1, n2]"}),
    "cap": ("tanh(qk * 0.0025) * 50.0", (), (), {}),
    "dropout": ("qk * 0.125", (), (), {"dropout": 0.1}),
    "sigmoid": ("sigmoid(qk * 0.125)", (torch.float32,), (2,), {"normaliser": "none", "factor": "t0[n1, n2]"}),
}
BF16, FP32 = torch.bfloat16, torch.float32
SHUFFLES = 128 if IS_LATER else 64
# A group of four query heads, of eight with eight queries.
FEW, MANY = 4, 64
# What the launcher sees to be 1 for them.
_AXES = [f"{along}_{axis}" for along, axis in itertools.product(("outer", "packed"), range(4))]
ONES = {
    FEW: (*(axis for axis in _AXES if axis not in ("outer_1", "packed_2")), "q_len", "row_tiles"),
    MANY: ("packed_0",),
}
# With several splits, with one, which finishes, and what finishes several.
KERNELS = ("split", "whole", "combine")

# Each kernel on each device, each program in the first or the second, and in both where they end otherwise.
CASES = [
    ("sm80", "padding", 128, FEW, BF16, ("split",)),
    ("sm80", "bias", 64, MANY, BF16, KERNELS),
    ("sm86", "causal", 128, MANY, BF16, KERNELS),
    ("sm90", "plain", 128, FEW, BF16, KERNELS),
    ("sm90", "padding", 128, MANY, BF16, ("split",)),
    ("sm90", "bias", 128, FEW, BF16, ("split",)),
    ("sm90", "key bias", 128, FEW, BF16, ("whole",)),
    ("sm90", "alibi", 128, FEW, BF16, ("split",)),
    ("sm90", "sink", 80, FEW, BF16, KERNELS),
    ("sm90", "sigmoid", 128, FEW, BF16, KERNELS),
    ("sm90", "dropout", 128, FEW, BF16, ("whole",)),
    ("sm90", "causal", 256, MANY, BF16, ("whole", "combine")),
    ("sm90", "padding", 128, FEW, FP32, ("whole", "combine")),
    ("sm100", "causal", 128, FEW, BF16, KERNELS),
    ("gfx942", "padding", 128, FEW, BF16, ("split", "combine")),
    ("gfx942", "sink", 256, MANY, BF16, ("whole",)),
]
if os.environ.get("FLASHFUSE_FULL_TABLE") == "1":
    CASES = list(
        itertools.product(DEVICES, PROGRAMS, (16, 64, 80, 128, 256, 512), (FEW, MANY), (BF16, FP32), (KERNELS,))
    )


def instances(
    device: str,
    program: str,
    head_dim: int,
    rows: int,
    dtype: torch.dtype,
    names: Sequence[str],
    many_keys: bool = False,
) -> dict[str, tuple[Any, str]]:
    """The kernels that are asked for, and what is reported of each."""
    limits, target = DEVICES[device]
    text, captured, ranks, more = PROGRAMS[program]
    further: dict[str, Any] = {
        name: parse(value, captured) if name in ("sink", "factor") else value for name, value in more.items()
    }
    spec = AttentionSpec(3, parse(text, captured), captured, 0, dtype, dtype, dtype, "nan", (0, 1, 2, 3, 4), **further)
    launch = choose_launch(limits, replace(shape_of(spec, rows, head_dim, head_dim), long=many_keys), TABLE)
    if launch is None:
        assert (limits.backend, dtype) == ("hip", FP32)
        return {}
    ranged = mask_of(spec).depends_on_data
    split, combine = variants(
        spec, head_dim, head_dim, "ieee", launch, ranged, True, (False, False, True, False), limits.overlaps
    )

    def instance(kernel: Any, constants: Any, parts: bool) -> tuple[Any, str]:
        arguments = dict(constants)
        options = {name: arguments.pop(name) for name in ("num_warps", "num_stages", "launch_pdl") if name in arguments}
        source = source_of(kernel, spec, ranks, arguments, ranged, parts=parts, ones=ONES[rows])
        return compiled(source, target, options)

    given = {
        "split": (attention_split_kernel, split, True),
        "whole": (attention_split_kernel, split, False),
        "combine": (attention_combine_kernel, combine, True),
    }
    return {name: instance(*given[name]) for name in names}


@pytest.mark.parametrize(("device", "program", "head_dim", "rows", "dtype", "names"), CASES)
def test_compiles_within_limits(
    device: str, program: str, head_dim: int, rows: int, dtype: torch.dtype, names: Sequence[str]
) -> None:
    check(device, dtype, instances(device, program, head_dim, rows, dtype, names))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("program", ["plain", "causal", "cap"])
def test_tiles_for_many_keys_compile_within_limits(program: str, head_dim: int) -> None:
    check("sm90", BF16, instances("sm90", program, head_dim, FEW, BF16, ("split",), many_keys=True))


def test_programs_have_many_keys() -> None:
    """Where larger tiles were faster on 132 multiprocessors, and where they were not."""
    assert has_many_keys(8, 32768, 132)
    assert has_many_keys(64, 8192, 132)
    assert not has_many_keys(8, 8192, 132)
    assert not has_many_keys(512, 1024, 132)


def check(device: str, dtype: torch.dtype, found: dict[str, tuple[Any, str]]) -> None:
    """What holds for each of `instances`."""
    limits, _ = DEVICES[device]
    for name, (kernel, report) in found.items():
        assert kernel.metadata.shared <= limits.shared_bytes
        if limits.backend == "hip":
            continue
        ptx = kernel.asm["ptx"]
        if name == "combine" and limits.overlaps:
            assert kernel.metadata.launch_pdl
            assert ptx.index("griddepcontrol.wait") < re.search(r"(ld|st)\.global", ptx).start()
        else:
            assert not kernel.metadata.launch_pdl
            assert ("griddepcontrol.launch_dependents" in ptx) == limits.overlaps
        if name != "combine":
            # Keys and values go to shared memory ahead of their use, 16 bytes at a time.
            assert re.search(r"cp\.async\.cg\.shared\.global \[.*\], \[.*\], 0x10", ptx)
        if dtype == BF16 and name != "combine":
            assert re.search(r"mma\.sync|wgmma|tcgen05\.mma", ptx)
            # As a read behind the product had its tile, a row lay in 32 threads, and reductions were made twice.
            assert ptx.count("shfl.sync") <= SHUFFLES
        if limits.arch in (80, 90):
            # A number or two that wait for the end may be put aside where that lets one more program run.
            assert spilled_bytes(report) <= 16, f"the {name} kernel spills"
