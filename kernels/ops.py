"""The operator `flashfuse::attention`: what a compiled graph calls, and where each device's kernel is chosen.

    attention(Tensor q, Tensor k, Tensor v, Tensor[] captured, SymInt[] sizes, str spec, Tensor? kv_ranges=None,
        Tensor? seed=None) -> (Tensor out, Tensor lse)

q: [N.., Tq, D], k: [N.., Tkv, D], v: [N.., Tkv, Dv], broadcast over the batch axes N..; `sizes` are the batch sizes
followed by size0, size1, .. of the score program; `spec` is `AttentionSpec.to_text()`. out: [N.., Tq, Dv].

lse: [N.., Tq, 2], the log-sum-exp of a row's scores as (m, l), which make a probability of a score again:
exp(score - m) / l. m is the row's largest score (where nothing is huge, any number near it), the sink's included, and l
the sum of exp(score - m): their one number m + log(l) has no room for the logarithm beside a huge fill, and rounds it
several times worse than l is rounded beside others. A row without a key has (-inf, 0), or beside a sink (sink, 1);
where its output is NaN for that reason, NaN as the second. Without a normaliser it is (0, 0).

kv_ranges: int32 [N'.., at least ceil(Tq / MASK_BLOCK), 4], N' broadcasting to N: the `bounds.KvRange` of each
MASK_BLOCK queries under a mask that depends on data. Without it every key that positions alone do not rule out is
visited. It comes from `flashfuse::mask_ranges`, which compilers see as the torch operators it is made of.

seed: one int64 for the numbers that decide what is dropped, where the spec has dropout: see `dropout`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from flashfuse.kernels.autograd import register_formula
from flashfuse.kernels.batching import vmap_attention
from flashfuse.kernels.call import Arguments
from flashfuse.kernels.gradient import gradients, save
from flashfuse.kernels.output import empty_output
from flashfuse.kernels.ranges import mask_ranges
from flashfuse.kernels.tiled import attention_tiled

Outputs = tuple[torch.Tensor, torch.Tensor]
Kernel = Callable[..., Outputs]

_library = torch.library.Library("flashfuse", "DEF")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] captured, SymInt[] sizes, str spec, Tensor? kv_ranges=None,"
    " Tensor? seed=None) -> (Tensor out, Tensor lse)",
    # Output strides depend on the spec alone, so inputs may come in whatever layout their producer prefers: no copies.
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)

_library.define(
    "mask_ranges(Tensor[] captured, SymInt[] sizes, int batch_axes, SymInt q_len, SymInt kv_len, str needed, str idle)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("mask_ranges", mask_ranges, "CompositeImplicitAutograd")


def _attention_tiled(*arguments: Any) -> Outputs:
    """In plain PyTorch, on any device."""
    call = Arguments(*arguments).call
    call.check()
    call.check_sizes()
    return attention_tiled(call.on_one_device())


@functools.cache
def _attention_triton() -> Kernel | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from flashfuse.kernels.plans import attention

    return attention


def _attention_cpu(*arguments: Any) -> Outputs:
    interpret = os.environ.get("TRITON_INTERPRET") == "1"
    return ((_attention_triton() if interpret else None) or _attention_tiled)(*arguments)


def _attention_cuda(*arguments: Any) -> Outputs:
    return (_attention_triton() or _attention_tiled)(*arguments)


_library.impl("attention", _attention_cpu, "CPU")
_library.impl("attention", _attention_cuda, "CUDA")


@torch.library.register_fake("flashfuse::attention", lib=_library)
def _fake(*arguments: Any) -> Outputs:
    call = Arguments(*arguments).call
    call.check()
    return empty_output(call)


register_formula(_library, torch.ops.flashfuse.attention.default, gradients, save)
torch.library.register_vmap("flashfuse::attention", vmap_attention, lib=_library)
