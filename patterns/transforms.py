"""Tensors inside `torch.func` transforms, as a Dynamo graph shows them, and the nodes where a transform begins or ends.

Between its beginning and its end a transform (grad, vmap, ..) wraps tensors: one level for each transform, the
outermost level being the innermost transform. An operator in there sees a plain tensor of the logical shape, so an
attention is the same as outside; what a transform makes of it is the operator's matter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

_FORWARD_MODE = frozenset({"_jvp_increment_nesting", "_enter_dual_level", "_make_dual"})
_seen = WeakTensorKeyDictionary()


def is_wrapped(t: object) -> bool:
    return isinstance(t, torch.Tensor) and is_functorch_wrapped_tensor(t)


def levels(t: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor and what it wraps, level by level, the plain tensor last."""
    while is_functorch_wrapped_tensor(t):
        yield t
        t = get_unwrapped(t)
    yield t


def innermost(t: torch.Tensor) -> torch.Tensor:
    """The plain tensor behind all levels."""
    *_, plain = levels(t)
    return plain


def gradient_levels(t: torch.Tensor) -> int:
    """How many transforms, and autograd outside of them, want a gradient of the tensor."""
    return sum(level.requires_grad for level in levels(t))


def mapped_axes(t: torch.Tensor) -> int:
    """How many `vmap`s add an axis to the tensor."""
    return sum(is_batchedtensor(level) for level in levels(t))


def as_operators_see(t: torch.Tensor) -> torch.Tensor:
    """A plain fake tensor of the logical shape; it requires a gradient where any level does. The same at every call."""
    if t not in _seen:
        fake = innermost(t)
        assert isinstance(fake, FakeTensor)
        with fake.fake_mode:
            plain = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        _seen[t] = plain.requires_grad_(gradient_levels(t) > 0)
    return _seen[t]


def is_border(node: fx.Node) -> bool:
    """Whether the node wraps or unwraps a tensor, or is part of a transform's own work."""
    module = getattr(node.target, "__module__", None)
    return isinstance(module, str) and module.startswith(("torch._functorch", "torch._C._functorch"))


def is_forward_mode(node: fx.Node) -> bool:
    """Whether forward-mode differentiation begins here."""
    return getattr(node.target, "__name__", None) in _FORWARD_MODE
