"""`kv_ranges`: the keys that each block of queries visits under a mask that depends on data, found once a forward.

Work and memory are linear in the sequence for a mask made of tensors along queries or keys (padding, documents,
lengths), times one element a tile; a mask stored over queries and keys is read once. The result depends only on what
masks, so layers with one mask share it whatever else their scores hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashfuse.kernels.bounds import by_positions
from flashfuse.kernels.expr import Expr, Gather, Index, Load, free_symbols, loads, sympify
from flashfuse.kernels.intervals import Grid, interval
from flashfuse.kernels.mask import MASK_BLOCK, MASK_GRANULE, mask_of
from flashfuse.kernels.normal import FALSE, conjunction, conjuncts, rewrite
from flashfuse.kernels.spec import (
    KV_IDX,
    KV_LEN,
    Q_IDX,
    Q_LEN,
    AttentionSpec,
    batch_symbol,
    parse,
    size_symbol,
    to_text,
)

# A mask over queries and keys is worth a pass of its own where at least so many scores read each element.
MIN_READERS = 4
# More granules than there ever are.
BEHIND_ALL = 1 << 30


@dataclass(frozen=True)
class RangesProgram:
    """What `flashfuse::mask_ranges` is called with for a spec, its slots numbered anew.

    needed, idle: see `MaskStructure`. captured, sizes: the spec's slots of tensors and of named sizes that they read.
    batch: the batch axes they depend on.
    """

    needed: str
    idle: str
    captured: tuple[int, ...]
    sizes: tuple[int, ...]
    batch: frozenset[int]


def ranges_program(spec: AttentionSpec, batch: Sequence[int], kv_len: int) -> RangesProgram | None:
    """How to find the key ranges of a spec; None where its mask depends on positions alone or where it never pays.

    batch, kv_len: the sizes, or typical ones.
    """
    mask = mask_of(spec)
    if kv_len <= MASK_GRANULE or not mask.depends_on_data:
        return None
    terms = conjuncts(mask.needed)
    readable = [term for term in terms if all(_pays(read, batch) for read in loads(term))]
    if not any(map(loads, readable)):
        return None
    # What is left out is never known to be idle; what positions decide, the kernel finds tile by tile.
    left_to_data = [term for term in conjuncts(mask.idle) if loads(term) or not by_positions(term)]
    return _numbered(conjunction(readable), conjunction(left_to_data) if len(readable) == len(terms) else FALSE)


def _pays(read: Load | Gather, batch: Sequence[int]) -> bool:
    if isinstance(read, Gather) or read.dtype == torch.float64:
        return False
    symbols = free_symbols(read)
    readers = math.prod(size for axis, size in enumerate(batch) if batch_symbol(axis) not in symbols)
    return not {Q_IDX, KV_IDX} <= symbols or readers >= MIN_READERS


def _numbered(needed: Expr, idle: Expr) -> RangesProgram:
    """The program of two predicates; tensors and sizes are numbered by first use."""
    symbols = free_symbols(needed) | free_symbols(idle)
    captured = tuple(dict.fromkeys(read.tensor for read in (*loads(needed), *loads(idle))))
    sizes = tuple(int(s.name[4:]) for s in sorted(symbols, key=lambda s: s.name) if s.name.startswith("size"))
    slots = {slot: new for new, slot in enumerate(captured)}
    names = {size_symbol(slot): size_symbol(new) for new, slot in enumerate(sizes)}

    def rule(e: Expr) -> Expr | None:
        if isinstance(e, Load):
            return Load(e.dtype, slots[e.tensor], tuple(sympify(i).xreplace(names) for i in e.indices))
        return Index(e.dtype, e.value.xreplace(names)) if isinstance(e, Index) else None

    return RangesProgram(
        needed=to_text(rewrite(needed, rule)),
        idle=to_text(rewrite(idle, rule)),
        captured=tuple(slot for slot in captured if isinstance(slot, int)),
        sizes=sizes,
        batch=frozenset(int(s.name[1:]) for s in symbols if s.name[0] == "n"),
    )


def mask_ranges(
    captured: Sequence[torch.Tensor],
    sizes: Sequence[int],
    batch_axes: int,
    q_len: int,
    kv_len: int,
    needed: str,
    idle: str,
) -> torch.Tensor:
    """The `KvRange` of each block of queries as int32 [N.., ceil(q_len / MASK_BLOCK), 4].

    captured: at least one tensor. sizes: N.., 1 for an axis that the mask does not depend on, then what `size0`, ..
    stand for. kv_len: at least 1. needed, idle: predicates over all this, as text; see `MaskStructure`.
    """
    types = tuple(c.dtype for c in captured)
    named = {size_symbol(slot): size for slot, size in enumerate(sizes[batch_axes:])}
    grid = Grid(
        batch=tuple((batch_symbol(axis), size) for axis, size in enumerate(sizes[:batch_axes])),
        sizes={Q_LEN: q_len, KV_LEN: kv_len, **named},
        captured=captured,
        block_q=MASK_BLOCK,
        block_kv=MASK_GRANULE,
        device=next((c.device for c in captured if c.dim()), captured[0].device),
    )
    some, every = (interval(parse(text, types), grid) for text in (needed, idle))
    assert some is not None
    assert every is not None
    return _found(some.high, every.low, grid)


def _found(some: torch.Tensor, every: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The ranges, where `some` says which granules hold a key, and `every` in which nothing is masked."""
    blocks, granules = grid.tiles
    number = grid.along(-1, torch.arange(granules, dtype=torch.int32, device=grid.device))
    fields = [(tile * MASK_GRANULE).clamp(max=grid.sizes[KV_LEN]) for tile in hull_and_run(some, every, number)]
    return torch.stack(fields, -1).expand(*(size for _, size in grid.batch), blocks, 4)


def hull_and_run(some: torch.Tensor, every: torch.Tensor, number: torch.Tensor) -> list[torch.Tensor]:
    """The fields of a `KvRange`, in units of tiles: around all `some`, and the first run of `every` inside, on axis -1.

    number: the number of each tile, broadcastable to the others.
    """

    def first(found: torch.Tensor) -> torch.Tensor:
        return torch.where(found, number, BEHIND_ALL).amin(-1)

    end = torch.where(some, number + 1, 0).amax(-1)
    start = torch.minimum(first(some), end)
    full_start = torch.minimum(first(every), end)
    behind = ~every & (number > full_start.unsqueeze(-1))
    full_end = torch.maximum(torch.minimum(first(behind), end), full_start)
    return [start, full_start, full_end, end]
