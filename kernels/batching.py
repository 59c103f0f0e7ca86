"""What `torch.vmap` makes of the operators: the axis it adds is one more batch axis, the first.

Operands that it does not map are shared along that axis. A captured tensor that it maps is read at the position on it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from flashfuse.kernels.call import Arguments, BackwardArguments
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
    *arguments: Any,
) -> tuple[Any, Any]:
    """The batching rule of `flashfuse::attention`; `in_dims` has the structure of the arguments."""
    given = Arguments(*arguments)
    dims: Any = Arguments(*in_dims)
    if given.seed is not None:
        return one_by_one(torch.ops.flashfuse.attention, info.batch_size, in_dims, arguments)
    operands = [_shared(x, dim) for x, dim in zip(given[:3], dims[:3], strict=True)]
    differing = tuple(dim is not None for dim in dims.captured)
    captured = [_mapped(x, dim) for x, dim in zip(given.captured, dims.captured, strict=True)]
    ranges = () if given.kv_ranges is None else (_shared(given.kv_ranges, dims.kv_ranges),)
    sizes = [info.batch_size, *given.sizes]
    return torch.ops.flashfuse.attention(*operands, captured, sizes, batched(given.spec, differing), *ranges), (0, 0)


def vmap_attention_backward(
    info: Any,
    in_dims: tuple[Any, ...],
    *arguments: Any,
) -> tuple[Any, Any]:
    """The batching rule of `flashfuse::attention_backward`: what a gradient is wanted of has one at each position."""
    given = BackwardArguments(*arguments)
    dims: Any = BackwardArguments(*in_dims)
    if given.seed is not None:
        return one_by_one(torch.ops.flashfuse.attention_backward, info.batch_size, in_dims, arguments)
    size, flags = info.batch_size, iter(given.needs)
    given_operands = (given.q, given.k, given.v, *given.captured)
    wanted = [next(flags) if x.is_floating_point() else False for x in given_operands]
    operands = [
        (_everywhere(x, dim, size), 0) if want else (x, dim)
        for x, dim, want in zip(given_operands, (dims.q, dims.k, dims.v, *dims.captured), wanted, strict=True)
    ]
    differing = tuple(dim is not None for _, dim in operands[3:])
    q, k, v = (_shared(x, dim) for x, dim in operands[:3])
    found = torch.ops.flashfuse.attention_backward(
        _everywhere(given.grad_out, dims.grad_out, size),
        q,
        k,
        v,
        _everywhere(given.out, dims.out, size),
        _everywhere(given.lse, dims.lse, size),
        [_mapped(x, dim) for x, dim in operands[3:]],
        [size, *given.sizes],
        batched(given.spec, differing),
        None if given.kv_ranges is None else _shared(given.kv_ranges, dims.kv_ranges),
        None,
        given.needs,
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
