"""Large numbers that are added to scores and take each other away: -1e32 + 1e32 is 0, whatever score was beside them.

Kernels add what is free of products first where that is faster, and skip keys that one addend rules out.
"""

from __future__ import annotations

import math

from flashfuse.kernels.expr import Const, Expr, Load, Pointwise, Product, walk
from flashfuse.kernels.normal import TAKES_DIGITS, rewrite
from flashfuse.patterns.opener import Opener
from flashfuse.patterns.refusal import Refused
from flashfuse.patterns.samples import Samples, TooManyPaths, made


def check_sums(program: Expr, opener: Opener) -> None:
    """Raises Refused where scores may be lost so, unless the program shows it: then it is computed in its order.

    Given tensors are taken not to hold such numbers of both signs.
    """
    tensors = dict.fromkeys(e for e in walk(program) if isinstance(e, Load) and e.dtype.is_floating_point)
    if len(tensors) + _is_large(program) < 2:
        return
    large = {load: whole for load in tensors if _is_large(whole := made(load, opener))}
    if len(large) + _is_large(program) < 2:
        return
    whole = opener.lifter.resolved(rewrite(program, lambda e: large.get(e) if isinstance(e, Load) else None))
    if _may_cancel(whole, Samples(opener)):
        raise Refused("inexact", "large numbers that are added to the scores take each other away, and the scores too")


def _is_large(expr: Expr) -> bool:
    """Whether there is a number in it that leaves nothing of a score."""
    constants = (e.value for e in walk(expr) if isinstance(e, Const))
    return any(math.isfinite(value) and abs(value) >= TAKES_DIGITS for value in constants)


def _may_cancel(program: Expr, samples: Samples) -> bool:
    sums = (e for e in walk(program) if isinstance(e, Pointwise) and e.op in ("add", "sub"))
    of_scores = dict.fromkeys(e for e in sums if any(isinstance(x, Product) for x in walk(e)))
    try:
        return any(_cancels(e, samples) for e in of_scores)
    except TooManyPaths:
        return True


def _cancels(expr: Pointwise, samples: Samples) -> bool:
    for known, (x, y) in samples.together(expr.args):
        total = x + y if expr.op == "add" else x - y
        lost = (x.abs() >= TAKES_DIGITS) & (y.abs() >= TAKES_DIGITS) & (total.abs() < TAKES_DIGITS)
        if (lost & samples.reached(known)).any():
            return True
    return False
