"""Sums that a score program rounds to a narrow type where an addend is large: where(large, round(sum), sum)."""

from __future__ import annotations

from flashfuse.kernels.expr import Expr, Pointwise, walk
from flashfuse.kernels.normal import rewrite
from flashfuse.kernels.operators import ROUNDINGS


def unrounded(program: Expr) -> Expr:
    """The program with such sums as they are."""
    return rewrite(program, lambda e: e.children[2] if _is_rounded(e) else None)


def where_rounded(program: Expr) -> tuple[Expr, ...]:
    """The conditions under which sums are rounded."""
    return tuple(dict.fromkeys(e.children[0] for e in walk(program) if _is_rounded(e)))


def _is_rounded(expr: Expr) -> bool:
    match expr:
        case Pointwise(op="where", args=(_, Pointwise(op=op, args=(rounded,)), plain)):
            return op in ROUNDINGS and rounded == plain
    return False
