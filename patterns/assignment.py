"""Assignments: which elements `x[..] = value` and its kin give another value, and which value.

Slices, single positions and tensors of positions that are formulas are index maps read backwards: conditions on the
positions of x. A boolean mask is a condition itself.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from flashfuse.kernels.expr import Expr, Index, Load
from flashfuse.kernels.normal import conjunction, pointwise
from flashfuse.patterns.aten import as_element
from flashfuse.patterns.aten_layout import copied
from flashfuse.patterns.graph import place_of, shape, storage, tensor
from flashfuse.patterns.indexing import ZERO, Indices
from flashfuse.patterns.inverse import inverse
from flashfuse.patterns.lift import CannotLift, NodeView
from flashfuse.patterns.lookup import formula
from flashfuse.patterns.rows import argument, row
from flashfuse.patterns.trace import AtenCall, CannotTrace, recorded

aten = torch.ops.aten

# What is computed where a write went, and the conditions under which a position is there.
New = tuple[Expr, list[Expr]]


@dataclass(frozen=True)
class _Chosen:
    """A tensor among the indices of an assignment: at which dimension, its type and sizes, and its elements."""

    dim: int
    dtype: torch.dtype
    sizes: tuple[sympy.Expr, ...]
    element: Callable[[Indices], Expr]

    @property
    def dims(self) -> int:
        """How many dimensions it chooses elements of."""
        return len(self.sizes) if self.dtype == torch.bool else 1


# A position in what is assigned; None where it counts the elements that a mask chooses.
Counted = tuple[sympy.Expr | None, ...]


def assigned(view: NodeView, written: fx.Node, place: Indices, old: Expr) -> New:
    """x[items] = value, at a position of x."""
    writer, dtype = view.node, old.dtype
    _, given, value = writer.args
    items = [*given] if isinstance(given, tuple) else [given]
    x = tensor(written)
    assert x is not None
    plain, tensors = _sorted(view, items, x.dim())
    try:
        part = recorded(view.lifter.graph, writer, operator.getitem, (written, tuple(plain)), {})
    except CannotTrace as error:
        raise CannotLift(writer, str(error)) from error
    taken: torch.Tensor = part.result
    if not tensors and isinstance(value, fx.Node) and storage(value) == storage(written):
        same = tensor(value)
        if same is not None and place_of(same) == place_of(taken):
            # x[i] += y assigns to x[i] what was added up in its memory.
            return old, []
    own = view.lifter.position(shape(taken), "w")
    source = NodeView(view.lifter, writer, part).element(taken, own)
    if not isinstance(source, Load):
        raise CannotLift(writer, "assigns to elements that are no view of the tensor")
    at_part, inside = inverse(view.lifter, writer, source.indices, place, own)
    at, further = _chosen(view, at_part, shape(taken), tensors)
    inside += further
    t = tensor(value) if isinstance(value, fx.Node) else None
    if isinstance(value, fx.Node) and t is not None:
        return copied(view, view.input(value, _aligned(view, at, shape(t))), t.dtype, dtype), inside
    if isinstance(value, fx.Node):
        number = view.input(value, ())
        return copied(view, number, number.dtype, dtype), inside
    return as_element(view, value, dtype), inside


def _sorted(view: NodeView, items: list[Any], rank: int) -> tuple[list[Any], list[_Chosen]]:
    """The indices with a whole dimension in the place of each that a tensor chooses of, and those tensors."""
    values = [tensor(i) if isinstance(i, fx.Node) else None for i in items]
    if any(isinstance(i, (list, bool)) for i in items):
        raise CannotLift(view.node, "assigns to elements that are listed one by one")
    taken = sum(
        (t.dim() if t.dtype == torch.bool else 1) if t is not None else i is not None and i is not ...
        for i, t in zip(items, values, strict=True)
    )
    plain: list[Any] = []
    tensors: list[_Chosen] = []
    dim = 0
    for item, t in zip(items, values, strict=True):
        if t is not None:
            chosen = _Chosen(dim, t.dtype, shape(t), functools.partial(view.input, item))
            tensors.append(chosen)
            plain += [slice(None)] * chosen.dims
            dim += chosen.dims
            continue
        plain.append(item)
        dim += rank - taken if item is ... else item is None or isinstance(item, slice)
    return plain, tensors


def _chosen(
    view: NodeView, position: Indices, sizes: Sequence[sympy.Expr], tensors: Sequence[_Chosen]
) -> tuple[Counted, list[Expr]]:
    """A position as one in what is assigned to the elements that tensors choose, and whether they choose it."""
    if not tensors:
        return position, []
    if any(t.dtype == torch.uint8 for t in tensors):
        raise CannotLift(view.node, "assigns by a mask of type uint8")
    masks = [t for t in tensors if t.dtype == torch.bool]
    if len(masks) == len(tensors) == 1:
        (mask,) = masks
        end = mask.dim + mask.dims
        return (*position[: mask.dim], None, *position[end:]), [mask.element(position[mask.dim : end])]
    if masks:
        raise CannotLift(view.node, "assigns by a mask and further indices")
    return _at_formulas(view, position, sizes, tensors)


def _at_formulas(
    view: NodeView, position: Indices, sizes: Sequence[sympy.Expr], tensors: Sequence[_Chosen]
) -> tuple[Counted, list[Expr]]:
    """The same for tensors of positions, which have to be formulas."""
    rank = max(len(t.sizes) for t in tensors)
    padded = [(*[sympy.Integer(1)] * (rank - len(t.sizes)), *t.sizes) for t in tensors]
    common = [next((n for n in sizes if n != 1), sympy.Integer(1)) for sizes in zip(*padded, strict=True)]
    own = view.lifter.position(common, "w")
    places = []
    for t in tensors:
        at = own[rank - len(t.sizes) :]
        known = view.resolved(t.element(tuple(ZERO if n == 1 else s for s, n in zip(at, t.sizes, strict=True))))
        if not isinstance(known, Index):
            raise CannotLift(view.node, "assigns at positions that depend on data")
        places.append(formula(view, known.value, sizes[t.dim], wraps=True))
    target = tuple(position[t.dim] for t in tensors)
    picked, inside = inverse(view.lifter, view.node, tuple(places), target, own)
    dims = [t.dim for t in tensors]
    rest = [at for dim, at in enumerate(position) if dim not in dims]
    first = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    return (*rest[:first], *picked, *rest[first:]), inside


def _aligned(view: NodeView, at: Counted, sizes: Sequence[sympy.Expr]) -> Indices:
    """The position in a value of these sizes, which broadcasts and may have further dimensions of size 1 in front."""
    missing = max(len(sizes) - len(at), 0)
    kept = (*[ZERO] * missing, *at)[missing + len(at) - len(sizes) :]
    if any(place is None and size != 1 for place, size in zip(kept, sizes, strict=True)):
        raise CannotLift(view.node, "assigns one element after the other to what a mask chooses")
    return tuple(ZERO if place is None or size == 1 else place for place, size in zip(kept, sizes, strict=True))


# --------------------------------------------------------------------------------------------------------------------
# The same without a write


def _put(view: NodeView, call: AtenCall, position: Indices, tensors: list[_Chosen], value: Any) -> Expr:
    x, dtype = call.args[0], call.output.dtype
    old = view.element(x, position)
    at, inside = _chosen(view, position, shape(x), tensors)
    if isinstance(value, torch.Tensor):
        new = copied(view, view.element(value, _aligned(view, at, shape(value))), value.dtype, dtype)
    else:
        new = as_element(view, value, dtype)
    return pointwise("where", conjunction(inside), new, old, dtype=dtype)


@row(aten.index_put.default)
def _index_put(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    if argument(call, 3, "accumulate", False):
        raise CannotLift(view.node, "adds to elements that may be the same")
    tensors: list[_Chosen] = []
    dim = 0
    for t in call.args[1]:
        if t is None:
            dim += 1
            continue
        tensors.append(_choice(view, dim, t))
        dim += tensors[-1].dims
    return _put(view, call, position, tensors, call.args[2])


@row(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def _index_fill(view: NodeView, call: AtenCall, position: Indices, _: int) -> Expr:
    _x, dim, positions, value = call.args
    if not position or not positions.shape:
        raise CannotLift(view.node, "fills a single number")
    return _put(view, call, position, [_choice(view, dim % len(position), positions)], value)


def _choice(view: NodeView, dim: int, t: torch.Tensor) -> _Chosen:
    return _Chosen(dim, t.dtype, shape(t), functools.partial(view.element, t))
