"""Choices by position: two-case divisions and decided comparisons, against evaluation at every position."""

from __future__ import annotations

import itertools
import random

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.evaluate import Tile, evaluate
from flashfuse.kernels.expr import Expr, Load, Pointwise, walk
from flashfuse.kernels.normal import const, index, pointwise
from flashfuse.patterns.cases import less, without_cases
from flashfuse.patterns.indexing import divide, linearize, recombined, resimplify, unlinearize

Q, K = (sympy.Symbol(s, integer=True, nonnegative=True) for s in "qk")


def values(expr: Expr, rows: int, columns: int, tensor: torch.Tensor) -> torch.Tensor:
    axes = ((Q, range(rows)), (K, range(columns)))
    tile = Tile(axes, {}, (), (tensor,), torch.float32, torch.device("cpu"))
    return evaluate(expr, tile).expand(rows, columns)


@pytest.mark.parametrize("seed", range(30))
def test_a_choice_of_two_cases_is_the_division(seed: int) -> None:
    generator = random.Random(seed)
    rows, columns, divisor = (generator.randrange(2, 8) for _ in range(3))
    offset = generator.randrange(0, 2 * divisor)
    at = generator.choice([Q + K, K - Q + rows - 1, Q - K + columns - 1, K + offset, 2 * K + Q]) + offset % 3
    tensor = torch.randn(40, 40)
    program = pointwise(
        "where",
        pointwise("lt", index(Mod(at, divisor)), index(1)),
        index(-1),
        Load(torch.float32, 0, (Q + FloorDiv(at, divisor), Mod(at, divisor))),
        dtype=torch.float32,
    )
    ranges = {Q: sympy.Integer(rows), K: sympy.Integer(columns)}
    found = without_cases(program, ranges)
    torch.testing.assert_close(values(found, rows, columns, tensor), values(program, rows, columns, tensor))


@pytest.mark.parametrize("seed", range(40))
def test_division_is_exact_wherever_it_is_simplified(seed: int) -> None:
    generator = random.Random(seed)
    rows, columns, divisor = (generator.randrange(2, 9) for _ in range(3))
    a, b = generator.randrange(0, 30), generator.randrange(-3, 30)
    at = sympy.expand(a * Q + b * K + (columns * 3 if b < 0 else generator.randrange(20)))
    ranges = {Q: sympy.Integer(rows), K: sympy.Integer(columns)}
    quotient, remainder = divide(at, sympy.Integer(divisor), ranges)
    for i, j in itertools.product(range(rows), range(columns)):
        here = {Q: i, K: j}
        assert (int(quotient.subs(here)), int(remainder.subs(here))) == divmod(int(at.subs(here)), divisor)


def test_symbolic_shift_divides() -> None:
    """(S + i (2 S - 1) + j) // (2 S) is i, since S - i + j lies in [1, 2 S)."""
    size = sympy.Symbol("S", integer=True, positive=True)
    at = size + Q * (2 * size - 1) + K
    assert divide(at, 2 * size, {Q: size, K: size}) == (Q, sympy.expand(size - Q + K))


def test_a_reshape_and_its_inverse_leave_nothing() -> None:
    ranges = {Q: sympy.Integer(60)}
    sizes = (sympy.Integer(3), sympy.Integer(4), sympy.Integer(5))
    assert linearize(unlinearize(Q, sizes, ranges), sizes) == Q
    assert recombined(6 * FloorDiv(Q, 2) + 3 * Mod(Q, 2) + 1) == 3 * Q + 1
    assert resimplify(4 * FloorDiv(Q + K, 4) + Mod(Q + K, 4), ranges | {K: sympy.Integer(7)}) == Q + K


def test_a_branch_knows_its_condition() -> None:
    behind = pointwise("ge", index(K), index(Q + 1))
    tensor = Load(torch.float32, 0, (Q, K))
    program = pointwise("where", behind, index(0), pointwise("where", less(K, Q + 3), tensor, index(1)))
    assert not any(isinstance(e, Pointwise) and e.op == "lt" for e in walk(without_cases(program, {})))


def test_equality_decides_inequality() -> None:
    """A mask filled where it is not zero and then where it is zero has two values."""
    tensor = Load(torch.float32, 0, (Q, K))
    zero, other = (pointwise(op, tensor, const(0.0)) for op in ("eq", "ne"))
    program = pointwise("where", zero, const(0.0), pointwise("where", other, const(-100.0), tensor))
    assert without_cases(program, {}) == pointwise("where", zero, const(0.0), const(-100.0))
