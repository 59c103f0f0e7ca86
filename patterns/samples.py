"""Score programs computed at sample numbers, on every path through their choices.

Each condition is tried as true and as false, and is the same wherever it occurs: only constants and infinities decide
one. So fills keep their size through whatever is done to them, and what is no fill stays an ordinary number: nothing
overflows that model code does not mean to.
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

# Ordinary numbers, and as many others, by which it shows what is no constant.
ORDINARY = 48
_SAMPLES = 2 * ORDINARY
# Positions below this are tried, and as others those below that.
_NEAR, _FAR = 8, 4096
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

    The first `ORDINARY` are the numbers that model code means. added: tensors that may hold -inf, where they are no
    parameters and differ between keys. binary: whether all integers are masks.
    """

    def __init__(self, opener: Opener, added: Iterable[Load | Gather] = (), *, binary: bool = False) -> None:
        self.j, self.ranges, self.binary = opener.j, opener.lifter.ranges, binary
        self._weights = opener.lifter.graph.weights
        self.masks = frozenset(x for x in added if x.dtype.is_floating_point and self._may_mask(x))
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
        """Which ordinary samples are at positions for which a path's conditions hold; all where none is."""
        there = torch.ones(ORDINARY, dtype=torch.bool)
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
            case Pointwise(op="ge" | "le" | "ne" as op, args=args):
                return self.of(Pointwise(torch.bool, "not", (Pointwise(torch.bool, _OPPOSITE[op], args),)))
            case Pointwise(op=op) if op in _COMPARISONS:
                return self._comparison(expr)
            case Pointwise():
                return _merged(self._results(expr))
        if expr.dtype == torch.bool:
            return self._either(expr)
        ordinary = self._ordinary(expr)
        if expr not in self.masks:
            return {frozenset(): ordinary}
        # As a condition, the tensor says that it masks.
        return {frozenset({(expr, True)}): torch.full_like(ordinary, -math.inf), frozenset({(expr, False)}): ordinary}

    def _results(self, expr: Pointwise) -> Iterator[tuple[Known, torch.Tensor]]:
        """An operator's value on each path, and once more at the pole that its last argument may be at."""
        for known, values in self.together(expr.args):
            result = _rounded(OPS[expr.op].torch(*(_promoted(x, expr.op) for x in values)), expr.dtype)
            pole = self._pole(expr, values) if expr.op in _POLES else None
            yield (known, result) if pole is None else (known | {(expr, False)}, result)
            if pole is not None:
                yield known | {(expr, True)}, torch.zeros_like(result) + pole

    def _pole(self, expr: Pointwise, values: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """What an operator gives for a product that it has no value for, or where a mask is 0; None for neither."""
        last, read = values[-1], [*walk(expr)]
        if any(isinstance(e, Product) for e in walk(expr.args[-1])):
            lacks = (last < 0).any() if expr.op in _NOT_NEGATIVE else (last <= 0).any() and (last >= 0).any()
            return torch.tensor(math.nan) if lacks else None
        of_masks = any(isinstance(e, (Load, Gather)) and self._may_mask(e) for e in read)
        if expr.op in _ROOTS or not of_masks or any(isinstance(e, Product) for e in read) or _is_constant(last):
            return None
        return torch.tensor(-math.inf) if expr.op != "div" else math.inf * values[0].float().sign()

    def _may_mask(self, read: Load | Gather) -> bool:
        return self.j in free_symbols(read) and read.tensor not in self._weights

    def _comparison(self, expr: Pointwise) -> Paths:
        """True and false, but where both sides are constants or one is infinite; at positions, what holds there."""
        if all(map(_is_of_positions, expr.args)):
            values = [next(iter(self.of(a).values())) for a in expr.args]
            self._truths[expr] = OPS[expr.op].torch(*values)[:ORDINARY]
            return self._either(expr)

        def found() -> Iterator[tuple[Known, torch.Tensor]]:
            for known, values in self.together(expr.args):
                if all(map(_is_constant, values)) or any(x.isinf().all() for x in values):
                    yield known, OPS[expr.op].torch(*values)
                else:
                    yield from ((known | own, holds) for own, holds in self._either(expr).items())

        return _merged(found())

    def _either(self, condition: Expr) -> Paths:
        truth = torch.ones(_SAMPLES, dtype=torch.bool)
        return {frozenset({(condition, True)}): truth, frozenset({(condition, False)}): ~truth}

    def _ordinary(self, expr: Expr) -> torch.Tensor:
        """Numbers of any sign for products; of tensors positive ones, of integers that differ between keys 0 and 1."""
        others = torch.randn(ORDINARY, generator=self._random)
        if isinstance(expr, Product):
            x = torch.randn(ORDINARY, generator=self._random).clamp(-3, 3)
            return torch.cat([x.index_fill(0, torch.tensor([0]), 0.0), 10 * others]).to(_work(expr.dtype))
        if expr.dtype.is_floating_point:
            x = 0.25 + 0.75 * torch.rand(ORDINARY, generator=self._random)
            return torch.cat([x.index_fill(0, torch.tensor([0]), 1.0), 10 * others]).to(_work(expr.dtype))
        low, high = (0, 2) if self.binary or self.j in free_symbols(expr) else (1, 4)
        return torch.cat([torch.randint(low, high, (ORDINARY,), generator=self._random), (10 * others).long()])

    def _at_positions(self, value: sympy.Expr) -> torch.Tensor:
        names = sorted(value.free_symbols, key=str)
        for name in names:
            if name not in self._positions:
                spans = self._span(name), self._span(name, _FAR)
                drawn = (torch.randint(*span, (ORDINARY,), generator=self._random) for span in spans)
                self._positions[name] = torch.cat([*drawn])
        points = zip(*(self._positions[name].tolist() for name in names), strict=True) if names else [()] * _SAMPLES
        at = [value.xreplace(dict(zip(names, map(sympy.Integer, point), strict=True))) for point in points]
        return torch.tensor([int(x) for x in at])

    def _span(self, name: sympy.Symbol, most: int = _NEAR) -> tuple[int, int]:
        """Where positions are tried, and lengths, which are beyond them."""
        if name not in self.ranges:
            return most + 1, 2 * most
        extent = self.ranges[name]
        return 0, min(most, int(extent)) if extent.is_Integer else most

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


_COMPARISONS = frozenset({"lt", "gt", "eq", "to_bool"})
_OPPOSITE = {"ge": "lt", "le": "gt", "ne": "eq"}
# Operators that have no value where their last argument is negative, and all that have none, or -inf, somewhere.
_ROOTS = frozenset({"sqrt", "rsqrt"})
_NOT_NEGATIVE = frozenset({"log", "log2"}) | _ROOTS
_POLES = frozenset({"div"}) | _NOT_NEGATIVE


def _is_of_positions(expr: Expr) -> bool:
    """Whether an expression is made of positions and constants, without a choice."""
    return isinstance(expr, (Index, Const)) or (
        isinstance(expr, Pointwise) and expr.dtype != torch.bool and all(map(_is_of_positions, expr.args))
    )


def _is_constant(x: torch.Tensor) -> bool:
    return bool((x == x[0]).all())


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
