"""Gradients of captured tensors, from the sums over queries or keys that the kernels leave and from rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import sympy
import torch

from flashfuse.kernels.backward_variants import BackwardLaunch
from flashfuse.kernels.buckets import SumBuckets
from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.codegen_backward import BackwardProgram, Term
from flashfuse.kernels.derivative import derivative, leaves
from flashfuse.kernels.distances import DISTANCE, DistanceSums
from flashfuse.kernels.evaluate import Tile, evaluate, overlaps, size_values, strided
from flashfuse.kernels.expr import Expr, Gather, Load, free_symbols
from flashfuse.kernels.launch import Launch
from flashfuse.kernels.prepared import Buffer, Empty
from flashfuse.kernels.scatter import look_ups, scatter_add
from flashfuse.kernels.spec import KV_IDX, Q_IDX, batch_symbol

# From so many programs on, batch positions that share elements of pairs are passed over.
ENOUGH_PROGRAMS = 512
# Bytes of gradients of pairs that share elements, left to be added up at a time, and of what that takes for look-ups,
# whose positions are sorted.
WORKSPACE = 64 * 2**20
LOOK_UP_BYTES = 48

META = torch.device("meta")
# The reads of a program whose gradient is wanted, each with the program's derivative by it.
Slopes = tuple[tuple[Load | Gather, Expr], ...]


class PairTarget(NamedTuple):
    """Where a kernel writes the gradients of a read at pairs: all of a view, of size 1 on axes to be summed over.

    number: of the pair term. reads: all that have these gradients; those by distance over `DISTANCE`.
    whole: what it is a view of, zeros elsewhere. view: without memory. is_total: whether `whole` is the tensor's
        gradient then, and not a part.
    parts: the positions that are written, one part after the other into the same rows, and then added up.
    """

    number: int
    by_distance: bool
    reads: tuple[Load | Gather, ...]
    whole: Buffer
    view: torch.Tensor
    is_total: bool
    parts: tuple[Tile, ...]

    def whole_by(self, empty: Empty) -> torch.Tensor:
        whole = empty(*self.whole)
        # Sums by distance overlap as a view of theirs.
        covered = not self.by_distance and self.view.numel() == whole.numel()
        return whole if covered else whole.zero_()

    def written(self, whole: torch.Tensor, part: Tile) -> torch.Tensor:
        view = whole.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset())
        return view if self.by_distance else view.narrow(-2, 0, len(queries_of(part)))


def queries_of(part: Tile) -> range:
    return part.axes[-2][1]


@dataclass(frozen=True, eq=False)
class CapturedProgram:
    """What the gradients of captured tensors follow from beside the tensors.

    needs: for each captured tensor, whether its gradient is wanted. results: their gradients; totals: in float32.
    weights: for each term of rows, which of the sums by rows corrects it; None where it needs none.
    rows, keys, pairs, distances: all batch positions with those of queries, of keys, or of both; a query or key axis of
        length 1 stands for one that has been summed over. They hold no tensors.
    sink, factor: what is read by these programs. reads: what is read by any.
    """

    program: BackwardProgram
    needs: Sequence[bool]
    results: tuple[Buffer, ...]
    totals: tuple[Buffer, ...]
    weights: tuple[int | None, ...]
    rows: Tile
    keys: Tile
    pairs: Tile
    distances: Tile
    sink: Slopes
    factor: Slopes
    reads: tuple[Load | Gather, ...]

    @staticmethod
    def of(call: AttentionCall, program: BackwardProgram, needs: Sequence[bool]) -> CapturedProgram:
        spec, q_len, kv_len = call.spec, call.q_len, call.kv_len

        def wanted(of: Expr) -> Iterator[Load | Gather]:
            return (leaf for leaf in leaves(of) if isinstance(leaf, (Load, Gather)) and needs[_slot(leaf)])

        def slopes(of: Expr | None) -> Slopes:
            return () if of is None else tuple((leaf, derivative(of, leaf)) for leaf in wanted(of))

        def over(*axes: tuple[sympy.Symbol, range]) -> Tile:
            batch = tuple((batch_symbol(axis), range(size)) for axis, size in enumerate(call.batch))
            sizes = size_values(spec, q_len, kv_len, call.sizes)
            return Tile((*batch, *axes), sizes, (), (), torch.float32, call.device)

        # Behind the terms' own sums, in their order.
        behind = itertools.count(len(program.row_terms))
        return CapturedProgram(
            program=program,
            needs=needs,
            results=tuple(Buffer.like(torch.empty_like(c, device=META)) for c in call.captured),
            totals=tuple(Buffer.contiguous(c.shape, torch.float32) for c in call.captured),
            weights=tuple(next(behind) if term in program.corrected else None for term in program.row_terms),
            rows=over((Q_IDX, range(q_len)), (KV_IDX, range(1))),
            keys=over((Q_IDX, range(1)), (KV_IDX, range(kv_len))),
            pairs=over((Q_IDX, range(q_len)), (KV_IDX, range(kv_len))),
            distances=over((Q_IDX, range(1)), (DISTANCE, range(1 - q_len, kv_len))),
            sink=slopes(spec.sink),
            factor=slopes(spec.factor) if any(term.read is None for term in program.row_terms) else (),
            reads=tuple(leaf for of in spec.programs for leaf in wanted(of)),
        )

    @property
    def of_sink(self) -> bool:
        """Whether the sink reads a tensor whose gradient is wanted."""
        return bool(self.sink)

    def pair_targets(self, tiles: BackwardLaunch) -> list[PairTarget]:
        """One for each pair term, but one for all of those with the same slope whose reads have no owner: two positions
        read one element, or one outside."""
        found: list[PairTarget] = []
        shared: dict[Hashable, list[int]] = {}
        for number, term in enumerate(self.program.pair_terms):
            target = (
                self._owned(number, term) if term.by_distance is None else self._distances(number, term, tiles.pairs)
            )
            if target is None:
                shared.setdefault((term.grad, term.masked, term.full, term.scale), []).append(number)
            else:
                found.append(target)
        return [*found, *(self._shared(numbers, tiles) for numbers in shared.values())]

    def _owned(self, number: int, term: Term) -> PairTarget | None:
        """[n.., q_len, kv_len] over the elements that the term's read reads."""
        if not isinstance(term.read, Load):
            return None
        is_total = sum(_slot(read) == _slot(term.read) for read in self.reads) == 1
        size, strides, dtype = self.results[_slot(term.read)]
        whole = Buffer(size, strides, dtype if is_total else torch.float32).without_memory
        view = strided(whole, term.read, self.pairs)
        if view is None or overlaps(view):
            return None
        return PairTarget(number, False, (term.read,), Buffer.like(whole), view, is_total, (self.pairs,))

    def _distances(self, number: int, term: Term, tiles: Launch) -> PairTarget:
        """Sums by distance, see `DistanceSums`."""
        assert term.by_distance is not None
        (_, queries), (_, keys) = self.pairs.axes[-2:]
        apart = -(-len(queries) // tiles.block_kv) + -(-len(keys) // tiles.block_kv)
        owned = self._owners([term.by_distance], apart)
        sums = DistanceSums.zeros(owned, len(queries), len(keys), tiles.block_q, tiles.block_kv, META)
        whole = Buffer.like(sums.skewed)
        return PairTarget(number, True, (term.by_distance,), whole, sums.tiles, False, (self.distances,))

    def _shared(self, numbers: Sequence[int], tiles: BackwardLaunch) -> PairTarget:
        """[n.., rows, kv_len], a part of the queries at a time."""
        reads = tuple(read for n in numbers if (read := self.program.pair_terms[n].read) is not None)
        *batch, (_, queries), (_, keys) = self.pairs.axes
        owned = self._owners(reads, -(-len(queries) // tiles.pairs.block_q) * -(-len(keys) // tiles.pairs.block_kv))
        looked_up = max(look_ups(self.totals[_slot(read)].without_memory, read, self.pairs) for read in reads)
        row_bytes = max(4 * math.prod(owned) * len(keys), LOOK_UP_BYTES * looked_up // len(queries))
        block = max(tiles.pairs.block_q, tiles.dense.block_q)
        rows = min(max(WORKSPACE // row_bytes // block, 1) * block, len(queries))
        view = torch.empty((*owned, rows, len(keys)), dtype=torch.float32, device=META)
        parts = (queries[start : start + rows] for start in range(0, len(queries), rows))
        over = tuple(replace(self.pairs, axes=(*batch, (Q_IDX, part), (KV_IDX, keys))) for part in parts)
        return PairTarget(numbers[0], False, reads, Buffer.like(view), view, False, over)

    def _owners(self, reads: Iterable[Load | Gather], programs: int) -> list[int]:
        """The batch positions that have sums of their own: those that read others, and more where programs are few."""
        batch = self.pairs.axes[:-2]
        symbols = frozenset().union(*map(free_symbols, reads))
        owned = [len(positions) if symbol in symbols else 1 for symbol, positions in batch]
        for axis in reversed(range(len(owned))):
            if math.prod(owned) * programs >= ENOUGH_PROGRAMS:
                break
            owned[axis] = len(batch[axis][1])
        return owned


@dataclass(eq=False, slots=True)
class CapturedGradients:
    """Accumulates the gradients of one call's captured tensors.

    sum_buckets: of gradients of pairs that share elements.
    total: by slot, the gradients so far, in float32 unless one term writes all of it.
    """

    of: CapturedProgram
    captured: tuple[torch.Tensor, ...]
    empty: Empty
    sum_buckets: SumBuckets
    total: dict[int, torch.Tensor] = field(default_factory=dict)

    def add_pair(self, target: PairTarget, whole: torch.Tensor, written: torch.Tensor, part: Tile) -> None:
        """Take in what the kernel has written of a part."""
        if target.is_total:
            self.total[_slot(target.reads[0])] = whole
            return
        if target.by_distance:
            (_, queries), (_, keys) = self.of.pairs.axes[-2:]
            written = DistanceSums(whole, len(queries), len(keys)).sums()
        for read in target.reads:
            self._scatter(read, written, part, None if target.by_distance else self.sum_buckets)

    def add_rows(self, sums: Sequence[torch.Tensor], left: torch.Tensor | None) -> None:
        """sums: [N.., q_len] each, what the kernel has summed over keys; left: what rounding has left in delta."""
        for term, found, at in zip(self.of.program.row_terms, sums, self.of.weights, strict=False):
            if left is not None and at is not None:
                found = found - torch.where(sums[at] == 0, 0.0, left * sums[at])
            values = found.unsqueeze(-1) * term.scale
            if term.read is None:
                self._add_program(self.of.factor, values)
            else:
                self._add(term.read, values, self.of.rows)

    def add_keys(self, term: Term, sums: torch.Tensor) -> None:
        """sums: [N.., kv_len], the term's gradients summed over queries."""
        assert term.read is not None
        self._add(term.read, sums.unsqueeze(-2) * term.scale, self.of.keys)

    def add_sink(self, grad: torch.Tensor) -> None:
        """grad: [N.., q_len], the gradient of the sink."""
        self._add_program(self.of.sink, grad.unsqueeze(-1))

    def result(self, slot: int) -> torch.Tensor:
        """The gradient in the tensor's element type and, where that is dense, memory order."""
        total, (size, strides, dtype) = self._total(slot), self.of.results[slot]
        if (total.stride(), total.dtype) == (strides, dtype):
            return total
        return self.empty(size, strides, dtype).copy_(total)

    def _add_program(self, slopes: Slopes, values: torch.Tensor) -> None:
        """Take in the gradient `values` of a program of rows."""
        tile = replace(self.of.rows, captured=self.captured)
        for leaf, slope in slopes:
            self._add(leaf, values * evaluate(slope, tile), tile)

    def _add(self, read: Load | Gather, values: torch.Tensor, tile: Tile) -> None:
        """Take in what each position gives; values are the same along axes of size 1."""
        self._scatter(read, values.expand([len(positions) for _, positions in tile.axes]), tile)

    def _scatter(
        self, read: Load | Gather, values: torch.Tensor, tile: Tile, sum_buckets: SumBuckets | None = None
    ) -> None:
        """Take in values that have been summed over axes of size 1."""
        # A tile keeps the positions it has made, which are tensors of this call's.
        scatter_add(self._total(_slot(read)), read, values, replace(tile, captured=self.captured), sum_buckets)

    def _total(self, slot: int) -> torch.Tensor:
        if slot not in self.total:
            self.total[slot] = self.empty(*self.of.totals[slot]).zero_()
        return self.total[slot]


def _slot(read: Load | Gather) -> int:
    assert isinstance(read.tensor, int)
    return read.tensor
