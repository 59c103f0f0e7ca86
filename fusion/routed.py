"""A site as a call of one of torch's own fused kernels, in the place of flashfuse's operator."""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from flashfuse.insert import Inserter
from flashfuse.patterns.graph import tensor
from flashfuse.routes import Route

aten = torch.ops.aten


def routed(build: Inserter, route: Route, batch: tuple[int, ...], q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """The output [*batch, Tq, D] of a site with operands [batch axes.., T, D], which broadcast to that.

    torch's kernels have two batch axes: the first stays, the others become one, and heads that are shared are repeated.
    """
    q, k, v = (_four_dims(build, x, batch) for x in (q, k, v))
    shared = (0.0, route.causal, False)
    if route.kernel == "cudnn":
        made = build.call(route.operator, q, k, v, None, build.history, *shared, scale=route.scale)
    else:
        made = build.call(route.operator, q, k, v, *shared, scale=route.scale)
    out = build.call(operator.getitem, made, 0)
    return build.call(torch.reshape, out, [*batch, *_tensor(out).shape[-2:]])


def _four_dims(build: Inserter, node: fx.Node, batch: tuple[int, ...]) -> fx.Node:
    t = _tensor(node)
    length, dim = t.shape[-2:]
    if tuple(t.shape[:-2]) != batch:
        node = build.call(aten.expand.default, node, [*batch, length, dim])
    if len(batch) != 2:
        node = build.call(torch.reshape, node, [*(batch[:1] or (1,)), math.prod(batch[1:]), length, dim])
    if _readable(_tensor(node)):
        return node
    # Also where it is contiguous, but does not begin at such a multiple.
    return build.call(torch.clone, node, memory_format=torch.contiguous_format)


def _readable(t: torch.Tensor) -> bool:
    """Whether rows lie as the kernels read them: elements side by side, rows at multiples of 16 bytes, none shared."""
    steps = [stride for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True) if size > 1]
    return t.stride(-1) == 1 and t.storage_offset() % 8 == 0 and all(s > 0 and s % 8 == 0 for s in steps)


def _tensor(node: fx.Node) -> torch.Tensor:
    t = tensor(node)
    assert t is not None
    return t
