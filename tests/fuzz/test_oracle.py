"""What the oracle takes for exact: numbers that are 0 in exact arithmetic, and what is made of positions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fuzz.oracle import Call, assert_right, check, without_discarded
from fuzz.program import Input, Program

GIVEN = (Input("q", ("s", "d"), "normal"), Input("k", ("t", "d"), "normal"), Input("v", ("t", "e"), "normal"))
# All keys of a row have the same value, so no score changes anything.
EQUAL_VALUES = Program(
    inputs=(*GIVEN[:2], Input("v", ("t", "e"), "shared")),
    lines=("return (q @ k.mT).softmax(-1) @ v",),
    sizes=({"s": 5, "t": 7, "d": 3, "e": 2},),
    dtype=torch.float64,
    sites=1,
    trains=True,
)


def test_positions_in_float64() -> None:
    """A bias that eager code rounds to float32 was exact beside the kernel's, which is wider than it was written."""
    made = "bias = (torch.arange(7).float() / 7).cos() * 99"
    check(replace(EQUAL_VALUES, inputs=GIVEN, lines=(made, "return (q @ k.mT + bias).softmax(-1) @ v"), trains=False))


def test_gradients_that_are_rounding_alone() -> None:
    """float64's own rounding was taken for the exact gradient, which no other order of additions can meet."""
    check(EQUAL_VALUES)


def test_sums_that_overflow_in_float64() -> None:
    """The number that a row's softmax is was held to 0, which is what a sum that overflows makes of it in any type."""
    lines = ("e = torch.log1p((q @ k.mT).masked_fill(q[:, :1] > 0, torch.finfo(q.dtype).min).abs()).exp()",)
    program = replace(EQUAL_VALUES, inputs=GIVEN, lines=(*lines, "return e / e.sum(-1, True) @ v"), trains=False)
    with pytest.raises(AssertionError, match="largest error"):
        check(program)
    check(replace(program, left_open=True))


def test_rounding_alone_has_a_size() -> None:
    """Where float32 leaves 1e-7, float64 may leave 1e-15, and nothing larger."""
    single = [torch.tensor([3e-7, -1e-7])]
    wide = [torch.tensor([4e-16, 1e-16], dtype=torch.float64)]
    assert_right([[torch.tensor([-7e-16, 0.0], dtype=torch.float64)], wide, wide, single], EQUAL_VALUES)
    with pytest.raises(AssertionError, match="rounding leaves"):
        assert_right([[torch.tensor([1e-12, 0.0], dtype=torch.float64)], wide, wide, single], EQUAL_VALUES)


def test_gradients_in_float64_are_of_the_same_numbers() -> None:
    """float64's gradients were those of another gradient of the output, so no error of a float64 program was found."""
    program = replace(EQUAL_VALUES, inputs=GIVEN, sizes=({"s": 5, "t": 7, "d": 3, "e": 4},))
    given = program.make()
    _, eager, wide, *_ = Call(program, program.function(), program.function(), 0).results(0)
    for x, exact in zip(eager[len(given) + 1 :], wide[len(given) + 1 :], strict=True):
        torch.testing.assert_close(x, exact)


def test_gradients_that_autograd_alone_makes_nan() -> None:
    """A temperature of scores that a mask has made -inf: autograd multiplies them by a gradient of 0."""
    numbers = [torch.tensor([1.0])]
    nan = torch.tensor([math.nan, 2.0])
    ours, theirs, exact = without_discarded([[*numbers, torch.tensor([3.0, 2.0])], [*numbers, nan], [*numbers, nan]], 1)
    assert [x[1].tolist() for x in (ours, theirs, exact)] == [[0.0, 2.0]] * 3
    without = [torch.tensor([math.nan])]
    left = without_discarded([[*without, torch.tensor([3.0, 2.0])], [*without, nan], [*without, nan]], 1)
    assert left[1][1].isnan().any()
