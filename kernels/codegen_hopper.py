"""What a Gluon kernel compiles in for one attention: the text that the Triton kernels compile in, by Gluon's names.

Both languages share their builtins but for a constant tile, which has a layout in Gluon: there the compiler finds it.
A product is one that the kernel has issued, and is waited for where Triton's text forms it. Of one captured tensor at
pairs of a query and a key the kernel has loaded the tile too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from flashfuse.kernels.codegen import ScoreProgram, generate, load_program
from flashfuse.kernels.codegen_backward import Term, backward_source
from flashfuse.kernels.codegen_derivative import generate_derivatives
from flashfuse.kernels.expr import Expr, Load, Loaded, free_symbols, loads, sympify
from flashfuse.kernels.mask import kernel_spec
from flashfuse.kernels.modules import finished, load_module
from flashfuse.kernels.normal import rewrite
from flashfuse.kernels.source import index_source
from flashfuse.kernels.spec import KV_IDX, Q_IDX, AttentionSpec, to_text

_NAMES = {
    "import triton.language as tl\n": (
        "import triton.language as tl\nfrom triton.experimental.gluon import language as gl\n"
    ),
    "tl.full(": "gl.full(",
    "from flashfuse.kernels.tiles import product\n": "from flashfuse.kernels.hopper_tiles import arrived\n",
    "(q, k, PRECISION: tl.constexpr, ": "(qk, pairs, OUTSTANDING: tl.constexpr, ",
    "(qk, n0, ": "(qk, pairs, n0, ",
    "product(q, k, PRECISION)": "arrived(qk, OUTSTANDING)",
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
class HopperForwardProgram(ScoreProgram):
    """A score is one of a tile of products under way, of the tile of pairs, and of the number of products since.

    pairs_at: position in the batch -> that of the tile of pairs on three axes; None where none is loaded.
    """

    pairs_at: Any


@dataclass(frozen=True, eq=False)
class HopperBackwardProgram:
    """See `DerivativeProgram` and `BackwardProgram`, whose functions these are; of tiles, and of the tile of pairs.

    pairs_at: as for `HopperForwardProgram`.
    """

    score_and_grad_masked: Any
    score_and_grad_full: Any
    query_bounds: Any
    pairs_at: Any


@functools.lru_cache(maxsize=1024)
def load_hopper_forward(spec: AttentionSpec, ranged: bool, fewer_queries: bool) -> HopperForwardProgram:
    """As `load_program`."""
    program = load_program(spec, ranged, fewer_queries)
    pairs = pair_read(spec)
    function = _module("score", *generate(_loading(kernel_spec(spec, fewer_queries), pairs), ranged, fewer_queries))
    optional = ("sink", "row_factor", "row_kept")
    own = {
        **{name: function(name) for name in ("score_masked", "score_full", "kv_bounds")},
        **{name: function(name) for name in optional if getattr(program, name) is not None},
    }
    return HopperForwardProgram(
        **{**{field.name: getattr(program, field.name) for field in fields(program)}, **own},
        pairs_at=_pairs_at(pairs),
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


def _loading(spec: AttentionSpec, read: Load | None) -> AttentionSpec:
    """The spec for a kernel that makes a read itself."""

    def rule(e: Expr) -> Expr | None:
        return Loaded(e.dtype, e.tensor, e.indices) if isinstance(e, Load) and e == read else None

    return spec if read is None else replace(spec, score=rewrite(spec.score, rule))


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
    derivatives = _module("derivatives", *generate_derivatives(_loading(spec, pairs), ranged))
    return HopperBackwardProgram(
        derivatives("score_and_grad_masked"),
        derivatives("score_and_grad_full"),
        _module("backward", *backward_source(spec))("query_bounds"),
        _pairs_at(pairs),
    )


@functools.lru_cache(maxsize=1024)
def load_hopper_pair_grad(spec: AttentionSpec, term: Term, fewer_queries: bool) -> tuple[Any, Any]:
    """What one read at pairs gets of a tile that may meet a mask, and of another; see `BackwardProgram.pair_grads`."""
    function = _module("backward", *backward_source(kernel_spec(spec, fewer_queries), pair_terms=(term,)))
    return function("pair_grad0_masked"), function("pair_grad0_full")


def _module(name: str, digest: str, source: str) -> Any:
    """What finds a function of a generated module by its name."""
    for triton, gluon in _NAMES.items():
        source = source.replace(triton, gluon)
    _, module = load_module(f"hopper_{name}_{digest}", source.replace(f"_{digest}", f"_hopper_{digest}"))
    return lambda function: getattr(module, f"{function}_hopper_{digest}")
