"""`Prepared`: a call of the operator but for its tensors, as the launches of kernels that compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.output import empty_output
from flashfuse.kernels.spec import MAX_BATCH_AXES

OUT, LSE = 3, 4

# What makes an uninitialised tensor of a size, strides and an element type.
Empty = Callable[[Sequence[int], Sequence[int], torch.dtype], torch.Tensor]


class KernelLaunch(NamedTuple):
    """One launch: `kernel[(programs,)](*arguments, **variant)`."""

    kernel: Any
    programs: int
    variant: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Prepared:
    """All that follows from the element types, sizes and strides of a call's tensors.

    launches: one after the other, with the same arguments.
    out, lse: (size, strides, element type). workspace: how many numbers of lse's type the kernels leave for each other,
    0 for none; None for a kernel that knows of no such thing.
    numbers: the arguments between the tensors and the captured tensors.
    """

    launches: tuple[KernelLaunch, ...]
    out: tuple[Any, ...]
    lse: tuple[Any, ...]
    workspace: int | None
    numbers: tuple[Any, ...]
    captured_strides: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(
        call: AttentionCall, launches: tuple[KernelLaunch, ...], lengths: tuple[int, ...], workspace: int | None = None
    ) -> Prepared:
        """lengths: the arguments between the strides and the program's own sizes."""
        out, lse = empty_output(call)
        ranges = out if call.kv_ranges is None else call.kv_ranges
        strides = (strides_of(x, call.batch) for x in (call.q, call.k, call.v, out, ranges))
        return Prepared(
            launches=launches,
            out=(tuple(out.shape), out.stride(), out.dtype),
            lse=(tuple(lse.shape), lse.stride(), lse.dtype),
            workspace=workspace,
            numbers=(*strides, *lengths, call.program_sizes),
            captured_strides=tuple(c.stride() for c in call.captured),
        )

    def arguments(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        captured: Sequence[torch.Tensor],
        kv_ranges: torch.Tensor | None,
        seed: torch.Tensor | None,
        empty: Empty,
    ) -> tuple[Any, ...]:
        """The kernels' arguments, with new outputs at places OUT and LSE: what `empty` made."""
        out, lse = empty(*self.out), empty(*self.lse)
        parts: tuple[torch.Tensor | None, ...] = ()
        if self.workspace is not None:
            parts = (empty((self.workspace,), (1,), self.lse[2]) if self.workspace else None,)
        reads = tuple(captured)
        return q, k, v, out, lse, kv_ranges, seed, *parts, *self.numbers, reads, self.captured_strides

    def of_call(self, call: AttentionCall) -> tuple[Any, ...]:
        """The kernels' arguments for a call."""
        return self.arguments(call.q, call.k, call.v, call.captured, call.kv_ranges, call.seed, empty_on(call.device))

    def run(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """`out` [N.., Tq, Dv] and `lse` [N.., Tq, 2] of a call."""
        arguments = self.of_call(call)
        with torch.cuda.device_of(call.q):
            for kernel, programs, variant in self.launches:
                kernel[(programs,)](*arguments, **variant)
        return arguments[OUT], arguments[LSE]


def empty_on(device: torch.device) -> Empty:
    return lambda size, strides, dtype: torch.empty_strided(size, strides, dtype=dtype, device=device)


def strides_of(x: torch.Tensor, batch: tuple[int, ...]) -> tuple[int, ...]:
    """Strides over four batch axes, row and column; 0 on the axes that x is shared over."""
    *outer, row, column = x.stride()
    shared = (0 if size == 1 else stride for size, stride in zip(x.shape, outer, strict=False))
    return (*shared, *(0,) * (MAX_BATCH_AXES - len(batch)), row, column)
