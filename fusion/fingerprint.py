"""What the caches of compiled graphs must know beside the graph: whose operators it calls."""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch._inductor.config

PACKAGES = ("flashfuse", "flashfuse.patterns", "flashfuse.kernels")


def tagged(options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's options with this version of flashfuse in what its caches know a graph by.

    Options hold for a backward too that is compiled when it is first called.
    """
    key = "aot_inductor.metadata"
    given = options.get(key, torch._inductor.config.aot_inductor.metadata)
    return {**options, key: {**(given or {}), "flashfuse": sources()}}


@functools.cache
def sources() -> str:
    """A digest of the package's sources."""
    found = hashlib.sha256()
    for package in PACKAGES:
        for folder in importlib.import_module(package).__path__:
            for file in sorted(Path(folder).glob("*.py")):
                found.update(file.read_bytes())
    return found.hexdigest()[:16]
