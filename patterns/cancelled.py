"""Large numbers that are added to scores and take each other away: -1e32 + 1e32 is 0, whatever score was beside them.

Kernels add what is free of products first where that is faster, and skip keys that one addend rules out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import fx
from torch.utils import _pytree as pytree

from flashfuse.kernels.expr import Const, Expr, Load, Pointwise, Product, loads, walk
from flashfuse.kernels.normal import TAKES_DIGITS, rewrite
from flashfuse.patterns.lift import Lifter
from flashfuse.patterns.opener import Opener
from flashfuse.patterns.refusal import Refused
from flashfuse.patterns.samples import ORDINARY, Samples, TooManyPaths, made

# So many nodes are looked at behind a tensor that has no index form.
_MOST_NODES = 32


def check_sums(program: Expr, opener: Opener) -> None:
    """Raises Refused where scores may be lost so, unless the program shows it: then it is computed in its order.

    Given tensors are taken not to hold such numbers of both signs, and integers that these are multiplied by to be 0
    or 1.
    """
    tensors = dict.fromkeys(e for e in loads(program) if e.dtype.is_floating_point)
    shown = _large(_constants(program))
    if len(tensors) + bool(shown) < 2:
        return
    whole = {read: made(read, opener) for read in tensors}
    large = {read: _large(_constants(e)) for read, e in whole.items()}
    hidden = {read: _large(_behind(e, opener.lifter)) for read, e in whole.items() if not large[read]}
    sources = [numbers for numbers in (shown, *large.values(), *hidden.values()) if numbers]
    if len(sources) < 2:
        return
    if any(hidden.values()):
        cancels = _subtracts(program) or len({x > 0 for numbers in sources for x in numbers}) == 2
    else:
        replaced = rewrite(program, lambda e: whole.get(e) if isinstance(e, Load) and large.get(e) else None)
        cancels = _may_cancel(opener.lifter.resolved(replaced), Samples(opener, binary=True))
    if cancels:
        raise Refused("inexact", "large numbers that are added to the scores take each other away, and the scores too")


def _large(numbers: Iterable[float]) -> list[float]:
    """Those that leave nothing of a score."""
    return [x for x in numbers if math.isfinite(x) and abs(x) >= TAKES_DIGITS]


def _constants(expr: Expr) -> list[float]:
    return [e.value for e in walk(expr) if isinstance(e, Const)]


def _behind(expr: Expr, lifter: Lifter) -> list[float]:
    """The numbers from which the graph makes what an expression reads, shortly behind."""
    queue = [x.tensor for x in loads(expr) if isinstance(x.tensor, fx.Node)]
    seen, found = {*queue}, []
    while queue and len(seen) < _MOST_NODES:
        node = queue.pop()
        lifter.region.open(node)
        found += [x for x in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(x, float)]
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        queue += fresh
    return found


def _subtracts(program: Expr) -> bool:
    return any(isinstance(e, Pointwise) and e.op in ("sub", "neg") for e in walk(program))


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
        if (lost[:ORDINARY] & samples.reached(known)).any():
            return True
    return False
