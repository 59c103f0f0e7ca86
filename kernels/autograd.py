"""Autograd formulas of operators, which hold under the transforms of `torch.func` too.

`torch.library.register_autograd` refuses `torch.func.grad`, and drops the tangents of forward-mode differentiation
without a word. A formula here is one `autograd.Function` that stands where a built-in operator's derivative does, below
the transform that is being applied: the levels under it see the operator again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch._library.utils import fill_defaults
from torch.autograd import Function
from torch.utils import _pytree as pytree

Backward = Callable[..., tuple[Any, ...]]
SetUp = Callable[[Any, tuple[Any, ...], Any], None]


def register_formula(
    library: torch.library.Library, op: torch._ops.OpOverload, backward: Backward, set_up: SetUp | None = None
) -> None:
    """Give an operator of tensors and lists of tensors its derivative.

    backward(ctx, *grads): a gradient for each argument, a list for a list; `ctx.needs` has the arguments' structure.
    set_up(ctx, arguments, output): keep what it needs.
    """

    class Formula(Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, history: bool, structure: pytree.TreeSpec, *flat: Any) -> Any:
            arguments = pytree.tree_unflatten(flat, structure)
            below = keyset & torch._C._after_autograd_keyset
            with torch._C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(history):
                output = op.redispatch(below, *arguments)
            ctx.structure = structure
            if set_up is not None:
                set_up(ctx, tuple(arguments), output)
            return tuple(output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            ctx.needs = pytree.tree_unflatten(ctx.needs_input_grad[-ctx.structure.num_leaves :], ctx.structure)
            found = backward(ctx, *grads)
            return None, None, None, *ctx.structure.flatten_up_to(list(found))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> NoReturn:
            raise NotImplementedError(f"{op.name()} has no forward-mode derivative: compute this part with eager code")

    def call(keyset: Any, *given: Any) -> Any:
        if not _derivatives_wanted(given):
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *given)
        arguments, _ = fill_defaults(op._schema, given, {})
        flat, structure = pytree.tree_flatten(list(arguments))
        # `Function.apply` itself would hand a tensor of a transform to the outermost level, which is behind us here.
        apply = super(Function, Formula).apply
        with enable_single_level_autograd_function():
            output = apply(keyset, torch.is_grad_enabled(), structure, *flat)
        return list(output) if op._schema.returns[0].type.kind() == "ListType" else output

    library.impl(op._schema.name.split("::")[1], call, "Autograd", with_keyset=True)


def _derivatives_wanted(arguments: Any) -> bool:
    wanted = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
    return wanted or torch.autograd.forward_ad._current_level >= 0
