"""A Triton driver for sm_80 whose launches do nothing: what the host does for a launch is left, and needs no GPU.

Kernels are compiled as for a GPU, and tensors stay on the CPU, whose addresses nobody follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

# Shared memory, and the most threads of a program.
SHARED_BYTES, THREADS = 166912, 1024


class IdleDriver:
    """launches: how many there were, and the names of the kernels."""

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": 108},
            load_binary=lambda name, *_: (name, name, 0, 0, THREADS),
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What launches a compiled kernel."""
        return lambda *_: self.launches.append(metadata.name)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@contextmanager
def idle_driver() -> Iterator[IdleDriver]:
    """Triton launches on the idle driver within."""
    idle = IdleDriver()
    before = driver._active
    driver.set_active(idle)
    try:
        yield idle
    finally:
        driver._active = before
