"""`AttentionCall`: the arguments of one attention as a value, which every implementation takes and every test makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from flashfuse.kernels.mask import MASK_BLOCK
from flashfuse.kernels.spec import AttentionSpec
from flashfuse.kernels.stored import STORED, holds


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What the operator is called with; see `ops` for the arguments.

    q: [N.., Tq, D], k: [N.., Tkv, D], v: [N.., Tkv, Dv], broadcast over the batch axes N...
    captured: the tensors that the spec's programs read. sizes: the batch sizes, then the programs' own numbers.
    kv_ranges: int32 [N'.., at least ceil(Tq / MASK_BLOCK), 4], or None.
    seed: one int64, of the numbers that dropout draws; None without dropout.
    """

    spec: AttentionSpec
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    captured: Sequence[torch.Tensor]
    sizes: Sequence[int]
    kv_ranges: torch.Tensor | None = None
    seed: torch.Tensor | None = None

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch sizes N.., which operands may be broadcast to."""
        return tuple(self.sizes[: self.spec.batch_axes])

    @property
    def program_sizes(self) -> tuple[int, ...]:
        """What size0, size1, .. of the programs are."""
        return tuple(self.sizes[self.spec.batch_axes :])

    @property
    def q_len(self) -> int:
        return self.q.shape[-2]

    @property
    def kv_len(self) -> int:
        return self.k.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1]

    @property
    def value_dim(self) -> int:
        return self.v.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def operands(self) -> tuple[torch.Tensor, ...]:
        """Every tensor that may have a gradient: q, k, v and the captured ones, in this order."""
        return (self.q, self.k, self.v, *self.captured)

    @property
    def tensors(self) -> tuple[Any, ...]:
        """Every tensor, or None where there is none: q, k, v, kv_ranges, seed and the captured ones."""
        return (self.q, self.k, self.v, self.kv_ranges, self.seed, *self.captured)

    @property
    def is_on_one_device(self) -> bool:
        return all(x is None or x.device == self.device for x in self.tensors)

    def on_one_device(self) -> AttentionCall:
        """With everything on q's device: torch lets a scalar on the CPU stand beside tensors elsewhere."""
        captured = [c if c.device == self.device else c.to(self.device, non_blocking=True) for c in self.captured]
        kv_ranges = None if self.kv_ranges is None else self.kv_ranges.to(self.device)
        seed = None if self.seed is None else self.seed.to(self.device)
        return replace(self, captured=captured, kv_ranges=kv_ranges, seed=seed)

    def check(self) -> None:
        """Raise RuntimeError where the arguments cannot be the spec's. Size comparisons are symbolic while tracing."""
        self._check_operands()
        spec, q, k, v = self.spec, self.q, self.k, self.v
        if len(self.sizes) != spec.batch_axes + spec.num_sizes:
            expected = f"{spec.batch_axes} batch sizes and {spec.num_sizes} others"
            raise RuntimeError(f"flashfuse::attention: expected {expected}, got {len(self.sizes)} sizes")
        if tuple(c.dtype for c in self.captured) != spec.captured:
            found = [c.dtype for c in self.captured]
            raise RuntimeError(f"flashfuse::attention: captured tensors must be {list(spec.captured)}, got {found}")
        for slot, c in enumerate(self.captured):
            if c.device != q.device and (c.dim() or c.device.type != "cpu"):
                raise RuntimeError(f"flashfuse::attention: captured tensor {slot} is on {c.device}, q on {q.device}")
        self._check_seed()
        torch._check(
            q.shape[-1] == k.shape[-1], lambda: f"flashfuse::attention: q is {q.shape[-1]} wide, k {k.shape[-1]}"
        )
        torch._check(
            k.shape[-2] == v.shape[-2], lambda: f"flashfuse::attention: {k.shape[-2]} keys, {v.shape[-2]} values"
        )

    def _check_operands(self) -> None:
        rank = self.spec.batch_axes + 2
        for name, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            if x.dim() != rank:
                raise RuntimeError(f"flashfuse::attention: {name} needs {rank} dimensions, got shape {list(x.shape)}")
            if x.device != self.device:
                raise RuntimeError(f"flashfuse::attention: {name} is on {x.device}, q on {self.device}")
            self._check_type(name, x.dtype)

    def _check_type(self, name: str, dtype: torch.dtype) -> None:
        program = {"k": self.spec.key, "v": self.spec.value}.get(name)
        if program is not None and dtype not in STORED:
            raise RuntimeError(f"flashfuse::attention: {name} is {dtype}, of which no program makes an operand")
        to = self.spec.probs_dtype if name == "v" else self.spec.product_dtype
        if program is None and not holds(to, dtype):
            raise RuntimeError(f"flashfuse::attention: {name} is {dtype}, which {to} cannot hold exactly")

    def _check_seed(self) -> None:
        if (self.seed is None) != (self.spec.dropout == 0):
            found = "no seed" if self.seed is None else "a seed"
            raise RuntimeError(f"flashfuse::attention: dropout is {self.spec.dropout}, and there is {found}")
        if self.seed is not None and (self.seed.dtype != torch.int64 or self.seed.numel() != 1):
            found = f"{self.seed.dtype} {list(self.seed.shape)}"
            raise RuntimeError(f"flashfuse::attention: seed must be one int64, got {found}")

    def check_sizes(self) -> None:
        """Raise RuntimeError where an operand does not broadcast to the batch sizes, or ranges are not the call's."""
        for name, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            if any(n not in (1, size) for n, size in zip(x.shape, self.batch, strict=False)):
                shape = list(x.shape)
                raise RuntimeError(f"flashfuse::attention: {name} of shape {shape} does not broadcast to {self.batch}")
        if self.kv_ranges is None:
            return
        wanted = (*self.batch, -(-self.q_len // MASK_BLOCK), 4)
        found = tuple(self.kv_ranges.shape)
        broadcasts = all(n in (1, size) for n, size in zip(found[:-2], wanted, strict=False))
        fits = broadcasts and len(found) == len(wanted) and found[-2] >= wanted[-2] and found[-1] == 4
        if self.kv_ranges.dtype != torch.int32 or not fits:
            dtype = self.kv_ranges.dtype
            raise RuntimeError(
                f"flashfuse::attention: kv_ranges must be int32 and broadcast to {wanted}, got {dtype} {found}"
            )


class Arguments(NamedTuple):
    """The arguments of `flashfuse::attention`, as `ops` defines them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    captured: Sequence[torch.Tensor]
    sizes: Sequence[int]
    spec: str
    kv_ranges: torch.Tensor | None = None
    seed: torch.Tensor | None = None

    @property
    def call(self) -> AttentionCall:
        spec = AttentionSpec.from_text(self.spec)
        return AttentionCall(spec, self.q, self.k, self.v, self.captured, self.sizes, self.kv_ranges, self.seed)


class BackwardArguments(NamedTuple):
    """The arguments of `flashfuse::attention_backward`, as `gradient` defines them."""

    grad_out: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    captured: Sequence[torch.Tensor]
    sizes: Sequence[int]
    spec: str
    kv_ranges: torch.Tensor | None
    seed: torch.Tensor | None
    needs: Sequence[bool]

    @property
    def call(self) -> AttentionCall:
        """The forward's."""
        return Arguments(
            self.q, self.k, self.v, self.captured, self.sizes, self.spec, self.kv_ranges, self.seed
        ).call  # fmt: skip
