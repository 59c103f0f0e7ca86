"""`flashfuse.explain`: what the backend would do with a model, without compiling anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from flashfuse.report import Report, merge
from flashfuse.transform import transform


def explain(model: Callable[..., Any]) -> Callable[..., Report]:
    """Explain one call: `flashfuse.explain(model)(*args, **kwargs)` gives its Report.

    model: a module or function, as torch.compile takes it. The call is traced by Dynamo under the caller's grad mode,
    every graph is searched, and the original code then runs eagerly, so graph breaks behave as they would compiled.
    The report covers all graphs and says where and why Dynamo broke the call apart. As with `torch._dynamo.explain`,
    code compiled before is dropped (`torch._dynamo.reset()`).
    """
    if not callable(model):
        raise TypeError(f"explain takes a module or a function, got {type(model).__name__}")
    original = getattr(model, "_orig_mod", model)

    def run(*args: Any, **kwargs: Any) -> Report:
        found: list[Report] = []

        def only_look(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            found.append(transform(gm, example_inputs, strict=False)[1])
            return gm.forward

        torch._dynamo.reset()
        try:
            torch.compile(original, backend=only_look)(*args, **kwargs)
        finally:
            torch._dynamo.reset()
        return merge(found, _name(original))

    return run


def _name(model: Callable[..., Any]) -> str:
    return getattr(model, "__qualname__", None) or type(model).__name__
