"""The forward kernel compiles for GPUs this machine does not have: tensor cores, shared memory, spills.

FLASHFUSE_FULL_TABLE=1 compiles every head dim and element type of the launch table (minutes).
"""

import itertools
import os
import re
from typing import Any

import pytest
import torch

from flashfuse.kernels.spec import AttentionSpec, parse

triton = pytest.importorskip("triton")

from compile_targets import DEVICES, accumulators, compiled, source_of, spilled_bytes  # noqa: E402

from flashfuse.kernels.forward import attention_forward_kernel  # noqa: E402
from flashfuse.kernels.launch import choose_launch, constants, shape_of  # noqa: E402
from flashfuse.kernels.mask import mask_of  # noqa: E402
from flashfuse.kernels.prepared import KernelLaunch  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled when interpreted"
)

# Score text, captured element types, and the rank of each captured tensor.
PROGRAMS: dict[str, tuple[str, tuple[torch.dtype, ...], tuple[int, ...]]] = {
    "plain": ("qk * 0.125", (), ()),
    "added": ("qk * 0.125 + where(kv_idx <= q_idx, 0.0, -10000.0)", (), ()),
    "causal": ("where(kv_idx <= q_idx, qk * 0.125, -inf)", (), ()),
    "bias": ("where(kv_idx <= q_idx, qk * 0.125 + t0[0, n1, q_idx, kv_idx], -inf)", (torch.bfloat16,), (4,)),
    "distances": ("qk * 0.125 + t0[n1, kv_idx - q_idx + (q_len - 1)]", (torch.bfloat16,), (2,)),
    "disentangled": (
        "qk * 0.1 + t0[n0, q_idx, min(max(q_idx - kv_idx + 16, 0), 31)]"
        " + t0[n0, kv_idx, min(max(q_idx - kv_idx + 16, 0), 31)]",
        (torch.bfloat16,),
        (3,),
    ),
    "rounded": ("qk * 0.125 + to_bfloat16(t0[n1] * to_float(kv_idx - q_idx))", (torch.float32,), (1,)),
    "sink": ("where(kv_idx <= q_idx, qk * 0.125, -inf)", (torch.bfloat16,), (1,)),
    "factor": ("where(t0[n0, kv_idx], qk * 0.125, -3.4028234663852886e+38)", (torch.bool,), (2,)),
    "sigmoid": ("sigmoid(where(kv_idx <= q_idx, qk * 0.125, -inf))", (torch.float32,), (1,)),
    "dropout": ("where(kv_idx <= q_idx, qk * 0.125, -inf)", (), ()),
    "padding": ("where((kv_idx <= q_idx) & t0[n0, kv_idx], qk * 0.125, -3.4028234663852886e+38)", (torch.bool,), (2,)),
}
# What a spec has besides its score.
FURTHER: dict[str, dict[str, Any]] = {
    "sink": {"sink": "t0[n1]"},
    "factor": {"factor": "where(t0[n0, kv_idx], 1.0, 0.0)"},
    "dropout": {"dropout": 0.1},
    "sigmoid": {"normaliser": "none", "factor": "t0[n1]"},
}
BF16, FP32 = torch.bfloat16, torch.float32
SHUFFLES = 64

CASES = [
    ("sm80", "causal", 128, BF16),
    ("sm86", "bias", 128, BF16),
    ("sm90", "plain", 64, BF16),
    ("sm90", "causal", 128, BF16),
    ("sm90", "bias", 128, BF16),
    ("sm90", "padding", 80, BF16),
    ("sm90", "rounded", 128, BF16),
    ("sm80", "distances", 128, BF16),
    ("sm90", "disentangled", 128, BF16),
    ("sm90", "sink", 128, BF16),
    ("sm90", "factor", 128, BF16),
    ("sm90", "sigmoid", 128, BF16),
    ("gfx942", "sink", 64, BF16),
    ("sm90", "causal", 256, BF16),
    ("sm100", "causal", 128, BF16),
    ("sm89", "sink", 128, BF16),
    ("sm120", "causal", 256, BF16),
    ("gfx942", "bias", 128, BF16),
    ("sm90", "added", 64, FP32),
    ("sm90", "dropout", 128, BF16),
]
if os.environ.get("FLASHFUSE_FULL_TABLE") == "1":
    CASES = list(itertools.product(DEVICES, PROGRAMS, (16, 64, 80, 128, 256, 512), (BF16, FP32)))


def compiled_forward(
    device: str, spec: AttentionSpec, ranks: tuple[int, ...], head_dim: int, unit: int = 1
) -> tuple[Any, str]:
    """The forward kernel for long rows, and what was reported of it; see `source_of`."""
    limits, target = DEVICES[device]
    launch = choose_launch(limits, shape_of(spec, 4096, head_dim, head_dim))
    assert launch is not None
    ranged = mask_of(spec).depends_on_data
    arguments = dict(constants(spec, head_dim, head_dim, "ieee", launch, ranged))
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages")}
    return compiled(source_of(attention_forward_kernel, spec, ranks, arguments, ranged, unit=unit), target, options)


@pytest.mark.parametrize(("device", "program", "head_dim", "dtype"), CASES)
def test_compiles_within_limits(device: str, program: str, head_dim: int, dtype: torch.dtype) -> None:
    limits, _ = DEVICES[device]
    text, captured, ranks = PROGRAMS[program]
    further: dict[str, Any] = {
        name: parse(value, captured) if name in ("sink", "factor") else value
        for name, value in FURTHER.get(program, {}).items()
    }
    spec = AttentionSpec(2, parse(text, captured), captured, 0, dtype, dtype, dtype, "nan", (0, 1, 2, 3), **further)
    kernel, report = compiled_forward(device, spec, ranks, head_dim)

    if dtype == FP32:
        assert all(accumulator.startswith("%cst") for accumulator in accumulators(kernel)), "sums start at 0"
    assert kernel.metadata.shared <= limits.shared_bytes
    if limits.backend == "hip":
        return
    ptx = kernel.asm["ptx"]
    if dtype == BF16:
        instruction = {90: "wgmma", 100: "tcgen05.mma"}.get(limits.arch, "mma.sync")
        assert instruction in ptx
    if limits.arch in (80, 90):
        # Rows lie in four threads each, as products leave them: two steps for each row and reduction. As a scattered
        # read has its tile, a row lies in 32.
        assert ptx.count("shfl.sync") <= SHUFFLES
    if program == "rounded":
        # Converting one at a time would double the work of the unit that exp2 runs on.
        assert "cvt.rn.bf16x2.f32" in ptx
        assert "cvt.rn.bf16.f32" not in ptx
    if limits.arch in (80, 90):
        assert "serialized" not in report, "matrix instructions are serialised"
        assert spilled_bytes(report) <= (0 if program in ("plain", "causal") and head_dim in (64, 128) else 512)


@pytest.mark.parametrize("unit", [4, 8])
@pytest.mark.parametrize("device", ["sm80", "sm90"])
def test_rows_of_a_few_numbers_too_many_are_loaded_in_few_parts(device: str, unit: int) -> None:
    """Triton asks whether strides are multiples of 16; those of rows of 72 or 40 numbers are of 8, of 36 of 4.

    What it was not told of was loaded number by number, and no keys ahead of their use: ten times as long.
    """
    spec = AttentionSpec(2, parse("qk * 0.125"), (), 0, BF16, BF16, BF16, "nan", (0, 1, 2, 3))
    kernel, report = compiled_forward(device, spec, (), 9 * unit, unit)
    ahead = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+)", kernel.asm["ptx"])
    assert set(ahead) == {f"0x{2 * unit:x}"}
    assert spilled_bytes(report) == 0


def test_rows_of_a_bias_are_loaded_like_those_of_keys() -> None:
    """Of 1000 numbers too, which are a multiple of 8: a tile's 16 bytes at a time, ahead of their use."""
    score = parse("qk * 0.125 + t0[n1, q_idx, kv_idx]", (BF16,))
    spec = AttentionSpec(2, score, (BF16,), 0, BF16, BF16, BF16, "nan", (0, 1, 2, 3))
    ptx = [compiled_forward("sm90", spec, (3,), 64, unit)[0].asm["ptx"] for unit in (1, 8)]
    loads = [re.findall(r"cp\.async\.c[ag]\.shared\.global|ld\.global[.\w]*", text) for text in ptx]
    assert sorted(loads[0]) == sorted(loads[1])


@pytest.mark.parametrize(
    ("strides", "unit"),
    [((0, 72, 5184, 72, 1), 8), ((0, 64, 128, 1), 1), ((36, 4, 12, 1), 4), ((7, 1), 1), ((8,) * 6 + (1,), 1)],
)
def test_units_of_strides(strides: tuple[int, ...], unit: int) -> None:
    """None where the compiler sees for itself, or there is none: no kernel is compiled twice for it."""
    found = KernelLaunch(attention_forward_kernel, 1, {}).of([strides], [strides]).variant
    assert found == {"UNITS": (unit,), "CAPTURED_UNITS": (unit if unit == 8 else 1,)}
