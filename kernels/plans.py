"""The attention operator where kernels are compiled: a call like an earlier one goes straight to its kernel.

What a call needs beside its tensors (validation, tiles, strides, what Triton specialises on) follows from their element
types, sizes, strides and alignment. It is worked out for the first call that has them, and kept as a plan.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.launch_decode import prepare_any
from flashfuse.kernels.prepared import LSE, OUT, Prepared
from flashfuse.kernels.relaunch import Again, facts, launched
from flashfuse.kernels.spec import AttentionSpec
from flashfuse.kernels.tiled import attention_tiled

Outputs = tuple[torch.Tensor, torch.Tensor]

MAX_PLANS = 4096
_plans: dict[Hashable, tuple[Prepared, tuple[Again, ...]]] = {}


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captured: Sequence[torch.Tensor],
    sizes: Sequence[int],
    spec: str,
    kv_ranges: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
) -> Outputs:
    """The operator `flashfuse::attention`, see `ops`."""
    # The setting decides how float32 products are formed.
    settings = spec, torch.backends.cuda.matmul.allow_tf32
    further = (x if x is None else _layout(x) for x in (kv_ranges, seed))
    key = (*settings, *further, *sizes, *map(_layout, (q, k, v, *captured)))
    plan = _plans.get(key)
    if plan is None:
        return _first(key, AttentionCall(AttentionSpec.from_text(spec), q, k, v, captured, sizes, kv_ranges, seed))
    prepared, launches = plan
    arguments = prepared.arguments(q, k, v, captured, kv_ranges, seed)
    with torch.cuda.device_of(q):
        for again in launches:
            again(arguments)
    return arguments[OUT], arguments[LSE]


def _layout(x: torch.Tensor) -> Hashable:
    return x.device, x.shape, x.stride(), facts(x)


def _first(key: Hashable, call: AttentionCall) -> Outputs:
    """The first call with its key, which leaves a plan for the next. Raises RuntimeError where it is not valid."""
    call.check()
    call.check_sizes()
    moved = call.on_one_device()
    prepared = prepare_any(moved)
    if prepared is None:
        return attention_tiled(moved)
    arguments = prepared.arguments(moved.q, moved.k, moved.v, moved.captured, moved.kv_ranges, moved.seed)
    with torch.cuda.device_of(moved.q):
        launches = launched(prepared.launches, arguments)
    if all(x is None or x.device == call.device for x in (*call.captured, call.kv_ranges, call.seed)):
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        _plans[key] = prepared, launches
    return arguments[OUT], arguments[LSE]
