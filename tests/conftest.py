"""Settings every test runs under."""

import itertools
import os

import pytest

# A test that compiles must compile: a cache hit would test another day's code.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def _fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        """Rounded once, as on every GPU; the interpreter of Triton 3.6 rounds the product too."""
        exact = np.multiply(x.data, y.data, dtype=np.float64) + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    InterpreterBuilder.create_fma = _fma


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
