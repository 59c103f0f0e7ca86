"""How Inductor's compiled graphs call the attention operators: at a `CallSite`, and not through torch's dispatcher.

The dispatcher takes the host about as long as the rest of a call, and a compiled graph has nothing to ask of it:
devices are known, and gradients are part of the graph.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen.wrapper import PythonWrapperCodegen, SubgraphPythonWrapperCodegen
from torch._inductor.lowering import add_needs_realized_inputs, register_lowering
from torch._inductor.virtualized import V
from torch.utils import _pytree as pytree

from flashfuse.kernels import ops  # noqa: F401  (registers the operator)

# Where kernels are compiled; the CPU's way through the dispatcher is as good as any other.
DEVICES = ("cuda",)


class AttentionKernel(ir.FallbackKernel):
    """A call of the operator, which Inductor's Python makes at a `CallSite` of its own on a GPU."""

    def codegen(self, wrapper: PythonWrapperCodegen) -> None:
        """Write the call."""
        device = self.get_device()
        if not V.graph.cpp_wrapper and device is not None and device.type in DEVICES:
            assert isinstance(self.op_overload, torch._ops.OpOverload)
            self.python_kernel_name = _call_site(wrapper, self.op_overload)
        super().codegen(wrapper)


def _call_site(wrapper: PythonWrapperCodegen, op: torch._ops.OpOverload) -> str:
    """The name of a new call site in the module that is written."""
    operator = op.name().split("::")[1]
    name = f"{operator}_{wrapper.next_kernel_suffix()}"
    # Only the outermost wrapper writes the module's header.
    while isinstance(wrapper, SubgraphPythonWrapperCodegen):
        wrapper = wrapper.parent_wrapper
    wrapper.add_import_once("from flashfuse.kernels import plans as attention_plans")
    wrapper.header.writeline(f"{name} = attention_plans.CallSite(attention_plans.{operator})")
    return name


@functools.cache
def install() -> None:
    """Tell Inductor of it, once in a process."""
    for op in (torch.ops.flashfuse.attention.default, torch.ops.flashfuse.attention_backward.default):
        add_needs_realized_inputs(op)
        register_lowering(op, type_promotion_kind=None)(functools.partial(_lower, op))


def _lower(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    return pytree.tree_map_only(ir.IRNode, ir.TensorBox.create, AttentionKernel.create(op, *args, **kwargs))
