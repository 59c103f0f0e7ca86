"""Element types that keys and values may be stored in where they are narrower than what they are multiplied in."""

from __future__ import annotations

import torch

# Of one byte. Every value of theirs is one of each floating type of two bytes or more.
_BYTES = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
# What a program of the element (`AttentionSpec.key` and `value`) may be a function of; float32 holds their values.
STORED = (*_BYTES, torch.float16, torch.bfloat16)

# From here on CUDA devices convert float8_e4m3fn, and so does Triton.
_E4M3_CAPABILITY = (8, 9)


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether the floating type `wide` of an operand holds every value of `narrow`."""
    if narrow in _BYTES:
        return wide.is_floating_point and wide.itemsize >= 2
    return narrow.is_floating_point and narrow.itemsize >= 2 and torch.promote_types(narrow, wide) == wide


def readable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels for a device read elements of a type in `STORED`."""
    if dtype not in STORED or device.type != "cuda":
        return dtype in STORED
    # Triton 3.6 fails to compile some of these kernels for AMD's devices.
    if torch.version.hip is not None:
        return False
    if dtype != torch.float8_e4m3fn:
        return True
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= _E4M3_CAPABILITY
