"""Launch a Triton kernel that has been launched so before: what it was compiled for is looked up, not worked out.

`kernel[grid](..)` asks of every argument what the kernel could be specialised on, and compares every global the kernel
reads: over 100 us where strides are many. Those are functions of a few facts, which are compared here instead.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from triton.compiler import CompiledKernel

Again = Callable[[tuple[Any, ...]], Any]

# Bytes to which a pointer may be aligned for the compiler to know, and what a number may be a multiple of.
ALIGNMENT = 16
MAX_INSTANCES = 4096
_instances: dict[Hashable, CompiledKernel] = {}


def launched(kernel: Any, programs: int, constants: Mapping[str, Any], arguments: tuple[Any, ...]) -> Again:
    """Launch `kernel[(programs,)](*arguments, **constants)` on the current device.

    arguments: tensors, numbers, None and tuples of them; constants: the compile-time arguments and options.
    Returns what launches the same again, for arguments with the same `facts`, on this device.
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    key = (kernel, device, *constants.values(), *map(facts, arguments))
    compiled = _instances.get(key)
    if compiled is None:
        compiled = kernel[(programs,)](*arguments, **constants)
        if not isinstance(compiled, CompiledKernel) or torch.version.hip is not None:
            # The interpreter compiles nothing, and AMD's compiler is told of storages too.
            return lambda others: kernel[(programs,)](*others, **constants)
        if len(_instances) >= MAX_INSTANCES:
            _instances.clear()
        _instances[key] = compiled
        return _again(kernel, programs, compiled, constants, len(arguments))
    again = _again(kernel, programs, compiled, constants, len(arguments))
    again(arguments)
    return again


def _again(kernel: Any, programs: int, compiled: CompiledKernel, constants: Mapping[str, Any], behind: int) -> Again:
    run = compiled[(programs, 1, 1)]
    compile_time = tuple(constants[name] for name in kernel.arg_names[behind:])
    return lambda others: run(*others, *compile_time)


def facts(x: Any) -> Hashable:
    """All that decides for which compiled instance an argument is."""
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % ALIGNMENT == 0
    if isinstance(x, tuple):
        return tuple(map(facts, x))
    if isinstance(x, int):
        # Its type, whether it is 1, and whether it is aligned.
        return -(2**31) <= x < 2**31, x >= 2**63, x == 1, x % ALIGNMENT == 0
    return x
