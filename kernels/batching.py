"""What `torch.vmap` makes of the operators: the axis it adds is one more batch axis, the first.

Operands that it does not map are shared along that axis. A captured tensor that it maps is read at the position on it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from flashfuse.kernels.expr import Expr, Gather, Load, gather
from flashfuse.kernels.normal import index, rewrite, substitute
from flashfuse.kernels.spec import MAX_BATCH_AXES, AttentionSpec, batch_symbol

Dim = int | None


@functools.lru_cache(maxsize=4096)
def batched(spec: str, mapped: tuple[bool, ...]) -> str:
    """The spec with one more batch axis in front, along which the captured tensors flagged in `mapped` differ."""
    plain = AttentionSpec.from_text(spec)
    if plain.batch_axes == MAX_BATCH_AXES:
        raise RuntimeError(f"flashfuse::attention has {MAX_BATCH_AXES} batch axes, and torch.vmap would add one more")
    moved = {batch_symbol(axis): batch_symbol(axis + 1) for axis in range(plain.batch_axes)}
    first = batch_symbol(0)

    def read(e: Expr) -> Expr | None:
        match e:
            case Load(tensor=int(slot)) if mapped[slot]:
                return Load(e.dtype, slot, (first, *e.indices))
            case Gather(tensor=int(slot)) if mapped[slot]:
                return gather(e.dtype, slot, (index(first), *e.at))
        return None

    def program(e: Expr | None) -> Expr | None:
        return None if e is None else rewrite(substitute(e, moved), read)

    score = program(plain.score)
    assert score is not None
    return replace(
        plain,
        batch_axes=plain.batch_axes + 1,
        score=score,
        sink=program(plain.sink),
        factor=program(plain.factor),
        key=program(plain.key),
        value=program(plain.value),
        out_order=(0, *(axis + 1 for axis in plain.out_order)),
    ).to_text()


def vmap_attention(
    info: Any,
    in_dims: tuple[Any, ...],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captured: Sequence[torch.Tensor],
    sizes: Sequence[int],
    spec: str,
    kv_ranges: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
) -> tuple[Any, Any]:
    """The batching rule of `flashfuse::attention`; `in_dims` has the structure of the arguments."""
    if seed is not None:
        arguments = (q, k, v, captured, sizes, spec, kv_ranges, seed)
        return one_by_one(torch.ops.flashfuse.attention, info.batch_size, in_dims, arguments)
    operands = [_shared(x, dim) for x, dim in zip((q, k, v), in_dims, strict=False)]
    differing = tuple(dim is not None for dim in in_dims[3])
    tensors = [_mapped(x, dim) for x, dim in zip(captured, in_dims[3], strict=True)]
    ranges = () if kv_ranges is None else (_shared(kv_ranges, in_dims[6]),)
    sizes = [info.batch_size, *sizes]
    return torch.ops.flashfuse.attention(*operands, tensors, sizes, batched(spec, differing), *ranges), (0, 0)


def vmap_attention_backward(
    info: Any,
    in_dims: tuple[Any, ...],
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    captured: Sequence[torch.Tensor],
    sizes: Sequence[int],
    spec: str,
    kv_ranges: torch.Tensor | None,
    seed: torch.Tensor | None,
    needs: Sequence[bool],
) -> tuple[Any, Any]:
    """The batching rule of `flashfuse::attention_backward`: what a gradient is wanted of has one at each position."""
    if seed is not None:
        arguments = (grad_out, q, k, v, out, lse, captured, sizes, spec, kv_ranges, seed, needs)
        return one_by_one(torch.ops.flashfuse.attention_backward, info.batch_size, in_dims, arguments)
    size = info.batch_size
    operands = (q, k, v, *captured)
    flags = iter(needs)
    wanted = [next(flags) if x.is_floating_point() else False for x in operands]
    dims = [
        (_everywhere(x, dim, size), 0) if want else (x, dim)
        for x, dim, want in zip(operands, (*in_dims[1:4], *in_dims[6]), wanted, strict=True)
    ]
    rows = [_everywhere(x, dim, size) for x, dim in zip((grad_out, out, lse), (in_dims[0], *in_dims[4:6]), strict=True)]
    differing = tuple(dim is not None for _, dim in dims[3:])
    found = torch.ops.flashfuse.attention_backward(
        rows[0],
        *(_shared(x, dim) for x, dim in dims[:3]),
        *rows[1:],
        [_mapped(x, dim) for x, dim in dims[3:]],
        [size, *sizes],
        batched(spec, differing),
        None if kv_ranges is None else _shared(kv_ranges, in_dims[9]),
        None,
        needs,
    )
    return found, [0] * len(found)


def one_by_one(op: Any, size: int, in_dims: Sequence[Any], arguments: Sequence[Any]) -> tuple[Any, Any]:
    """The operator at each position of the mapped axis: what is dropped is decided by the other axes alone."""

    def at(x: Any, dim: Any, position: int) -> Any:
        if isinstance(dim, (list, tuple)):
            return [at(part, inner, position) for part, inner in zip(x, dim, strict=True)]
        return x if dim is None else x.select(dim, position)

    runs = [op(*(at(x, dim, n) for x, dim in zip(arguments, in_dims, strict=False))) for n in range(size)]
    found = type(runs[0])(map(torch.stack, zip(*runs, strict=True)))
    return found, type(runs[0])([0] * len(found))


def _mapped(x: torch.Tensor, dim: Dim) -> torch.Tensor:
    """The mapped axis first; a tensor that is not mapped as it is."""
    return x if dim is None else x.movedim(dim, 0)


def _shared(x: torch.Tensor, dim: Dim) -> torch.Tensor:
    """The mapped axis first, of size 1 where the tensor is not mapped."""
    return x.unsqueeze(0) if dim is None else x.movedim(dim, 0)


def _everywhere(x: torch.Tensor, dim: Dim, size: int) -> torch.Tensor:
    """The mapped axis first, with all its positions."""
    return _shared(x, dim).expand(size, *(-1,) * (x.dim() - (dim is not None)))
