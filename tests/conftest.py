"""Settings every test runs under."""

import itertools
import os
from types import SimpleNamespace
from typing import Any

import pytest

# A test that compiles must compile: a cache hit would test another day's code.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def _fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        """Rounded once, as on every GPU; the interpreter of Triton 3.6 rounds the product too."""
        exact = np.multiply(x.data, y.data, dtype=np.float64) + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    InterpreterBuilder.create_fma = _fma

    _patch_lang = interpreter._patch_lang

    def _patch_once(_: Any) -> Any:
        """Put the interpreter's operations into `triton.language`, for a kernel and all that it calls."""
        return _patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))

    def _call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        """A device function, for which the interpreter would look for operations to replace again: half of its time."""
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang = _patch_once
    interpreter.InterpretedFunction.__call__ = _call


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest, each a process of its own, first and shared out: a worker starts with an equal run of the list."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [item for item in items if item.path.name == "test_interpreter.py"]
    others = iter([item for item in items if item.path.name != "test_interpreter.py"])
    share = -(-len(items) // workers)
    items[:] = [
        item
        for worker in range(workers)
        for item in (*long[worker::workers], *itertools.islice(others, share - len(long[worker::workers])))
    ]
