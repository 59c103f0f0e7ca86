"""Launch a Triton kernel that has been launched so before: what it was compiled for is looked up, not worked out.

`kernel[grid](..)` asks of every argument what the kernel could be specialised on, and compares every global the kernel
reads: over 100 us where strides are many. Those are functions of a few facts, which are compared here instead. And
`compiled[grid](..)` describes every launch to hooks that are seldom there, 6 of its 12 us.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel

from flashfuse.kernels.prepared import Empty, KernelLaunch, Start, empty_on

Again = Callable[[tuple[Any, ...]], Any]
Result = TypeVar("Result")
Made = TypeVar("Made", covariant=True)

# Bytes to which a pointer may be aligned for the compiler to know, and what a number may be a multiple of.
ALIGNMENT = 16
MAX_INSTANCES = 4096
# Whose launchers are called as `CudaLauncher.__call__` calls them.
RELEASE = "3.6."
# What is compiled, and its compile-time arguments.
_instances: dict[Hashable, tuple[CompiledKernel, tuple[Any, ...]]] = {}


def launched(launch: KernelLaunch, arguments: tuple[Any, ...]) -> Again:
    """Launch a kernel with arguments: tensors and their descriptors, numbers, None and tuples of them.

    Returns what launches it again, for arguments with the same `facts`, on the current device.
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    kernel, programs, variant = launch
    key = (kernel, device, *map(facts, arguments), *variant.values())
    instance = _instances.get(key)
    if instance is not None:
        again = _again(programs, *instance, arguments)
        again(arguments)
        return again
    compiled = kernel[(programs,)](*arguments, **variant)
    if not isinstance(compiled, CompiledKernel) or torch.version.hip is not None:
        # The interpreter compiles nothing, and AMD's compiler is told of storages too.
        return lambda others: kernel[(programs,)](*others, **variant)
    if len(_instances) >= MAX_INSTANCES:
        _instances.clear()
    _instances[key] = compiled, tuple(variant[name] for name in kernel.arg_names[len(arguments) :])
    return _again(programs, *_instances[key], arguments)


def _again(programs: int, compiled: CompiledKernel, compile_time: tuple[Any, ...], arguments: tuple[Any, ...]) -> Again:
    run = compiled[(programs, 1, 1)]
    if not triton.__version__.startswith(RELEASE) or _takes_memory(compiled):
        return lambda others: run(*others, *compile_time)
    launcher, device, stream = compiled.run, torch.cuda.current_device(), torch._C._cuda_getCurrentRawStream
    how = compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None, compiled.packed_metadata
    tensors = [i for i, x in enumerate(arguments) if torch.is_tensor(x)]
    groups = [i for i, x in enumerate(arguments) if isinstance(x, tuple) and any(map(torch.is_tensor, x))]

    def again(others: tuple[Any, ...]) -> None:
        if _calls(knobs.runtime.launch_enter_hook) or _calls(knobs.runtime.launch_exit_hook):
            run(*others, *compile_time)
            return
        # Of a tensor the launcher would ask for its address, and the driver whether it is one: a microsecond for all.
        found = list(others)
        for i in tensors:
            found[i] = others[i].data_ptr()
        for i in groups:
            found[i] = tuple([x.data_ptr() for x in others[i]])
        launcher.launch(programs, 1, 1, stream(device), *how, None, None, None, *found, *compile_time)

    return again


def _takes_memory(compiled: CompiledKernel) -> bool:
    """Whether something may have to be allocated for each launch."""
    return any(getattr(compiled.run, name, 1) for name in ("global_scratch_size", "profile_scratch_size"))


def _calls(hook: Any) -> bool:
    """Whether it calls something: a chain of hooks, a function, or None."""
    return bool(getattr(hook, "calls", hook))


def facts(x: Any) -> Hashable:
    """All that decides for which compiled instance an argument is."""
    if isinstance(x, tuple):
        return tuple([_facts_of_number(n) if type(n) is int else facts(n) for n in x])
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % ALIGNMENT == 0
    if hasattr(x, "block_shape"):
        # A tensor descriptor: its layout follows, and its sizes and strides are numbers that nothing is compiled for.
        return x.base.dtype, *x.block_shape
    return _facts_of_number(x) if type(x) is int else x


def _facts_of_number(x: int) -> int:
    """Whether it is 1, a multiple of `ALIGNMENT`, and within 32 bits, in one number."""
    return -1 if x == 1 else (x % ALIGNMENT == 0) + 2 * (not -(2**31) <= x < 2**31)


class Prepares(Protocol[Made]):
    """A call but for its tensors: makes the results, and starts kernels in an order that is always the same."""

    def compute(self, empty: Empty, start: Start, *tensors: Any) -> Made:
        """On the current device."""


@dataclass(frozen=True, eq=False)
class Plan(Generic[Result]):
    """A prepared call and what launches each of its kernels again."""

    prepared: Prepares[Result]
    launches: tuple[Again, ...]

    def __call__(self, empty: Empty, tensors: Sequence[torch.Tensor | None]) -> Result:
        again = iter(self.launches)
        return self.prepared.compute(empty, lambda _, arguments: next(again)(arguments), *tensors)


def planned(prepared: Prepares[Result], tensors: Sequence[Any]) -> tuple[Result, Plan[Result]]:
    """What the first call gives, and the plan for others."""
    launches: list[Again] = []

    def start(launch: KernelLaunch, arguments: tuple[Any, ...]) -> None:
        launches.append(launched(launch, arguments))

    with torch.cuda.device_of(tensors[0]):
        found = prepared.compute(empty_on(tensors[0].device), start, *tensors)
    return found, Plan(prepared, tuple(launches))
