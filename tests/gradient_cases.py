"""Gradients of attention calls for tests: exact ones, those of eager code, and the rule that holds kernels to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from attention_cases import Call
from numerics import assert_close_to_exact

from flashfuse.kernels.reference import attention_reference

Gradients = list[torch.Tensor]


def grad_out(call: Call, draw: int = 0) -> torch.Tensor:
    """A gradient of the call's output, in the output's type."""
    rows = (*call.sizes[: call.spec.batch_axes], call.q.shape[-2], call.v.shape[-1])
    values = torch.randn(rows, generator=torch.Generator().manual_seed(2 + draw))
    return values.to(call.q.device, call.spec.out_dtype)


def differentiable(call: Call) -> list[int]:
    """The places of the floating-point tensors in (q, k, v, *captured)."""
    return [at for at, x in enumerate(call.operands) if x.is_floating_point()]


def reference_gradients(
    call: Call, grads: Sequence[torch.Tensor], wanted: Sequence[int], dtype: torch.dtype | None = None
) -> Gradients:
    """Autograd through the reference, one after the other for all `grads`: exact with dtype float64, eager without."""
    operands = [x.detach().clone() for x in call.operands]
    for at in wanted:
        operands[at] = operands[at].to(dtype or operands[at].dtype).requires_grad_()
    out, _ = attention_reference(call.on(operands), dtype, call.kept())
    leaves = [operands[at] for at in wanted]
    return _stacked(
        torch.autograd.grad(out, leaves, grad.to(out.dtype), retain_graph=True, materialize_grads=True)
        for grad in grads
    )


def check_gradients(
    call: Call,
    backward: Callable[[Call, torch.Tensor, Sequence[int]], Gradients],
    wanted: Sequence[int] | None = None,
    draws: int = 1,
    few: int | None = None,
) -> Gradients:
    """Hold `backward(call, grad_out, wanted)` to the exact gradients, by default of everything that has one.

    draws: for how many gradients of the output; a gradient that is few numbers says little with one.
    few: gradients of more numbers than that are taken for the first alone. Returns the gradients for the first.
    """
    wanted = differentiable(call) if wanted is None else wanted
    again = [at for at in wanted if few is None or call.operands[at].numel() <= few]
    grads = [grad_out(call, draw) for draw in range(draws)]
    exact, eager = (reference_gradients(call, grads, wanted, dtype) for dtype in (torch.float64, None))
    first = backward(call, grads[0], wanted)
    more = [dict(zip(again, backward(call, grad, again), strict=True)) for grad in grads[1:] if again]
    for at, found, theirs, truth in zip(wanted, first, eager, exact, strict=True):
        mine = torch.stack([found, *(gradients[at] for gradients in more if at in gradients)])
        operand = call.operands[at]
        assert (mine.shape[1:], mine.dtype) == (operand.shape, operand.dtype)
        try:
            assert_close_to_exact(mine, theirs[: len(mine)], truth[: len(mine)], dtype=call.spec.product_dtype)
        except AssertionError as error:
            raise AssertionError(f"gradient of operand {at} (q, k, v, captured..): {error}") from error
    return first


def _stacked(draws: Iterable[Sequence[torch.Tensor]]) -> Gradients:
    return [torch.stack(grads) for grads in zip(*draws, strict=True)]


def check_rows_of_one_value(call: Call, backward: Callable[[Call, torch.Tensor, Sequence[int]], Gradients]) -> None:
    """Gradients of a call whose queries are keys, every probability being 0 or 1: those of queries and keys are 0."""
    k = (torch.nn.functional.normalize(call.k.float(), dim=-1) * 4).to(call.k.dtype)
    call = replace(call, q=k[..., : call.q_len, :].contiguous(), k=k)
    grad = grad_out(call)
    dq, dk, dv = backward(call, grad, (0, 1, 2))
    torch.testing.assert_close(dv[..., : call.q_len, :], grad.to(dv.device))
    assert torch.count_nonzero(dq) == torch.count_nonzero(dk) == 0
