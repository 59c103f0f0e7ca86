"""Predicates in a normal form: `not` only on what cannot be turned round, and comparisons of sums only.

abs, min and max of integers inside a comparison are an `and` or an `or` of comparisons, so that what reads predicates
needs a rule for none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from flashfuse.kernels.expr import Expr, Index, Pointwise
from flashfuse.kernels.normal import pointwise

NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
_DUAL = {"and": "or", "or": "and"}
_AT_MOST = ("lt", "le")
_PARTS: Mapping[str, Callable[..., tuple[Expr, Expr]]] = {
    "abs": lambda x: (x, pointwise("neg", x)),
    "max": lambda x, y: (x, y),
    "min": lambda x, y: (x, y),
}


def normal(expr: Expr, negate: bool = False) -> Expr:
    """`expr`, or its negation, in normal form."""
    match expr:
        case Pointwise(op="not", args=(arg,)):
            return normal(arg, not negate)
        case Pointwise(op="and" | "or", args=args):
            return pointwise(_DUAL[expr.op] if negate else expr.op, *(normal(a, negate) for a in args))
        case Pointwise(op="where", args=(condition, yes, no)) if expr.dtype == torch.bool:
            chosen = pointwise("and", normal(condition), normal(yes, negate))
            return pointwise("or", chosen, pointwise("and", normal(condition, True), normal(no, negate)))
        case Pointwise(op="to_bool", args=(Index() as number,)):
            return normal(pointwise("ne", number, Index(number.dtype, number.value * 0)), negate)
        case Pointwise(op=op, args=(left, right)) if op in NEGATED and is_whole(left) and is_whole(right):
            return _comparison(NEGATED[op] if negate else op, left, right)
    return pointwise("not", expr) if negate else expr


def is_whole(expr: Expr) -> bool:
    """Whether values are totally ordered: integers and booleans are, floats with NaN among them are not."""
    return not expr.dtype.is_floating_point


def _comparison(op: str, left: Expr, right: Expr) -> Expr:
    """`left op right` of integers, with abs, min and max opened."""
    extreme = next((e for e in (left, right) if isinstance(e, Pointwise) and e.op in _PARTS), None)
    if extreme is None:
        return pointwise(op, left, right)
    if op in ("eq", "ne"):
        at_most, at_least, joined = ("le", "ge", "and") if op == "eq" else ("lt", "gt", "or")
        return pointwise(joined, _comparison(at_most, left, right), _comparison(at_least, left, right))
    # max <= x where every part is; max >= x where some part is; min the other way round.
    every = (extreme.op != "min") == ((op in _AT_MOST) == (extreme is left))
    pairs = [(p, right) if extreme is left else (left, p) for p in _PARTS[extreme.op](*extreme.args)]
    return pointwise("and" if every else "or", *(_comparison(op, *pair) for pair in pairs))


def disjuncts(expr: Expr) -> Iterator[Expr]:
    """The terms whose logical or `expr` is."""
    if isinstance(expr, Pointwise) and expr.op == "or":
        for arg in expr.args:
            yield from disjuncts(arg)
    else:
        yield expr
