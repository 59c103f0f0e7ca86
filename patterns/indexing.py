"""Index arithmetic: floor division, remainder and reshapes of sympy index expressions, simplified under known ranges.

Every layout operation is a substitution in an index. A reshape is the only one that divides; written here so that
(b * H + h) // H is b whenever 0 <= h < H can be proven, for sizes that are numbers or symbols alike.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

Indices = tuple[sympy.Expr, ...]

Ranges = Mapping[sympy.Symbol, sympy.Expr]
"""For every index symbol its extent: the symbol runs over 0 <= symbol < extent."""

ZERO, ONE = sympy.Integer(0), sympy.Integer(1)


def same(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two sizes are equal whatever their symbols stand for."""
    return a == b or sympy.expand(a - b) == 0


@functools.lru_cache(maxsize=65536)
def quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    """a / b where b divides a whatever the symbols stand for, else None."""
    if a.is_Integer and b.is_Integer:
        return sympy.Integer(int(a) // int(b)) if int(a) % int(b) == 0 else None
    coefficient, rest = a.as_coeff_Mul()
    if b.is_Integer and coefficient.is_Integer and rest.is_Symbol:
        return coefficient // b * rest if coefficient % b == 0 else None
    if _is_monomial(b) and all(map(_is_monomial, terms := sympy.Add.make_args(sympy.expand(a)))):
        parts = [term / b for term in terms]
        return sympy.Add(*parts) if all(map(_is_monomial, parts)) else None
    ratio = sympy.cancel(a / b)
    return sympy.expand(ratio) if _is_whole(ratio) else None


def _is_monomial(expr: sympy.Expr) -> bool:
    """Whether the expression is an integer times powers of symbols and divisions, none in a denominator."""
    coefficient, rest = expr.as_coeff_Mul()
    return coefficient.is_Integer and all(_is_power(factor) for factor in sympy.Mul.make_args(rest))


def _is_power(factor: sympy.Expr) -> bool:
    base, exponent = factor.as_base_exp()
    whole = base.is_Symbol or isinstance(base, (FloorDiv, Mod)) or base == 1
    return whole and exponent.is_Integer and exponent.is_positive


def _is_whole(expr: sympy.Expr) -> bool:
    """Whether the expression is free of fractions, also of fractional coefficients."""
    return bool(sympy.fraction(sympy.together(expr))[1] == 1)


def bounds(expr: sympy.Expr, ranges: Ranges) -> tuple[sympy.Expr, sympy.Expr] | None:
    """Least and greatest value of an index expression, over sizes; None where no bound is known."""
    if expr in ranges:
        return ZERO, ranges[expr] - 1
    if expr.is_Integer or not (expr.free_symbols & set(ranges)):
        return expr, expr
    if isinstance(expr, (FloorDiv, Mod)):
        return _division_bounds(expr, ranges)
    if expr.is_Add:
        parts = [bounds(a, ranges) for a in expr.args]
        if any(p is None for p in parts):
            return None
        low, high = zip(*(p for p in parts if p is not None), strict=True)
        return sympy.Add(*low), sympy.Add(*high)
    if expr.is_Mul:
        factors = [a for a in expr.args if a.free_symbols & set(ranges)]
        scale = sympy.Mul(*(a for a in expr.args if a not in factors))
        inner = bounds(factors[0], ranges) if len(factors) == 1 else None
        if inner is None:
            return None
        if scale.is_nonnegative:
            return scale * inner[0], scale * inner[1]
        return (scale * inner[1], scale * inner[0]) if scale.is_nonpositive else None
    return None


def _division_bounds(expr: sympy.Expr, ranges: Ranges) -> tuple[sympy.Expr, sympy.Expr] | None:
    value, divisor = expr.args
    inner = bounds(value, ranges)
    if inner is None or not inner[0].is_nonnegative:
        return None
    return (ZERO, FloorDiv(inner[1], divisor)) if isinstance(expr, FloorDiv) else (ZERO, divisor - 1)


def within(expr: sympy.Expr, extent: sympy.Expr, ranges: Ranges) -> bool:
    """Whether 0 <= expr < extent can be proven."""
    limits = bounds(expr, ranges)
    if limits is None:
        return False
    return bool(limits[0].is_nonnegative) and bool(sympy.expand(extent - 1 - limits[1]).is_nonnegative)


def never_negative(expr: sympy.Expr, ranges: Ranges) -> bool:
    """Whether 0 <= expr can be proven."""
    limits = bounds(expr, ranges)
    return limits is not None and bool(limits[0].is_nonnegative)


def divide(expr: sympy.Expr, divisor: sympy.Expr, ranges: Ranges) -> tuple[sympy.Expr, sympy.Expr]:
    """(expr // divisor, expr % divisor) for a non-negative expr and a positive divisor, simplified."""
    if divisor == 1:
        return expr, ZERO
    whole: list[sympy.Expr] = []
    rest: list[sympy.Expr] = []
    for term in sympy.Add.make_args(recombined(expr)):
        part = quotient(term, divisor)
        (rest if part is None else whole).append(term if part is None else part)
    remainder = sympy.Add(*rest)
    if within(remainder, divisor, ranges):
        return sympy.Add(*whole), remainder
    # (x // a) // b is x // (a b), so that a chain of reshapes leaves one division
    if isinstance(remainder, FloorDiv):
        inner, first = remainder.args
        return sympy.Add(*whole) + FloorDiv(inner, sympy.expand(first * divisor)), Mod(remainder, divisor)
    share = _best_share(rest, divisor, ranges)
    if share is None:
        return _parts(expr, divisor)
    taken, left = sympy.Add(*whole, share[0]), share[1]
    if within(left, divisor, ranges):
        return taken, left
    further, remainder = _parts(left, divisor)
    return taken + further, remainder


def _parts(value: sympy.Expr, divisor: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """(value // divisor, value % divisor); of a lone symbol sympy would look for a while and find nothing."""
    lone = value.is_Symbol and divisor.is_Integer
    return FloorDiv(value, divisor, evaluate=not lone), Mod(value, divisor, evaluate=not lone)


def _best_share(
    terms: Sequence[sympy.Expr], divisor: sympy.Expr, ranges: Ranges
) -> tuple[sympy.Expr, sympy.Expr] | None:
    """A way to write the sum of `terms` as taken * divisor + left where left is small, or at least never negative."""
    shares = _shares(terms, divisor)
    for extent in (divisor, 2 * divisor):
        for share in shares:
            if within(share[1], extent, ranges):
                return share
    return next((s for s in shares if s[1].is_nonnegative or never_negative(s[1], ranges)), None)


_MOST_TERMS = 5


def _shares(terms: Sequence[sympy.Expr], divisor: sympy.Expr) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """Ways to write the sum of `terms` as taken * divisor + left: 11 i is 12 i - i."""
    if len(terms) > _MOST_TERMS:
        return [(ZERO, sympy.Add(*terms))]
    choices = [_share(term, divisor) for term in terms]
    return [
        (sympy.Add(*(taken for taken, _ in way)), sympy.expand(sympy.Add(*(left for _, left in way))))
        for way in itertools.product(*choices)
    ]


def _share(term: sympy.Expr, divisor: sympy.Expr) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """One term as taken * divisor + left, by rounding its coefficient down or up."""
    if divisor.is_Integer:
        coefficient, rest = term.as_coeff_Mul()
        if not coefficient.is_Integer:
            return [(ZERO, term)]
        taken = int(coefficient) // int(divisor)
        return [(n * rest, (coefficient - n * divisor) * rest) for n in (taken, taken + 1)]
    whole = {part: sympy.Dummy(integer=True) for part in (term * divisor).atoms(FloorDiv, Mod)}
    given = {dummy: part for part, dummy in whole.items()}
    term_, divisor_ = term.xreplace(whole), divisor.xreplace(whole)
    size = sorted(divisor_.free_symbols, key=str)[0]
    if size not in term_.free_symbols:
        return [(ZERO, term)]
    try:
        taken, left = (part.xreplace(given) for part in sympy.div(term_, divisor_, size))
    except sympy.PolynomialError:
        return [(ZERO, term)]
    return [(ZERO, term), (taken, left)] if _is_whole(taken) and _is_whole(left) else [(ZERO, term)]


def recombined(expr: sympy.Expr) -> sympy.Expr:
    """The expanded expression with x for d * (x // d) + x % d, which a reshape and its inverse leave."""
    expr = sympy.expand(expr)
    for part in sorted(expr.atoms(Mod), key=str):
        value, divisor = part.args
        times = expr.coeff(part, 1)
        whole = FloorDiv(value, divisor)
        if times != 0 and sympy.expand(expr.coeff(whole, 1) - times * divisor) == 0:
            expr = sympy.expand(expr - times * part - times * divisor * whole + times * value)
    return expr


def resimplify(expr: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    """Redo the divisions of an index after a substitution."""
    if not expr.has(FloorDiv, Mod):
        return sympy.expand(expr)
    args = [resimplify(a, ranges) for a in expr.args]
    if isinstance(expr, FloorDiv):
        return divide(args[0], args[1], ranges)[0]
    if isinstance(expr, Mod):
        return divide(args[0], args[1], ranges)[1]
    return recombined(expr.func(*args))


def product(sizes: Sequence[sympy.Expr]) -> sympy.Expr:
    return sympy.Mul(*sizes)


def linearize(position: Sequence[sympy.Expr], sizes: Sequence[sympy.Expr]) -> sympy.Expr:
    """Row-major offset of a position."""
    offset: sympy.Expr = ZERO
    for at, size in zip(position, sizes, strict=True):
        offset = offset * size + at
    return recombined(offset)


def unlinearize(offset: sympy.Expr, sizes: Sequence[sympy.Expr], ranges: Ranges) -> tuple[sympy.Expr, ...]:
    """The position whose row-major offset this is."""
    position: list[sympy.Expr] = []
    for size in reversed(sizes[1:]):
        offset, at = divide(offset, size, ranges)
        position.append(at)
    return (offset, *reversed(position)) if sizes else ()


def reshape(
    position: Sequence[sympy.Expr], shape: Sequence[sympy.Expr], source: Sequence[sympy.Expr], ranges: Ranges
) -> tuple[sympy.Expr, ...]:
    """Where the element at `position` of a tensor reshaped to `shape` stood in the `source` shape.

    Dimensions are matched in groups of equal product first, so a dimension that a reshape leaves alone keeps its index.
    """
    result: list[sympy.Expr] = []
    i = j = 0
    while i < len(shape) or j < len(source):
        i_end, j_end = _group(shape, source, i, j)
        inner, outer = source[j:j_end], shape[i:i_end]
        real = [(at, size) for at, size in zip(position[i:i_end], outer, strict=True) if size != 1]
        kept = [size for size in inner if size != 1]
        if len(real) == len(kept) == 1:
            values = [real[0][0]]
        else:
            values = (
                list(unlinearize(linearize([p for p, _ in real], [s for _, s in real]), kept, ranges)) if kept else []
            )
        result += [ZERO if size == 1 else values.pop(0) for size in inner]
        i, j = i_end, j_end
    return tuple(result)


def _group(shape: Sequence[sympy.Expr], source: Sequence[sympy.Expr], i: int, j: int) -> tuple[int, int]:
    """The shortest next runs of dimensions of both shapes with equal products."""
    if i == len(shape) or j == len(source):
        return len(shape), len(source)
    i_end, j_end = i + 1, j + 1
    while not same(product(shape[i:i_end]), product(source[j:j_end])):
        left, right = product(shape[i:i_end]), product(source[j:j_end])
        if i_end == len(shape) and j_end == len(source):
            return i_end, j_end
        if j_end == len(source) or (i_end < len(shape) and _smaller(left, right)):
            i_end += 1
        else:
            j_end += 1
    return i_end, j_end


def _smaller(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether a is the factor to grow: it divides b, or is the smaller number."""
    if a.is_Integer and b.is_Integer:
        return bool(a < b)
    return quotient(b, a) is not None
