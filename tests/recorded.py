"""The operator calls that a rewritten graph makes, so that an operator can be checked on what matching recovers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from flashfuse.kernels.spec import AttentionSpec, parse, to_text
from flashfuse.transform import transform

Calls = dict[Any, list[tuple[Any, ...]]]


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, calls: Calls) -> None:
        super().__init__(module)
        self.calls = calls

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "flashfuse":
            self.calls.setdefault(target, []).append(args)
        return super().call_function(target, args, kwargs)


def operator_calls(fn: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> Calls:
    """The arguments of every call of an operator of flashfuse's, by operator, for one run of the rewritten `fn`."""
    calls: Calls = {}

    def backend(module: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        rewritten, _ = transform(module, examples, strict=True)
        return lambda *args: _Recorder(rewritten, calls).run(*args)

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True)(*inputs)
    return calls


def widened(spec: AttentionSpec, **changes: Any) -> AttentionSpec:
    """The same attention computed in float64 throughout."""
    types = tuple(torch.float64 if dtype.is_floating_point else dtype for dtype in spec.captured)
    wide = {name: torch.float64 for name in ("product_dtype", "probs_dtype", "out_dtype")}
    programs = {
        name: None if program is None else parse(to_text(program), types, torch.float64)
        for name in ("score", "sink", "factor")
        for program in (getattr(spec, name),)
    }
    return dataclasses.replace(spec, captured=types, **wide, **programs, **changes)
