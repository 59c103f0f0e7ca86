"""Where an attention's results and gradients go: the one place that decides their shapes, element types and strides.

Every implementation of the operator allocates here, the fake one too, so the strides a compiler sees are the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashfuse.kernels.call import AttentionCall


def empty_output(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised `out` [N.., Tq, Dv], dense in the memory order `spec.out_order`, and contiguous `lse` [N.., Tq, 2].

    The batch sizes N.. come from the call's `sizes`, since operands may be broadcast.
    """
    spec, rows = call.spec, (*call.batch, call.q_len)
    out = torch.empty_permuted((*rows, call.value_dim), spec.out_order, dtype=spec.out_dtype, device=call.device)
    lse = torch.empty((*rows, 2), dtype=spec.compute_dtype, device=call.device)
    return out, lse


def needed_places(call: AttentionCall, needs: Sequence[bool]) -> list[int]:
    """The places of the operands (q, k, v, *captured) whose gradients are needed.

    needs: a flag for each of q, k, v and every floating-point captured tensor.
    """
    floating = [0, 1, 2, *(slot + 3 for slot, dtype in enumerate(call.spec.captured) if dtype.is_floating_point)]
    if len(needs) != len(floating):
        raise RuntimeError(f"flashfuse::attention_backward: expected {len(floating)} flags in needs, got {len(needs)}")
    return [at for at, need in zip(floating, needs, strict=True) if need]


def needed_operands(call: AttentionCall, needs: Sequence[bool]) -> list[torch.Tensor]:
    """The operands whose gradients are needed. Raises RuntimeError where there are none of them."""
    if call.spec.key is not None or call.spec.value is not None:
        raise RuntimeError("flashfuse::attention_backward: no gradients behind programs of stored elements")
    return [call.operands[at] for at in needed_places(call, needs)]


def empty_gradients(call: AttentionCall, needs: Sequence[bool]) -> dict[int, torch.Tensor]:
    """Uninitialised gradients of `needed_places`, by place.

    A gradient has the element type of its operand, and its strides where the operand is dense.
    """
    return {at: torch.empty_like(call.operands[at]) for at in needed_places(call, needs)}
