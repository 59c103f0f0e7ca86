"""Gradients of captured tensors, from the sums over queries or keys that the kernels leave and from rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import sympy
import torch

from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.captured_reads import owned_view
from flashfuse.kernels.codegen_backward import BackwardProgram, Term
from flashfuse.kernels.derivative import derivative, leaves
from flashfuse.kernels.distances import DISTANCE, DistanceSums
from flashfuse.kernels.evaluate import Tile, evaluate, scatter_add, size_values
from flashfuse.kernels.expr import Expr, Gather, Load, free_symbols
from flashfuse.kernels.launch import Launch
from flashfuse.kernels.spec import KV_IDX, Q_IDX, batch_symbol

# From so many programs on, one for each distance of tiles, batch positions that share distances are passed over.
ENOUGH_PROGRAMS = 512


@dataclass(frozen=True, eq=False)
class CapturedGradients:
    """Accumulates the gradients of the captured tensors for which `needs` says so, of one call.

    total: by slot, the gradients so far, in float32 unless one term writes all of it.
    """

    call: AttentionCall
    program: BackwardProgram
    needs: Sequence[bool]
    total: dict[int, torch.Tensor] = field(default_factory=dict)

    def pair_targets(self, tiles: Launch) -> list[torch.Tensor | DistanceSums] | None:
        """For each pair term what its kernel writes, of size 1 on axes to be summed over: see `_pairs`, `_distances`.

        None where a term's read has no owner: two positions read one element, or one outside the tensor.
        """
        targets: list[torch.Tensor | DistanceSums] = []
        for term in self.program.pair_terms:
            target = self._pairs(term) if term.by_distance is None else self._distances(term.by_distance, tiles)
            if target is None:
                return None
            targets.append(target)
        return targets

    def _pairs(self, term: Term) -> torch.Tensor | None:
        """[n.., q_len, kv_len] over the elements that the term's read reads; the others are 0."""
        assert isinstance(term.read, Load)
        slot = _slot(term.read)
        alone = self._terms_of(slot) == 1
        target = torch.empty_like(self.call.captured[slot], dtype=None if alone else torch.float32)
        view = owned_view(target, term.read, self._tile(self.call.q_len, self.call.kv_len))
        # Kernels write every element of the view.
        if view is not None and view.numel() < target.numel():
            target.zero_()
        if alone:
            self.total[slot] = target
        return view

    def _distances(self, read: Load | Gather, tiles: Launch) -> DistanceSums:
        """Sums by distance for a read over `DISTANCE`."""
        call, symbols = self.call, free_symbols(read)
        owned = [size if batch_symbol(axis) in symbols else 1 for axis, size in enumerate(call.batch)]
        apart = -(-call.q_len // tiles.block_kv) + -(-call.kv_len // tiles.block_kv)
        for axis in reversed(range(len(owned))):
            if math.prod(owned) * apart >= ENOUGH_PROGRAMS:
                break
            owned[axis] = call.batch[axis]
        return DistanceSums.zeros(owned, call.q_len, call.kv_len, tiles.block_q, tiles.block_kv, call.device)

    def add_pair(self, term: Term, target: torch.Tensor | DistanceSums) -> None:
        """Take in what the kernel has written, unless it is the total already."""
        if isinstance(target, DistanceSums):
            assert term.by_distance is not None
            distances = range(1 - self.call.q_len, self.call.kv_len)
            tile = self._over((Q_IDX, range(1)), (DISTANCE, distances))
            scatter_add(self._total(_slot(term.by_distance)), term.by_distance, target.sums(), tile)
            return
        assert isinstance(term.read, Load)
        if self._terms_of(_slot(term.read)) > 1:
            scatter_add(self._total(_slot(term.read)), term.read, target, self._tile(self.call.q_len, self.call.kv_len))

    def add_rows(self, sums: Sequence[torch.Tensor], left: torch.Tensor | None) -> None:
        """sums: [N.., q_len] each, what the kernel has summed over keys; left: what rounding has left in delta."""
        terms = self.program.row_terms
        corrected = [term for term in terms if term in self.program.corrected]
        weights = dict(zip(corrected, sums[len(terms) :], strict=False))
        for term, found in zip(terms, sums, strict=False):
            if left is not None and term in weights:
                found = found - torch.where(weights[term] == 0, 0.0, left * weights[term])
            self._add_rows(term, found)

    def _add_rows(self, term: Term, sums: torch.Tensor) -> None:
        tile = self._tile(self.call.q_len, 1)
        values = sums.unsqueeze(-1) * term.scale
        if term.read is not None:
            self._add(term.read, values, tile)
        elif self.call.spec.factor is not None:
            self._add_program(self.call.spec.factor, values, tile)

    def add_keys(self, term: Term, sums: torch.Tensor) -> None:
        """sums: [N.., kv_len], the term's gradients summed over queries."""
        assert term.read is not None
        self._add(term.read, sums.unsqueeze(-2) * term.scale, self._tile(1, self.call.kv_len))

    def add_sink(self, grad: torch.Tensor) -> None:
        """grad: [N.., q_len], the gradient of the sink."""
        assert self.call.spec.sink is not None
        self._add_program(self.call.spec.sink, grad.unsqueeze(-1), self._tile(self.call.q_len, 1))

    @property
    def of_sink(self) -> bool:
        """Whether the sink reads a tensor whose gradient is wanted."""
        return self.call.spec.sink is not None and any(True for _ in self._wanted(self.call.spec.sink))

    def result(self, slot: int) -> torch.Tensor:
        """The gradient in the tensor's element type and, where that is dense, memory order."""
        total = self._total(slot)
        like = torch.empty_like(self.call.captured[slot])
        return total if total.dtype == like.dtype and total.stride() == like.stride() else like.copy_(total)

    def _add_program(self, program: Expr, values: torch.Tensor, tile: Tile) -> None:
        """Take in the gradient `values` of a program of rows."""
        for leaf in self._wanted(program):
            self._add(leaf, values * evaluate(derivative(program, leaf), tile), tile)

    def _add(self, read: Load | Gather, values: torch.Tensor, tile: Tile) -> None:
        shape = [len(positions) for _, positions in tile.axes]
        scatter_add(self._total(_slot(read)), read, values.expand(shape), tile)

    def _total(self, slot: int) -> torch.Tensor:
        if slot not in self.total:
            self.total[slot] = torch.zeros(self.call.captured[slot].shape, dtype=torch.float32, device=self.call.device)
        return self.total[slot]

    def _wanted(self, program: Expr) -> Iterator[Load | Gather]:
        for leaf in leaves(program):
            if isinstance(leaf, (Load, Gather)) and self.needs[_slot(leaf)]:
                yield leaf

    def _terms_of(self, slot: int) -> int:
        return sum(_slot(leaf) == slot for program in self.call.spec.programs for leaf in self._wanted(program))

    def _tile(self, q_len: int, kv_len: int) -> Tile:
        """All positions; an axis of length 1 stands for one that has been summed over."""
        return self._over((Q_IDX, range(q_len)), (KV_IDX, range(kv_len)))

    def _over(self, *axes: tuple[sympy.Symbol, range]) -> Tile:
        """All batch positions and two more axes."""
        call = self.call
        batch = tuple((batch_symbol(axis), range(size)) for axis, size in enumerate(call.batch))
        sizes = size_values(call.spec, call.q_len, call.kv_len, call.sizes)
        return Tile((*batch, *axes), sizes, (), call.captured, torch.float32, call.device)


def _slot(read: Load | Gather) -> int:
    assert isinstance(read.tensor, int)
    return read.tensor
