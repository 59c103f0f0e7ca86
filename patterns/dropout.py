"""Dropout: every element of a tensor multiplied with a random number of its own (Srivastava et al., JMLR 15, 2014).

Lifted it is a product with a `Draw`. On weights that meet values that is a property of the attention, its numbers drawn
again wherever they are needed; everywhere else an element drawn at random has no index form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx
from torch.utils._sympy.functions import Mod

from flashfuse.kernels.expr import Const, Expr, Load, Pointwise
from flashfuse.kernels.normal import pointwise
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.patterns.draw import Draw, DrawLoad
from flashfuse.patterns.graph import value
from flashfuse.patterns.indexing import Indices, Ranges, recombined
from flashfuse.patterns.lift import NODE_ROWS, CannotLift, Lifter, NodeView
from flashfuse.patterns.refusal import Refused
from flashfuse.patterns.rows import argument, row
from flashfuse.patterns.site import AttentionSite
from flashfuse.patterns.trace import AtenCall

aten = torch.ops.aten


def dropped(view: NodeView, x: Expr, p: Any, position: Indices, call: int = 0) -> Expr:
    """An element x after dropout, at its position in the tensor that is dropped from. Raises CannotLift.

    A probability that is a symbol becomes the number it is, with a guard: so does every compiler's dropout.
    """
    p = value(p) if isinstance(p, fx.Node) else p
    if not isinstance(p, (int, float, torch.SymFloat)):
        raise CannotLift(view.node, "drops with a probability that is not a number")
    view.lifter.region.specialised |= isinstance(p, torch.SymFloat)
    p = float(p)
    if p == 0:
        return x
    factor: Expr = Const(x.dtype, 0.0) if p == 1 else DrawLoad(x.dtype, Draw(view.node, p, call), position)
    return pointwise("mul", x, factor, dtype=x.dtype)


def _lift_dropout(view: NodeView, position: Indices) -> Expr:
    """`F.dropout(x, p=0.5, training=True, inplace=False)` and `torch.dropout(x, p, train)`, whose names differ."""
    given: dict[str, Any] = dict(zip(("input", "p", "training"), view.node.args, strict=False)) | view.node.kwargs
    x = view.input(given["input"], position)
    return dropped(view, x, given.get("p", 0.5), position) if given.get("training", given.get("train", True)) else x


_DROPOUTS = (F.dropout, torch.dropout, torch.dropout_, aten.dropout, aten.dropout.default)
NODE_ROWS |= dict.fromkeys(_DROPOUTS, _lift_dropout)


@row(aten.native_dropout.default)
def _native_dropout(view: NodeView, call: AtenCall, position: Indices, number: int) -> Expr:
    x, p, training = (argument(call, at, name) for at, name in enumerate(("input", "p", "train")))
    if number != 0:
        raise CannotLift(view.node, "gives what it drew at random")
    element = view.element(x, position)
    assert view.trace is not None
    order = [made for made, _ in view.trace.producers.values()].index(call)
    return element if training is False else dropped(view, element, p, position, order)


def before_dropout(lifter: Lifter, expr: Expr) -> tuple[Expr, DrawLoad | None]:
    """What is dropped from, and the random number that it is multiplied by; (expr, None) where dropout is not last."""
    match expr:
        case Load(tensor=fx.Node()):
            try:
                inner, draw = before_dropout(lifter, lifter.expand(expr, draws=True))
            except CannotLift:
                return expr, None
            return (expr, None) if draw is None else (inner, draw)
        case Pointwise(op="mul", args=(inner, DrawLoad() as draw)):
            return inner, draw
        case Pointwise(op=op, args=(arg,)) if op in ROUNDINGS:
            inner, draw = before_dropout(lifter, arg)
            return pointwise(op, inner, dtype=expr.dtype), draw
    return expr, None


def check_apart(draw: DrawLoad, needed: Iterable[sympy.Symbol], ranges: Ranges) -> None:
    """Refuse where one random number serves several positions: those along symbols that the draw does not tell apart.

    draw: where a weight's random number is read. needed: the symbols of the attention's batch axes, rows and columns.
    """
    indices = _whole_numbers(draw.indices)
    parts = [index.free_symbols & ranges.keys() for index in indices]
    everything = {s for s in needed if ranges[s] != 1} <= set().union(*parts)
    once = sum(map(len, parts)) == len(set().union(*parts))
    if not (everything and once and all(_tells_apart(index, ranges) for index in indices)):
        reason = "several probabilities share a random number that decides what is dropped"
        raise Refused("dropout", reason, draw.tensor.node)


def _whole_numbers(indices: Indices) -> Indices:
    """The indices, where x // n and x % n, which a reshape leaves, are x: they tell apart what it does."""
    whole: list[sympy.Expr] = []
    for index in indices:
        shared = [
            n for n, known in enumerate(whole) if isinstance(index, Mod) and known.free_symbols & index.free_symbols
        ]
        if shared:
            whole[shared[0]] = recombined(whole[shared[0]] * index.args[1] + index)
        else:
            whole.append(index)
    return tuple(whole)


def _tells_apart(index: sympy.Expr, ranges: Ranges) -> bool:
    """Whether an index differs wherever its symbols do: s0 + extent0 * (s1 + extent1 * ..) + constant."""
    whole = sympy.expand(index)
    symbols = whole.free_symbols & ranges.keys()
    span = sympy.Integer(1)
    while symbols:
        found = next((s for s in symbols if sympy.expand(whole.coeff(s, 1) - span) == 0), None)
        if found is None:
            return False
        symbols, span = symbols - {found}, span * ranges[found]
        whole = sympy.expand(whole.coeff(found, 0))
    return True


def check_draws(sites: Sequence[AttentionSite]) -> None:
    """Refuse where some random numbers of one dropout serve one term, and some of them another."""
    draws = {site.draw: (site.batch, site.out_axes) for site in sites if site.draw is not None}
    for site in sites:
        draw = site.draw
        others = (d for d in draws if draw is not None and d != draw and d.tensor == draw.tensor)
        shared = any(not _differ(d.indices, draw.indices) for d in others if draw is not None)
        if draw is not None and (shared or draws[draw] != (site.batch, site.out_axes)):
            raise Refused("dropout", "terms of the attention share some of the random numbers that drop", site.node)


def _differ(one: Indices, other: Indices) -> bool:
    """Whether two positions in a tensor are never the same element."""
    return any((a - b).is_Integer and a != b for a, b in zip(one, other, strict=True))
