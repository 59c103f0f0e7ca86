"""What has to hold of a program: found where it is attention, and right wherever it is not."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from forms.form import widened
from torch.overrides import TorchFunctionMode

import flashfuse

from .program import WITHOUT_GRADIENT, Input, Program
from .rule import Results, assert_right, without_discarded

# Of how many inputs together a result is judged that fewer did not pass: few numbers may be near by luck.
DRAWS = (1, 12, 96)

# What eager code says of its own backward pass where a program writes over what that needs.
NOT_TRAINED = (
    "modified by an inplace operation", "does not require grad", "is a view and is being modified inplace",
)  # fmt: skip

Run = Callable[..., Any]
Way = Callable[[Run, list[torch.Tensor]], Results]


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
        try:
            Call(program, function, compiled, call).check()
        except AssertionError:
            # A graph without a site is handed on as it is, and what is made of it is the other compiler's.
            if any(report.sites for report in flashfuse.reports()):
                raise
            alone = torch.compile(function, backend=inner, fullgraph=True)
            Call(program, function, compiled, call).check_same(alone)
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
                return assert_right(_together(several), self.program)
            except AssertionError:
                if draws == DRAWS[-1] and not any(map(_repeats_keys, self.program.inputs)):
                    raise
        apart = [self.results(seed, apart=True) for seed in range(DRAWS[-1])]
        return assert_right(_together(several), self.program, _together(apart))

    def check_same(self, other: Run) -> None:
        """The very results of another way to run the program."""
        ours, theirs = (replace(self, compiled=run).results(0)[0] for run in (self.compiled, other))
        for one, two in zip(ours, theirs, strict=True):
            assert (one is None) == (two is None)
            if one is not None and two is not None:
                torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)

    def results(self, seed: int, apart: bool = False) -> list[Results]:
        """What flashfuse, eager code and float64 give; for float64 programs what it is in float32, too.

        apart: whether one key or value that stands for all of them is told apart.
        """
        given = self.program.make(self.number, seed)
        inputs, single = (self._apart(xs, seed) if apart else xs for xs in (given, [*map(_single, given)]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.program.trains and (found := self._trained(inputs, single)):
                return found
            with torch.no_grad():
                return self._run(inputs, single, outputs)

    def _apart(self, inputs: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
        pairs = zip(inputs, self.program.inputs, strict=True)
        return [told_apart(x, seed) if _repeats_keys(own) else x for x, own in pairs]

    def _run(self, inputs: list[torch.Tensor], single: list[torch.Tensor], way: Way) -> list[Results]:
        try:
            eager = way(self.function, [x.clone() for x in inputs])
            with widened(self.program.dtype), _positions_widened(self.program.dtype):
                wide = way(self.function, [_double(x) for x in inputs])
        except Exception as error:
            raise Invalid(f"{type(error).__name__}: {error}") from error
        results = [way(self._marked, [x.clone() for x in inputs]), eager, wide]
        if self.program.dtype == torch.float64:
            results.append(way(self.function, [x.clone() for x in single]))
        return results

    def _trained(self, inputs: list[torch.Tensor], single: list[torch.Tensor]) -> list[Results]:
        """With gradients; nothing where eager code writes over what its own gradients need."""
        with torch.enable_grad():
            way = functools.partial(gradients, program=self.program)
            try:
                found = self._run(inputs, single, way)
            except Invalid as error:
                if not any(text in str(error) for text in NOT_TRAINED):
                    raise
                return []
            return without_discarded(found, sum(learned(self.program, inputs)), self.program.curved)

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


def _repeats_keys(own: Input) -> bool:
    """Whether it is one key or value for all of them."""
    return own.kind == "shared" and "t" in own.axes[0]


def told_apart(x: torch.Tensor, seed: int) -> torch.Tensor:
    """The same with every element its own: as it was, or an ulp or two more or less."""
    steps = torch.randint(-1, 2, x.shape, generator=torch.Generator().manual_seed(seed))
    return (x.double() * (1 + steps.double() * torch.finfo(x.dtype).eps)).to(x.dtype)


def _together(several: Sequence[list[Results]]) -> list[Results]:
    """Each way's results for several sets of inputs as one."""
    return [_stacked(results) for results in zip(*several, strict=True)]


def _stacked(results: Sequence[Results]) -> Results:
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
