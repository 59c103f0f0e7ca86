"""A call of an operator but for its tensors: the launches of kernels that compute it, and the tensors they write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.output import empty_output
from flashfuse.kernels.spec import MAX_BATCH_AXES

# Triton compiles a kernel apart for numbers that are multiples of this.
COMPILER_ASKS = 16
# Axes of a tensor for which kernels are told of its strides.
MOST_AXES = 6
Strides = tuple[int, ...]
# What makes an uninitialised tensor of a size, strides and an element type.
Empty = Callable[[Sequence[int], Sequence[int], torch.dtype], torch.Tensor]


class KernelLaunch(NamedTuple):
    """One launch: `kernel[(programs,)](*arguments, **variant)`."""

    kernel: Any
    programs: int
    variant: Mapping[str, Any]

    def of(self, strides: Iterable[Strides], captured_strides: Iterable[Strides] = ()) -> KernelLaunch:
        """The same for operands and captured tensors with these strides, of which the kernel asks for `tiles.in_units`.

        Of captured ones no more than multiples of 8 are told: lengths that grow are strides of masks, and a kernel is
        compiled for each unit.
        """
        units = {
            "UNITS": tuple(map(_unit, strides)),
            "CAPTURED_UNITS": tuple([unit if (unit := _unit(s)) == 8 else 1 for s in captured_strides]),
        }
        asked = {name: found for name, found in units.items() if name in self.kernel.arg_names}
        return self._replace(variant={**self.variant, **asked})


# What launches a kernel with its arguments: tensors, numbers, None and tuples of them.
Start = Callable[[KernelLaunch, tuple[Any, ...]], None]


def start(launch: KernelLaunch, arguments: tuple[Any, ...]) -> None:
    """As Triton launches."""
    kernel, programs, variant = launch
    kernel[(programs,)](*arguments, **variant)


class Buffer(NamedTuple):
    """What `Empty` makes a tensor of."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def like(x: torch.Tensor) -> Buffer:
        return Buffer(tuple(x.shape), x.stride(), x.dtype)

    @staticmethod
    def contiguous(size: Sequence[int], dtype: torch.dtype) -> Buffer:
        return Buffer.like(torch.empty(tuple(size), dtype=dtype, device="meta"))

    @property
    def without_memory(self) -> torch.Tensor:
        return torch.empty_strided(self.size, self.strides, dtype=self.dtype, device="meta")


@dataclass(frozen=True, eq=False)
class Prepared:
    """All that follows from the element types, sizes and strides of an attention's tensors.

    launches: one after the other, with the same arguments.
    workspace: how many numbers of lse's type the kernels leave for each other, 0 for none; None for a kernel that knows
    of no such thing.
    numbers: the arguments between the tensors and the captured tensors.
    descriptors: of q, k, v, out and the captured tensor `pairs`, None without one, for a kernel that reads those by TMA
    and no seed; without tensors.
    counted: whether such a kernel counts what its programs take.
    """

    launches: tuple[KernelLaunch, ...]
    out: Buffer
    lse: Buffer
    workspace: int | None
    numbers: tuple[Any, ...]
    captured_strides: tuple[tuple[int, ...], ...]
    descriptors: tuple[Any, ...] = ()
    pairs: int | None = None
    counted: bool = False

    @staticmethod
    def of(
        call: AttentionCall, launches: tuple[KernelLaunch, ...], lengths: tuple[int, ...], workspace: int | None = None
    ) -> Prepared:
        """lengths: the arguments between the strides and the program's own sizes."""
        out, lse = empty_output(call)
        ranges = out if call.kv_ranges is None else call.kv_ranges
        strides = tuple(strides_of(x, call.batch) for x in (call.q, call.k, call.v, out, ranges))
        captured_strides = tuple(c.stride() for c in call.captured)
        return Prepared(
            launches=tuple(launch.of(strides[:4], captured_strides) for launch in launches),
            out=Buffer.like(out),
            lse=Buffer.like(lse),
            workspace=workspace,
            numbers=(*strides, *lengths, call.program_sizes),
            captured_strides=captured_strides,
        )

    def compute(
        self,
        empty: Empty,
        start: Start,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_ranges: torch.Tensor | None,
        seed: torch.Tensor | None,
        *captured: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New `out` [N.., Tq, Dv] and `lse` [N.., Tq, 2] of a call on the current device, from `call.tensors`."""
        out, lse = empty(*self.out), empty(*self.lse)
        parts: tuple[torch.Tensor | None, ...] = ()
        if self.workspace is not None:
            parts = (empty((self.workspace,), (1,), self.lse[2]) if self.workspace else None,)
        tensors: tuple[Any, ...] = (q, k, v, out, lse, kv_ranges, seed, *parts)
        if self.descriptors:
            pairs = None if self.pairs is None else captured[self.pairs]
            counter = empty((1,), (1,), torch.int32).zero_() if self.counted else None
            tensors = (*map(described, self.descriptors, (q, k, v, out, pairs)), lse, kv_ranges, counter)
        arguments = (*tensors, *self.numbers, captured, self.captured_strides)
        for launch in self.launches:
            start(launch, arguments)
        return out, lse

    def run(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """`out` and `lse` of a call, launched as Triton does."""
        with torch.cuda.device_of(call.q):
            return self.compute(empty_on(call.device), start, *call.tensors)


def empty_on(device: torch.device) -> Empty:
    return lambda size, strides, dtype: torch.empty_strided(size, strides, dtype=dtype, device=device)


def strides_of(x: torch.Tensor, batch: tuple[int, ...]) -> tuple[int, ...]:
    """Strides over four batch axes, row and column; 0 on the axes that x is shared over."""
    *outer, row, column = x.stride()
    shared = (0 if size == 1 else stride for size, stride in zip(x.shape, outer, strict=False))
    return (*shared, *(0,) * (MAX_BATCH_AXES - len(batch)), row, column)


def _unit(strides: Strides) -> int:
    """What all but the last are multiples of, 8 or 4; else 1, as where the compiler sees it. See `tiles.in_units`."""
    unit = math.gcd(COMPILER_ASKS, *strides[:-1])
    return unit if unit in (4, 8) and len(strides) <= MOST_AXES else 1


def padded_axes(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of four batch axes."""
    return (*sizes, *(1,) * (MAX_BATCH_AXES - len(sizes)))


def loop_over(batch: tuple[int, ...], owned: tuple[int, ...]) -> tuple[int, ...]:
    """The batch positions over which each owner passes."""
    return tuple(1 if mine == size else size for size, mine in zip(batch, owned, strict=True))


def described(descriptor: Any, x: torch.Tensor | None) -> Any:
    """The descriptor of one tensor. What its class would ask of it was asked when the call was prepared."""
    if descriptor is None:
        return None
    found = object.__new__(type(descriptor))
    found.__dict__ = {**descriptor.__dict__, "base": x}
    return found
