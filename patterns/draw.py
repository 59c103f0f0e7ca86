"""Numbers that a graph draws at random, as tensors that an index expression may read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from flashfuse.kernels.expr import Expr, Load, walk


@dataclass(frozen=True)
class Draw:
    """The tensor of what dropout multiplies by: 0 with probability `p`, or else 1 / (1 - p), apart for each element.

    A `Load` names it where a node, in its call number `call`, draws it without giving it to anyone.
    """

    node: fx.Node
    p: float
    call: int = 0


def drawn(expr: Expr) -> tuple[Load, ...]:
    """The random numbers that an expression reads."""
    return tuple(dict.fromkeys(e for e in walk(expr) if isinstance(e, Load) and isinstance(e.tensor, Draw)))
