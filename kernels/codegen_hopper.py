"""What a Gluon kernel compiles in for one attention: the text that the Triton kernels compile in, by Gluon's names.

Both languages share their builtins but for a constant tile, which has a layout in Gluon: there the compiler finds it.
A product is one that the kernel has issued, and is waited for where Triton's text forms it. Of one captured tensor at
pairs of a query and a key the kernel has loaded the tile too, and what is read for the columns of a tile alone (keys in
the forward, queries in the backward, where a thread has 16 of them or more) the warp that loads puts in shared memory.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from flashfuse.kernels.codegen import ScoreProgram, generate, load_program
from flashfuse.kernels.codegen_backward import Term, backward_source
from flashfuse.kernels.codegen_derivative import generate_derivatives
from flashfuse.kernels.columns import Columns
from flashfuse.kernels.expr import Expr, Load, Loaded, free_symbols, loads, sympify
from flashfuse.kernels.index_source import index_source
from flashfuse.kernels.mask import kernel_spec
from flashfuse.kernels.modules import finished, load_module
from flashfuse.kernels.normal import rewrite
from flashfuse.kernels.spec import KV_IDX, Q_IDX, AttentionSpec, to_text

_NAMES = {
    "import triton.language as tl\n": (
        "import triton.language as tl\nfrom triton.experimental.gluon import language as gl\n"
    ),
    "tl.full(": "gl.full(",
    "from flashfuse.kernels.tiles import product\n": "from flashfuse.kernels.hopper_tiles import arrived\n",
    "(q, k, PRECISION: tl.constexpr, ": "(qk, pairs, columns, OUTSTANDING: tl.constexpr, ",
    "product(q, k, PRECISION)": "arrived(qk, OUTSTANDING)",
    "(qk, n0, ": "(qk, pairs, columns, n0, ",
}

# Element types of a tile of pairs that there is room for.
_PAIR_TYPES = (torch.float16, torch.bfloat16)
# Batch axes of a tensor that a tile of pairs is loaded from.
_PAIR_AXES = 3

_PAIRS_AT = '''"""Where a tile of {read} is."""

IMPORTS

@triton.jit
def pairs_at_HASH(n0, n1, n2, n3, q_len, kv_len, sizes):
    """The position on its first axes; 0 on those that it does not have."""
    return {places}
'''


@dataclass(frozen=True, eq=False)
class TileReads:
    """What a kernel reads itself for a tile.

    pairs_at: position in the batch -> that of the tile of pairs on three axes; None where none is loaded.
    columns, coded_rows, column_types, code_of: see `Columns`; the functions are None where there is nothing to read.
    """

    pairs_at: Any
    columns: Any
    coded_rows: Any
    column_types: tuple[torch.dtype, ...]
    code_of: int | None


@dataclass(frozen=True, eq=False)
class HopperForwardProgram(TileReads, ScoreProgram):
    """A score is one of a tile of products under way, of the tile of pairs, what was read for its keys, and of the
    number of products since.
    """


@dataclass(frozen=True, eq=False)
class HopperBackwardProgram(TileReads):
    """See `DerivativeProgram` and `BackwardProgram`, whose functions these are, the former of the tile of pairs, and of
    what was read for queries, too.
    """

    score_and_grad_masked: Any
    score_and_grad_full: Any
    query_bounds: Any


@dataclass(frozen=True, eq=False)
class HopperPairsProgram:
    """What the gradient of the tensor of pairs takes: scores by its tile, without what is read for columns, and what it
    gets of a tile of either kind, see `BackwardProgram.pair_grads`.

    pairs_at: as for `TileReads`.
    """

    score_and_grad_masked: Any
    score_and_grad_full: Any
    pair_grad_masked: Any
    pair_grad_full: Any
    pairs_at: Any


@functools.lru_cache(maxsize=1024)
def load_hopper_forward(spec: AttentionSpec, ranged: bool, fewer_queries: bool) -> HopperForwardProgram:
    """As `load_program`."""
    program = load_program(spec, ranged, fewer_queries)
    pairs = pair_read(spec)
    own_spec = kernel_spec(spec, fewer_queries)
    columns = Columns.of(own_spec.score, KV_IDX)
    loading = _loading(own_spec, _tile_of(pairs) | columns.made)
    function = _module("score", *generate(loading, ranged, fewer_queries))
    optional = ("sink", "row_factor", "row_kept")
    own = {
        **{name: function(name) for name in ("score_masked", "score_full", "kv_bounds")},
        **{name: function(name) for name in optional if getattr(program, name) is not None},
    }
    return HopperForwardProgram(
        **{**{field.name: getattr(program, field.name) for field in fields(program)}, **own},
        **_reads(pairs, columns),
    )


@functools.lru_cache(maxsize=4096)
def pair_read(spec: AttentionSpec) -> Load | None:
    """The only read at pairs of a query and a key, if its tiles are tiles of a tensor's last two axes."""
    reads = dict.fromkeys(read for program in spec.programs for read in loads(program))
    of_pairs = [read for read in reads if {Q_IDX, KV_IDX} <= free_symbols(read)]
    read = of_pairs[0] if len(of_pairs) == 1 else None
    if not isinstance(read, Load) or read.dtype not in _PAIR_TYPES or len(read.indices) < 2:
        return None
    *outer, row, column = map(sympify, read.indices)
    along = frozenset().union(*(i.free_symbols for i in outer)) & {Q_IDX, KV_IDX}
    return read if (row, column) == (Q_IDX, KV_IDX) and not along and len(outer) <= _PAIR_AXES else None


def _tile_of(pairs: Load | None) -> dict[Expr, Expr]:
    """What the read at pairs is in a program that is given its tile."""
    return {} if pairs is None else {pairs: Loaded(pairs.dtype, pairs.tensor, pairs.indices, "pairs")}


def _loading(spec: AttentionSpec, made: Mapping[Expr, Expr]) -> AttentionSpec:
    """The spec for a kernel that makes some reads itself."""
    return replace(spec, score=rewrite(spec.score, made.get)) if made else spec


def _reads(pairs: Load | None, columns: Columns) -> Mapping[str, Any]:
    """The fields of `TileReads`."""
    sources = columns.sources()
    names = ("columns", "coded_rows")
    functions = {name: _module(name, *sources[name])(name) if name in sources else None for name in names}
    return {
        **functions,
        "pairs_at": _pairs_at(pairs),
        "column_types": columns.types,
        "code_of": columns.code_of,
    }


def _pairs_at(read: Load | None) -> Any:
    """See `HopperForwardProgram`."""
    if read is None:
        return None
    outer = [index_source(sympify(i)) for i in read.indices[:-2]]
    places = ", ".join([*outer, *("0",) * (_PAIR_AXES - len(outer))])
    return _module("pairs", *finished(_PAIRS_AT.format(read=to_text(read), places=places), read.dtype))("pairs_at")


@functools.lru_cache(maxsize=1024)
def load_hopper_backward(spec: AttentionSpec, ranged: bool, fewer_queries: bool) -> HopperBackwardProgram:
    """Generate, write and import the functions of a spec, as `load_backward` does."""
    pairs = pair_read(spec)
    spec = kernel_spec(spec, fewer_queries)
    columns = Columns.of(spec.score, Q_IDX)
    loading = _loading(spec, _tile_of(pairs) | columns.made)
    derivatives = _module("derivatives", *generate_derivatives(loading, ranged, by_score=True))
    return HopperBackwardProgram(
        score_and_grad_masked=derivatives("score_and_grad_masked"),
        score_and_grad_full=derivatives("score_and_grad_full"),
        query_bounds=_module("backward", *backward_source(spec))("query_bounds"),
        **_reads(pairs, columns),
    )


@functools.lru_cache(maxsize=1024)
def load_hopper_pairs(spec: AttentionSpec, term: Term, ranged: bool, fewer_queries: bool) -> HopperPairsProgram:
    """Generate, write and import what the gradient of the only read at pairs takes; term: its summand."""
    pairs = pair_read(spec)
    spec = kernel_spec(spec, fewer_queries)
    derivatives = _module("derivatives", *generate_derivatives(_loading(spec, _tile_of(pairs)), ranged))
    gradients = _module("backward", *backward_source(spec, pair_terms=(term,)))
    return HopperPairsProgram(
        score_and_grad_masked=derivatives("score_and_grad_masked"),
        score_and_grad_full=derivatives("score_and_grad_full"),
        pair_grad_masked=gradients("pair_grad0_masked"),
        pair_grad_full=gradients("pair_grad0_full"),
        pairs_at=_pairs_at(pairs),
    )


def _module(name: str, digest: str, source: str) -> Any:
    """What finds a function of a generated module by its name."""
    for triton, gluon in _NAMES.items():
        source = source.replace(triton, gluon)
    _, module = load_module(f"hopper_{name}_{digest}", source.replace(f"_{digest}", f"_hopper_{digest}"))
    return lambda function: getattr(module, f"{function}_hopper_{digest}")
