"""The operator `flashfuse::attention_backward`, and the attention operator's autograd formula that calls it.

    attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] captured,
        SymInt[] sizes, str spec, Tensor? kv_ranges, Tensor? seed, bool[] needs) -> Tensor[]

The gradients of q, k, v and then of every floating-point captured tensor, those that `needs` flags, in this order. A
gradient has the shape and element type of its operand, summed over the batch axes along which that is shared, and its
strides where the operand is dense. The other arguments are the forward's and its results, see `ops`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from flashfuse.kernels.autograd import register_formula
from flashfuse.kernels.backward_tiled import attention_backward_tiled
from flashfuse.kernels.batching import vmap_attention_backward
from flashfuse.kernels.call import Arguments, BackwardArguments
from flashfuse.kernels.output import empty_gradients, needed_operands

Kernel = Callable[..., list[torch.Tensor]]

_library = torch.library.Library("flashfuse", "FRAGMENT")
_library.define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] captured,"
    " SymInt[] sizes, str spec, Tensor? kv_ranges, Tensor? seed, bool[] needs) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


def _attention_backward_tiled(*arguments: Any) -> list[torch.Tensor]:
    """In plain PyTorch, on any device."""
    given = BackwardArguments(*arguments)
    call = given.call
    wanted = needed_operands(call, given.needs)
    found = attention_backward_tiled(call.on_one_device(), given.grad_out, given.out, given.lse, given.needs)
    return [x.to(like.device) for x, like in zip(found, wanted, strict=True)]


@functools.cache
def _attention_backward_triton() -> Kernel | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from flashfuse.kernels.plans import attention_backward

    return attention_backward


def _attention_backward_cpu(*arguments: Any) -> list[torch.Tensor]:
    interpret = os.environ.get("TRITON_INTERPRET") == "1"
    return ((_attention_backward_triton() if interpret else None) or _attention_backward_tiled)(*arguments)


def _attention_backward_cuda(*arguments: Any) -> list[torch.Tensor]:
    return (_attention_backward_triton() or _attention_backward_tiled)(*arguments)


_library.impl("attention_backward", _attention_backward_cpu, "CPU")
_library.impl("attention_backward", _attention_backward_cuda, "CUDA")


@torch.library.register_fake("flashfuse::attention_backward", lib=_library)
def _fake(*arguments: Any) -> list[torch.Tensor]:
    given = BackwardArguments(*arguments)
    return list(empty_gradients(given.call, given.needs).values())


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Keep what the gradients are computed from; log-sum-exps themselves have none."""
    given, (out, lse) = Arguments(*inputs), output
    ctx.mark_non_differentiable(lse)
    kept = given.q, given.k, given.v, out, lse, given.kv_ranges, given.seed, *given.captured
    ctx.save_for_backward(*map(_as_savable, kept))
    ctx.sizes, ctx.spec = given.sizes, given.spec


def _as_savable(x: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor of inference mode as one that autograd saves: what eager code made of it, and saved, the kernel read."""
    return x.clone() if x is not None and x.is_inference() else x


def gradients(ctx: Any, grad_out: torch.Tensor, _: torch.Tensor | None) -> tuple[Any, ...]:
    """A gradient for each argument of `flashfuse::attention`."""
    q, k, v, out, lse, kv_ranges, seed, *captured = ctx.saved_tensors
    flags = (*ctx.needs[:3], *ctx.needs[3])
    floating = [at for at, x in enumerate((q, k, v, *captured)) if x.is_floating_point()]
    needs = [flags[at] for at in floating]
    found = iter(
        torch.ops.flashfuse.attention_backward(
            grad_out, q, k, v, out, lse, captured, ctx.sizes, ctx.spec, kv_ranges, seed, needs
        )
    )
    result: list[torch.Tensor | None] = [None] * len(flags)
    for at, need in zip(floating, needs, strict=True):
        result[at] = next(found) if need else None
    return *result[:3], result[3:], [None] * len(ctx.sizes), None, None, None


def _no_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError(
        "flashfuse::attention has no second derivative: its backward is no function of the graph that create_graph=True"
        " asks for. Compute this part with eager code"
    )


register_formula(_library, torch.ops.flashfuse.attention_backward.default, _no_second_derivative)
torch.library.register_vmap("flashfuse::attention_backward", vmap_attention_backward, lib=_library)
