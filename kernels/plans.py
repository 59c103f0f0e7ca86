"""The attention operator where kernels are compiled: a call like an earlier one goes straight to its kernel.

What a call needs beside its tensors (validation, tiles, strides, what Triton specialises on) follows from their element
types, sizes, strides and alignment. It is worked out for the first call that has them, and kept as a plan.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch._C._dynamo.guards import _empty_strided_cpu, _empty_strided_cuda  # type: ignore[attr-defined]

from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.launch import allows_tf32
from flashfuse.kernels.launch_decode import prepare_any
from flashfuse.kernels.prepared import LSE, OUT, Prepared, empty_on
from flashfuse.kernels.relaunch import ALIGNMENT, Again, facts, launched
from flashfuse.kernels.spec import AttentionSpec
from flashfuse.kernels.tiled import attention_tiled

Outputs = tuple[torch.Tensor, torch.Tensor]
Plan = tuple[Prepared, tuple[Again, ...]]

# A growing cache leaves one for every length.
MAX_PLANS = 512
_plans: dict[Hashable, Plan] = {}


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
    key = _key(q, k, v, captured, sizes, spec, kv_ranges, seed)
    plan = _plans.get(key)
    if plan is None:
        return _first(key, AttentionCall(AttentionSpec.from_text(spec), q, k, v, captured, sizes, kv_ranges, seed))
    prepared, launches = plan
    with torch.cuda.device_of(q):
        return _run(launches, prepared.arguments(q, k, v, captured, kv_ranges, seed, empty_on(q.device)))


class CallSite:
    """One place in a compiled graph where the operator is called: a call like the last one there is launched at once.

    Elsewhere torch's dispatcher comes first and a plan is looked up, which together take several times longer. In a
    compiled graph a place has tensors of one device, which is the current one, and of one element type each; and the
    graph is for one setting of what else a plan depends on.
    """

    def __init__(self) -> None:
        # In one piece, so that threads which call here take turns with it.
        self._last: tuple[Any, Plan] | None = None

    def __call__(
        self,
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
        tensors = [q, k, v, *captured, *[x for x in (kv_ranges, seed) if x is not None]]
        layout = [(x.shape, x.stride(), x.data_ptr() % ALIGNMENT == 0) for x in tensors], sizes
        last = self._last
        if last is None or layout != last[0]:
            # There is a plan from the second call on, unless torch computes this.
            key = _key(q, k, v, captured, sizes, spec, kv_ranges, seed)
            plan = _plans.get(key)
            if plan is None:
                call = AttentionCall(AttentionSpec.from_text(spec), q, k, v, captured, sizes, kv_ranges, seed)
                return _first(key, call)
            last = self._last = layout, plan
        prepared, launches = last[1]
        empty = _empty_strided_cuda if q.is_cuda else _empty_strided_cpu
        return _run(launches, prepared.arguments(q, k, v, captured, kv_ranges, seed, empty))


def _run(launches: Sequence[Again], arguments: tuple[Any, ...]) -> Outputs:
    for again in launches:
        again(arguments)
    return arguments[OUT], arguments[LSE]


def _key(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captured: Sequence[torch.Tensor],
    sizes: Sequence[int],
    spec: str,
    kv_ranges: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
) -> Hashable:
    """All that the plan of a call follows from."""
    # The setting decides how float32 products are formed.
    settings = spec, allows_tf32()
    further = (x if x is None else _layout(x) for x in (kv_ranges, seed))
    return (*settings, *further, *sizes, *map(_layout, (q, k, v, *captured)))


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
    arguments = prepared.of_call(moved)
    with torch.cuda.device_of(moved.q):
        launches = launched(prepared.launches, arguments)
    if all(x is None or x.device == call.device for x in (*call.captured, call.kv_ranges, call.seed)):
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        _plans[key] = prepared, launches
    return arguments[OUT], arguments[LSE]
