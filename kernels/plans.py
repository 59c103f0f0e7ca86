"""Operators where kernels are compiled: a call like an earlier one goes straight to its kernels.

What a call needs beside its tensors (validation, tiles, strides, what Triton specialises on, where gradients go)
follows from their element types, sizes, strides and alignment. It is worked out for the first call that has them, and
kept as a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

import torch
from torch._C._dynamo.guards import _empty_strided_cpu, _empty_strided_cuda  # type: ignore[attr-defined]

from flashfuse.kernels.backward_tiled import attention_backward_tiled
from flashfuse.kernels.call import Arguments, BackwardArguments
from flashfuse.kernels.launch import allows_tf32
from flashfuse.kernels.launch_backward import prepare_backward
from flashfuse.kernels.launch_decode import prepare_any
from flashfuse.kernels.output import needed_operands
from flashfuse.kernels.prepared import empty_on
from flashfuse.kernels.relaunch import ALIGNMENT, Plan, Result, facts, planned
from flashfuse.kernels.tiled import attention_tiled
from flashfuse.kernels.tuning import prepare_tuned

Tensors = Sequence[torch.Tensor | None]

# A growing cache leaves one for every length.
MAX_PLANS = 512


@dataclass(frozen=True, eq=False)
class Operator(Generic[Result]):
    """An operator that keeps plans.

    split: the tensors of a call, and all other arguments, which a plan follows from as they are.
    first: what a call gives, and its plan, or None where there is none: torch computes it, or tensors have to be moved
        for it. Raises RuntimeError where the call is not valid.
    plans: by all they follow from.
    """

    split: Callable[..., tuple[Tensors, tuple[Hashable, ...]]]
    first: Callable[..., tuple[Result, Plan[Result] | None]]
    plans: dict[Hashable, Plan[Result]] = field(default_factory=dict)

    def __call__(self, *arguments: Any) -> Result:
        tensors, others = self.split(*arguments)
        key = self.key(tensors, others)
        plan = self.plans.get(key)
        if plan is None:
            return self.leave_plan(key, arguments)
        with torch.cuda.device_of(arguments[0]):
            return plan(empty_on(arguments[0].device), tensors)

    def key(self, tensors: Tensors, others: tuple[Hashable, ...]) -> Hashable:
        """All that the plan of a call follows from; settings decide how float32 products are formed, and which pass may
        add in any order."""
        return (allows_tf32(), torch.are_deterministic_algorithms_enabled(), *others, *map(_layout, tensors))

    def leave_plan(self, key: Hashable, arguments: tuple[Any, ...]) -> Result:
        """The first call with its key."""
        found, plan = self.first(*arguments)
        if plan is not None:
            if len(self.plans) >= MAX_PLANS:
                self.plans.clear()
            self.plans[key] = plan
        return found


class CallSite(Generic[Result]):
    """One place in a compiled graph where an operator is called: a call like the last one there is launched at once.

    Elsewhere torch's dispatcher comes first and a plan is looked up, which together take several times longer. In a
    compiled graph a place has tensors of one device, which is the current one, and of one element type each; and the
    graph is for one setting of what else a plan depends on.
    """

    def __init__(self, operator: Operator[Result]) -> None:
        self._operator = operator
        # In one piece, so that threads which call here take turns with it.
        self._last: tuple[Any, Plan[Result]] | None = None

    def __call__(self, *arguments: Any) -> Result:
        """The operator."""
        tensors, others = self._operator.split(*arguments)
        layouts = [None if x is None else (x.shape, x.stride(), x.data_ptr() % ALIGNMENT == 0) for x in tensors]
        # A backward pass runs under the setting of its own time, not that of the graph's.
        layout = layouts, others, torch.are_deterministic_algorithms_enabled()
        last = self._last
        if last is None or layout != last[0]:
            # There is a plan from the second call on, unless torch computes this.
            key = self._operator.key(tensors, others)
            plan = self._operator.plans.get(key)
            if plan is None:
                return self._operator.leave_plan(key, arguments)
            last = self._last = layout, plan
        return last[1](_empty_strided_cuda if arguments[0].is_cuda else _empty_strided_cpu, tensors)


def _layout(x: torch.Tensor | None) -> Hashable:
    return None if x is None else (x.device, x.shape, x.stride(), facts(x))


# --------------------------------------------------------------------------------------------------------------------
# The two operators


def _split(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captured: Sequence[torch.Tensor],
    sizes: Sequence[int],
    spec: str,
    kv_ranges: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
) -> tuple[Tensors, tuple[Hashable, ...]]:
    return [q, k, v, kv_ranges, seed, *captured], (spec, *sizes)


def _first(*arguments: Any) -> tuple[tuple[torch.Tensor, torch.Tensor], Plan | None]:
    call = Arguments(*arguments).call
    call.check()
    call.check_sizes()
    moved = call.on_one_device()
    prepared = prepare_tuned(moved) if moved.spec.tuned else prepare_any(moved)
    if prepared is None:
        return attention_tiled(moved), None
    found, plan = planned(prepared, moved.tensors)
    return found, plan if call.is_on_one_device else None


def _split_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    captured: Sequence[torch.Tensor],
    sizes: Sequence[int],
    spec: str,
    kv_ranges: torch.Tensor | None,
    seed: torch.Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensors, tuple[Hashable, ...]]:
    return [grad_out, out, lse, q, k, v, kv_ranges, seed, *captured], (spec, tuple(needs), *sizes)


def _first_backward(*arguments: Any) -> tuple[list[torch.Tensor], Plan | None]:
    given = BackwardArguments(*arguments)
    call, grad_out, out, lse, needs = given.call, given.grad_out, given.out, given.lse, given.needs
    wanted = needed_operands(call, needs)
    moved = call.on_one_device()
    prepared = prepare_backward(moved, grad_out, out, lse, needs)
    if prepared is None:
        found, plan = attention_backward_tiled(moved, grad_out, out, lse, needs), None
    else:
        found, plan = planned(prepared, (grad_out, out, lse, *moved.tensors))
    found = [x.to(like.device) for x, like in zip(found, wanted, strict=True)]
    return found, plan if call.is_on_one_device else None


attention = Operator(_split, _first)
attention_backward = Operator(_split_backward, _first_backward)
