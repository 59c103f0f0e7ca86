"""The score program as a spec has it: one factor at its product, and no rounding that leaves nothing behind."""

from __future__ import annotations

import torch

from flashfuse.kernels.expr import Const, Expr, Pointwise, Product, walk
from flashfuse.kernels.normal import number, pointwise
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.patterns.opener import STEPS
from flashfuse.patterns.operand import exactly_promotes


def settled(expr: Expr, dtype: torch.dtype) -> Expr:
    """The program with the scale of its product gathered: x / c is x * (1 / c), and factors of factors are one.

    Roundings of the scores to a type that holds their own element type `dtype` go too: wider is nearer to the source's
    meaning. Masks and biases stay exactly as written.
    """
    if not isinstance(expr, Pointwise) or expr.op in STEPS or not any(isinstance(e, Product) for e in walk(expr)):
        return expr
    args = tuple(settled(a, dtype) for a in expr.args)
    if expr.op in ROUNDINGS and exactly_promotes(dtype, ROUNDINGS[expr.op]):
        return args[0]
    if expr.op == "div" and number(args[1]):
        return _times(args[0], 1.0 / float(number(args[1]) or 1.0), expr.dtype)
    if expr.op == "mul":
        for x, c in (args, args[::-1]):
            if (factor := number(c)) is not None:
                return _times(x, float(factor), expr.dtype)
    return pointwise(expr.op, *args, dtype=expr.dtype)


def _times(expr: Expr, factor: float, dtype: torch.dtype) -> Expr:
    """expr * factor, where expr may have a factor already."""
    if isinstance(expr, Pointwise) and expr.op == "mul":
        for x, c in (expr.args, expr.args[::-1]):
            if (known := number(c)) is not None:
                return pointwise("mul", x, Const(dtype, factor * float(known)), dtype=dtype)
    return pointwise("mul", expr, Const(dtype, factor), dtype=dtype)
