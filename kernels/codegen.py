"""Write the Triton source of a score program: one small readable module for each distinct spec.

The forward kernel is one ordinary file; what differs between attentions is how a tile of products becomes a tile of
scores and which keys a tile of queries visits. Those are three generated functions, in a module of their own in a cache
folder, whose names hold a hash of their text: Triton keys its caches by name and text, and equal names have collided.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashfuse.kernels.bounds import Q_START, Q_STOP, BoundsProgram, KvRange
from flashfuse.kernels.expr import Const, Expr, free_symbols, loads, walk
from flashfuse.kernels.mask import kernel_spec, mask_of, may_be_huge
from flashfuse.kernels.modules import finished, load_module
from flashfuse.kernels.normal import index, pointwise
from flashfuse.kernels.scale import LARGE, Fill, fills_of, inner_score, unscaled
from flashfuse.kernels.source import (
    OPERANDS_ARGUMENTS,
    ROW_ARGUMENTS,
    STORED_ARGUMENTS,
    TILE_ARGUMENTS,
    Writer,
    indented,
    is_row,
    operands_body,
    row_body,
    stored_body,
    tile_body,
)
from flashfuse.kernels.spec import KV_IDX, KV_LEN, Q_IDX, AttentionSpec, batch_symbol, to_text


@dataclass(frozen=True, eq=False)
class ScoreProgram:
    """The compiled-in part of one attention.

    score_masked, score_full: tiles of queries and keys -> tile of inner scores, tile of products, for tiles that meet a
        mask or the end of the keys, and for those that do not.
    kv_bounds: query tile -> (start, full_start, full_end, end), see `mask.KvRange`.
    scale: score = scale * inner score.
    fill_threshold: rows whose largest inner score is not above it must see the skipped keys; None when none ever must.
    large_scores: whether scores may be so large that the rounding of a product with log2(e) shows in probabilities.
    fills: inner scores, and the scores that they stand for, where these are not `scale` times those.
    longest_first: whether later query tiles have more keys to visit.
    shared_batch: whether captured elements are loaded for each score, and are the same along the first batch axis.
    sink: rows -> the score without a value of each; None where there is none.
    factor_masked, factor_full: tile -> the factor of its probabilities, for tiles that may reach behind the last key
        and for those that do not; None where there is no factor, or one for a whole row.
    row_factor: rows -> the factor of all their probabilities; None where there is none, or it differs along the row.
    row_kept: rows -> whether they are kept where others become zero; None where all are.
    key, value: tile of stored elements -> keys, values; None where those are what is stored.
    path: the generated source.
    """

    score_masked: Any
    score_full: Any
    kv_bounds: Any
    scale: float
    fill_threshold: float | None
    large_scores: bool
    fills: tuple[Fill, ...]
    longest_first: bool
    shared_batch: bool
    sink: Any
    factor_masked: Any
    factor_full: Any
    row_factor: Any
    row_kept: Any
    key: Any
    value: Any
    path: Path


@functools.lru_cache(maxsize=1024)
def load_program(spec: AttentionSpec, ranged: bool = False, fewer_queries: bool = False) -> ScoreProgram:
    """Generate, write and import the functions of a spec.

    ranged: for calls with `kv_ranges`, which vouch for what data masks too. fewer_queries: for q_len <= kv_len.
    """
    spec = kernel_spec(spec, fewer_queries)
    scale, inner = inner_score(spec)
    mask = mask_of(spec)
    digest, source = generate(spec, ranged, fewer_queries)
    path, module = load_module(f"score_{digest}", source)

    def function(name: str) -> Any:
        return getattr(module, f"{name}_{digest}", None)

    return ScoreProgram(
        score_masked=function("score_masked"),
        score_full=function("score_full"),
        kv_bounds=function("kv_bounds"),
        sink=function("sink"),
        factor_masked=function("factor_masked"),
        factor_full=function("factor_full"),
        row_factor=function("row_factor"),
        row_kept=function("row_kept"),
        key=function("key"),
        value=function("value"),
        scale=scale,
        fill_threshold=mask.fill_threshold(scale, ranged=ranged),
        large_scores=any(may_be_huge(e, LARGE / scale) for e in walk(inner)),
        fills=fills_of(spec.score, scale),
        longest_first=mask.bounds.depends_on({Q_START, Q_STOP}, ("end",)),
        shared_batch=_shares_first_batch_axis(spec),
        path=path,
    )


def _shares_first_batch_axis(spec: AttentionSpec) -> bool:
    tiles = [free_symbols(e) for program in spec.programs for e in loads(program) if {Q_IDX, KV_IDX} <= free_symbols(e)]
    return bool(tiles) and not any(batch_symbol(0) in symbols for symbols in tiles)


# --------------------------------------------------------------------------------------------------------------------
# Source text

_TEMPLATE = '''"""score = {score}

Mask: {mask}. The functions below give score / {scale!r}; the kernel applies that factor inside its exponential.
"""

IMPORTS

@triton.jit
def score_masked_HASH({arguments}):
    """{masked}"""
{masked_body}


@triton.jit
def score_full_HASH({arguments}):
    """{full}"""
{full_body}


@triton.jit
def kv_bounds_HASH(q_start, q_stop, n0, n1, n2, n3, q_len, kv_len, sizes):
    """Keys outside [start, end) are masked for queries [q_start, q_stop); keys in [full_start, full_end) are not."""
{bounds_body}
'''

_FUNCTION = '''

@triton.jit
def {name}_HASH({arguments}):
    """{text}"""
{body}
'''


def generate(spec: AttentionSpec, ranged: bool = False, fewer_queries: bool = False) -> tuple[str, str]:
    """(hash, source text) of the spec's module; ranged, fewer_queries: see `load_program`."""
    scale, inner = inner_score(spec)
    mask = mask_of(spec)
    if not mask.ends_keys(fewer_queries):
        behind = Const(inner.dtype, -math.inf if spec.normaliser == "softmax" else 0.0)
        inner = pointwise("where", pointwise("lt", index(KV_IDX), index(KV_LEN)), inner, behind)
    full = unscaled(mask.unmasked if ranged else mask.full, scale)
    bodies = {
        "masked_body": operands_body(inner, spec.compute_dtype, keys_end=True),
        "full_body": operands_body(full, spec.compute_dtype, keys_end=False),
        "bounds_body": bounds_body(mask.bounds, spec.compute_dtype),
    }
    source = _TEMPLATE.format(
        score=to_text(spec.score),
        mask=mask.describe(),
        scale=scale,
        arguments=OPERANDS_ARGUMENTS,
        masked=to_text(inner),
        full=to_text(full),
        **bodies,
    )
    return finished(source + "".join(_further_functions(spec)), spec.product_dtype)


def _further_functions(spec: AttentionSpec) -> Iterator[str]:
    """The functions of what some specs have besides a score: a sink, a factor of tiles or rows, stored elements."""

    def function(name: str, arguments: str, program: Expr, body: str) -> str:
        return _FUNCTION.format(name=name, arguments=arguments, text=to_text(program), body=body)

    for name, stored in (("key", spec.key), ("value", spec.value)):
        if stored is not None:
            yield function(name, STORED_ARGUMENTS, stored, stored_body(stored))
    if spec.sink is not None:
        yield function("sink", ROW_ARGUMENTS, spec.sink, row_body(spec.sink))
    if spec.factor is None:
        return
    if is_row(spec.factor):
        name = "row_kept" if spec.factor.dtype == torch.bool else "row_factor"
        yield function(name, ROW_ARGUMENTS, spec.factor, row_body(spec.factor))
        return
    for name, keys_end in (("factor_masked", True), ("factor_full", False)):
        yield function(name, TILE_ARGUMENTS, spec.factor, tile_body([spec.factor], spec.compute_dtype, keys_end))


def bounds_body(bounds: BoundsProgram, float_dtype: torch.dtype) -> str:
    """Statements that return the fields of a `KvRange`, which are positions: of 32 bits, whatever they follow from."""
    lines = [f"{name} = {Writer([value], float_dtype, keys_end=False).emit(value)}" for name, value in bounds.steps]
    if any("int64" in line for line in lines):
        lines += [f"{name} = tl.cast({name}, tl.int32)" for name in KvRange._fields]
    return indented([*lines, f"return {', '.join(KvRange._fields)}"])
