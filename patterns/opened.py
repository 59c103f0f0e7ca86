"""Looking through loads until something else is on top."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from flashfuse.kernels.expr import Expr, Load, Pointwise
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


def seen_through(
    lifter: Lifter, expr: Expr, within: Callable[[Pointwise], object], *, draws: bool = False
) -> Iterator[Expr]:
    """An expression, and it again for each load expanded: itself, or the last argument of an operator `within` takes.

    draws: whether one may be drawn at random.
    """
    while True:
        yield expr
        try:
            if isinstance(expr, Load):
                expr = lifter.expand(expr, draws=draws)
            elif isinstance(expr, Pointwise) and within(expr) and isinstance(expr.args[-1], Load):
                expr = replace(expr, args=(*expr.args[:-1], lifter.expand(expr.args[-1], draws=draws)))
            else:
                return
        except CannotLift:
            return
