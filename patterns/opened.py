"""Looking through loads until something else is on top."""

from __future__ import annotations

from flashfuse.kernels.expr import Expr, Load
from flashfuse.patterns.lift import CannotLift, Lifter


def open_up(lifter: Lifter, expr: Expr) -> Expr:
    """Expand a load until something other than a load is on top. Raises CannotLift."""
    while isinstance(expr, Load):
        expr = lifter.expand(expr)
    return expr


def opened_or_none(lifter: Lifter, expr: Expr) -> Expr | None:
    try:
        return open_up(lifter, expr)
    except CannotLift:
        return None
