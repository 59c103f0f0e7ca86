"""Where an attention's results and gradients go: the one place that decides their shapes, element types and strides.

Every implementation of the operator allocates here, the fake one too, so the strides a compiler sees are the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashfuse.kernels.spec import AttentionSpec


def empty_output(
    spec: AttentionSpec, q: torch.Tensor, v: torch.Tensor, sizes: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised `out` [N.., Tq, Dv], dense in the memory order `spec.out_order`, and contiguous `lse` [N.., Tq, 2].

    q: [.., Tq, D], v: [.., Tkv, Dv]; the batch sizes N.. come from `sizes`, since operands may be broadcast.
    """
    rows = (*sizes[: spec.batch_axes], q.shape[-2])
    out = torch.empty_permuted((*rows, v.shape[-1]), spec.out_order, dtype=spec.out_dtype, device=q.device)
    lse = torch.empty((*rows, 2), dtype=spec.compute_dtype, device=q.device)
    return out, lse


def empty_gradients(
    spec: AttentionSpec, operands: Sequence[torch.Tensor], needs: Sequence[bool]
) -> dict[int, torch.Tensor]:
    """Uninitialised gradients of the needed ones of `operands` = (q, k, v, *captured), by place.

    needs: a flag for each of q, k, v and every floating-point captured tensor. A gradient has the element type of its
    operand, and its strides where the operand is dense.
    """
    floating = [at for at, x in enumerate(operands) if at < 3 or spec.captured[at - 3].is_floating_point]
    if len(needs) != len(floating):
        raise RuntimeError(f"flashfuse::attention_backward: expected {len(floating)} flags in needs, got {len(needs)}")
    needed = (at for at, need in zip(floating, needs, strict=True) if need)
    return {at: torch.empty_like(operands[at]) for at in needed}
