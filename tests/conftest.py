"""Settings every test runs under."""

import gc
import itertools
import os

import pytest

# Tests share the cores, and threads of torch would wait for each other: tiny tensors took five times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test that compiles must compile: a cache hit would test another day's code.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

from torch._dynamo import guards
from torch._inductor import cpu_vec_isa

# Kernels of scalars compile in half the time of vectors, whose kinds would first be compiled for a trial each.
cpu_vec_isa.valid_vec_isa_list = list
# Dynamo flushes the processor's caches to time the guards of each graph, for its log.
guards.profile_guard_manager = lambda *_: 0.0

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreted

    interpreted.install()


def pytest_collection_finish() -> None:
    """What has been imported stays, and need not be looked through for garbage behind every graph."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


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
