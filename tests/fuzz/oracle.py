"""What has to hold of a program: found where it is attention, and right wherever it is not."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from forms.form import widened
from numerics import assert_close_to_exact
from torch.overrides import TorchFunctionMode

import flashfuse

from .program import WITHOUT_GRADIENT, Program

# Of how many inputs together a result is judged that fewer did not pass: few numbers may be near by luck.
DRAWS = (1, 12, 96)

# What eager code says of its own backward pass where a program writes over what that needs.
NOT_TRAINED = (
    "modified by an inplace operation", "does not require grad", "is a view and is being modified inplace",
)  # fmt: skip
# A gradient that is this part of what float32 gives is 0 in exact arithmetic: of any other float32 has some digits.
ROUNDING_ALONE = 2.0**-20

Run = Callable[..., Any]
Results = list[torch.Tensor | None]


class Invalid(Exception):
    """Eager code does not run: the generator's fault."""


class Missed(AssertionError):
    """An attention that was not found."""


def check(program: Program, inner: str = "eager") -> None:
    """Raises AssertionError, or what the compiled program raises, where something is wrong."""
    torch._dynamo.reset()
    flashfuse.reset()
    function = program.function()
    options = {"flashfuse.inner": inner, "flashfuse.strict": True}
    compiled = torch.compile(function, backend="flashfuse", options=options, fullgraph=True)
    for call in range(len(program.sizes)):
        Call(program, function, compiled, call).check()
    judge(program)


def judge(program: Program) -> None:
    """The attentions that were found, against those that there are."""
    if program.sites is None:
        return
    for report in flashfuse.reports():
        codes = {refusal.code for refusal in report.refusals}
        if codes and codes <= program.refused:
            continue
        if len(report.sites) != program.sites or codes:
            raise Missed(f"{len(report.sites)} sites; " + "; ".join(map(str, report.refusals)))


@dataclass(frozen=True)
class Call:
    """One call of a program, by eager code, in float64 and compiled."""

    program: Program
    function: Run
    compiled: Run
    number: int

    def check(self) -> None:
        """Results by the rule: for one set of inputs, and, where those fail it, for several as one."""
        several: list[list[Results]] = []
        for draws in DRAWS:
            several += [self.results(seed) for seed in range(len(several), draws)]
            try:
                return assert_right([_together(kind) for kind in zip(*several, strict=True)], self.program)
            except AssertionError:
                if draws == DRAWS[-1]:
                    raise

    def results(self, seed: int) -> list[Results]:
        """What flashfuse, eager code and float64 give; for gradients in float64, what they are in float32, too."""
        inputs = self.program.make(self.number, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.program.trains and (found := self._trained(inputs)):
                return found
            with torch.no_grad():
                return self._run(inputs, outputs)

    def _run(self, inputs: list[torch.Tensor], way: Callable[[Run, list[torch.Tensor]], Results]) -> list[Results]:
        try:
            eager = way(self.function, [x.clone() for x in inputs])
            with widened(self.program.dtype), _positions_widened(self.program.dtype):
                wide = way(self.function, [_double(x) for x in inputs])
        except Exception as error:
            raise Invalid(f"{type(error).__name__}: {error}") from error
        return [way(self._marked, [x.clone() for x in inputs]), eager, wide]

    def _trained(self, inputs: list[torch.Tensor]) -> list[Results]:
        """With gradients; nothing where eager code writes over what its own gradients need."""
        with torch.enable_grad():
            way = functools.partial(gradients, program=self.program)
            try:
                found = self._run(inputs, way)
            except Invalid as error:
                if not any(text in str(error) for text in NOT_TRAINED):
                    raise
                return []
            if self.program.dtype == torch.float64:
                found.append(way(self.function, [_single(x) for x in inputs]))
            return without_discarded(found, sum(learned(self.program, inputs)))

    def _marked(self, *inputs: torch.Tensor) -> Any:
        """The compiled program, told that batch size and lengths are dynamic where they change."""
        axes = [x.axes if len(self.program.sizes) > 1 else () for x in self.program.inputs]
        for x, own in zip(inputs, axes, strict=True):
            for dim in (n for n, axis in enumerate(own) if set(axis) & set("bst")):
                torch._dynamo.maybe_mark_dynamic(x, dim)
        return self.compiled(*inputs)


@contextlib.contextmanager
def _positions_widened(own: torch.dtype) -> Iterator[None]:
    """What a float64 program makes of positions in float32 is made in float64, as the kernels do (numerics.md, 3)."""
    if own != torch.float64:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Positions():
            yield
    finally:
        torch.set_default_dtype(before)


class _Positions(TorchFunctionMode):
    """Integers become float64 where they are asked to become float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if not isinstance(first, torch.Tensor) or first.is_floating_point():
            return func(*args, **kwargs)
        if func is torch.Tensor.float:
            return first.double()
        wide = [torch.float64 if x is torch.float32 else x for x in args]
        return func(*wide, **{name: torch.float64 if x is torch.float32 else x for name, x in kwargs.items()})


def _double(x: torch.Tensor) -> torch.Tensor:
    return x.clone().double() if x.is_floating_point() else x.clone()


def _single(x: torch.Tensor) -> torch.Tensor:
    return x.clone().float() if x.is_floating_point() else x.clone()


def _together(results: Sequence[Results]) -> Results:
    columns = zip(*results, strict=True)
    return [None if any(x is None for x in xs) else torch.stack(xs) for xs in columns]  # type: ignore[arg-type]


def outputs(run: Run, inputs: list[torch.Tensor]) -> Results:
    """The results of one run, and what has become of its inputs."""
    found = run(*inputs)
    results = list(found) if isinstance(found, tuple) else [found]
    return [x.detach() for x in (*results, *inputs) if x.is_floating_point()]


def learned(program: Program, inputs: list[torch.Tensor]) -> list[bool]:
    """Which inputs a gradient is asked for."""
    return [
        x.is_floating_point() and own.kind not in WITHOUT_GRADIENT
        for x, own in zip(inputs, program.inputs, strict=True)
    ]


def gradients(run: Run, inputs: list[torch.Tensor], program: Program) -> Results:
    """The same, and the gradients of inputs for a random one of each result."""
    leaves = [x.requires_grad_(wanted) for x, wanted in zip(inputs, learned(program, inputs), strict=True)]
    # A program may write into its inputs, and no leaf may be written.
    given = [x.clone() if x.is_floating_point() else x for x in leaves]
    found = run(*given)
    results = list(found) if isinstance(found, tuple) else [found]
    generator = torch.Generator().manual_seed(0)
    # The same numbers whatever the default type is, which `_positions_widened` sets.
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in results]
    wanted = [x for x in leaves if x.requires_grad]
    found = torch.autograd.grad(results, wanted, grads, allow_unused=True)
    return [*(x.detach() for x in (*results, *given) if x.is_floating_point()), *found]


def without_discarded(results: list[Results], gradients: int) -> list[Results]:
    """The same with 0 for gradients that are NaN to autograd alone: it multiplies a branch that is discarded by 0.

    results: of flashfuse, eager code, float64 and perhaps others, whose last so many are gradients. The kernels leave
    such branches out (numerics.md, 5). Where a result is NaN gradients are NaN of themselves.
    """
    fused, eager, wide, *_ = results
    first = len(wide) - gradients
    if any(x is None or x.isnan().any() for x in wide[:first]):
        return results
    for at in range(first, len(wide)):
        ours, theirs, exact = fused[at], eager[at], wide[at]
        if ours is not None and theirs is not None and exact is not None:
            alone = ours.isfinite() & theirs.isnan() & exact.isnan()
            for run in results:
                run[at] = run[at].masked_fill(alone, 0.0)  # type: ignore[union-attr]
    return results


def assert_right(results: Sequence[Results], program: Program) -> None:
    """Every result by the rule, where it says something."""
    for fused, eager, wide, *narrow in zip(*results, strict=True):
        assert (fused is None) == (eager is None), "a gradient where eager has none, or none where it has one"
        if fused is None or eager is None or wide is None:
            continue
        assert fused.shape == eager.shape, f"shape {tuple(fused.shape)}, expected {tuple(eager.shape)}"
        assert fused.dtype == eager.dtype, f"{fused.dtype}, expected {eager.dtype}"
        known = ~_left_open(program, fused, eager, wide)
        if not known.any():
            continue
        if narrow and (size := _rounding_alone(eager[known], narrow[0][known])) is not None:
            found = fused[known].abs().max().item()
            assert found <= size, f"what is 0 in exact arithmetic is {found:.3g}, and rounding leaves {size:.3g}"
            continue
        floor = torch.float32 if program.dtype == torch.float64 else eager.dtype
        assert_close_to_exact(fused[known], eager[known], wide[known], floor)


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
