"""What a Gluon kernel compiles in for one attention: the text that the Triton kernels compile in, by Gluon's names.

Both languages share their builtins but for a constant tile, which has a layout in Gluon: there the compiler finds it.
A product is one that the kernel has issued, and is waited for where Triton's text forms it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from flashfuse.kernels.codegen import ScoreProgram, generate, load_program
from flashfuse.kernels.codegen_backward import backward_source
from flashfuse.kernels.codegen_derivative import generate_derivatives
from flashfuse.kernels.mask import kernel_spec
from flashfuse.kernels.modules import load_module
from flashfuse.kernels.spec import AttentionSpec

_NAMES = {
    "import triton.language as tl\n": (
        "import triton.language as tl\nfrom triton.experimental.gluon import language as gl\n"
    ),
    "tl.full(": "gl.full(",
    "from flashfuse.kernels.tiles import product\n": "from flashfuse.kernels.hopper_tiles import arrived\n",
    "(q, k, PRECISION: tl.constexpr, ": "(qk, OUTSTANDING: tl.constexpr, ",
    "product(q, k, PRECISION)": "arrived(qk, OUTSTANDING)",
}


@dataclass(frozen=True, eq=False)
class HopperBackwardProgram:
    """See `DerivativeProgram` and `BackwardProgram`, whose functions these are."""

    score_and_grad_masked: Any
    score_and_grad_full: Any
    query_bounds: Any


@functools.lru_cache(maxsize=1024)
def load_hopper_forward(spec: AttentionSpec, ranged: bool, fewer_queries: bool) -> ScoreProgram:
    """As `load_program`; a score is one of a tile of products under way and of the number of those issued since."""
    program = load_program(spec, ranged, fewer_queries)
    function = _module("score", *generate(kernel_spec(spec, fewer_queries), ranged, fewer_queries))
    return replace(
        program,
        score_masked=function("score_masked"),
        score_full=function("score_full"),
        kv_bounds=function("kv_bounds"),
        **{name: function(name) for name in ("sink", "row_factor", "row_kept") if getattr(program, name) is not None},
    )


@functools.lru_cache(maxsize=1024)
def load_hopper_backward(spec: AttentionSpec, ranged: bool, fewer_queries: bool) -> HopperBackwardProgram:
    """Generate, write and import the functions of a spec, as `load_backward` does."""
    spec = kernel_spec(spec, fewer_queries)
    derivatives = _module("derivatives", *generate_derivatives(spec, ranged))
    bounds = _module("backward", *backward_source(spec))
    return HopperBackwardProgram(
        derivatives("score_and_grad_masked"), derivatives("score_and_grad_full"), bounds("query_bounds")
    )


def _module(name: str, digest: str, source: str) -> Any:
    """What finds a function of a generated module by its name."""
    for triton, gluon in _NAMES.items():
        source = source.replace(triton, gluon)
    _, module = load_module(f"hopper_{name}_{digest}", source.replace(f"_{digest}", f"_hopper_{digest}"))
    return lambda function: getattr(module, f"{function}_hopper_{digest}")
