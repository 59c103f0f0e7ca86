"""Attentions that the kernels for Hopper take, and those kernels compiled for sm_90."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compile_targets import DEVICES, POINTERS, compiled
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from flashfuse.kernels import hopper_dense
from flashfuse.kernels.codegen_backward import load_backward
from flashfuse.kernels.codegen_derivative import load_derivatives
from flashfuse.kernels.codegen_hopper import pair_read
from flashfuse.kernels.hopper_backward import HALF, attention_hopper_backward_kernel
from flashfuse.kernels.hopper_forward import GROUP_Q, attention_hopper_forward_kernel
from flashfuse.kernels.hopper_query_visits import GROUP_KV
from flashfuse.kernels.launch import padded
from flashfuse.kernels.launch_hopper_backward import BLOCK_Q, backward_constants
from flashfuse.kernels.launch_hopper_dense import dense_hopper_constants
from flashfuse.kernels.launch_hopper_forward import OUT_COLUMNS, forward_constants
from flashfuse.kernels.spec import AttentionSpec, parse

# Score text, captured element types, and the rank of each captured tensor.
PROGRAMS: dict[str, tuple[str, tuple[torch.dtype, ...], tuple[int, ...]]] = {
    "plain": ("qk * 0.125", (), ()),
    "causal": ("where(kv_idx <= q_idx, qk * 0.125, -inf)", (), ()),
    "window": ("where((kv_idx <= q_idx) & (kv_idx > q_idx - 100), qk * 0.125, -inf)", (), ()),
    "alibi": ("where(kv_idx <= q_idx, qk * 0.125 + to_float(kv_idx - q_idx) * t0[n1], -inf)", (torch.float32,), (1,)),
    "cap": ("tanh(qk * 0.0025) * 50.0", (), ()),
    "causal cap": ("where(kv_idx <= q_idx, tanh(qk * 0.0025) * 50.0, -inf)", (), ()),
    "keys": ("qk * 0.125 + t0[n1, kv_idx]", (torch.float32,), (2,)),
    "padding": ("where(t0[n0, kv_idx], qk * 0.125, -inf)", (torch.bool,), (2,)),
    "documents": (
        "where((t0[n0, q_idx] == t0[n0, kv_idx]) & (kv_idx <= q_idx), qk * 0.125, -inf)",
        (torch.int64,),
        (2,),
    ),
    "bias": ("qk * 0.125 + t0[n1, q_idx, kv_idx]", (torch.bfloat16,), (3,)),
    "causal bias": ("where(kv_idx <= q_idx, qk * 0.125 + t0[n1, q_idx, kv_idx], -inf)", (torch.float16,), (3,)),
    "scaled bias": ("(qk + t0[n0, q_idx, kv_idx]) * 0.125", (torch.bfloat16,), (3,)),
    "documents bias": (
        "where((t1[n0, q_idx] == t1[n0, kv_idx]) & (kv_idx <= q_idx), qk * 0.125 + t0[n1, q_idx, kv_idx], -inf)",
        (torch.float16, torch.int64),
        (3, 2),
    ),
    "fill": ("where(kv_idx <= q_idx - 200, qk * 0.125, -10000.0)", (), ()),
    "sink": ("where(kv_idx <= q_idx, qk * 0.125, -inf)", (torch.float32,), (1,)),
}
SPREAD = 8
AXES = (True, True, False)


def compiled_backward(program: str, head_dim: int, dtype: torch.dtype, shared: bool) -> tuple[Any, str]:
    """The kernel for sm_90, of one position or more (shared) for each that has keys; of documents with their ranges."""
    spec = _spec(program, dtype)
    ranged = program.startswith("documents")
    pairs = pair_read(spec)
    # With sums of the scores' gradients where it can have them.
    wanted = pairs is not None and load_derivatives(spec, ranged).is_flat
    backward = load_backward(spec, (wanted,) * len(spec.captured), ranged, True)
    block = padded(head_dim)
    rows, keys = BLOCK_Q[block], GROUP_KV.value
    given = {
        "ranges_ptr": "*i32" if ranged else None,
        "filled_ptr": None if backward.fill_threshold is None else "*i32",
        "rows_ptr": "*fp32",
        "left_ptr": "*fp32" if backward.corrected else None,
        **{f"loop_{axis}": "i32" if shared and axis == 2 else 1 for axis in range(4)},
        **{f"{name}_desc": described(dtype, rows, block) for name in ("q", "grad")},
        **{f"{name}_desc": described(dtype, keys, block) for name in ("k", "v", "dk", "dv")},
        "dq_desc": described(torch.float32, 64, 64, batch_axes=1),
        "pairs_desc": None if pairs is None else described(pairs.dtype, HALF.value, keys),
    }
    variant = backward_constants(spec, backward, head_dim, head_dim, AXES, ranged, True, (SPREAD, 1))
    return _compiled(attention_hopper_backward_kernel, program, variant, given)


def compiled_dense(program: str, head_dim: int, dtype: torch.dtype, shared_by: int) -> tuple[Any, str]:
    """The kernel of rows of pairs for sm_90, where so many positions of the first axis share them."""
    spec = _spec(program, dtype)
    pairs = pair_read(spec)
    assert pairs is not None
    backward = load_backward(spec, (True,) * len(spec.captured), False, True)
    rows, keys = hopper_dense.GROUP_Q.value, hopper_dense.BLOCK_KV.value
    given = {
        "ranges_ptr": None,
        "rows_ptr": "*fp32",
        **{f"loop_{axis}": "i32" if shared_by > 1 and axis == 0 else 1 for axis in range(4)},
        **{f"{name}_desc": described(dtype, rows, head_dim) for name in ("q", "grad")},
        **{f"{name}_desc": described(dtype, keys, head_dim) for name in ("k", "v")},
        **{f"{name}_desc": described(pairs.dtype, rows, keys) for name in ("dt", "pairs")},
    }
    axes = ((True, True, True), (True, True, True), AXES)
    variant = dense_hopper_constants(spec, backward, head_dim, axes, False, True, shared_by)
    return _compiled(hopper_dense.attention_hopper_dense_backward_kernel, program, variant, given)


def compiled_forward(
    program: str, head_dim: int, value_dim: int, dtype: torch.dtype, groups: int = 2
) -> tuple[Any, str]:
    """The kernel for sm_90, of keys that one axis shares; of documents with their ranges."""
    spec = _spec(program, dtype)
    ranged = program.startswith("documents")
    axes = ((True, True, True), AXES, AXES, (True, True, True))
    variant = forward_constants(spec, head_dim, value_dim, axes, ranged, True, SPREAD, groups)
    rows, keys = GROUP_Q.value, variant["BLOCK_KV"]
    pairs = pair_read(spec)
    given = {
        "ranges_ptr": "*i32" if ranged else None,
        "counter_ptr": "*i32",
        "lse_ptr": "*fp32",
        "q_desc": described(dtype, rows, padded(head_dim)),
        "k_desc": described(dtype, keys, padded(head_dim)),
        "v_desc": described(dtype, keys, padded(value_dim)),
        "out_desc": described(dtype, rows, min(padded(value_dim), OUT_COLUMNS)),
        "pairs_desc": None if pairs is None else described(pairs.dtype, rows, keys),
    }
    return _compiled(attention_hopper_forward_kernel, program, variant, given)


def _spec(program: str, dtype: torch.dtype) -> AttentionSpec:
    text, captured, _ = PROGRAMS[program]
    sink = parse("t0[n1]", captured) if program == "sink" else None
    return AttentionSpec(2, parse(text, captured), captured, 0, dtype, dtype, dtype, "nan", (0, 1, 2, 3), sink=sink)


def _compiled(kernel: Any, program: str, variant: Mapping[str, Any], given: dict[str, Any]) -> tuple[Any, str]:
    """given: the types of arguments, or numbers and None for what the launcher compiles in; others have 32 bits."""
    _, captured, ranks = PROGRAMS[program]
    arguments = dict(variant)
    options = {name: arguments.pop(name) for name in ("num_warps", "maxnreg", "launch_pdl") if name in arguments}
    signature: dict[str, Any] = {}
    constant: dict[tuple[int, ...], Any] = {}
    aligned: list[tuple[int, ...]] = []
    for i, name in enumerate(kernel.arg_names):
        if name in arguments:
            signature[name], constant[i,] = "constexpr", arguments[name]
        elif not isinstance(given.get(name, ""), str):
            signature[name], constant[i,] = "constexpr", given[name]
        elif name == "ranges_strides":
            signature[name] = (*("i32",) * 5, "constexpr")
            constant[i, 5] = 1
        elif name == "captured":
            signature[name] = tuple(POINTERS[c] for c in captured)
            aligned.extend((i, slot) for slot in range(len(captured)))
        elif name == "captured_strides":
            signature[name] = tuple((*("i32",) * (rank - 1), "constexpr") for rank in ranks)
            constant |= {(i, slot, rank - 1): 1 for slot, rank in enumerate(ranks)}
        else:
            signature[name] = () if name == "sizes" else given.get(name, "i32")
            aligned.extend([(i,)] * name.endswith("_ptr"))
    attributes = {path: [["tt.divisibility", 16]] for path in aligned}
    return compiled(GluonASTSource(kernel, signature, constant, attributes), DEVICES["sm90"][1], options)


def described(dtype: torch.dtype, rows: int, columns: int, batch_axes: int = 3) -> str:
    """The type of a descriptor, as the launcher spells it."""
    block = [*(1,) * batch_axes, rows, columns]
    layout = gl.NVMMASharedLayout.get_default_for(block, getattr(gl, str(dtype).removeprefix("torch.")))
    return f"tensordesc<{POINTERS[dtype].removeprefix('*')}{block},{layout!r}>"
