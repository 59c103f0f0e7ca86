"""What the oracle takes for exact: numbers that are 0 in exact arithmetic, and what is made of positions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fuzz.oracle import Call, check, told_apart
from fuzz.program import Input, Program
from fuzz.rule import assert_right, without_discarded

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


def test_gradients_that_eager_code_makes_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys and values are one: eager code's roundings leave 0 in any type, and another order of additions 1e-31."""
    monkeypatch.setattr("fuzz.oracle.DRAWS", (2,))
    keys = (GIVEN[0], Input("k", ("t", "d"), "shared"), Input("v", ("t", "e"), "shared"))
    lines = ("s = q @ k.mT", "e = (s - s.amax(-1, True)).exp()", "return e * e.sum(-1, True).pow(-1) @ v")
    check(replace(EQUAL_VALUES, inputs=keys, lines=lines, sizes=({"s": 2, "t": 24, "d": 4, "e": 8},)))


def test_equal_keys_are_told_apart() -> None:
    """One rounding for all keys leaves nothing behind a softmax; a kernel was held to that."""
    program = replace(EQUAL_VALUES, inputs=GIVEN, dtype=torch.float32, trains=False)
    ours, theirs, exact = (torch.tensor([1 + error], dtype=torch.float64) for error in (2e-6, 1e-8, 0.0))
    apart = [[exact], [(exact + 1.5e-6).float()], [exact]]
    results = [[ours.float()], [theirs.float()], [exact]]
    with pytest.raises(AssertionError, match="largest error"):
        assert_right(results, program)
    assert_right(results, program, apart)
    with pytest.raises(AssertionError, match="largest error"):
        assert_right([[ours.float() + 1e-5], *results[1:]], program, apart)


def test_telling_apart_is_an_ulp() -> None:
    one = torch.randn(1, 4).to(torch.bfloat16).expand(9, 4)
    apart = told_apart(one, 0)
    assert (apart != one).any()
    assert ((apart - one).abs() <= 2 * torch.finfo(torch.bfloat16).eps * one.abs()).all()


def test_gradients_of_rows_that_are_nan() -> None:
    """A score of +inf makes its row NaN, and log1p is flat there: 0 times NaN to autograd, 0 to the kernels."""
    row, nan = torch.tensor([math.nan]), torch.tensor([math.nan, math.nan])
    for ours, right in ((0.0, True), (3.0, False)):
        runs = [[row, torch.tensor([ours, math.nan])], [row, nan], [row, nan]]
        assert without_discarded(runs, 1)[1][1].isnan().all()
        assert (without_discarded(runs, 1, curved=True)[1][1][0].item() == 0) == right


def test_numbers_that_are_nearly_too_large() -> None:
    """A gradient a thousandth below the largest number was not finite, as half of eager code's error makes it."""
    program = replace(EQUAL_VALUES, inputs=GIVEN, dtype=torch.float32, trains=False)
    ours, theirs = torch.tensor([math.inf]), torch.tensor([3.39e38])
    assert_right([[ours], [theirs], [torch.tensor([3.398e38], dtype=torch.float64)]], program)
    with pytest.raises(AssertionError, match="largest error"):
        assert_right([[ours], [theirs], [torch.tensor([3.391e38], dtype=torch.float64)]], program)


def test_graphs_without_a_site_are_what_inductor_makes_of_them() -> None:
    """What Inductor alone makes of a program was held to eager code's numbers: another result still fails."""
    program = replace(EQUAL_VALUES, inputs=GIVEN, lines=("return (q * 0.3 - k).softmax(0) @ v.mT",), trains=False)
    program = replace(program, sizes=({"s": 5, "t": 5, "d": 3, "e": 3},))
    run = program.function()
    call = Call(program, run, run, 0)
    call.check_same(run)
    with pytest.raises(AssertionError, match="not equal"):
        call.check_same(lambda q, k, v: run(q, k, v) * 1.001)
