"""A Triton driver whose launches do nothing: what the host does for a launch is left, and needs no GPU.

Kernels are compiled as for a GPU, and tensors stay on the CPU, whose addresses nobody follows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from flashfuse.kernels import relaunch

# Shared memory by capability, and the most threads of a program.
SHARED_BYTES, THREADS = {80: 166912, 90: 232448}, 1024


class IdleDriver:
    """Of a GPU of some compute capability.

    launches: the names of the kernels, one after the other, each with what tells its compiled instances apart.
    """

    def __init__(self, arch: int) -> None:
        self._arch = arch
        self.launches: list[tuple[str, str]] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES[arch], "multiprocessor_count": 108},
            load_binary=lambda name, *_: (name, name, 0, 0, THREADS),
        )

    def taken(self) -> list[tuple[str, str]]:
        """The launches since the last time."""
        found, self.launches = self.launches, []
        return found

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What launches a compiled kernel."""
        return lambda *_: self.launches.append((metadata.name, metadata.hash))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        # No other driver's kernels are kept under this number.
        return 1000 + self._arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@functools.cache
def _the_driver(arch: int) -> IdleDriver:
    """One, since Triton keeps what it has compiled with it."""
    return IdleDriver(arch)


@contextmanager
def idle_driver(arch: int = 80) -> Iterator[IdleDriver]:
    """Triton launches on the idle driver within."""
    idle, active, instances = _the_driver(arch), driver._active, dict(relaunch._instances)
    idle.taken()
    relaunch._instances.clear()
    driver.set_active(idle)
    try:
        yield idle
    finally:
        driver._active = active
        relaunch._instances.clear()
        relaunch._instances.update(instances)
