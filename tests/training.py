"""Training a compiled function beside the eager one: outputs and gradients by the accuracy rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from forms.same_dropout import SEED, same_dropout
from numerics import assert_close_to_exact

import flashfuse
from flashfuse.report import Report

Run = Callable[..., Any]
Inputs = Sequence[torch.Tensor]

S, D = 16, 8
# Of how many gradients of the output: one says little about a gradient of FEW numbers.
DRAWS, FEW, DRAWS_OF_FEW = 2, 64, 32


def qkvb() -> tuple[torch.Tensor, ...]:
    """q, k, v [2, 3, S, D] and a bias [3, S, S], all requiring gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, S, D),) * 3 + ((3, S, S),)
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)


def attention(q: Any, k: Any, v: Any, bias: Any) -> Any:
    return ((q @ k.mT) * 0.3 + bias).softmax(-1) @ v


def compiled(fn: Callable[..., Any], inner: str = "eager", **options: Any) -> Callable[..., Any]:
    settings = {"flashfuse.inner": inner, "flashfuse.strict": True}
    return torch.compile(fn, backend="flashfuse", options=settings, **options)


def gradients(out: torch.Tensor, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """[draws, ..] of every input for random gradients of the output; None where there is none."""
    draws: list[list[torch.Tensor | None]] = [[] for _ in inputs]
    for seed in range(DRAWS_OF_FEW):
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
        wanted = [at for at, x in enumerate(inputs) if seed < DRAWS or x.numel() <= FEW]
        if not wanted:
            break
        found = torch.autograd.grad(out, [inputs[at] for at in wanted], grad, retain_graph=True, allow_unused=True)
        for at, gradient in zip(wanted, found, strict=True):
            draws[at].append(gradient)
    return [None if any(x is None for x in of_one) else torch.stack(of_one) for of_one in draws]  # type: ignore[arg-type]


def leaves(inputs: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Copies of the inputs that require a gradient where those do, the floating-point ones in `dtype`."""
    typed = (x.detach().to(dtype) if dtype and x.is_floating_point() else x.detach() for x in inputs)
    return [y.clone().requires_grad_(x.requires_grad) for x, y in zip(inputs, typed, strict=True)]


def assert_trains(
    fn: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    inner: str = "eager",
    precise: Callable[..., torch.Tensor] | None = None,
) -> Report:
    """Outputs and gradients of the compiled function by the accuracy rule, and None where eager gives None.

    precise: what computes fn in float64, by default fn itself.
    """
    results = []
    for run, dtype in (
        (compiled(fn, inner), None),
        (same_dropout(fn), None),
        (same_dropout(precise or fn), torch.float64),
    ):
        xs = leaves(inputs, dtype)
        torch.manual_seed(SEED)
        out = run(*xs)
        wanted = [x for x in xs if x.requires_grad]
        results.append([out, *gradients(out, wanted)])
    spread = bool(results[2][0].isnan().any())
    for fused, eager, wide in zip(*results, strict=True):
        assert (fused is None) == (eager is None), "a gradient where eager has none, or none where it has one"
        if fused is None or eager is None or wide is None:
            continue
        # Autograd multiplies what a `where` discards by zero, and may give NaN where nothing is NaN in the output.
        known = torch.ones_like(wide, dtype=torch.bool) if spread else wide.isfinite()
        assert_close_to_exact(fused[known], eager[known], wide[known])
    (report,) = flashfuse.reports()
    return report


def assert_same_use(
    use: Callable[[Callable[..., Any], Sequence[torch.Tensor]], Sequence[torch.Tensor | None]],
    fn: Callable[..., Any] = attention,
    inputs: Sequence[torch.Tensor] | None = None,
    inner: str = "aot_eager",
    **options: Any,
) -> Report:
    """What `use` makes of the compiled function, by the accuracy rule; the report of its first graph."""
    given = qkvb() if inputs is None else inputs
    runs = ((compiled(fn, inner, **options), None), (fn, None), (fn, torch.float64))
    for fused, eager, wide in zip(*(use(run, leaves(given, dtype)) for run, dtype in runs), strict=True):
        assert (fused is None) == (eager is None), "a gradient where eager has none, or none where it has one"
        if fused is not None and eager is not None and wide is not None:
            assert_close_to_exact(fused, eager, wide)
    return flashfuse.reports()[0]


def loss(out: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A sum with random weights, whose gradient is far from uniform."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    return (out * weights.to(out.dtype)).sum()


def kept_gradients(inputs: Inputs) -> list[torch.Tensor | None]:
    """What `backward` left; None where it left nothing."""
    return [x.grad for x in inputs]


def backward(run: Run, inputs: Inputs) -> list[torch.Tensor | None]:
    """The plain step that others vary."""
    loss(run(*inputs)).backward()
    return kept_gradients(inputs)
