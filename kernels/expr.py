"""The score expression language: what one attention score is, as a function of position.

An expression says what the element at a symbolic position is. The same few node kinds serve twice: lifting a graph
builds them over the graph's own tensors, and an `AttentionSpec` carries them over numbered captured tensors. Loads hold
sympy index expressions, so every layout operation is a substitution in an index and leaves no node behind.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

Indices = tuple[sympy.Expr, ...]


@dataclass(frozen=True)
class Expr:
    """Base of all expressions. `dtype` is the element type the source program computes this value in."""

    dtype: torch.dtype

    @property
    def children(self) -> tuple[Expr, ...]:
        return ()

    def with_children(self, children: tuple[Expr, ...]) -> Expr:
        return self


@dataclass(frozen=True)
class Load(Expr):
    """The element of a materialised tensor at sympy index expressions, one per dimension.

    `tensor` is any hashable name of the tensor: a graph node while lifting, a captured slot number in a spec.
    """

    tensor: Hashable
    indices: Indices


@dataclass(frozen=True)
class Loaded(Load):
    """A read that a kernel makes itself: generated functions are given its tile, by this name.

    A floating-point one may have another type in the tile, and a boolean one is a number there.
    """

    name: str


@dataclass(frozen=True)
class Gather(Expr):
    """The element of a materialised tensor at computed positions, one integer expression per dimension: a look-up.

    The positions lie inside the tensor; `gather` builds one, and a `Load` where all positions are formulas.
    """

    tensor: Hashable
    at: tuple[Expr, ...]

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.at

    def with_children(self, children: tuple[Expr, ...]) -> Expr:
        return gather(self.dtype, self.tensor, children)


@dataclass(frozen=True)
class Index(Expr):
    """An integer computed from positions and sizes only."""

    value: sympy.Expr


@dataclass(frozen=True)
class Const(Expr):
    """A number known while compiling. Floats may be infinite; NaN never compares equal, so it is not used."""

    value: float | int | bool


@dataclass(frozen=True)
class Pointwise(Expr):
    """`op` (a row of `OPS`) applied to its arguments element by element."""

    op: str
    args: tuple[Expr, ...]

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.args

    def with_children(self, children: tuple[Expr, ...]) -> Expr:
        return replace(self, args=children)


@dataclass(frozen=True)
class Dot(Expr):
    """Sum over `axis` in [0, extent) of lhs * rhs."""

    lhs: Expr
    rhs: Expr
    axis: sympy.Symbol
    extent: sympy.Expr

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.lhs, self.rhs)

    def with_children(self, children: tuple[Expr, ...]) -> Expr:
        return replace(self, lhs=children[0], rhs=children[1])


@dataclass(frozen=True)
class Product(Expr):
    """In a spec: query-key product number `slot` at this position, sum over r of q[.., q_idx, r] * k[.., kv_idx, r]."""

    slot: int


@dataclass(frozen=True)
class Element(Expr):
    """In a spec's programs of keys and values: the element at this position as it is stored, as a number."""


@dataclass(frozen=True)
class Reduce(Expr):
    """`kind` ("max", "min" or "sum") of `arg` over `axis` in [0, extent)."""

    kind: str
    arg: Expr
    axis: sympy.Symbol
    extent: sympy.Expr

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.arg,)

    def with_children(self, children: tuple[Expr, ...]) -> Expr:
        return replace(self, arg=children[0])


@dataclass(frozen=True)
class Softmax(Expr):
    """exp(arg) / sum over `axis` of exp(arg), evaluated at `at` on that axis.

    `arg` is written over the bound symbol `axis`. `empty_row` says what a row of only -inf gives: "nan" as
    `torch.softmax` does, "zero" as `scaled_dot_product_attention` defines.
    """

    arg: Expr
    axis: sympy.Symbol
    at: sympy.Expr
    extent: sympy.Expr
    empty_row: str = "nan"

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.arg,)

    def with_children(self, children: tuple[Expr, ...]) -> Expr:
        return replace(self, arg=children[0])


# --------------------------------------------------------------------------------------------------------------------
# Walking


def walk(expr: Expr) -> Iterator[Expr]:
    """Every sub-expression, outermost first."""
    yield expr
    for child in expr.children:
        yield from walk(child)


def free_symbols(expr: Expr) -> frozenset[sympy.Symbol]:
    """Index symbols the value depends on; a symbol bound by a reduction is not free."""
    match expr:
        case Load():
            return frozenset().union(*(sympify(i).free_symbols for i in expr.indices))
        case Index():
            return frozenset(expr.value.free_symbols)
        case Dot() | Reduce():
            return frozenset().union(*(free_symbols(c) for c in expr.children)) - {expr.axis}
        case Softmax():
            return (free_symbols(expr.arg) - {expr.axis}) | sympify(expr.at).free_symbols
    return frozenset().union(*(free_symbols(c) for c in expr.children))


def loads(expr: Expr) -> tuple[Load | Gather, ...]:
    """The distinct reads of tensors in the expression, in order of first use."""
    return tuple(dict.fromkeys(e for e in walk(expr) if isinstance(e, (Load, Gather))))


def places(read: Load | Gather) -> tuple[Expr, ...]:
    """Where a read goes, in each dimension of its tensor."""
    return read.at if isinstance(read, Gather) else tuple(Index(torch.int64, sympify(i)) for i in read.indices)


def sympify(value: Any) -> sympy.Expr:
    return value if isinstance(value, sympy.Basic) else sympy.sympify(value)


def gather(dtype: torch.dtype, tensor: Hashable, at: tuple[Expr, ...]) -> Expr:
    """The element of `tensor` at computed positions; a plain `Load` where every position is a formula."""
    formulas = tuple(a.value for a in at if isinstance(a, Index))
    return Load(dtype, tensor, formulas) if len(formulas) == len(at) else Gather(dtype, tensor, at)
