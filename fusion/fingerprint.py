"""What the caches of compiled graphs must know beside the graph: whose operators it calls."""

from __future__ import annotations

import functools
import hashlib
import importlib
from contextlib import AbstractContextManager
from pathlib import Path

import torch

PACKAGES = ("flashfuse", "flashfuse.patterns", "flashfuse.kernels")


def tagged() -> AbstractContextManager[None]:
    """Compile under a key of this version of flashfuse: code made for other operators is not found in a cache.

    A user's own `torch.compiler.config.cache_key_tag` stays part of it.
    """
    tag = f"{torch.compiler.config.cache_key_tag} flashfuse {sources()}"
    return torch.compiler.config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]


@functools.cache
def sources() -> str:
    """A digest of the package's sources."""
    found = hashlib.sha256()
    for package in PACKAGES:
        for folder in importlib.import_module(package).__path__:
            for file in sorted(Path(folder).glob("*.py")):
                found.update(file.read_bytes())
    return found.hexdigest()[:16]
