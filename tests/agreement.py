"""A function compiled with flashfuse against the same function run eagerly, by the one rule for numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numerics import assert_close_to_exact

import flashfuse


def check_fused(fn: Callable[..., Any], *args: Any, sites: int = 1, dynamic: bool | None = None) -> None:
    """`fn` of tensors fuses to so many attentions, and gives what eager gives, measured against float64."""
    check_right(fn, *args, dynamic=dynamic)
    flashfuse.reports()[0].assert_fused(sites=sites)


def check_right(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> None:
    """`fn` of tensors gives what eager gives, whether it fuses or not."""
    torch._dynamo.reset()
    flashfuse.reset()
    options = {"flashfuse.inner": "eager", "flashfuse.strict": True}
    with torch.no_grad():
        fused = torch.compile(fn, backend="flashfuse", dynamic=dynamic, options=options)(*args)
        wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        assert_close_to_exact(fused, fn(*args), fn(*wide))
