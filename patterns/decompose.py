"""Rows of operators that torch itself decomposes into others: functions put together from those that have a row.

Only those whose decomposition has the operator's own derivative at its kinks stand here; `hardtanh` for one is flat at
both ends where the `clamp` that it decomposes into is not, and has a row of its own.
"""

from __future__ import annotations

import torch

from flashfuse.kernels.expr import Expr
from flashfuse.patterns.indexing import Indices
from flashfuse.patterns.lift import NodeView
from flashfuse.patterns.rows import row
from flashfuse.patterns.trace import AtenCall, decomposed

aten = torch.ops.aten

_DECOMPOSED = (
    aten.elu.default, aten.celu.default, aten.mish.default, aten.softplus.default, aten.log_sigmoid_forward.default,
    aten.threshold.default, aten.softshrink.default, aten.hardshrink.default, aten._prelu_kernel.default,
    aten.logaddexp.default, aten.logaddexp2.default, aten.frac.default, aten.deg2rad.default,
    aten.rad2deg.default, aten.lerp.Scalar, aten.lerp.Tensor, aten.addcmul.default, aten.addcdiv.default,
)  # fmt: skip


@row(*_DECOMPOSED)
def _decomposed(view: NodeView, call: AtenCall, position: Indices, number: int) -> Expr:
    assert view.trace is not None
    made = decomposed(view.lifter.graph, view.node, call, view.trace)
    result = made.result[number] if isinstance(made.result, tuple) else made.result
    return NodeView(view.lifter, view.node, made).element(result, position)
