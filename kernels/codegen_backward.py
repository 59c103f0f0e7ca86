"""What the backward kernels compile in for one attention: the forward's functions, derivatives, and sums of reads.

The sums are generated because their number differs: a function takes the sums so far and the gradients of a tile, and
gives the sums with the tile in them, one for each read of a captured tensor whose gradient is wanted.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashfuse.kernels.bounds import BoundsProgram
from flashfuse.kernels.codegen import ScoreProgram, bounds_body, load_program
from flashfuse.kernels.codegen_derivative import DerivativeProgram, load_derivatives
from flashfuse.kernels.derivative import Leaf, derivative, leaves
from flashfuse.kernels.distances import by_distance
from flashfuse.kernels.expr import Expr, Gather, Load, free_symbols
from flashfuse.kernels.mask import kernel_spec, mask_of
from flashfuse.kernels.modules import finished, load_module
from flashfuse.kernels.normal import const, number
from flashfuse.kernels.query_ranges import query_bounds
from flashfuse.kernels.scale import inner_score, unscaled
from flashfuse.kernels.source import TILE_ARGUMENTS, indented, is_row, tile_values
from flashfuse.kernels.spec import KV_IDX, Q_IDX, AttentionSpec, to_text


@dataclass(frozen=True)
class Term:
    """A summand of gradients: `grad` ("ds" of the inner score, "of_factor" of the factor) times d program / d read.

    read: what is read; None for a factor of whole rows itself, whose reads are all at rows.
    scale: what the sum is multiplied by to be the gradient.
    """

    grad: str
    read: Load | Gather | None
    masked: Expr
    full: Expr
    scale: float

    @property
    def is_of_pairs(self) -> bool:
        """Whether the read has elements for pairs of a query and a key: its gradient is no sum over either."""
        return self.read is not None and free_symbols(self.read) >= {Q_IDX, KV_IDX}

    @property
    def by_distance(self) -> Load | Gather | None:
        """The read over `DISTANCE`, where pairs that are equally far apart share an element."""
        return by_distance(self.read) if self.read is not None and self.is_of_pairs else None

    @property
    def is_of_keys(self) -> bool:
        return self.read is not None and not self.is_of_pairs and KV_IDX in free_symbols(self.read)


@dataclass(frozen=True, eq=False)
class BackwardProgram:
    """The compiled-in part of one attention's backward pass.

    forward, derivatives: the forward's functions, and those of slopes.
    query_bounds: key tile -> the queries that visit it, see `query_ranges.query_bounds`.
    skips: whether a mask may rule out a whole tile.
    row_terms, key_terms, pair_terms: the gradients of reads, by what is left when the kernels have summed.
    row_sums, key_sums: for tiles that may meet a mask or the end of the keys and for others, the function that adds a
        tile to the sums; None where there are none.
    pair_grads: for each pair term the functions of tiles that may meet a mask or the end of the keys, and of others.
    corrected: the terms of rows and pairs that hold ds. Summed over all keys, or in buckets of pairs by whoever made
        the tensor, delta's own rounding does not average out. So the kernel that passes by query tile also sums ds,
        which that rounding alone keeps from 0, and p * slope for each term of rows; pairs wait for the right delta.
    fill_threshold: rows whose largest score is not above it see every key; None where no row has to, -inf where only
        rows that are NaN for want of a key have to, so that their gradients are NaN.
    """

    forward: ScoreProgram
    derivatives: DerivativeProgram
    query_bounds: Any
    skips: bool
    row_terms: tuple[Term, ...]
    key_terms: tuple[Term, ...]
    pair_terms: tuple[Term, ...]
    row_sums: tuple[Any, Any]
    key_sums: tuple[Any, Any]
    pair_grads: tuple[tuple[Any, Any], ...]
    corrected: tuple[Term, ...]
    fill_threshold: float | None

    @property
    def num_row_sums(self) -> int:
        """One for each row term, and what corrects terms: one for each of those of rows, and one more."""
        of_rows = sum(term in self.corrected for term in self.row_terms)
        return len(self.row_terms) + of_rows + (1 if self.corrected else 0)


@functools.lru_cache(maxsize=1024)
def load_backward(
    spec: AttentionSpec, needs: tuple[bool, ...], ranged: bool = False, fewer_queries: bool = False
) -> BackwardProgram:
    """Generate, write and import what a spec's backward pass needs; see `load_program`.

    needs: for each captured tensor, whether its gradient is wanted.
    """
    forward = load_program(spec, ranged, fewer_queries)
    spec = kernel_spec(spec, fewer_queries)
    terms = _terms(spec, needs)
    row_terms, key_terms, pair_terms = _sorted(terms)
    digest, source = backward_source(spec, row_terms, key_terms, pair_terms)
    _, module = load_module(f"backward_{digest}", source)

    def function(name: str) -> Any:
        return getattr(module, f"{name}_{digest}", None)

    return BackwardProgram(
        forward=forward,
        derivatives=load_derivatives(spec, ranged),
        query_bounds=function("query_bounds"),
        skips=mask_of(spec).bounded or ranged,
        row_terms=row_terms,
        key_terms=key_terms,
        pair_terms=pair_terms,
        row_sums=(function("row_sums_masked"), function("row_sums_full")),
        key_sums=(function("key_sums_masked"), function("key_sums_full")),
        pair_grads=tuple(
            (function(f"pair_grad{i}_masked"), function(f"pair_grad{i}_full")) for i in range(len(pair_terms))
        ),
        corrected=_corrected(spec, (*row_terms, *pair_terms)),
        fill_threshold=_fill_threshold(spec, ranged, fewer_queries),
    )


def _fill_threshold(spec: AttentionSpec, ranged: bool, fewer_queries: bool) -> float | None:
    mask = mask_of(spec)
    if spec.normaliser == "none" or not (mask.bounded or ranged):
        return None
    threshold = mask.fill_threshold(ranged=ranged, fewer_queries=fewer_queries)
    may_be_nan = spec.empty_row == "nan" and not mask.keeps_key(fewer_queries)
    return -math.inf if threshold is None and may_be_nan else threshold


def _terms(spec: AttentionSpec, needs: Sequence[bool]) -> tuple[Term, ...]:
    """The gradients of reads in score and factor; a sink is a function of rows, and no kernel's business."""
    scale, inner = inner_score(spec)
    full = unscaled(mask_of(spec).full, scale)

    def wanted(program: Expr) -> Iterable[Load | Gather]:
        return (leaf for leaf in leaves(program) if isinstance(leaf, (Load, Gather)) and _needed(leaf, needs))

    found = [Term("ds", leaf, derivative(inner, leaf), derivative(full, leaf), scale) for leaf in wanted(inner)]
    factor = spec.factor
    if factor is None or factor.dtype == torch.bool:
        return tuple(found)
    if is_row(factor):
        return (*found, Term("of_factor", None, const(1.0), const(1.0), 1.0)) if any(wanted(factor)) else tuple(found)
    for leaf in wanted(factor):
        slope = derivative(factor, leaf)
        found.append(Term("of_factor", leaf, slope, slope, 1.0))
    return tuple(found)


def _needed(leaf: Leaf, needs: Sequence[bool]) -> bool:
    return isinstance(leaf, (Load, Gather)) and isinstance(leaf.tensor, int) and needs[leaf.tensor]


def _sorted(terms: tuple[Term, ...]) -> tuple[tuple[Term, ...], tuple[Term, ...], tuple[Term, ...]]:
    pairs = tuple(t for t in terms if t.is_of_pairs)
    keys = tuple(t for t in terms if t.is_of_keys)
    return tuple(t for t in terms if not t.is_of_pairs and not t.is_of_keys), keys, pairs


# --------------------------------------------------------------------------------------------------------------------
# Source text

_HEADER = '''"""Backward pass of score = {score}"""

IMPORTS

@triton.jit
def query_bounds_HASH(q_start, q_stop, n0, n1, n2, n3, q_len, kv_len, sizes):
    """For the keys [q_start, q_stop) of q_len keys: the queries, of kv_len, as kv_bounds gives keys for queries."""
{bounds}
'''

_FUNCTION = '''

@triton.jit
def {name}_HASH({arguments}):
    """{text}"""
{body}
'''


def backward_source(
    spec: AttentionSpec,
    row_terms: Sequence[Term] = (),
    key_terms: Sequence[Term] = (),
    pair_terms: Sequence[Term] = (),
) -> tuple[str, str]:
    """(hash, source text) of the module of a spec with the gradients of some reads."""
    bounds: BoundsProgram = query_bounds(spec)
    parts = [_HEADER.format(score=to_text(spec.score), bounds=bounds_body(bounds, spec.compute_dtype))]
    corrected = _corrected(spec, (*row_terms, *pair_terms))
    for name, terms, correct in (("row_sums", row_terms, corrected), ("key_sums", key_terms, ())):
        for variant in ("masked", "full") if terms or correct else ():
            body = _sums_body(terms, variant, spec, correct)
            arguments = f"sums, ds, of_factor, p, {TILE_ARGUMENTS}"
            parts.append(_function(f"{name}_{variant}", arguments, terms, body))
    for (i, term), variant in itertools.product(enumerate(pair_terms), ("masked", "full")):
        lines, (slope,) = tile_values([getattr(term, variant)], spec.compute_dtype, keys_end=variant == "masked")
        body = indented([*lines, f"return {_times(term.grad, getattr(term, variant), slope)}"])
        parts.append(_function(f"pair_grad{i}_{variant}", f"ds, of_factor, {TILE_ARGUMENTS}", [term], body))
    return finished("".join(parts), spec.product_dtype)


def _corrected(spec: AttentionSpec, terms: Sequence[Term]) -> tuple[Term, ...]:
    return tuple(t for t in terms if t.grad == "ds") if spec.normaliser == "softmax" else ()


def _sums_body(terms: Sequence[Term], variant: str, spec: AttentionSpec, corrected: Sequence[Term]) -> str:
    slopes = [getattr(term, variant) for term in terms]
    lines, values = tile_values(slopes, spec.compute_dtype, keys_end=variant == "masked")
    parts = list(zip(terms, slopes, values, strict=True))
    found = [_times(term.grad, slope, value) for term, slope, value in parts]
    found += [_times("p", slope, value) for term, slope, value in parts if term in corrected]
    found += ["ds"] if corrected else []
    summed = (f"sums[{i}] + tl.sum({value}, 1)" for i, value in enumerate(found))
    return indented([*lines, f"return ({', '.join(summed)},)"])


def _times(grad: str, slope: Expr, text: str) -> str:
    """The text of a gradient times a slope."""
    return grad if number(slope) == 1 else f"through({grad}, {text})"


def _function(name: str, arguments: str, terms: Sequence[Term], body: str) -> str:
    text = ", ".join("factor" if t.read is None else to_text(t.read) for t in terms) or "scores"
    return _FUNCTION.format(name=name, arguments=arguments, text=f"Gradients of {text}.", body=body)
