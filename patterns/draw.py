"""Numbers that a graph draws at random, as tensors that an index expression may read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from flashfuse.kernels.expr import Expr, Load, walk


@dataclass(frozen=True)
class Draw:
    """The tensor of what dropout multiplies by: 0 with probability `p`, or else 1 / (1 - p), apart for each element.

    A node draws it in its call number `call`, and gives it to no one.
    """

    node: fx.Node
    p: float
    call: int = 0


@dataclass(frozen=True)
class DrawLoad(Load):
    """The random number at a position of such a tensor."""

    tensor: Draw


def drawn(expr: Expr) -> tuple[DrawLoad, ...]:
    """The random numbers that an expression reads."""
    return tuple(dict.fromkeys(e for e in walk(expr) if isinstance(e, DrawLoad)))
