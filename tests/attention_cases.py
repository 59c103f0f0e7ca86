"""Attention calls for tests: a spec with operands, and the same attention written eagerly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.dropout import kept
from flashfuse.kernels.expr import Expr
from flashfuse.kernels.reference import attention_reference
from flashfuse.kernels.spec import AttentionSpec, parse


class Call(AttentionCall):
    """A call with what tests ask of it."""

    @property
    def arguments(self) -> tuple:
        """In the operator's order."""
        return self.q, self.k, self.v, self.captured, self.sizes, self.spec.to_text(), self.kv_ranges, self.seed

    def to(self, device: str) -> Call:
        kv_ranges = None if self.kv_ranges is None else self.kv_ranges.to(device)
        return self.on([_moved(x, device) for x in self.operands], kv_ranges)

    def on(self, operands: Sequence[torch.Tensor], kv_ranges: torch.Tensor | None = None) -> Call:
        """The call of other tensors q, k, v, *captured."""
        q, k, v, *captured = operands
        seed = None if self.seed is None else self.seed.to(q.device)
        return replace(self, q=q, k=k, v=v, captured=captured, kv_ranges=kv_ranges, seed=seed)

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        return attention_reference(self, torch.float64, self.kept())

    def eager(self) -> tuple[torch.Tensor, torch.Tensor]:
        return attention_reference(self, kept=self.kept())

    def kept(self) -> torch.Tensor | None:
        """Which weights [N.., Tq, Tkv] dropout leaves, on the device of q; None without dropout."""
        if self.seed is None:
            return None
        batch = torch.arange(math.prod(self.batch)).view(self.batch)
        box = batch, range(self.q_len), range(self.kv_len)
        return kept(self.seed.cpu(), self.spec.dropout, *box, torch.bool).to(self.device)


def _moved(x: torch.Tensor, device: str) -> torch.Tensor:
    """On another device with all that lies between its elements, which `Tensor.to` leaves out."""
    storage = torch.as_strided(x, (x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
    return torch.as_strided(storage.to(device), x.shape, x.stride(), x.storage_offset())


def make_call(
    score: str,
    q_shape: Sequence[int],
    kv_len: int | None = None,
    *,
    k_batch: Sequence[int] | None = None,
    v_batch: Sequence[int] | None = None,
    value_dim: int | None = None,
    captured: Sequence[torch.Tensor] = (),
    sizes: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    empty_row: str = "nan",
    out_order: Sequence[int] | None = None,
    normaliser: str = "softmax",
    sink: str | None = None,
    factor: str | None = None,
    dropout: float = 0.0,
    seed: int = 0x123456789ABCDEF,
    key: str | None = None,
    value: str | None = None,
    stored: torch.dtype | None = None,
) -> Call:
    """A call with random operands: q of `q_shape`, k and v of the same batch axes unless `k_batch`, `v_batch` say.

    stored: the element type of k and v, by default `dtype`. Integers use the whole of their range.
    """
    *batch, q_len, head_dim = q_shape
    kv_len = q_len if kv_len is None else kv_len
    types = tuple(c.dtype for c in captured)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    order = tuple(out_order or range(len(q_shape)))

    def program(text: str | None) -> Expr | None:
        return None if text is None else parse(text, types, compute)

    spec = AttentionSpec(
        batch_axes=len(batch),
        score=parse(score, types, compute),
        captured=types,
        num_sizes=len(sizes),
        product_dtype=dtype,
        probs_dtype=dtype,
        out_dtype=dtype,
        empty_row=empty_row,
        out_order=order,
        normaliser=normaliser,
        sink=program(sink),
        factor=program(factor),
        dropout=dropout,
        key=program(key),
        value=program(value),
    )
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def held(*shape: int) -> torch.Tensor:
        if stored is None or stored.is_floating_point:
            return random(*shape).to(stored or dtype)
        limits = torch.iinfo(stored)
        return torch.randint(limits.min, limits.max + 1, shape, generator=generator, dtype=stored)

    k_batch = batch if k_batch is None else k_batch
    return Call(
        spec,
        random(*q_shape),
        held(*k_batch, kv_len, head_dim),
        held(*(k_batch if v_batch is None else v_batch), kv_len, head_dim if value_dim is None else value_dim),
        list(captured),
        [*batch, *sizes],
        seed=torch.tensor(seed) if dropout else None,
    )
