"""What a Gluon kernel compiles in for one attention: the text that the Triton kernels compile in, by Gluon's names.

Both languages share their builtins but for a constant tile, which has a layout in Gluon: there the compiler finds it.
A product is one that the kernel has issued, and is waited for where Triton's text forms it. Of one captured tensor at
pairs of a query and a key the kernel has loaded the tile too, and what is read for the columns of a tile alone (keys in
the forward, queries in the backward, where a thread has 16 of them or more) the warp that loads puts in shared memory.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import sympy
import torch

from flashfuse.kernels.codegen import ScoreProgram, generate, load_program
from flashfuse.kernels.codegen_backward import backward_source
from flashfuse.kernels.codegen_derivative import generate_derivatives
from flashfuse.kernels.expr import Expr, Load, Loaded, free_symbols, loads, sympify
from flashfuse.kernels.mask import kernel_spec
from flashfuse.kernels.modules import finished, load_module
from flashfuse.kernels.normal import rewrite
from flashfuse.kernels.source import index_source, is_needed_everywhere, reads_body
from flashfuse.kernels.spec import KV_IDX, Q_IDX, AttentionSpec, to_text

_NAMES = {
    "import triton.language as tl\n": (
        "import triton.language as tl\nfrom triton.experimental.gluon import language as gl\n"
    ),
    "tl.full(": "gl.full(",
    "from flashfuse.kernels.tiles import product\n": "from flashfuse.kernels.hopper_tiles import arrived\n",
    "(q, k, PRECISION: tl.constexpr, ": "(qk, pairs, columns, OUTSTANDING: tl.constexpr, ",
    "product(q, k, PRECISION)": "arrived(qk, OUTSTANDING)",
    "(qk, n0, ": "(qk, columns, n0, ",
}

# Element types of a tile of pairs that there is room for.
_PAIR_TYPES = (torch.float16, torch.bfloat16)
# Batch axes of a tensor that a tile of pairs is loaded from.
_PAIR_AXES = 3
# Bytes that there are for each column of a tile.
_COLUMN_BYTES = 8

_COLUMNS = '''"""What is read for columns: {reads}."""

IMPORTS

@triton.jit
def columns_HASH(n0, n1, n2, n3, {position}, q_len, kv_len, sizes, captured, strides):
    """For each position the elements that are read."""
{body}
'''

_PAIRS_AT = '''"""Where a tile of {read} is."""

IMPORTS

@triton.jit
def pairs_at_HASH(n0, n1, n2, n3, q_len, kv_len, sizes):
    """The position on its first axes; 0 on those that it does not have."""
    return {places}
'''


@dataclass(frozen=True, eq=False)
class HopperForwardProgram(ScoreProgram):
    """A score is one of a tile of products under way, of the tile of pairs, what was read for its keys, and of the
    number of products since.

    pairs_at: position in the batch -> that of the tile of pairs on three axes; None where none is loaded.
    columns, column_types: what reads for keys, None where nothing is, and the element types of that.
    """

    pairs_at: Any
    columns: Any
    column_types: tuple[torch.dtype, ...]


@dataclass(frozen=True, eq=False)
class HopperBackwardProgram:
    """See `DerivativeProgram` and `BackwardProgram`, whose functions these are, the former of what was read for queries
    too.

    columns, column_types: what reads for queries, None where nothing is, and the element types of that.
    """

    score_and_grad_masked: Any
    score_and_grad_full: Any
    query_bounds: Any
    columns: Any
    column_types: tuple[torch.dtype, ...]


@functools.lru_cache(maxsize=1024)
def load_hopper_forward(spec: AttentionSpec, ranged: bool, fewer_queries: bool) -> HopperForwardProgram:
    """As `load_program`."""
    program = load_program(spec, ranged, fewer_queries)
    pairs = pair_read(spec)
    own_spec = kernel_spec(spec, fewer_queries)
    columns = _column_reads(own_spec, KV_IDX)
    named = {read: f"columns[{i}]" for i, read in enumerate(columns)} | ({} if pairs is None else {pairs: "pairs"})
    function = _module("score", *generate(_loading(own_spec, named), ranged, fewer_queries))
    optional = ("sink", "row_factor", "row_kept")
    own = {
        **{name: function(name) for name in ("score_masked", "score_full", "kv_bounds")},
        **{name: function(name) for name in optional if getattr(program, name) is not None},
    }
    return HopperForwardProgram(
        **{**{field.name: getattr(program, field.name) for field in fields(program)}, **own},
        pairs_at=None if pairs is None else _module("pairs", *_pairs_at(pairs))("pairs_at"),
        columns=_columns(columns, KV_IDX),
        column_types=_element_types(columns),
    )


@functools.lru_cache(maxsize=4096)
def pair_read(spec: AttentionSpec) -> Load | None:
    """The only read at pairs of a query and a key, if its tiles are tiles of a tensor's last two axes."""
    reads = dict.fromkeys(read for program in spec.programs for read in loads(program))
    of_pairs = [read for read in reads if {Q_IDX, KV_IDX} <= free_symbols(read)]
    read = of_pairs[0] if len(of_pairs) == 1 else None
    if not isinstance(read, Load) or read.dtype not in _PAIR_TYPES:
        return None
    *outer, row, column = map(sympify, read.indices)
    along = frozenset().union(*(i.free_symbols for i in outer)) & {Q_IDX, KV_IDX}
    return read if (row, column) == (Q_IDX, KV_IDX) and not along and len(outer) <= _PAIR_AXES else None


def _column_reads(spec: AttentionSpec, column: sympy.Symbol) -> tuple[Load, ...]:
    """The reads at one position of a tile alone, as far as there is room for what they read."""
    found: list[Load] = []
    for read in dict.fromkeys(loads(spec.score)):
        alone = isinstance(read, Load) and free_symbols(read) & {Q_IDX, KV_IDX} == {column}
        size = sum(dtype.itemsize for dtype in _element_types((*found, read)))
        if alone and size <= _COLUMN_BYTES and is_needed_everywhere(spec.score, read):
            found.append(read)
    return tuple(found)


def _columns(reads: Sequence[Load], column: sympy.Symbol) -> Any:
    """The function that reads for columns."""
    if not reads:
        return None
    text = ", ".join(map(to_text, reads))
    source = _COLUMNS.format(reads=text, position=column.name, body=reads_body(reads))
    return _module("columns", *finished(source, reads[0].dtype))("columns")


def _element_types(reads: Sequence[Load]) -> tuple[torch.dtype, ...]:
    """Of what `reads_body` gives for them."""
    types = (torch.float32 if read.dtype.is_floating_point else read.dtype for read in reads)
    return tuple(torch.int8 if dtype == torch.bool else dtype for dtype in types)


def _loading(spec: AttentionSpec, named: Mapping[Expr, str]) -> AttentionSpec:
    """The spec for a kernel that makes some reads itself."""

    def rule(e: Expr) -> Expr | None:
        return Loaded(e.dtype, e.tensor, e.indices, named[e]) if isinstance(e, Load) and e in named else None

    return replace(spec, score=rewrite(spec.score, rule)) if named else spec


def _pairs_at(read: Load) -> tuple[str, str]:
    """(hash, source text) of the module of `HopperForwardProgram.pairs_at`."""
    outer = [index_source(sympify(i)) for i in read.indices[:-2]]
    places = ", ".join([*outer, *("0",) * (_PAIR_AXES - len(outer))])
    return finished(_PAIRS_AT.format(read=to_text(read), places=places), read.dtype)


@functools.lru_cache(maxsize=1024)
def load_hopper_backward(spec: AttentionSpec, ranged: bool, fewer_queries: bool) -> HopperBackwardProgram:
    """Generate, write and import the functions of a spec, as `load_backward` does."""
    spec = kernel_spec(spec, fewer_queries)
    columns = _column_reads(spec, Q_IDX)
    named: dict[Expr, str] = {read: f"columns[{i}]" for i, read in enumerate(columns)}
    derivatives = _module("derivatives", *generate_derivatives(_loading(spec, named), ranged))
    bounds = _module("backward", *backward_source(spec))
    return HopperBackwardProgram(
        score_and_grad_masked=derivatives("score_and_grad_masked"),
        score_and_grad_full=derivatives("score_and_grad_full"),
        query_bounds=bounds("query_bounds"),
        columns=_columns(columns, Q_IDX),
        column_types=_element_types(columns),
    )


def _module(name: str, digest: str, source: str) -> Any:
    """What finds a function of a generated module by its name."""
    for triton, gluon in _NAMES.items():
        source = source.replace(triton, gluon)
    _, module = load_module(f"hopper_{name}_{digest}", source.replace(f"_{digest}", f"_hopper_{digest}"))
    return lambda function: getattr(module, f"{function}_hopper_{digest}")
