"""Look-ups: x[index], gather, embedding and their kin. An element at positions that another tensor holds.

Where the positions are formulas a look-up is one more substitution. Where they depend on data it becomes a `Gather`,
whose positions are clamped to the tensor unless they provably lie inside: a kernel never reads outside, and eager code
raises there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import sympy
import torch

from flashfuse.kernels.expr import Const, Expr, Index, Load, Pointwise, free_symbols, gather, loads, walk
from flashfuse.kernels.normal import cast, index, pointwise, rewrite
from flashfuse.patterns.graph import shape, wants_gradient
from flashfuse.patterns.indexing import ZERO, Indices, divide, within
from flashfuse.patterns.lift import CannotLift, NodeView
from flashfuse.patterns.limits import at_least, without_clamps
from flashfuse.patterns.rows import row
from flashfuse.patterns.trace import AtenCall

aten = torch.ops.aten

# A position in a looked-up tensor: known as a formula, or computed.
Place: TypeAlias = sympy.Expr | Expr


@row(aten.index.Tensor)
def _index(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    """x[.., tensor, ..]; negative positions count from the end."""
    source, given = call.args[0], list(call.args[1])
    given += [None] * (len(source.shape) - len(given))
    slots = [d for d, t in enumerate(given) if t is not None]
    if any(given[d].dtype in (torch.bool, torch.uint8) for d in slots):
        raise CannotLift(view.node, "selects elements by a boolean mask, so its size depends on data")
    rank = max(len(given[d].shape) for d in slots)
    together = slots == list(range(slots[0], slots[-1] + 1))
    first = slots[0] if together else 0
    picked, rest = position[first : first + rank], iter(position[:first] + position[first + rank :])
    places: list[Place] = [
        next(rest) if t is None else _position(view, view.element(t, tuple(picked)), size, wraps=True)
        for t, size in zip(given, shape(source), strict=True)
    ]
    return _element(view, source, places)


@row(aten.gather.default)
def _gather(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    source, dim, positions = call.args[:3]
    if not source.shape or not positions.shape:
        raise CannotLift(view.node, "looks up a single number")
    return _along(view, source, dim, position, view.element(positions, position))


@row(aten.index_select.default)
def _index_select(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    source, dim, positions = call.args
    if not source.shape or not positions.shape:
        raise CannotLift(view.node, "looks up a single number")
    return _along(view, source, dim, position, view.element(positions, (position[dim],)))


# padding_idx, scale_grad_by_freq, sparse: a padding row gets no gradient, frequent rows get less of it.
_PLAIN_GRADIENT = ((), (-1,), (-1, False), (-1, False, False))


@row(aten.embedding.default)
def _embedding(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    weight, positions, *gradient = call.args
    if wants_gradient(view.node) and tuple(gradient) not in _PLAIN_GRADIENT:
        raise CannotLift(view.node, "looks up elements whose gradient is another one than a look-up's")
    place = _position(view, view.element(positions, position[:-1]), shape(weight)[0], wraps=False)
    return _element(view, weight, [place, position[-1]])


def _along(view: NodeView, source: Any, dim: int, position: Indices, at: Expr) -> Expr:
    """An element of `source` at `position`, but for one dimension."""
    dim = dim % len(position)
    place = _position(view, at, shape(source)[dim], wraps=False)
    return _element(view, source, [*position[:dim], place, *position[dim + 1 :]])


# --------------------------------------------------------------------------------------------------------------------
# One position


def _position(view: NodeView, at: Expr, size: sympy.Expr, wraps: bool) -> Place:
    """Where an integer points to on a dimension of `size`; `wraps` counts negative ones from the end."""
    known = view.resolved(at)
    if isinstance(known, Index):
        return formula(view, known.value, size, wraps)
    if not loads(known) and not any(e.dtype.is_floating_point for e in walk(known)):
        at = known
    at = cast(at, torch.int64)
    if wraps and not at_least(at, ZERO, view.ranges):
        at = pointwise("where", pointwise("lt", at, index(0)), pointwise("add", at, index(size)), at)
    clamped = pointwise("min", pointwise("max", at, index(0)), index(size - 1))
    return without_clamps(clamped, view.ranges)


def formula(view: NodeView, at: sympy.Expr, size: sympy.Expr, wraps: bool) -> sympy.Expr:
    """A formula must provably point into the tensor; where it may not, the user's own look-up raises."""
    if within(at, size, view.ranges):
        return at
    if wraps and within(at + size, 2 * size, view.ranges):
        return divide(at + size, size, view.ranges)[1]
    raise CannotLift(view.node, "takes elements at positions that may lie outside the tensor")


# --------------------------------------------------------------------------------------------------------------------
# The element there


def _element(view: NodeView, source: torch.Tensor, places: Sequence[Place]) -> Expr:
    """The element of `source`: lifted at symbols in the place of computed positions, which are put in afterwards."""
    computed: dict[sympy.Symbol, Expr] = {}
    position: list[sympy.Expr] = []
    for place, size in zip(places, shape(source), strict=True):
        if isinstance(place, sympy.Expr):
            position.append(place)
        else:
            symbol = view.symbol(size)
            computed[symbol] = place
            position.append(symbol)
    element = view.element(source, tuple(position))
    return rewrite(element, lambda e: _filled_in(view, e, computed)) if computed else element


def _filled_in(view: NodeView, expr: Expr, computed: Mapping[sympy.Symbol, Expr]) -> Expr | None:
    match expr:
        case Load(dtype=dtype, tensor=tensor, indices=indices):
            return gather(dtype, tensor, tuple(_computed(view, i, computed) for i in indices))
        case Index(value=value, dtype=dtype) if value.free_symbols & computed.keys():
            return cast(_computed(view, value, computed), dtype)
        case Pointwise() | Index() | Const():
            return None
    if free_symbols(expr) & computed.keys():
        raise CannotLift(view.node, "looks up elements that are computed on the way")
    return None


def _computed(view: NodeView, value: sympy.Expr, computed: Mapping[sympy.Symbol, Expr]) -> Expr:
    """A formula over computed positions."""
    if value in computed:
        return computed[value]
    if not value.free_symbols & computed.keys():
        return index(value)
    if not isinstance(value, (sympy.Add, sympy.Mul)):
        raise CannotLift(view.node, "divides a position that depends on data")
    first, *others = (_computed(view, a, computed) for a in value.args)
    for other in others:
        first = pointwise("add" if value.is_Add else "mul", first, other)
    return first
