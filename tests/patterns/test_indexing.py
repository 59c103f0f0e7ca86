"""Index arithmetic against brute force."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import sympy

from flashfuse.patterns.axes import folds, radix
from flashfuse.patterns.indexing import divide, quotient, reshape
from flashfuse.patterns.views import Arrange, Narrow, Split, view_plan

b, h, i, r = (sympy.Symbol(s, integer=True, nonnegative=True) for s in "bhir")
H, G = (sympy.Symbol(s, integer=True, positive=True) for s in "HG")


def sizes(*values: int) -> tuple[sympy.Expr, ...]:
    return tuple(map(sympy.Integer, values))


def test_division_of_folded_index_is_exact_for_symbolic_sizes() -> None:
    ranges = {b: sympy.Integer(5), h: H}
    assert divide(b * H + h, H, ranges) == (b, h)


def test_grouped_heads_divide() -> None:
    ranges = {h: H, i: G}
    assert divide(h * G + i, G, ranges) == (h, i)


def factorizations(n: int, generator: random.Random) -> list[int]:
    shape = []
    while n > 1:
        f = generator.choice([d for d in range(2, n + 1) if n % d == 0])
        shape.append(f)
        n //= f
    for _ in range(generator.randrange(3)):
        shape.insert(generator.randrange(len(shape) + 1), 1)
    return shape


@pytest.mark.parametrize("seed", range(20))
def test_reshape_agrees_with_row_major_order(seed: int) -> None:
    generator = random.Random(seed)
    n = generator.choice([24, 36, 60, 64])
    shape, source = factorizations(n, generator), factorizations(n, generator)
    symbols = [
        sympy.Integer(0) if s == 1 else sympy.Symbol(f"x{d}", integer=True, nonnegative=True)
        for d, s in enumerate(shape)
    ]
    ranges = {x: sympy.Integer(s) for x, s in zip(symbols, shape, strict=True) if isinstance(x, sympy.Symbol)}
    moved = reshape(symbols, sizes(*shape), sizes(*source), ranges)
    for flat, at in enumerate(itertools.product(*map(range, shape))):
        values = {x: v for x, v in zip(symbols, at, strict=True) if isinstance(x, sympy.Symbol)}
        expected, rest = [], flat
        for s in reversed(source):
            expected.insert(0, rest % s)
            rest //= s
        assert [int(m.subs(values)) for m in moved] == expected
    assert math.prod(source) == n


def test_a_dimension_that_a_reshape_leaves_alone_keeps_its_index() -> None:
    ranges = {b: sympy.Integer(2), i: H, h: sympy.Integer(4), r: sympy.Integer(8)}
    assert reshape(
        (b, i, h * 8 + r),
        (sympy.Integer(2), H, sympy.Integer(32)),
        (sympy.Integer(2), H, sympy.Integer(4), sympy.Integer(8)),
        ranges,
    ) == (b, i, h, r)


def test_radix_of_folded_axes() -> None:
    from torch.utils._sympy.functions import FloorDiv, Mod

    indices = [FloorDiv(b, 12), FloorDiv(Mod(b, 12), 4)]
    assert set(folds(indices, b)) == {12, 4}
    assert radix(sympy.Integer(24), [sympy.Integer(4), sympy.Integer(12)]) == (2, 3, 4)
    assert radix(sympy.Integer(24), [sympy.Integer(4), sympy.Integer(6)]) is None


def test_view_plan_of_fused_projection() -> None:
    """q of a fused qkv: x[b, i, h * 24 + 8 + r] is unflatten, narrow, permute."""
    ranges = {b: sympy.Integer(2), i: sympy.Integer(5), h: sympy.Integer(4), r: sympy.Integer(8)}
    plan = view_plan((b, i, h * 24 + 8 + r), sizes(2, 5, 96), (b, h, i, r), ranges)
    assert plan == (Split(2, 4, 24), Narrow(3, 8, 8, 1), Arrange((0, 2, 1, 3)))


def test_overlapping_windows_have_no_view_plan() -> None:
    """x[4 * i + r] with r up to 8 reads elements twice; unflattening cannot say that."""
    ranges = {i: sympy.Integer(5), r: sympy.Integer(8)}
    assert view_plan((4 * i + r,), sizes(24), (i, r), ranges) is None


def test_a_diagonal_has_no_view_plan() -> None:
    ranges = {i: sympy.Integer(5)}
    assert view_plan((i, i), sizes(5, 5), (i,), ranges) is None


def test_a_size_that_may_be_odd_is_not_halved() -> None:
    """(H + 1) // 2 was taken for (H + 1) / 2, which has no fraction bar but fractional coefficients."""
    assert quotient(H + 1, sympy.Integer(2)) is None
    assert quotient(2 * H + 4, sympy.Integer(2)) == H + 2
    assert quotient(H * G, G) == H
