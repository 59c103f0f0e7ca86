"""The kernels for Hopper compile for sm_90: registers, shared memory, matrix instructions that overlap."""

import os
import re

import pytest
import torch

triton = pytest.importorskip("triton")

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled when interpreted"),
    pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="another Gluon"),
]

BF16, FP16 = torch.bfloat16, torch.float16
# The most bytes that the backward spills, by head dim: addresses and bounds, which tiles read a few of.
SPILLS = {64: 160, 128: 320}
# The most that the forward does: what is read where one tile of queries ends and the next begins.
FORWARD_SPILLS = 80
# More where columns are 256: what is kept of rows until they are stored, and for documents what the loader has.
WIDE_SPILLS = {"causal": 20, "documents": 300}
# Of three groups, each thread of which has 160 registers: at the same places.
THREE_GROUPS_SPILLS = 160
# Beside these, where something is read for each column: addresses, at the same places; and for documents what the warp
# that loads has 24 registers for, in a loop that few ever see.
MORE_SPILLS = {"keys": 100, "padding": 100, "documents": 400}
# Beside a tile of pairs what masked tiles alone need; a mask of documents there: more of it.
FORWARD_MORE_SPILLS = {**MORE_SPILLS, "bias": 100, "causal bias": 100, "documents bias": 900}
BACKWARD = [
    ("plain", 64, BF16, False),
    ("plain", 128, BF16, False),
    ("causal", 64, BF16, False),
    ("causal", 128, BF16, False),
    ("causal", 64, BF16, True),
    ("causal", 128, BF16, True),
    ("plain", 48, FP16, False),
    ("causal", 72, BF16, False),
    ("window", 64, BF16, False),
    ("window", 128, BF16, False),
    ("alibi", 64, BF16, False),
    ("alibi", 128, BF16, False),
    ("cap", 64, FP16, False),
    ("cap", 128, BF16, False),
    ("causal cap", 64, BF16, False),
    ("causal cap", 128, BF16, False),
    ("keys", 128, BF16, False),
    ("padding", 128, BF16, False),
    ("documents", 64, BF16, True),
    ("bias", 64, BF16, True),
    ("documents bias", 128, FP16, False),
]
FORWARD = [
    ("plain", 64, 64, BF16),
    ("plain", 128, 128, FP16),
    ("causal", 64, 64, BF16),
    ("causal", 128, 128, BF16),
    ("causal", 64, 128, BF16),
    ("causal", 128, 64, BF16),
    ("plain", 72, 72, BF16),
    ("causal", 112, 40, FP16),
    ("window", 128, 128, BF16),
    ("alibi", 64, 64, BF16),
    ("alibi", 128, 128, BF16),
    ("cap", 64, 64, FP16),
    ("causal cap", 128, 128, BF16),
    ("keys", 128, 128, BF16),
    ("padding", 128, 128, BF16),
    ("documents", 64, 64, BF16),
    ("documents", 128, 128, BF16),
    ("bias", 64, 64, BF16),
    ("bias", 128, 128, BF16),
    ("causal bias", 64, 64, BF16),
    ("causal bias", 128, 128, BF16),
    ("documents bias", 128, 128, FP16),
    ("plain", 256, 256, BF16),
    ("causal", 256, 256, FP16),
    ("causal", 192, 128, BF16),
    ("fill", 256, 256, BF16),
    ("documents", 256, 256, BF16),
    ("fill", 64, 64, BF16),
    ("fill", 128, 128, BF16),
    ("sink", 128, 128, BF16),
]
# The most that the kernel of rows of pairs does, and how many positions share them.
ROWS_SPILLS = {2: 80, 4: 400}
ROWS_OF_PAIRS = [
    ("causal bias", 128, FP16, 2),
    ("scaled bias", 64, BF16, 4),
]


@pytest.mark.parametrize(("program", "head_dim", "dtype", "shared"), BACKWARD)
def test_backward_compiles_within_limits(program: str, head_dim: int, dtype: torch.dtype, shared: bool) -> None:
    """ptxas says only when asked that it has put matrix instructions one after the other."""
    from compile_targets import DEVICES, spilled_bytes
    from hopper_cases import compiled_backward

    from flashfuse.kernels.launch import padded
    from flashfuse.kernels.launch_hopper_backward import SHARED_BYTES

    kernel, report = compiled_backward(program, head_dim, dtype, shared)
    assert kernel.metadata.shared <= SHARED_BYTES <= DEVICES["sm90"][0].shared_bytes
    ptx = kernel.asm["ptx"]
    assert "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add" in ptx
    assert "C75" not in report
    assert spilled_bytes(report) <= SPILLS[padded(head_dim)] + MORE_SPILLS.get(program, 0)


@pytest.mark.parametrize(("program", "head_dim", "dtype", "shared_by"), ROWS_OF_PAIRS)
def test_rows_of_pairs_compile_within_limits(program: str, head_dim: int, dtype: torch.dtype, shared_by: int) -> None:
    from compile_targets import DEVICES, spilled_bytes
    from hopper_cases import compiled_dense

    from flashfuse.kernels.launch_hopper_dense import SHARED_BYTES

    kernel, report = compiled_dense(program, head_dim, dtype, shared_by)
    assert kernel.metadata.shared <= SHARED_BYTES <= DEVICES["sm90"][0].shared_bytes
    assert "C75" not in report
    assert spilled_bytes(report) <= ROWS_SPILLS[shared_by]


@pytest.mark.parametrize(("program", "head_dim", "value_dim", "dtype"), FORWARD)
def test_forward_compiles_within_limits(program: str, head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    from compile_targets import DEVICES, spilled_bytes
    from hopper_cases import compiled_forward

    from flashfuse.kernels.launch_hopper_forward import SHARED_BYTES

    kernel, report = compiled_forward(program, head_dim, value_dim, dtype)
    # Of queries and keys, which are both in shared memory, columns behind the last are not multiplied, but by sixteens:
    # in one place of each of two groups, and in another where rows may see what a mask has ruled out.
    products = len(re.findall(r"wgmma\.mma_async[^;]*}, %rd\d+, %rd\d+,", kernel.asm["ptx"]))
    assert products / -(-head_dim // 16) in (2, 4)
    assert kernel.metadata.shared <= SHARED_BYTES <= DEVICES["sm90"][0].shared_bytes
    assert "C75" not in report
    wide = WIDE_SPILLS.get(program, 0) if head_dim == 256 else 0
    assert spilled_bytes(report) <= FORWARD_SPILLS + FORWARD_MORE_SPILLS.get(program, 0) + wide


@pytest.mark.parametrize("program", ["plain", "fill"])
def test_forward_of_three_groups_compiles_within_limits(program: str) -> None:
    from compile_targets import spilled_bytes
    from hopper_cases import compiled_forward

    from flashfuse.kernels.launch_hopper_forward import SHARED_BYTES

    kernel, report = compiled_forward(program, 64, 64, BF16, groups=3)
    assert kernel.metadata.shared <= SHARED_BYTES
    assert "C75" not in report
    assert spilled_bytes(report) <= THREE_GROUPS_SPILLS
