"""A tensor that a site reads and the graph does not make yet: a smaller one in the place of one that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from flashfuse.kernels.expr import Expr, loads

# What the positions of a look-up are computed by. All are integers, so any operator that says the same will do.
PLACE_OPS: Mapping[str, Callable[..., Any]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "neg": torch.neg, "abs": torch.abs, "where": torch.where,
    "min": torch.minimum, "minimum": torch.minimum, "max": torch.maximum, "maximum": torch.maximum,
    "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne,
    "and": torch.logical_and, "or": torch.logical_or, "not": torch.logical_not,
}  # fmt: skip


@dataclass(frozen=True)
class Applied(Expr):
    """What the pointwise operator of `node` gives for the elements `args` of its inputs `inputs`."""

    node: fx.Node
    inputs: tuple[fx.Node, ...]
    args: tuple[Expr, ...]

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.args

    def with_children(self, children: tuple[Expr, ...]) -> Expr:
        return replace(self, args=children)


@dataclass(frozen=True)
class Table:
    """A tensor that the graph is to make where it makes `source`, whose elements it holds, each once.

    element: its element over `axes`, which `extents` are the sizes of.
    """

    source: fx.Node
    element: Expr
    axes: tuple[sympy.Symbol, ...]
    extents: tuple[sympy.Expr, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.element.dtype

    @property
    def name(self) -> str:
        return f"{self.source.name} over kv_idx - q_idx"

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        """The tensors of the graph that it is made from."""
        return tuple(dict.fromkeys(x.tensor for x in loads(self.element) if isinstance(x.tensor, fx.Node)))
