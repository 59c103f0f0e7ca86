"""`backend="flashfuse"`: rewrite attention in the Dynamo graph, and hand the graph on to Inductor."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from flashfuse.fingerprint import tagged
from flashfuse.options import Options, misspelt, parse
from flashfuse.report import record
from flashfuse.transform import failure, is_control_flow, transform

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]
Compiler = Callable[[fx.GraphModule, list[Any]], Compiled]


def flashfuse(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The backend torch.compile calls with each graph.

    `mode` and `options` mean what they mean for backend="inductor"; keys that start with "flashfuse." are described in
    `flashfuse.options`. A graph without attention goes on as the very module Dynamo made. Raises ValueError for
    options that do not exist, and, with "flashfuse.strict", whatever failed in flashfuse itself.
    """
    ours = parse(options)
    compiler = _inner_compiler(mode, ours, ours.inductor)
    tuned = asks_to_tune(mode, ours.inductor)
    rewritten, report = transform(gm, example_inputs, ours.strict, tuned, ours.route)
    if rewritten is gm:
        record(report)
        return compiler(gm, example_inputs)
    try:
        compiled = _compiler_of_rewritten(mode, ours)(rewritten, example_inputs)
    except Exception as error:
        if ours.strict or is_control_flow(error):
            raise
        # The original is compiled first: what fails there too is not the rewrite's doing, and is raised as it is.
        compiled = compiler(gm, example_inputs)
        failed = failure("compile", error)
        record(dataclasses.replace(report, sites=(), failures=(*report.failures, failed), after=report.before))
        return compiled
    record(report)
    if not ours.verify:
        return compiled
    from flashfuse.verify import verify_first_call

    return verify_first_call(gm, rewritten, compiled, report)


def _reset() -> None:
    """What `torch._dynamo.reset()` calls: drop the CUDA graphs that Inductor recorded for this backend."""
    if "torch._inductor.cudagraph_trees" in sys.modules:
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


flashfuse.reset = _reset  # type: ignore[attr-defined]


def asks_to_tune(mode: str | None, options: Mapping[str, Any]) -> bool:
    """Whether kernels are to be searched: where Inductor has `max_autotune`, by mode, option or settings."""
    import torch._inductor

    given = {**torch._inductor.list_mode_options().get(mode or "default", {}), **options}
    named = {key.replace("-", "_"): value for key, value in given.items()}
    return bool(named.get("max_autotune", torch._inductor.config.max_autotune))


def _compiler_of_rewritten(mode: str | None, ours: Options) -> Compiler:
    if ours.inner == "inductor":
        from flashfuse.lowering import install

        install()
    return _inner_compiler(mode, ours, tagged(ours.inductor))


def _inner_compiler(mode: str | None, ours: Options, inductor_options: Mapping[str, Any]) -> Compiler:
    """Who compiles the graph after the rewrite. Inductor's options are checked even where another one compiles."""
    inductor = _inductor(mode, inductor_options) if ours.inner == "inductor" or ours.inductor else None
    if ours.inner == "inductor" and inductor is not None:
        return inductor
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(ours.inner)


def _inductor(mode: str | None, options: Mapping[str, Any]) -> Compiler:
    try:
        return torch._TorchCompileInductorWrapper(mode, dict(options), None)
    except RuntimeError as error:
        if hint := misspelt(options):
            raise ValueError(f"{hint}\n{error}") from error
        raise
