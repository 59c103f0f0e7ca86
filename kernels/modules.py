"""Generated modules as ordinary Python files in a cache folder, named by a hash of their text.

Triton keys its caches by name and text, and equal names have collided.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

# What a generated text may use beyond Triton's own language.
_IMPORTS = {
    "libdevice.": "from triton.language.extra import libdevice",
    "load_along(": "from flashfuse.kernels.tiles import load_along",
    "product(": "from flashfuse.kernels.tiles import product",
    **{
        f"{name}(": f"from flashfuse.kernels.elementary import {name}"
        for name in ("asinh", "atan", "expm1", "log1p", "power", "sign", "tanh", "through", "to_bfloat16")
    },
}
# What of a capped score is lost near 0 is far below what operands of 16 bits have lost already.
_NARROW_IMPORTS = {**_IMPORTS, "tanh(": "from flashfuse.kernels.elementary import bounded_tanh as tanh"}


def finished(source: str, product_dtype: torch.dtype) -> tuple[str, str]:
    """(hash, text) of a module: IMPORTS spelled out, and the hash of the text in every name that ends in _HASH."""
    imports = _NARROW_IMPORTS if product_dtype.itemsize == 2 else _IMPORTS
    lines = ["import triton", "import triton.language as tl", *(line for use, line in imports.items() if use in source)]
    source = source.replace("IMPORTS", "\n".join([*lines, ""]), 1)
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    return digest, source.replace("_HASH", f"_{digest}")


def load_module(name: str, source: str) -> tuple[Path, Any]:
    """Write and import a module, once for each name."""
    path = _write(name, source)
    return path, _import(path)


def cache_folder() -> Path:
    """Where generated modules are written: $FLASHFUSE_CACHE_DIR, or ~/.cache/flashfuse."""
    return Path(os.environ.get("FLASHFUSE_CACHE_DIR") or Path.home() / ".cache" / "flashfuse")


def _write(name: str, source: str) -> Path:
    """Write the module unless it is there already. Other processes never see half a file."""
    path = cache_folder() / f"{name}.py"
    if path.exists() and path.read_text() == source:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".py", delete=False) as file:
        file.write(source)
    os.replace(file.name, path)
    return path


def _import(path: Path) -> Any:
    name = f"flashfuse_generated.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import the generated module {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module
