"""Which queries a tile of keys is visited by: the bounds of `mask.MaskStructure` with queries and keys exchanged.

The backward pass sums over the queries of a key. A predicate over positions says as much about the queries of a key
tile as about the keys of a query tile, once its symbols are exchanged.
"""

from __future__ import annotations

import functools

from flashfuse.kernels.bounds import BoundsProgram, Reader, Span
from flashfuse.kernels.expr import Expr
from flashfuse.kernels.mask import mask_of
from flashfuse.kernels.normal import conjuncts, substitute
from flashfuse.kernels.predicate import normal
from flashfuse.kernels.spec import KV_IDX, KV_LEN, Q_IDX, Q_LEN, AttentionSpec

_EXCHANGED = {Q_IDX: KV_IDX, KV_IDX: Q_IDX, Q_LEN: KV_LEN, KV_LEN: Q_LEN}


@functools.lru_cache(maxsize=1024)
def query_bounds(spec: AttentionSpec) -> BoundsProgram:
    """The `bounds.KvRange` of queries that a tile of keys is visited by, and of those whose score is `mask.full`.

    A program in which queries and keys have changed places: q_start, q_stop are a range of keys, kv_len is the number
    of queries, q_len that of keys.
    """
    reader = Reader()
    visited, full = Span(), Span()
    known = True
    for term in conjuncts(mask_of(spec).stated):
        bounds = reader.read(exchanged(term))
        visited = reader.both(visited, bounds.visited)
        if Reader().read(term).full is None:
            # The forward evaluates this term in full tiles too.
            continue
        known = known and bounds.full is not None
        full = full if bounds.full is None else reader.both(full, bounds.full)
    return BoundsProgram.of(reader, visited, full if known else None)


def exchanged(predicate: Expr) -> Expr:
    """The predicate with queries and keys in each other's place."""
    return normal(substitute(predicate, _EXCHANGED))
