"""When results are right: the rule of docs/numerics.md, section 2, where it says something."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from numerics import assert_close_to_exact

from .program import Program

# A number that is this part of what float32 gives is 0 in exact arithmetic: of any other float32 has some digits.
ROUNDING_ALONE = 2.0**-20
# How much larger the rounding of one set of keys may be than that of another.
APART = 1.25

Results = list[torch.Tensor | None]


def without_discarded(results: list[Results], gradients: int, curved: bool = False) -> list[Results]:
    """The same with 0 for gradients that are NaN to autograd alone: it multiplies a branch that is discarded by 0.

    results: of flashfuse, eager code, float64 and perhaps others, whose last so many are gradients. The kernels leave
    such branches out (numerics.md, 5). Where a result is NaN gradients are NaN of themselves, but that a score passes
    0 on where a function of it is flat. curved: whether there is such a function.
    """
    fused, eager, wide, *_ = results
    first = len(wide) - gradients
    unknown = any(x is None or x.isnan().any() for x in wide[:first])
    if unknown and not curved:
        return results
    for at in range(first, len(wide)):
        ours, theirs, exact = fused[at], eager[at], wide[at]
        if ours is not None and theirs is not None and exact is not None:
            alone = (ours == 0 if unknown else ours.isfinite()) & theirs.isnan() & exact.isnan()
            for run in results:
                run[at] = run[at].masked_fill(alone, 0.0)  # type: ignore[union-attr]
    return results


def assert_right(results: Sequence[Results], program: Program, apart: Sequence[Results] | None = None) -> None:
    """Every result by the rule, where it says something.

    apart: eager code's error is that of these results, where equal keys are not quite equal. Of keys that are one key
    eager code makes one rounding for all, which a softmax leaves nothing of, where a kernel rounds each for itself:
    by as much, but not the same, so that there is `APART` between them.
    """
    columns, measured = (zip(*of, strict=True) for of in (results, results if apart is None else apart))
    for (fused, eager, wide, *_), (_, rounded, unrounded, *narrow) in zip(columns, measured, strict=True):
        assert (fused is None) == (eager is None), "a gradient where eager has none, or none where it has one"
        if fused is None or eager is None or wide is None:
            continue
        assert fused.shape == eager.shape, f"shape {tuple(fused.shape)}, expected {tuple(eager.shape)}"
        assert fused.dtype == eager.dtype, f"{fused.dtype}, expected {eager.dtype}"
        known = ~_left_open(program, fused, eager, wide)
        if not known.any():
            continue
        if narrow and (size := _rounding_alone(rounded[known], narrow[0][known])) is not None:
            found = fused[known].abs().max().item()
            assert found <= size, f"what is 0 in exact arithmetic is {found:.3g}, and rounding leaves {size:.3g}"
            continue
        floor = torch.float32 if program.dtype == torch.float64 else eager.dtype
        error = (rounded[known].double() - unrounded[known]) * (1.0 if apart is None else APART)
        # What overflows is off by as much as the largest number of its type is.
        at_most = torch.where(wide.isfinite(), fused.nan_to_num(nan=torch.nan), fused)
        assert_close_to_exact(at_most[known], wide[known] + error, wide[known], floor)


def _rounding_alone(eager: torch.Tensor, single: torch.Tensor) -> float | None:
    """What float64's rounding may leave of numbers that are 0 in exact arithmetic; None where they are others.

    Of such numbers nothing but rounding is left in any type, and each type's is of its own size (numerics.md, 5).
    """
    size, of_single = (x.nan_to_num(0.0, 0.0, 0.0).abs().max().double().item() for x in (eager, single))
    if of_single == 0 or size > ROUNDING_ALONE * of_single:
        return None
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return 4 * max(size, ratio * of_single)


def _left_open(program: Program, fused: torch.Tensor, eager: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """Where nothing is asked: eager code gives the very same or overflows as well, or the contract leaves it open.

    Where exponentials without the row's own maximum overflow, eager code has no error that another could be held to.
    Nor where their sum alone does, and the quotient is 0: no wider type than float64 tells.
    """
    same = ~eager.isfinite() & ((fused == eager) | (fused.isnan() & eager.isnan()))
    if program.left_open:
        overflown = (eager == 0) & (wide == 0) & (program.dtype == torch.float64)
        return ~eager.isfinite() | ~wide.isfinite() | overflown
    return same | (wide.isfinite() & ~eager.isfinite() & ~fused.isfinite())
