"""Gradients of attention calls for tests: exact ones, those of eager code, and the rule that holds kernels to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from attention_cases import Call
from numerics import assert_close_to_exact

from flashfuse.kernels.reference import attention_reference

Gradients = list[torch.Tensor]


def grad_out(call: Call) -> torch.Tensor:
    """A gradient of the call's output, in the output's type."""
    rows = (*call.sizes[: call.spec.batch_axes], call.q.shape[-2], call.v.shape[-1])
    values = torch.randn(rows, generator=torch.Generator().manual_seed(2))
    return values.to(call.q.device, call.spec.out_dtype)


def differentiable(call: Call) -> list[int]:
    """The places of the floating-point tensors in (q, k, v, *captured)."""
    return [at for at, x in enumerate((call.q, call.k, call.v, *call.captured)) if x.is_floating_point()]


def reference_gradients(call: Call, wanted: Sequence[int], dtype: torch.dtype | None = None) -> Gradients:
    """Autograd through the reference: exact with dtype float64, eager without."""
    operands = [x.detach().clone() for x in (call.q, call.k, call.v, *call.captured)]
    for at in wanted:
        operands[at] = operands[at].to(dtype or operands[at].dtype).requires_grad_()
    q, k, v, *captured = operands
    out, _ = attention_reference(call.spec, q, k, v, captured, call.sizes, dtype=dtype)
    leaves = [operands[at] for at in wanted]
    found = torch.autograd.grad(out, leaves, grad_out(call).to(out.dtype), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def check_gradients(
    call: Call,
    backward: Callable[[Call, torch.Tensor, Sequence[int]], Gradients],
    wanted: Sequence[int] | None = None,
) -> Gradients:
    """Hold `backward(call, grad_out, wanted)` to the exact gradients, by default of everything that has one."""
    wanted = differentiable(call) if wanted is None else wanted
    exact, eager = reference_gradients(call, wanted, torch.float64), reference_gradients(call, wanted)
    found = backward(call, grad_out(call), wanted)
    for at, mine, theirs, truth in zip(wanted, found, eager, exact, strict=True):
        operand = (call.q, call.k, call.v, *call.captured)[at]
        assert (mine.shape, mine.dtype) == (operand.shape, operand.dtype)
        try:
            assert_close_to_exact(mine, theirs, truth, dtype=call.spec.product_dtype)
        except AssertionError as error:
            raise AssertionError(f"gradient of operand {at} (q, k, v, captured..): {error}") from error
    return found
