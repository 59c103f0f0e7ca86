"""`options={"flashfuse.verify": True}`: the first call runs the original graph beside the compiled one.

The bound is derived, not chosen: the original runs in its own dtype and again in float64, and the compiled graph may be
twice as far from float64 as the original is. Where the graph does not run in float64, half the digits must agree.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from flashfuse.kernels.dropout import SEEDS
from flashfuse.kernels.spec import AttentionSpec
from flashfuse.report import Report

aten = torch.ops.aten

log = logging.getLogger(__name__)

ULPS = 8


class VerificationError(RuntimeError):
    """The compiled graph and the original one disagree on the inputs of the first call."""


def verify_first_call(
    original: fx.GraphModule, rewritten: fx.GraphModule, compiled: Callable[..., Any], report: Report
) -> Callable[..., Any]:
    """`compiled`, whose first call is checked against `original`.

    A graph that draws random numbers is checked by running `rewritten` uncompiled, because Inductor's random stream is
    not eager's; one in which dropout was fused with all dropout left out. Raises VerificationError, from that first
    call, when an output is further off than the bound.
    """
    checked = False

    def run(*args: Any) -> Any:
        nonlocal checked
        if checked:
            return compiled(*args)
        checked = True
        inputs = _clone(args)
        drops = any(site.spec.dropout for site in report.sites)
        expected, draws_random = _run(original, _clone(inputs), drops)
        exact = _run_in_float64(original, _clone(inputs), drops)
        if draws_random or drops:
            actual, _ = _run(rewritten, inputs, drops)
            _compare(actual, expected, exact, report)
            return compiled(*args)
        result = compiled(*args)
        _compare(_tensors(result), expected, exact, report)
        return result

    return run


def _compare(
    actual: list[torch.Tensor], expected: list[torch.Tensor], exact: list[torch.Tensor] | None, report: Report
) -> None:
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if not e.is_floating_point() or e.numel() == 0:
            continue
        x = exact[number] if exact is not None and exact[number].shape == e.shape else None
        if problem := _mismatch(a, e, x):
            sites = "\n".join(f"  {site.location}: {site.math}" for site in report.sites)
            raise VerificationError(
                f"output {number} of graph {report.graph} {problem}; the rewritten sites are\n{sites}"
            )


def _mismatch(actual: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor | None) -> str | None:
    """What is wrong with `actual`, or None. All three have one shape; `exact` is float64."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"is {actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
    a, e = actual.detach().double(), expected.detach().double()
    finite = e.isfinite() if exact is None else e.isfinite() & exact.isfinite()
    if not torch.equal(a.isfinite() | ~finite, torch.ones_like(finite)):
        return "is not finite where the original is"
    if not torch.equal(a.isnan() & e.isinf(), torch.zeros_like(finite)):
        return "is NaN where the original is infinite"
    a, e = a[finite], e[finite]
    if a.numel() == 0:
        return None
    eps = torch.finfo(expected.dtype).eps
    if exact is None:
        error, allowed = (a - e).abs().max(), eps**0.5 * e.abs().max()
    else:
        x = exact[finite]
        error, allowed = (a - x).abs().max(), 2 * (e - x).abs().max() + ULPS * eps * x.abs().max()
    if error <= allowed:
        return None
    return f"differs by {error.item():.3g} from the original, where {allowed.item():.3g} is allowed"


class _WithoutDropout(TorchDispatchMode):
    """Every element that dropout may drop is kept, unscaled, and nothing is drawn for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if func is aten.bernoulli_.float:
            # What was drawn is divided by its probability next.
            return args[0].fill_(args[1])
        if func is aten.randint.low and args[1] == SEEDS:
            return torch.zeros(args[2], **kwargs)
        if func is torch.ops.flashfuse.attention.default:
            spec = replace(AttentionSpec.from_text(args[5]), dropout=0.0)
            return func(*args[:5], spec.to_text(), *args[6:7], **kwargs)
        names = [argument.name for argument in func._schema.arguments[: len(args)]]
        args = tuple(0.0 if name == "dropout_p" else a for name, a in zip(names, args, strict=True))
        return func(*args, **kwargs)


def _run(gm: fx.GraphModule, args: Sequence[Any], undropped: bool) -> tuple[list[torch.Tensor], bool]:
    """The graph's outputs, run uncompiled, and whether it drew random numbers; the generators are put back.

    undropped: with all dropout left out.
    """
    with torch.no_grad(), torch.random.fork_rng(), _WithoutDropout() if undropped else contextlib.nullcontext():
        before = _generators()
        outputs = _tensors(gm.forward(*args))
        drew = any(not torch.equal(b, a) for b, a in zip(before, _generators(), strict=True))
    return outputs, drew


def _run_in_float64(gm: fx.GraphModule, args: Sequence[Any], undropped: bool) -> list[torch.Tensor] | None:
    """The graph's outputs computed in float64, or None where its code insists on a narrower type."""
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    try:
        with _widened_state(gm):
            outputs, _ = _run(gm, wide, undropped)
    except Exception as error:
        log.info("verify: the graph does not run in float64 (%s)", error)
        return None
    same = all(o.dtype == torch.float64 or not o.is_floating_point() for o in outputs)
    return outputs if same else None


@contextlib.contextmanager
def _widened_state(gm: fx.GraphModule) -> Iterator[None]:
    """Floating parameters and buffers of the module itself, in float64 for a while."""
    state = [t for t in (*gm.parameters(), *gm.buffers()) if t.is_floating_point()]
    kept = [t.data for t in state]
    try:
        for tensor in state:
            tensor.data = tensor.data.double()
        yield
    finally:
        for tensor, data in zip(state, kept, strict=True):
            tensor.data = data


def _generators() -> list[torch.Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *cuda]


def _clone(args: Sequence[Any]) -> list[Any]:
    """Inputs that the graph may write to; two that are one tensor stay one tensor."""
    copies: dict[int, Any] = {}
    for arg in args:
        if isinstance(arg, torch.Tensor):
            copies.setdefault(id(arg), arg.detach().clone())
    return [copies.get(id(arg), arg) for arg in args]


def _tensors(outputs: Any) -> list[torch.Tensor]:
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [o for o in outputs if isinstance(o, torch.Tensor)]
