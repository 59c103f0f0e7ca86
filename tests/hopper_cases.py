"""Attentions that the one-pass backward for Hopper takes, and its kernel compiled for sm_90."""

from __future__ import annotations

from typing import Any

import torch
import triton
from compile_targets import DEVICES, POINTERS
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from flashfuse.kernels.codegen_backward import load_backward
from flashfuse.kernels.hopper_backward import GROUP_KV, attention_hopper_backward_kernel
from flashfuse.kernels.launch_hopper import BLOCK_Q, hopper_constants
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
        (torch.bool,),
        (2,),
    ),
}
SPREAD = 8


def compiled(program: str, head_dim: int, dtype: torch.dtype, shared: bool) -> Any:
    """The kernel for sm_90, of one position or more (shared) for each that has keys; of documents with their ranges."""
    text, captured, ranks = PROGRAMS[program]
    spec = AttentionSpec(2, parse(text, captured), captured, 0, dtype, dtype, dtype, "nan", (0, 1, 2, 3))
    ranged = program == "documents"
    backward = load_backward(spec, (False,) * len(captured), ranged, True)
    arguments = dict(hopper_constants(spec, backward, head_dim, ranged, True, SPREAD))
    given = {"ranges_ptr": ranged, "filled_ptr": backward.fill_threshold is not None}
    options = {option: arguments.pop(option) for option in ("num_warps", "maxnreg")}
    rows = {"q_desc": BLOCK_Q[head_dim], "grad_desc": BLOCK_Q[head_dim]}
    signature: dict[str, Any] = {}
    constant: dict[tuple[int, ...], Any] = {}
    aligned: list[tuple[int, ...]] = []
    for i, name in enumerate(attention_hopper_backward_kernel.arg_names):
        if name in arguments:
            signature[name], constant[i,] = "constexpr", arguments[name]
        elif name == "dq_desc":
            signature[name] = described(torch.float32, [1, 64, 64])
        elif name.endswith("_desc"):
            signature[name] = described(dtype, [1, 1, 1, rows.get(name, GROUP_KV.value), head_dim])
        elif name.endswith("_ptr") and not given.get(name, True):
            signature[name], constant[i,] = "constexpr", None
        elif name.endswith("_ptr"):
            signature[name] = "*i32" if name in given else "*fp32"
            aligned.append((i,))
        elif name == "ranges_strides":
            signature[name] = (*("i32",) * 5, "constexpr")
            constant[i, 5] = 1
        elif name == "captured":
            signature[name] = tuple(POINTERS[c] for c in captured)
            aligned.extend((i, slot) for slot in range(len(captured)))
        elif name == "captured_strides":
            signature[name] = tuple((*("i32",) * (rank - 1), "constexpr") for rank in ranks)
            constant |= {(i, slot, rank - 1): 1 for slot, rank in enumerate(ranks)}
        elif name.startswith("loop_") and not (shared and name == "loop_2"):
            signature[name], constant[i,] = "constexpr", 1
        else:
            signature[name] = () if name == "sizes" else "i32"
    attributes = {path: [["tt.divisibility", 16]] for path in aligned}
    source = GluonASTSource(attention_hopper_backward_kernel, signature, constant, attributes)
    return triton.compile(source, target=DEVICES["sm90"][1], options=options)


def described(dtype: torch.dtype, block: list[int]) -> str:
    """The type of a descriptor, as the launcher spells it."""
    layout = gl.NVMMASharedLayout.get_default_for(block, getattr(gl, str(dtype).removeprefix("torch.")))
    return f"tensordesc<{POINTERS[dtype].removeprefix('*')}{block},{layout!r}>"
