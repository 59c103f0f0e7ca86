"""Kernels that read stored keys and values compile for GPUs this machine does not have, with wide loads of bytes."""

import os
import re
from typing import Any

import pytest
import torch

from flashfuse.kernels.spec import AttentionSpec, parse
from flashfuse.kernels.stored import readable

triton = pytest.importorskip("triton")

from compile_targets import DEVICES, compiled, source_of, spilled_bytes  # noqa: E402

from flashfuse.kernels.decode import attention_split_kernel  # noqa: E402
from flashfuse.kernels.forward import attention_forward_kernel  # noqa: E402
from flashfuse.kernels.launch import choose_launch, constants, shape_of  # noqa: E402
from flashfuse.kernels.launch_decode import TABLE, variants  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled when interpreted"
)

FP16, BF16, INT8 = torch.float16, torch.bfloat16, torch.int8
# Programs of keys and values over [B, Hkv, G], and the rank of the tensor of scales.
PROGRAMS: dict[str, tuple[str | None, int]] = {
    "plain": (None, 0),
    "head": ("x * t0[n1]", 1),
    "token": ("x * t0[n0, n1, kv_idx, 0]", 4),
    "channel": ("x * t0[n1, d_idx]", 2),
    "group": ("x * t0[n0, n1, kv_idx, d_idx // 32]", 4),
    "float16": ("to_float16(x)", 0),
}
CASES = [
    ("sm80", "channel", 128, INT8, FP16, True),
    ("sm80", "head", 128, torch.float8_e5m2, BF16, True),
    ("sm80", "float16", 128, BF16, FP16, True),
    ("sm86", "group", 64, INT8, BF16, True),
    ("sm90", "plain", 128, torch.float8_e4m3fn, BF16, True),
    ("sm90", "plain", 128, torch.float8_e4m3fn, BF16, False),
    ("sm90", "token", 128, torch.float8_e4m3fn, FP16, True),
    ("sm90", "token", 80, INT8, BF16, False),
    ("sm90", "group", 128, INT8, FP16, True),
    ("sm90", "group", 128, INT8, FP16, False),
    ("sm100", "head", 128, torch.float8_e4m3fn, BF16, True),
]


@pytest.mark.parametrize(("device", "program", "head_dim", "stored", "dtype", "decoding"), CASES)
def test_compiles_within_limits(
    device: str, program: str, head_dim: int, stored: torch.dtype, dtype: torch.dtype, decoding: bool
) -> None:
    limits, target = DEVICES[device]
    text, rank = PROGRAMS[program]
    captured = (dtype,) if rank else ()
    element = None if text is None else parse(text, captured)
    score = parse("where(kv_idx <= q_idx + (kv_len - q_len), qk * 0.125, -inf)")
    types = (dtype, dtype, dtype)
    spec = AttentionSpec(3, score, captured, 0, *types, "nan", (0, 1, 2, 3, 4), key=element, value=element)
    rows = 4 if decoding else 4096
    launch = choose_launch(limits, shape_of(spec, rows, head_dim, head_dim), *([TABLE] if decoding else []))
    assert launch is not None
    given: tuple[Any, ...] = (spec, head_dim, head_dim, "ieee", launch, False, True)
    packed = (False, False, True, False)
    variant = variants(*given, packed, limits.overlaps)[0] if decoding else constants(*given)
    arguments = dict(variant)
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages")}
    source = source_of(
        attention_split_kernel if decoding else attention_forward_kernel, spec, (rank,) if rank else (), arguments,
        False, stored=stored,
    )  # fmt: skip
    kernel, report = compiled(source, target, options)
    assert kernel.metadata.shared <= limits.shared_bytes
    ptx = kernel.asm["ptx"]
    # Bytes go to shared memory as they are, 16 at a time; nothing as wide as the operand is written anywhere.
    assert re.search(r"cp\.async\.cg\.shared\.global \[.*\], \[.*\], 0x10", ptx)
    if limits.arch in (80, 90):
        # Numbers that wait for the end, and scales of channels that wait from tile to tile.
        assert spilled_bytes(report) <= (64 if decoding else 512), "the kernel spills"


def test_what_devices_read() -> None:
    """float8_e4m3fn on CUDA depends on the device at hand, and is not asked of one here."""
    assert readable(torch.float8_e4m3fn, torch.device("cpu"))
    assert readable(torch.float8_e5m2, torch.device("cuda", 0)) == (torch.version.hip is None)
    assert not readable(torch.float32, torch.device("cpu"))
    assert not readable(torch.bool, torch.device("cpu"))
