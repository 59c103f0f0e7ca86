"""Operands: which graph tensor a product really reads, seen through layout, scalar factors and exact casts.

The further back an operand is read, the fewer copies are left: k through `repeat_kv` is the cache itself. An operand is
only read at a place from which a view leads to the attention's axes, and never across a write to its memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from flashfuse.kernels.expr import Const, Expr, Load, Pointwise, free_symbols
from flashfuse.kernels.normal import pointwise
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.kernels.stored import holds
from flashfuse.patterns.graph import shape, tensor
from flashfuse.patterns.lift import CannotLift, Lifter
from flashfuse.patterns.stored import Side, stored_readings


@dataclass(frozen=True)
class Reading:
    """One place an operand can be read: the load there, and the scalar factors passed on the way.

    program: what the operand's element is of the one that is read there, `Element`; None where it is that one.
    """

    load: Load
    factors: tuple[Expr, ...]
    program: Expr | None = None


def readings(
    lifter: Lifter,
    side: Expr,
    shared: frozenset[sympy.Symbol],
    dtype: torch.dtype,
    site: fx.Node,
    scaled: bool,
    stored: Side | None = None,
) -> list[Reading]:
    """Places where an operand of a product can be read, nearest first.

    `shared` are the symbols a scalar factor may depend on (it must be the same for every element of a row of the
    product and of its column), `scaled` whether factors may be passed at all, `dtype` the product's element type.
    `stored` says that programs of stored elements may be passed, too, where no gradient is to come back through them.
    """
    found, behind = _plain_readings(lifter, side, shared, dtype, site, scaled)
    if not found or behind is None or stored is None or lifter.history:
        return found
    expr, factors = behind
    types = (reading.load.dtype for reading in found)
    element_bytes = min((t if exactly_promotes(t, dtype) else dtype).itemsize for t in types)
    further = stored_readings(lifter, expr, stored, element_bytes)
    return found + [Reading(load, factors, program) for load, program in further]


def _plain_readings(
    lifter: Lifter, side: Expr, shared: frozenset[sympy.Symbol], dtype: torch.dtype, site: fx.Node, scaled: bool
) -> tuple[list[Reading], tuple[Expr, tuple[Expr, ...]] | None]:
    """Readings of the operand's own elements; what lies behind the last and the factors until there, if anything."""
    found: list[Reading] = []
    factors: tuple[Expr, ...] = ()
    expr, rounded = side, False
    while True:
        if isinstance(expr, Pointwise) and ROUNDINGS.get(expr.op) == dtype and not found and not factors:
            # The product's own conversion (autocast): the operand is read before it and converted again.
            expr, rounded = expr.args[0], True
            continue
        if isinstance(expr, Pointwise) and rounded:
            return found, (expr, factors)
        if isinstance(expr, Pointwise):
            passed = _without_factor(expr, shared) if scaled else None
            if passed is None:
                return found, (expr, factors)
            expr, factor = passed
            factors = (*factors, factor)
            continue
        if not isinstance(expr, Load):
            return found, None
        assert isinstance(expr.tensor, fx.Node)
        if not rounded and not exactly_promotes(expr.dtype, dtype):
            return found, (expr, factors)
        if lifter.writer_before(expr.tensor, site) is None:
            found.append(Reading(expr, factors))
        try:
            expr = lifter.expand(expr)
        except CannotLift:
            return found, None


def exactly_promotes(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether every value of `source` is a value of `target`."""
    if not source.is_floating_point or source.itemsize < 2:
        return source == target
    return holds(target, source)


def _without_factor(expr: Pointwise, shared: frozenset[sympy.Symbol]) -> tuple[Expr, Expr] | None:
    """(x, c) where expr is x * c and c is a scalar of the product; None where it is something else."""
    if expr.op == "neg":
        return expr.args[0], Const(torch.float32, -1.0)
    if expr.op not in ("mul", "div"):
        return None
    x, c = expr.args
    if _is_scalar(c, shared) and not _is_scalar(x, shared):
        return (x, c) if expr.op == "mul" else (x, reciprocal(c, expr.dtype))
    if expr.op == "mul" and _is_scalar(x, shared) and not _is_scalar(c, shared):
        return c, x
    return None


def reciprocal(expr: Expr, dtype: torch.dtype) -> Expr:
    """1 / expr. Of a number with all of its digits: rounded to a narrow type, it would put all elements off alike."""
    wide = pointwise("div", Const(torch.float32, 1.0), expr, dtype=torch.promote_types(dtype, torch.float32))
    return replace(wide, dtype=dtype)


def _is_scalar(expr: Expr, shared: frozenset[sympy.Symbol]) -> bool:
    return isinstance(expr, (Const, Load)) and free_symbols(expr) <= shared


def sizes_of(load: Load) -> Sequence[sympy.Expr]:
    assert isinstance(load.tensor, fx.Node)
    t = tensor(load.tensor)
    assert t is not None
    return shape(t)
