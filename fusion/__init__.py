"""flashfuse: a torch.compile backend that finds every attention in a model and runs it as a fused kernel.

Names load when they are first used: `import flashfuse` costs nothing, and torch may import this package while torch
itself is still being imported, which is what `TORCH_LOGS="+flashfuse"` does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashfuse.explanation import explain
    from flashfuse.report import Failure, GraphBreak, Refused, Report, Site, reports, reset
    from flashfuse.verify import VerificationError

__all__ = [
    "Failure",
    "GraphBreak",
    "Refused",
    "Report",
    "Site",
    "VerificationError",
    "__version__",
    "explain",
    "reports",
    "reset",
]

_HOMES = {
    "explain": "flashfuse.explanation",
    "VerificationError": "flashfuse.verify",
    **dict.fromkeys(("Failure", "GraphBreak", "Refused", "Report", "Site", "reports", "reset"), "flashfuse.report"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("flashfuse")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
