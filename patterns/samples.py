"""Score programs computed at sample numbers, on every path through their choices.

Each condition that no product decides is tried as true and as false, and is the same wherever it occurs. So fills keep
their size through whatever is done to them, and what is no fill stays an ordinary number: nothing overflows that model
code does not mean to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import sympy
import torch

from flashfuse.kernels.expr import Const, Expr, Gather, Index, Load, Pointwise, Product, free_symbols, walk
from flashfuse.kernels.normal import pointwise
from flashfuse.kernels.operators import OPS
from flashfuse.patterns.lift import CannotLift
from flashfuse.patterns.opened import open_up
from flashfuse.patterns.opener import Opener
from flashfuse.patterns.refusal import Refused

_SAMPLES = 48
# Positions below this are tried.
_NEAR = 8
# More paths than this are not followed: nothing is known then.
_MOST_PATHS = 256

# So many tensors are looked behind, one after the other.
_MOST_STEPS = 6

# Conditions that are known, and whether they hold.
Known = frozenset[tuple[Expr, bool]]
Paths = Mapping[Known, torch.Tensor]


class TooManyPaths(Exception):
    """A program has more choices that do not decide each other than are followed."""


def made(expr: Expr, opener: Opener, steps: int = _MOST_STEPS) -> Expr:
    """An expression with what the graph makes its tensors of in their place, as far as that has an index form."""
    match expr:
        case Pointwise(op=op, args=args):
            return pointwise(op, *(made(a, opener, steps) for a in args), dtype=expr.dtype)
        case Load() if steps and expr.dtype.is_floating_point:
            try:
                return made(opener.read(open_up(opener.lifter, expr)), opener, steps - 1)
            except (CannotLift, Refused):
                return expr
    return expr


class Samples:
    """The values of programs, and of all that they are made of, at sample numbers on each path.

    added: tensors that may hold -inf, where they are no parameters and differ between keys.
    """

    def __init__(self, opener: Opener, added: Iterable[Load | Gather] = ()) -> None:
        self.j, self.ranges = opener.j, opener.lifter.ranges
        weights = opener.lifter.graph.weights
        self.masks = frozenset(
            x for x in added
            if x.dtype.is_floating_point and self.j in free_symbols(x) and x.tensor not in weights
        )  # fmt: skip
        self._random = torch.Generator().manual_seed(0)
        self._positions: dict[sympy.Symbol, torch.Tensor] = {}
        self._found: dict[Expr, Paths] = {}
        self._truths: dict[Expr, torch.Tensor] = {}

    def of(self, expr: Expr) -> Paths:
        """The value of an expression on each path. Raises TooManyPaths."""
        if expr not in self._found:
            self._found[expr] = self._computed(expr)
        return self._found[expr]

    def reached(self, known: Known) -> torch.Tensor:
        """Which samples are at positions for which a path's conditions hold; all where none is."""
        there = torch.ones(_SAMPLES, dtype=torch.bool)
        for condition, holds in known:
            there &= self._truths[condition] == holds if condition in self._truths else True
        return there if there.any() else ~there

    def _computed(self, expr: Expr) -> Paths:
        match expr:
            case Const(dtype=dtype, value=value):
                return {frozenset(): torch.full((_SAMPLES,), value, dtype=_work(dtype))}
            case Index(dtype=dtype, value=value):
                return {frozenset(): self._at_positions(value).to(_work(dtype))}
            case Pointwise(op="where", args=(condition, yes, no)):
                return self._choice(condition, yes, no, expr.dtype)
            case Pointwise(op="ge" | "le" | "ne" as op, args=args) if self._is_atom(expr):
                return self.of(Pointwise(torch.bool, "not", (Pointwise(torch.bool, _OPPOSITE[op], args),)))
            case Pointwise(op=op, args=args) if not self._is_atom(expr):
                return _merged(
                    (known, _rounded(OPS[op].torch(*(_promoted(x, op) for x in values)), expr.dtype))
                    for known, values in self.together(args)
                )
        if expr.dtype == torch.bool:
            return self._condition(expr)
        ordinary = self._ordinary(expr)
        if expr not in self.masks:
            return {frozenset(): ordinary}
        # As a condition, the tensor says that it masks.
        return {frozenset({(expr, True)}): torch.full_like(ordinary, -math.inf), frozenset({(expr, False)}): ordinary}

    def _is_atom(self, expr: Expr) -> bool:
        """Whether an expression is a condition that may hold or not: scores and masks alone do not decide it."""
        if not isinstance(expr, Pointwise) or expr.op not in _COMPARISONS:
            return False
        read = [e for e in walk(expr) if not isinstance(e, (Pointwise, Const, Index))]
        decides = [isinstance(e, Product) or e in self.masks for e in read]
        return not any(decides) or not all(decides)

    def _condition(self, atom: Expr) -> Paths:
        inside = tuple(e for e in walk(atom) if not isinstance(e, Pointwise))
        if isinstance(atom, Pointwise) and all(isinstance(e, (Index, Const)) for e in inside):
            values = [next(iter(self.of(a).values())) for a in atom.args]
            self._truths[atom] = OPS[atom.op].torch(*values)
        truth = torch.ones(_SAMPLES, dtype=torch.bool)
        return {frozenset({(atom, True)}): truth, frozenset({(atom, False)}): ~truth}

    def _ordinary(self, expr: Expr) -> torch.Tensor:
        """Numbers of any sign for products; of tensors positive ones, of integers that differ between keys 0 and 1."""
        if isinstance(expr, Product):
            x = torch.randn(_SAMPLES, generator=self._random).clamp(-3, 3)
            return x.index_fill(0, torch.tensor([0]), 0.0).to(_work(expr.dtype))
        if expr.dtype.is_floating_point:
            x = 0.25 + 0.75 * torch.rand(_SAMPLES, generator=self._random)
            return x.index_fill(0, torch.tensor([0]), 1.0).to(_work(expr.dtype))
        low, high = (0, 2) if self.j in free_symbols(expr) else (1, 4)
        return torch.randint(low, high, (_SAMPLES,), generator=self._random)

    def _at_positions(self, value: sympy.Expr) -> torch.Tensor:
        names = sorted(value.free_symbols, key=str)
        for name in names:
            if name not in self._positions:
                low, high = self._span(name)
                self._positions[name] = torch.randint(low, high, (_SAMPLES,), generator=self._random)
        points = zip(*(self._positions[name].tolist() for name in names), strict=True) if names else [()] * _SAMPLES
        at = [value.xreplace(dict(zip(names, map(sympy.Integer, point), strict=True))) for point in points]
        return torch.tensor([int(x) for x in at])

    def _span(self, name: sympy.Symbol) -> tuple[int, int]:
        """Where positions are tried, and lengths, which are beyond them."""
        if name not in self.ranges:
            return _NEAR + 1, 2 * _NEAR
        extent = self.ranges[name]
        return 0, min(_NEAR, int(extent)) if extent.is_Integer else _NEAR

    def _choice(self, condition: Expr, yes: Expr, no: Expr, dtype: torch.dtype) -> Paths:
        def chosen() -> Iterator[tuple[Known, torch.Tensor]]:
            for known, holds in self.of(condition).items():
                if holds.all() or not holds.any():
                    branch = self.of(yes if holds.all() else no)
                    yield from ((both, _rounded(x, dtype)) for both, (x,) in _joined(known, [branch]))
                else:
                    for both, (x, y) in _joined(known, [self.of(yes), self.of(no)]):
                        yield both, _rounded(torch.where(holds, x, y), dtype)

        return _merged(chosen())

    def together(self, args: Sequence[Expr]) -> Iterator[tuple[Known, tuple[torch.Tensor, ...]]]:
        return _joined(frozenset(), [self.of(a) for a in args])


_COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne", "to_bool"})
_OPPOSITE = {"ge": "lt", "le": "gt", "ne": "eq"}


def _joined(known: Known, sides: Sequence[Paths]) -> Iterator[tuple[Known, tuple[torch.Tensor, ...]]]:
    """The values of several expressions on the paths that all of them may be on."""
    if not sides:
        yield known, ()
        return
    for own, x in sides[0].items():
        if not any((condition, not holds) in known for condition, holds in own):
            yield from ((both, (x, *rest)) for both, rest in _joined(known | own, sides[1:]))


class _Group(NamedTuple):
    value: torch.Tensor
    paths: set[Known]


def _merged(found: Iterator[tuple[Known, torch.Tensor]]) -> Paths:
    """Paths without the conditions that make no difference to the value."""
    groups: dict[object, _Group] = {}
    for count, (known, x) in enumerate(found):
        if count > 16 * _MOST_PATHS:
            raise TooManyPaths
        group = groups.setdefault((x.dtype, str(x.tolist())), _Group(x, set()))
        _add(group.paths, known)
    result = {known: group.value for group in groups.values() for known in group.paths}
    if len(result) > _MOST_PATHS:
        raise TooManyPaths
    return result


def _add(paths: set[Known], known: Known) -> None:
    """Add a path; two that differ in one condition are one without it."""
    for condition, holds in known:
        rest = known - {(condition, holds)}
        if rest | {(condition, not holds)} in paths:
            paths.discard(rest | {(condition, not holds)})
            return _add(paths, rest)
    paths.add(known)
    return None


def _work(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_floating_point:
        return torch.float64 if dtype == torch.float64 else torch.float32
    return torch.bool if dtype == torch.bool else torch.int64


def _promoted(x: torch.Tensor, op: str) -> torch.Tensor:
    return x.float() if OPS[op].result == "float" and not x.is_floating_point() else x


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A result in its type, with the infinities that a narrow one makes."""
    return x.to(dtype).to(_work(dtype))
