"""Why a sum of products with parts of the probabilities is no product with all of them: what is between them and it."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from torch import fx

from flashfuse.kernels.expr import Const, Dot, Expr, Load, Pointwise
from flashfuse.kernels.normal import number
from flashfuse.patterns.added import Factors, scales
from flashfuse.patterns.calls import label_of
from flashfuse.patterns.lift import Lifter
from flashfuse.patterns.opened import opened_or_none
from flashfuse.patterns.operand import reciprocal
from flashfuse.patterns.refusal import Refused
from flashfuse.patterns.weights import Columns, OtherAxis, find_weights

# So many operators are looked through between a sum and its products.
_MOST_STEPS = 6


def refuse_parts(lifter: Lifter, expr: Expr, leads: AbstractSet[fx.Node], node: fx.Node) -> None:
    """Refuse where some of the products that a sum is made of meet a part of the columns of a softmax."""
    found = _Addends(lifter, leads)
    found.add(expr, (), _MOST_STEPS)
    if not any(found.meets_a_part(dot) for dot, _ in found.products):
        return
    if any(dot.extent == 0 for dot, _ in found.products):
        raise Refused("empty", "one of the parts of the probabilities that meet values has no columns", node)
    for other in found.others:
        told = (
            f"`{_label(lifter, other)}` stands between products with parts of the probabilities and their sum: "
            "only what is added to that sum, or applied to it, can stay outside of the attention"
        )
        raise Refused("value-product", told, node)
    for dot, factors in found.products:
        tensor = next((factor for factor in factors if number(factor) is None), None)
        if tensor is not None:
            told = (
                f"a product with a part of the probabilities is multiplied or divided by `{_label(lifter, tensor)}`: "
                "only numbers of the code become part of its weights, since a tensor may hold an infinity or a 0"
            )
            raise Refused("probability-factor", told, node)
        if not scales(factors, dot.dtype):
            told = (
                "a product with a part of the probabilities is multiplied by a number that its weights cannot take "
                "without overflow or lost digits"
            )
            raise Refused("probability-factor", told, node)
    told = "the parts of the probabilities that meet values overlap, or leave columns out"
    raise Refused("extra-columns", told, node)


class _Addends:
    """The products that are added, each with what it is multiplied by, and whatever else is added."""

    def __init__(self, lifter: Lifter, leads: AbstractSet[fx.Node]) -> None:
        self.lifter, self.leads = lifter, leads
        self.products: list[tuple[Dot, Factors]] = []
        self.others: list[Expr] = []

    def add(self, expr: Expr, factors: Factors, steps: int) -> None:
        if isinstance(expr, Load) and expr.tensor not in self.leads:
            self.others.append(expr)
            return
        match opened_or_none(self.lifter, expr) if steps else None:
            case Dot() as dot:
                self.products.append((dot, factors))
            case Pointwise(op="add" | "sub", args=(left, right)):
                self.add(left, factors, steps - 1)
                self.add(right, factors, steps - 1)
            case Pointwise(op="neg", args=(arg,)):
                self.add(arg, factors, steps - 1)
            case Pointwise(op="mul", args=(left, right)):
                sides = ((left, right), (right, left))
                inner, factor = next((x for x in sides if self._is_sum(x[0], steps - 1)), (None, expr))
                if inner is None:
                    self.others.append(expr)
                else:
                    self.add(inner, (*factors, factor), steps - 1)
            case Pointwise(op="div", args=(left, right)) if self._is_sum(left, steps - 1):
                self.add(left, (*factors, reciprocal(right, expr.dtype)), steps - 1)
            case _:
                self.others.append(expr)

    def _is_sum(self, expr: Expr, steps: int) -> bool:
        """Whether an expression is made of products alone."""
        inner = _Addends(self.lifter, self.leads)
        inner.add(expr, (), steps)
        return not inner.others

    def meets_a_part(self, dot: Dot) -> bool:
        columns = Columns(self.lifter, dot.axis, dot.extent, dot.dtype, self.leads)
        return any(self._is_part(columns, side) for side in (dot.lhs, dot.rhs))

    def _is_part(self, columns: Columns, side: Expr) -> bool:
        try:
            return any(weights.sinks for weights in find_weights(columns, side))
        except OtherAxis:
            return False
        except Refused as error:
            return error.code == "extra-columns"


def _label(lifter: Lifter, expr: Expr) -> str:
    match expr:
        case Load(tensor=fx.Node() as node):
            lifter.region.open(node)
            return label_of(node)
        case Pointwise(op="div", args=(Const(value=1), divisor)):
            return _label(lifter, divisor)
        case Pointwise(op=op):
            return op
    return str(expr)
