"""Tables of distances: reads that depend on kv_idx - q_idx alone, and sums of tiles of pairs by that difference.

All pairs of tiles that are equally far apart have the same distances in the same places, so they add up as they are
(a relative bias, https://arxiv.org/abs/1910.10683, section 2.1, has such a gradient). What is left to sum along
diagonals is one tile for each distance of tiles: linear in the lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
import torch

from flashfuse.kernels.expr import Expr, Gather, Index, Load, Pointwise, free_symbols, sympify
from flashfuse.kernels.normal import index, pointwise, rewrite
from flashfuse.kernels.predicate import NEGATED
from flashfuse.kernels.spec import KV_IDX, Q_IDX

# kv_idx - q_idx, of either sign.
DISTANCE = sympy.Symbol("distance", integer=True)


@functools.lru_cache(maxsize=4096)
def by_distance(read: Load | Gather) -> Load | Gather | None:
    """The read with `DISTANCE` for kv_idx - q_idx; None where it holds something else of the two positions."""
    found = rewrite(read, _moved)
    assert isinstance(found, (Load, Gather))
    return None if Q_IDX in free_symbols(found) else found


def _moved(e: Expr) -> Expr | None:
    match e:
        case Load():
            return replace(e, indices=tuple(_apart(sympify(i)) for i in e.indices))
        case Index():
            return replace(e, value=_apart(e.value))
        case Pointwise(op=op, args=(Index() as left, Index() as right)) if op in NEGATED:
            return pointwise(op, index(sympy.expand(left.value - right.value)), index(0))
    return None


def _apart(formula: sympy.Expr) -> sympy.Expr:
    """The formula with q_idx + distance for kv_idx, in which q_idx cancels where only the difference counts."""
    return sympy.expand(formula.xreplace({KV_IDX: Q_IDX + DISTANCE}))


@dataclass(frozen=True, eq=False)
class DistanceSums:
    """Where tiles of pairs are added up by distance.

    skewed: [owned.., block_q, distances], float32. Element (a, y) is the sum over what tiles hold in row a at the
        distance y + 1 - q_tiles * block_q; owned is 1 on axes that are summed over.
    """

    skewed: torch.Tensor
    q_len: int
    kv_len: int

    @staticmethod
    def zeros(
        owned: Sequence[int], q_len: int, kv_len: int, block_q: int, block_kv: int, device: torch.device
    ) -> DistanceSums:
        """Of tiles [block_q, block_kv], whose starts are multiples of block_kv apart."""
        q_tiles, kv_tiles = -(-q_len // block_q), -(-kv_len // block_kv)
        assert q_tiles == 1 or block_q % block_kv == 0, "where a query tile starts, a key tile does"
        columns = (q_tiles - 1) * block_q + kv_tiles * block_kv
        shape = (*owned, block_q, columns + block_q - 1)
        return DistanceSums(torch.zeros(shape, dtype=torch.float32, device=device), q_len, kv_len)

    @property
    def tiles(self) -> torch.Tensor:
        """The sums of tiles side by side, [owned.., block_q, tile distances * block_kv]: a view.

        Column x of row a has the distance x - a + (1 - q_tiles) * block_q.
        """
        *owned, block_q, distances = self.skewed.shape
        *outer, _, _ = self.skewed.stride()
        shape = (*owned, block_q, distances - block_q + 1)
        return self.skewed.as_strided(shape, (*outer, distances - 1, 1), block_q - 1)

    def sums(self) -> torch.Tensor:
        """[owned.., 1, q_len + kv_len - 1], from the distance 1 - q_len on."""
        block_q = self.skewed.shape[-2]
        behind = -self.q_len % block_q
        return self.skewed.sum(-2, keepdim=True).narrow(-1, behind, self.q_len + self.kv_len - 1)
