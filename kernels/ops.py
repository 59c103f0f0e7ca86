"""The operator `flashfuse::attention`: what a compiled graph calls, and where each device's kernel is chosen.

    attention(Tensor q, Tensor k, Tensor v, Tensor[] captured, SymInt[] sizes, str spec, Tensor? kv_ranges=None)
        -> (Tensor out, Tensor lse)

q: [N.., Tq, D], k: [N.., Tkv, D], v: [N.., Tkv, Dv], broadcast over the batch axes N..; `sizes` are the batch sizes
followed by size0, size1, .. of the score program; `spec` is `AttentionSpec.to_text()`. out: [N.., Tq, Dv].

lse: [N.., Tq, 2], what makes a probability of a score again: exp(score - lse[.., 0] - lse[.., 1]). Their sum is the
natural logarithm of the sum of exp(score), the sink's included. It is a pair because a huge fill absorbs the
logarithm: lse[.., 0] is the row's largest score (where nothing is huge, any number near it) and lse[.., 1] the
logarithm of the sum of exp(score - lse[.., 0]). A row without a key has (-inf, 0), or beside a sink (sink, 0); where
its output is NaN for that reason, NaN as the second. Without a normaliser it is (0, 0).

kv_ranges: int32 [N'.., at least ceil(Tq / MASK_BLOCK), 4], N' broadcasting to N: the `bounds.KvRange` of each
MASK_BLOCK queries under a mask that depends on data. Without it every key that positions alone do not rule out is
visited. It comes from `flashfuse::mask_ranges`, which compilers see as the torch operators it is made of.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence

import torch

from flashfuse.kernels.autograd import register_formula
from flashfuse.kernels.batching import vmap_attention
from flashfuse.kernels.gradient import gradients, save
from flashfuse.kernels.mask import MASK_BLOCK
from flashfuse.kernels.output import empty_output
from flashfuse.kernels.ranges import mask_ranges
from flashfuse.kernels.spec import AttentionSpec
from flashfuse.kernels.tiled import attention_tiled

Outputs = tuple[torch.Tensor, torch.Tensor]
Kernel = Callable[..., Outputs]

_library = torch.library.Library("flashfuse", "DEF")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] captured, SymInt[] sizes, str spec, Tensor? kv_ranges=None)"
    " -> (Tensor out, Tensor lse)",
    # Output strides depend on the spec alone, so inputs may come in whatever layout their producer prefers: no copies.
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)

_library.define(
    "mask_ranges(Tensor[] captured, SymInt[] sizes, int batch_axes, SymInt q_len, SymInt kv_len, str needed, str idle)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("mask_ranges", mask_ranges, "CompositeImplicitAutograd")


def _check(
    spec: AttentionSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captured: Sequence[torch.Tensor],
    sizes: Sequence[int],
) -> None:
    """Raise RuntimeError where the operands cannot be the spec's. Size comparisons are symbolic while tracing."""
    rank = spec.batch_axes + 2
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != rank:
            raise RuntimeError(f"flashfuse::attention: {name} needs {rank} dimensions, got shape {list(x.shape)}")
        if x.device != q.device:
            raise RuntimeError(f"flashfuse::attention: {name} is on {x.device}, q on {q.device}")
        to = spec.probs_dtype if name == "v" else spec.product_dtype
        if torch.promote_types(x.dtype, to) != to:
            raise RuntimeError(f"flashfuse::attention: {name} is {x.dtype}, which {to} cannot hold exactly")
    if len(sizes) != spec.batch_axes + spec.num_sizes:
        expected = f"{spec.batch_axes} batch sizes and {spec.num_sizes} others"
        raise RuntimeError(f"flashfuse::attention: expected {expected}, got {len(sizes)} sizes")
    if tuple(c.dtype for c in captured) != spec.captured:
        found = [c.dtype for c in captured]
        raise RuntimeError(f"flashfuse::attention: captured tensors must be {list(spec.captured)}, got {found}")
    for slot, c in enumerate(captured):
        # torch lets a scalar on the CPU stand beside tensors elsewhere.
        if c.device != q.device and (c.dim() or c.device.type != "cpu"):
            raise RuntimeError(f"flashfuse::attention: captured tensor {slot} is on {c.device}, q on {q.device}")
    torch._check(q.shape[-1] == k.shape[-1], lambda: f"flashfuse::attention: q is {q.shape[-1]} wide, k {k.shape[-1]}")
    torch._check(k.shape[-2] == v.shape[-2], lambda: f"flashfuse::attention: {k.shape[-2]} keys, {v.shape[-2]} values")


def _check_batch(spec: AttentionSpec, operands: Sequence[torch.Tensor], sizes: Sequence[int]) -> None:
    """Raise RuntimeError where an operand does not broadcast to the batch sizes."""
    batch = tuple(sizes[: spec.batch_axes])
    for name, x in zip("qkv", operands, strict=True):
        if any(n not in (1, size) for n, size in zip(x.shape, batch, strict=False)):
            raise RuntimeError(f"flashfuse::attention: {name} of shape {list(x.shape)} does not broadcast to {batch}")


def _beside(
    spec: AttentionSpec, kv_ranges: torch.Tensor | None, q: torch.Tensor, sizes: Sequence[int]
) -> torch.Tensor | None:
    """The ranges, on q's device. Raises RuntimeError where they are not what `flashfuse::mask_ranges` gives."""
    if kv_ranges is None:
        return None
    wanted = (*sizes[: spec.batch_axes], -(-q.shape[-2] // MASK_BLOCK), 4)
    found = tuple(kv_ranges.shape)
    broadcasts = all(n in (1, size) for n, size in zip(found[:-2], wanted, strict=False))
    fits = broadcasts and len(found) == len(wanted) and found[-2] >= wanted[-2] and found[-1] == 4
    if kv_ranges.dtype != torch.int32 or not fits:
        raise RuntimeError(
            f"flashfuse::attention: kv_ranges must be int32 and broadcast to {wanted}, got {kv_ranges.dtype} {found}"
        )
    return kv_ranges.to(q.device)


def _on_device(choose: Callable[[], Kernel]) -> Kernel:
    """The implementation on one device, by the kernel that `choose` finds at the call."""

    def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        captured: Sequence[torch.Tensor],
        sizes: Sequence[int],
        spec: str,
        kv_ranges: torch.Tensor | None = None,
    ) -> Outputs:
        parsed = AttentionSpec.from_text(spec)
        _check(parsed, q, k, v, captured, sizes)
        _check_batch(parsed, (q, k, v), sizes)
        kv_ranges = _beside(parsed, kv_ranges, q, sizes)
        captured = [c if c.device == q.device else c.to(q.device, non_blocking=True) for c in captured]
        return choose()(parsed, q, k, v, captured, sizes, kv_ranges)

    return attention


@functools.cache
def _triton_kernel() -> Kernel | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from flashfuse.kernels.launch import attention_forward

    return attention_forward


def _cpu_kernel() -> Kernel:
    interpret = os.environ.get("TRITON_INTERPRET") == "1"
    return (_triton_kernel() if interpret else None) or attention_tiled


def _cuda_kernel() -> Kernel:
    return _triton_kernel() or attention_tiled


_library.impl("attention", _on_device(_cpu_kernel), "CPU")
_library.impl("attention", _on_device(_cuda_kernel), "CUDA")


@torch.library.register_fake("flashfuse::attention", lib=_library)
def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captured: Sequence[torch.Tensor],
    sizes: Sequence[int],
    spec: str,
    kv_ranges: torch.Tensor | None = None,
) -> Outputs:
    parsed = AttentionSpec.from_text(spec)
    _check(parsed, q, k, v, captured, sizes)
    return empty_output(parsed, q, v, sizes)


register_formula(_library, torch.ops.flashfuse.attention.default, gradients, save)
torch.library.register_vmap("flashfuse::attention", vmap_attention, lib=_library)
