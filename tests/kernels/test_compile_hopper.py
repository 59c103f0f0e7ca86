"""The one-pass backward compiles for sm_90: registers, shared memory, matrix instructions that overlap."""

import os
import re
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled when interpreted"),
    pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="another Gluon"),
]

BF16, FP16 = torch.bfloat16, torch.float16
# The most bytes that are spilled, by head dim: addresses and bounds, which tiles read a few of.
SPILLS = {64: 160, 128: 320}
CASES = [
    ("plain", 64, BF16, False),
    ("plain", 128, BF16, False),
    ("causal", 64, BF16, False),
    ("causal", 128, BF16, False),
    ("causal", 128, FP16, False),
    ("causal", 64, BF16, True),
    ("causal", 128, BF16, True),
    ("window", 64, BF16, False),
    ("window", 128, BF16, False),
    ("alibi", 64, BF16, False),
    ("alibi", 128, BF16, False),
    ("cap", 64, FP16, False),
    ("cap", 128, BF16, False),
    ("causal cap", 64, BF16, False),
    ("causal cap", 128, BF16, False),
    ("keys", 64, BF16, False),
    ("keys", 128, BF16, False),
    ("padding", 64, BF16, False),
    ("padding", 128, BF16, False),
    ("documents", 64, BF16, True),
    ("documents", 128, BF16, False),
]


@pytest.mark.parametrize(("program", "head_dim", "dtype", "shared"), CASES)
def test_compiles_within_limits(program: str, head_dim: int, dtype: torch.dtype, shared: bool, tmp_path: Path) -> None:
    """ptxas says only when asked that it has put matrix instructions one after the other."""
    from compile_targets import DEVICES, assembler_report
    from hopper_cases import compiled

    from flashfuse.kernels.launch_hopper import SHARED_BYTES

    kernel = compiled(program, head_dim, dtype, shared)
    assert kernel.metadata.shared <= SHARED_BYTES <= DEVICES["sm90"][0].shared_bytes
    ptx = kernel.asm["ptx"]
    assert "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add" in ptx
    report = assembler_report(ptx, 90, tmp_path)
    assert "C75" not in report
    assert max(int(n) for n in re.findall(r"(\d+) bytes spill stores", report)) <= SPILLS[head_dim]
