"""The backward kernels compile for GPUs this machine does not have: tensor cores, shared memory, spills.

FLASHFUSE_FULL_TABLE=1 compiles every head dim and element type of the launch table (minutes).
"""

import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashfuse.kernels.spec import AttentionSpec, parse

triton = pytest.importorskip("triton")

from compile_targets import DEVICES, IS_LATER, accumulators, assembler_report, compiled, source_of, spilled_bytes  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from flashfuse.kernels import backward, backward_dense, backward_pairs, launch_buckets  # noqa: E402
from flashfuse.kernels import backward_variants as variants  # noqa: E402
from flashfuse.kernels.backward_buckets import bucket_sums_kernel  # noqa: E402
from flashfuse.kernels.backward_ranges import filled_rows_kernel, query_ranges_kernel  # noqa: E402
from flashfuse.kernels.backward_rows import attention_rows_backward_kernel  # noqa: E402
from flashfuse.kernels.buckets import BucketSums  # noqa: E402
from flashfuse.kernels.codegen_backward import load_backward  # noqa: E402
from flashfuse.kernels.launch import shape_of  # noqa: E402
from flashfuse.kernels.launch_ranges import filled_rows, query_ranges  # noqa: E402
from flashfuse.kernels.mask import mask_of  # noqa: E402
from flashfuse.kernels.prepared import empty_on  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled when interpreted"
)

BF16, FP32 = torch.bfloat16, torch.float32
# Score text, captured element types, and the rank of each captured tensor.
PROGRAMS: dict[str, tuple[str, tuple[torch.dtype, ...], tuple[int, ...]]] = {
    "plain": ("qk * 0.125", (), ()),
    "added": ("qk * 0.125 + where(kv_idx <= q_idx, 0.0, -10000.0)", (), ()),
    "causal": ("where(kv_idx <= q_idx, qk * 0.125, -inf)", (), ()),
    "alibi": ("where(kv_idx <= q_idx, qk * 0.125 + to_float(kv_idx - q_idx) * t0[n1], -inf)", (FP32,), (1,)),
    "bias": ("where(kv_idx <= q_idx, qk * 0.125 + t0[0, n1, q_idx, kv_idx], -inf)", (BF16,), (4,)),
    "distances": ("where(kv_idx <= q_idx, qk * 0.125 + t0[n1, kv_idx - q_idx + (q_len - 1)], -inf)", (BF16,), (2,)),
    "buckets": ("qk * 0.125 + t0[min(abs(kv_idx - q_idx), 31), n1]", (BF16,), (2,)),
    "shared": ("qk * 0.125 + t0[n1, q_idx, min(abs(kv_idx - q_idx), 31)]", (BF16,), (3,)),
    "dropout": ("where(kv_idx <= q_idx, qk * 0.125, -inf)", (), ()),
    "padding": ("where((kv_idx <= q_idx) & t0[n0, kv_idx], qk * 0.125, -3.4028234663852886e+38)", (torch.bool,), (2,)),
}
KERNELS = {
    "keys": backward.attention_keys_backward_kernel,
    "queries": backward.attention_queries_backward_kernel,
    "pairs": backward_pairs.attention_pairs_backward_kernel,
    "dense": backward_dense.attention_dense_backward_kernel,
}
# What keys that no two batch positions share are passed over.
LOOPS = ("loop_0", "loop_1", "loop_2", "loop_3")
# Each kernel on each device, and each program on one.
CASES = [
    ("sm80", "causal", 128, BF16),
    ("sm90", "plain", 64, BF16),
    ("sm90", "alibi", 128, BF16),
    ("sm90", "padding", 80, BF16),
    ("sm90", "distances", 64, BF16),
    ("sm90", "buckets", 128, BF16),
    ("sm90", "added", 64, FP32),
    *((device, "dropout", 64, BF16) for device in ("sm86", "sm100")),
    *((device, "dropout", 128, BF16) for device in ("sm90", "gfx942")),
]
# For one kernel: what the others do is told by the cases above, and by tests of their own below.
SINGLE = [
    ("sm90", "causal", 128, BF16, "queries"),
    ("sm120", "causal", 512, BF16, "keys"),
    ("sm89", "padding", 128, BF16, "keys"),
    *(("sm90", "bias", 64, BF16, name) for name in ("queries", "pairs", "dense")),
    ("sm90", "shared", 128, BF16, "dense"),
    *((device, "distances", 64, BF16, "pairs") for device in ("sm80", "sm100", "gfx942")),
    ("sm90", "distances", 64, FP32, "pairs"),
]
if os.environ.get("FLASHFUSE_FULL_TABLE") == "1":
    SINGLE = []
    CASES = list(itertools.product(DEVICES, PROGRAMS, (16, 64, 80, 128, 256, 512), (BF16, FP32)))


def arguments_of(name: str, spec: AttentionSpec, head_dim: int, device: str, ranged: bool) -> Mapping[str, Any] | None:
    """The compile-time arguments of a kernel as the launcher would choose them; None where it is not launched."""
    launch = variants.choose_backward(DEVICES[device][0], shape_of(spec, 4096, head_dim, head_dim))
    assert launch is not None
    program = load_backward(spec, tuple(c.is_floating_point for c in spec.captured), ranged)
    if name == "keys":
        return variants.keys_constants(spec, program, head_dim, head_dim, launch.keys)
    if name == "queries":
        return variants.queries_constants(spec, program, head_dim, head_dim, launch.queries)
    if not program.pair_terms:
        return None
    if name == "dense":
        by_distance = program.pair_terms[0].by_distance is not None
        if by_distance:
            return None
        tiles = variants.choose_dense(DEVICES[device][0], shape_of(spec, 4096, head_dim, head_dim), launch.dense, 1)
        assert tiles is not None
        return variants.dense_constants(spec, program, 0, head_dim, head_dim, tiles, 1)
    return variants.pairs_constants(spec, program, 0, head_dim, head_dim, launch.pairs)


@pytest.mark.parametrize(
    ("device", "program", "head_dim", "dtype", "name"),
    [*((*case, name) for case in CASES for name in KERNELS), *SINGLE],
)
def test_compiles_within_limits(device: str, program: str, head_dim: int, dtype: torch.dtype, name: str) -> None:
    limits, target = DEVICES[device]
    text, captured, ranks = PROGRAMS[program]
    spec = AttentionSpec(2, parse(text, captured), captured, 0, dtype, dtype, dtype, "nan", (0, 1, 2, 3))
    spec = replace(spec, dropout=0.1 if program == "dropout" else 0.0)
    ranged = mask_of(spec).depends_on_data and bool(captured) and captured[0] == torch.bool
    found = arguments_of(name, spec, head_dim, device, ranged)
    if found is None:
        pytest.skip("no tensor has an element for each pair")
    arguments = dict(found)
    options = {option: arguments.pop(option) for option in ("num_warps", "num_stages")}
    filled = load_backward(spec, (False,) * len(captured), ranged).fill_threshold is not None
    ones = LOOPS if name == "keys" else ()
    source = source_of(KERNELS[name], spec, ranks, arguments, ranged, filled, ones=ones)
    kernel, report = compiled(source, target, options)

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
        assert "serialized" not in report, "matrix instructions are serialised"
        # Masked tiles of the keys' pass spill some of what finite fills take beside a mask of data.
        assert spilled_bytes(report) <= (700 if name == "keys" and limits.arch == 90 else 512)


@pytest.mark.parametrize(
    ("head_dim", "shared", "most"),
    [(64, False, 0), (128, False, 0), (64, True, 192), (128, True, 544 if IS_LATER else 512)],
)
def test_the_pass_by_keys_keeps_its_sums_in_registers(head_dim: int, shared: bool, most: int, tmp_path: Path) -> None:
    """It spilled 672 bytes at head dim 128, the most of them for a loop over the one position that has the keys.

    Where several positions share the keys, some is spilled outside of the loop over queries by the tiles that are the
    fastest where none do.
    """
    spec = AttentionSpec(2, parse(PROGRAMS["causal"][0], ()), (), 0, BF16, BF16, BF16, "nan", (0, 1, 2, 3))
    arguments = dict(arguments_of("keys", spec, head_dim, "sm90", False) or {})
    options = {option: arguments.pop(option) for option in ("num_warps", "num_stages")}
    ones = [loop for loop in LOOPS if not (shared and loop == "loop_2")]
    source = source_of(KERNELS["keys"], spec, (), arguments, False, ones=ones)
    kernel = triton.compile(source, target=DEVICES["sm90"][1], options=options)
    report = assembler_report(kernel.asm["ptx"], 90, tmp_path)
    assert kernel.metadata.shared <= DEVICES["sm90"][0].shared_bytes
    assert "wgmma" in kernel.asm["ptx"]
    assert "serialized" not in report
    assert spilled_bytes(report) <= most


def test_the_gradient_of_a_bias_by_rows() -> None:
    """Of tiles that meet no mask all is loaded ahead: by pairs, the bias waited for each of 1038 instructions."""
    text, captured, ranks = "qk * 0.125 + t0[n0, n1, q_idx, kv_idx]", (BF16,), (4,)
    spec = AttentionSpec(2, parse(text, captured), captured, 0, BF16, BF16, BF16, "nan", (0, 1, 2, 3))
    program = load_backward(spec, (True,))
    launch = variants.choose_backward(DEVICES["sm90"][0], shape_of(spec, 4096, 128, 128))
    assert launch is not None
    arguments = dict(variants.dense_constants(spec, program, 0, 128, 128, launch.dense, 1))
    options = {option: arguments.pop(option) for option in ("num_warps", "num_stages")}
    source = source_of(KERNELS["dense"], spec, ranks, arguments, False)
    kernel, report = compiled(source, DEVICES["sm90"][1], options)
    loop = next(part for part in kernel.asm["ttgir"].split("scf.for") if "warp_group_dot " in part)
    body = loop[: loop.index("scf.yield")]
    assert body.count("async_copy_global_to_local") == 3, "keys, values, bias"
    assert "tt.load" not in body
    assert spilled_bytes(report) == 0


@pytest.mark.parametrize("shared_by", [2, 3, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("captured", [(BF16,), (FP32,), (BF16, BF16)], ids=["bf16", "fp32", "two"])
def test_rows_of_pairs_that_positions_share_fit(
    shared_by: int, head_dim: int, captured: tuple[torch.dtype, ...]
) -> None:
    """Each position copies its own captured tile ahead; counted once, tiles were chosen that no device has room for."""
    text = " + ".join(["qk * 0.125", *(f"t{slot}[0, n1, q_idx, kv_idx]" for slot in range(len(captured)))])
    spec = AttentionSpec(2, parse(text, captured), captured, 0, BF16, BF16, BF16, "nan", (0, 1, 2, 3))
    limits, target = DEVICES["sm90"]
    shape = shape_of(spec, 4096, head_dim, head_dim)
    launch = variants.choose_backward(limits, shape)
    assert launch is not None
    tiles = variants.choose_dense(limits, shape, launch.dense, shared_by)
    if tiles is None:
        assert (head_dim, shared_by) == (128, 4), "by tiles of pairs, where rows have no room"
        return
    program = load_backward(spec, (True,) * len(captured))
    arguments = dict(variants.dense_constants(spec, program, 0, head_dim, head_dim, tiles, shared_by))
    options = {option: arguments.pop(option) for option in ("num_warps", "num_stages")}
    source = source_of(KERNELS["dense"], spec, (4,) * len(captured), arguments, False)
    kernel, _ = compiled(source, target, options)
    assert kernel.metadata.shared <= limits.shared_bytes


def test_the_pass_by_keys_has_registers_for_a_bias() -> None:
    """Its tile spilled, since it held both products and all numbers of rows at once."""
    text, captured, ranks = "qk * 0.125 + t0[0, n1, q_idx, kv_idx]", (BF16,), (4,)
    spec = AttentionSpec(2, parse(text, captured), captured, 0, BF16, BF16, BF16, "nan", (0, 1, 2, 3))
    program = load_backward(spec, (True,))
    launch = variants.choose_backward(DEVICES["sm90"][0], shape_of(spec, 4096, 128, 128))
    assert launch is not None
    arguments = dict(variants.keys_constants(spec, program, 128, 128, launch.keys))
    options = {option: arguments.pop(option) for option in ("num_warps", "num_stages")}
    source = source_of(KERNELS["keys"], spec, ranks, arguments, False, ones=LOOPS)
    kernel, report = compiled(source, DEVICES["sm90"][1], options)
    assert kernel.metadata.shared <= DEVICES["sm90"][0].shared_bytes
    assert "wgmma" in kernel.asm["ptx"]
    assert "serialized" not in report
    assert spilled_bytes(report) == 0


@pytest.mark.parametrize(("device", "owner"), [("sm80", "rows"), ("sm90", "keys"), ("gfx942", "pairs")])
def test_sums_of_buckets(device: str, owner: str) -> None:
    kernel = bucket_sums_kernel
    launches = []
    values, at = torch.empty(8, 512, 4096, device="meta"), torch.empty(4607, dtype=torch.int64, device="meta")
    launch_buckets.sum_buckets(
        empty_on(values.device), lambda launch, _: launches.append(launch), BucketSums(values, at, (-1, 1), 32, owner)
    )
    (launch,) = launches
    signature = {name: "i32" for name in kernel.arg_names} | dict.fromkeys(launch.variant, "constexpr")
    signature |= {"values_ptr": "*fp32", "at_ptr": "*i64", "sums_ptr": "*fp32", "at_key_stride": "constexpr"}
    constants = {**launch.variant, "at_key_stride": 1}
    constant = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    found, report = compiled(ASTSource(kernel, signature, constant), DEVICES[device][1], {})
    assert found.asm["ttgir"].count("scf.for") == 1
    assert device == "gfx942" or spilled_bytes(report) == 0


def test_query_tiles_start_where_key_tiles_do() -> None:
    """What a program that owns a distance of tiles asks of the pairs' tiles; head dim 512 on sm_90 failed it."""
    assert all(row.launch.pairs.block_q % row.launch.pairs.block_kv == 0 for row in variants.TABLE)


@pytest.mark.parametrize(
    ("score", "fills", "device"),
    [
        ("qk * 0.3", 0, "sm80"),
        ("qk * 0.3", 0, "sm90"),
        ("where(t0[n0, kv_idx], qk * 0.3, -3.4028234663852886e+38)", 1, "sm90"),
        *(
            ("qk * 0.3 + where(t0[n0, kv_idx], 0.0, -1e30) + where(t0[n0, 0], 0.0, -1e31)", 3, device)
            for device in DEVICES
        ),
    ],
)
def test_the_numbers_of_rows(score: str, fills: int, device: str) -> None:
    """With the fills that a row's largest score may be, each of which is a comparison."""
    captured = (torch.bool,)
    spec = AttentionSpec(2, parse(score, captured), captured, 0, BF16, BF16, BF16, "nan", (0, 1, 2, 3))
    arguments = dict(variants.rows_constants(spec, load_backward(spec, (False,)), 64, 64, 64, with_sink=False))
    assert len(arguments["FILLS"]) == fills
    source = source_of(attention_rows_backward_kernel, spec, (2,), arguments, ranged=False, sums=device == "sm90")
    assert triton.compile(source, target=DEVICES[device][1]).asm["ttgir"]


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_pass_by_keys_asks_of_data_compiles(device: str) -> None:
    """With ranges laid out in any way, and with a fill and without."""
    numbers = (*(f"batch_{axis}" for axis in range(4)), "q_len", "kv_len")
    for name, kernel, found in (
        ("ranges", query_ranges_kernel, query_ranges(torch.zeros(2, 1, 4, 4, dtype=torch.int32), 200, 200, 64)),
        ("filled", filled_rows_kernel, filled_rows((2, 3), 200, -1e4)),
        ("filled", filled_rows_kernel, filled_rows((2, 3), 200, -math.inf)),
    ):
        assert found.launched.launch.kernel is kernel
        pointers = {"lse_ptr": "*fp32"} if name == "filled" else {"kv_ranges_strides": ("i64",) * 6}
        signature = {
            argument: pointers.get(argument, "i32" if argument in numbers else "*i32") for argument in kernel.arg_names
        }
        variant = dict(found.launched.launch.variant)
        options = {"num_warps": variant.pop("num_warps")} if "num_warps" in variant else {}
        signature |= dict.fromkeys(variant, "constexpr")
        constant = {(kernel.arg_names.index(argument),): value for argument, value in variant.items()}
        assert triton.compile(ASTSource(kernel, signature, constant), target=DEVICES[device][1], options=options).asm
