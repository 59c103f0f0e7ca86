"""Mask structure: which tiles of a score program hold only masked scores, and which hold none.

A boolean sub-expression is *necessary* when the score with it false (or true) is a known fill: minus infinity or a
finite constant, or anything plus a hugely negative constant. So is `t > -1e30` for a float tensor t that is added to
the score. Where a necessary predicate is false on a whole tile, the tile can be skipped; where it is true on a whole
tile, it need not be evaluated. What positions decide, `bounds` states; what tensors decide, `ranges` finds at run time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch

from flashfuse.kernels.bounds import BoundsProgram, Reader, Span, slack_of
from flashfuse.kernels.expr import Const, Expr, Gather, Load, Pointwise, Product, free_symbols, walk
from flashfuse.kernels.mask_words import in_words
from flashfuse.kernels.normal import FALSE, TAKES_DIGITS, TRUE, conjunction, conjuncts, number, substitute
from flashfuse.kernels.normal import pointwise as make
from flashfuse.kernels.operators import ROUNDINGS
from flashfuse.kernels.predicate import normal
from flashfuse.kernels.rounding import unrounded, where_rounded
from flashfuse.kernels.spec import KV_IDX, KV_LEN, Q_IDX, Q_LEN, AttentionSpec, batch_symbol

# A tensor that masks is read once for each block of queries by each granule of keys.
MASK_BLOCK = 64
MASK_GRANULE = 64

# Adding a constant below this to any meaningful score leaves a probability of exactly zero beside an unmasked key.
HUGE_FILL = -1e30
# exp(-FILL_MARGIN) vanishes beside 1 even when summed over 2**31 keys, in float64 too.
FILL_MARGIN = 128.0
# By more than this the inner score of a fill is not off the fill divided by the scale, both rounded to float32.
FILL_ROUNDING = 2.0**-20
LARGEST = torch.finfo(torch.float32).max

# A key that every row may attend to, if any does: in any attention, and where there are no more queries than keys.
_FIRST_AND_LAST = (sympy.Integer(0), KV_LEN - 1)
_DIAGONALS = (Q_IDX, Q_IDX + KV_LEN - Q_LEN)


@dataclass(frozen=True)
class MaskStructure:
    """What is known about the masked part of a score program.

    bounds: the keys that a tile of queries visits, by positions alone.
    full: the score where `bounds` says that its readable predicates hold.
    needed: a key is masked for a query unless this holds; true when no predicate is necessary.
    stated: the part of it that the program states itself; an added tensor may be a mask or a bias.
    idle: where this holds throughout a tile, the score is `unmasked` there.
    fill, data_fill: the largest value that a score skipped by `bounds`, or because `needed` is false, can stand for,
        give or take a score that is added to it; None when there is none. Skipping is exact for -inf; otherwise rows
        at or below `fill_threshold` need every key.
    """

    bounds: BoundsProgram
    full: Expr
    needed: Expr
    stated: Expr
    idle: Expr
    unmasked: Expr
    fill: float | None
    data_fill: float | None

    @property
    def bounded(self) -> bool:
        """Whether positions alone may rule out keys."""
        return self.bounds.bounded

    @functools.cached_property
    def depends_on_data(self) -> bool:
        """Whether `needed` reads a tensor."""
        return any(isinstance(e, (Load, Gather)) for e in walk(self.needed))

    def describe(self) -> str:
        """The structure in words: "none", "causal", "causal, window 1024", ..; of what has none, the predicate."""
        return in_words(self.stated)

    def fill_threshold(self, scale: float = 1.0, *, ranged: bool = False, fewer_queries: bool = False) -> float | None:
        """Rows whose running maximum is not above this see the skipped keys; None when no row ever has to.

        scale: natural-log units in one unit of the maximum, where a factor has been taken out of the score.
        ranged: whether keys are skipped by ranges over data too. fewer_queries: whether q_len <= kv_len is known.
        """
        fill = self.data_fill if ranged else self.fill
        if fill is None or fill == -math.inf:
            return None
        if fill > HUGE_FILL:
            return max(fill + FILL_MARGIN, fill * (1.0 - FILL_ROUNDING)) / scale
        return None if self.keeps_key(fewer_queries) else max(fill / scale, -LARGEST) / 2

    def keeps_key(self, fewer_queries: bool = False, further: Sequence[Expr] = ()) -> bool:
        """Whether every row provably has an unmasked key, whose score is no fill of another kind either.

        further: what has to hold of that key besides.
        """
        if any(may_be_huge(e) for e in walk(self.unmasked)):
            return False
        keys = (*_FIRST_AND_LAST, *_DIAGONALS) if fewer_queries else _FIRST_AND_LAST
        wanted = conjunction([self.needed, *further])
        return any(normal(substitute(wanted, {KV_IDX: key})) == TRUE for key in keys)

    def ends_keys(self, fewer_queries: bool = False) -> bool:
        """Whether positions behind the last key are masked like others, with nothing left of their scores."""
        if self.data_fill != -math.inf:
            return False
        # A key behind the last one, and any query at or before the last.
        beyond, before, more = sympy.symbols("beyond before more", integer=True, nonnegative=True)
        q_len = KV_LEN - more if fewer_queries else Q_LEN
        slacks = [slack_of(term) for term in conjuncts(self.needed)]
        pair = {KV_IDX: KV_LEN + beyond, Q_IDX: Q_LEN - 1 - before}
        reached = [s.xreplace(pair).xreplace({Q_LEN: q_len}) for s in slacks if s is not None]
        return any(sympy.expand(slack).is_negative for slack in reached)


@functools.lru_cache(maxsize=4096)
def mask_of(spec: AttentionSpec) -> MaskStructure:
    """The mask structure of a spec's score."""
    return analyze(spec.score, spec.normaliser)


@functools.lru_cache(maxsize=4096)
def kernel_spec(spec: AttentionSpec, fewer_queries: bool = False) -> AttentionSpec:
    """The spec as kernels compute it: where every row provably keeps a key, a huge fill may as well be -inf.

    Nor does it matter there what a narrow type's sum leaves of masked scores. fewer_queries: whether q_len <= kv_len is
    known.
    """
    mask = mask_of(spec)
    large = where_rounded(spec.score) if spec.normaliser == "softmax" else ()
    if large and mask.keeps_key(fewer_queries, [make("not", condition) for condition in large]):
        return kernel_spec(replace(spec, score=unrounded(spec.score)), fewer_queries)
    finite = mask.data_fill is not None and -math.inf < mask.data_fill <= HUGE_FILL
    if not finite or not mask.keeps_key(fewer_queries):
        return spec
    dtype = spec.score.dtype
    return replace(spec, score=make("where", mask.needed, mask.unmasked, Const(dtype, -math.inf), dtype=dtype))


def may_be_huge(expr: Expr, size: float = -HUGE_FILL) -> bool:
    """Whether a node may bring in numbers of the size of a fill, at least `size`."""
    match expr:
        case Const(value=value):
            return math.isfinite(value) and abs(value) >= size
        case Load(dtype=dtype) | Gather(dtype=dtype):
            return dtype.is_floating_point
    return False


def analyze(score: Expr, normaliser: str = "softmax") -> MaskStructure:
    """Find the necessary predicates of a score program, and what follows from them.

    normaliser: the spec's; under "none" a score is a weight, and masked where it is exactly 0.
    """
    reader = Reader()
    visited, full = Span(), Span()
    fill: list[float] = []
    parts = [*_boolean_parts(score, normaliser)]
    kept: dict[Expr, Expr] = {}
    for part in parts:
        remaining = []
        for term in conjuncts(part.needed):
            bounds = reader.read(term)
            if bounds.visited != Span():
                fill.append(part.fill)
            visited = reader.both(visited, bounds.visited)
            if bounds.full is None:
                remaining.append(term)
            else:
                full = reader.both(full, bounds.full)
        kept[part.masks] = conjunction(remaining) if part.kept == TRUE else make("not", conjunction(remaining))
    stated = conjunction([part.needed for part in parts])
    parts += _additive_parts(score, normaliser)
    return MaskStructure(
        bounds=BoundsProgram.of(reader, visited, full),
        full=_replace_outermost(score, kept),
        needed=conjunction([part.needed for part in parts]),
        stated=stated,
        idle=conjunction([part.idle for part in parts]),
        unmasked=_replace_outermost(score, {part.masks: part.kept for part in parts}),
        fill=max(fill, default=None),
        data_fill=max((part.fill for part in parts), default=None),
    )


@dataclass(frozen=True)
class _Part:
    """A sub-expression `masks` of a score that is a fill, at most `fill`, unless `needed`.

    Where `idle` holds, `kept` may stand in its place.
    """

    masks: Expr
    needed: Expr
    idle: Expr
    kept: Expr
    fill: float


def _boolean_parts(score: Expr, normaliser: str) -> Iterator[_Part]:
    for predicate in dict.fromkeys(_predicates(score)):
        for verdict, kept in ((FALSE, TRUE), (TRUE, FALSE)):
            fill = _fill_of(_replace_outermost(score, {predicate: verdict}), normaliser)
            if fill is not None:
                needed = normal(predicate, negate=kept == FALSE)
                yield _Part(predicate, needed, needed, kept, fill)
                break


def _predicates(expr: Expr) -> Iterator[Expr]:
    """The largest boolean sub-expressions that read no product."""
    if isinstance(expr, Const):
        return
    if expr.dtype == torch.bool and not any(isinstance(e, Product) for e in walk(expr)):
        yield expr
        return
    for child in expr.children:
        yield from _predicates(child)


def _additive_parts(score: Expr, normaliser: str) -> Iterator[_Part]:
    """Float tensors shared by heads that are added to the score, so that a hugely negative element masks.

    Where one is zero throughout a tile of queries and keys it need not be read; along keys alone reading it is cheap.
    """
    inside = {e for predicate in _predicates(unrounded(score)) for e in walk(predicate)}
    for load in dict.fromkeys(e for e in walk(score) if isinstance(e, Load) and e not in inside):
        symbols = free_symbols(load)
        if not load.dtype.is_floating_point or KV_IDX not in symbols or symbols & set(map(batch_symbol, range(1, 4))):
            continue
        limit = _masking_limit(score, load, normaliser)
        if limit is None:
            continue
        needed = make("gt", load, Const(torch.float32, limit))
        zero = Const(torch.float32, 0.0)
        if Q_IDX in symbols:
            yield _Part(load, needed, make("eq", load, zero), zero, HUGE_FILL)
        else:
            yield _Part(load, needed, TRUE, load, HUGE_FILL)


def _masking_limit(score: Expr, load: Load, normaliser: str) -> float | None:
    """The score is a fill of at most `HUGE_FILL` where `load` is at most this; None where it need not be one."""

    def at(value: float) -> Expr:
        return _replace_outermost(score, {load: Const(load.dtype, value)})

    # A factor further out may shrink what is added.
    factor = 1.0 if normaliser == "none" else min(_added_constant(at(-LARGEST)) / -LARGEST, 1.0)
    if factor * LARGEST <= -2 * HUGE_FILL:
        return None
    limit = HUGE_FILL / factor
    return limit if _fill_of(at(1.001 * limit), normaliser) is not None else None


def _fill_of(masked: Expr, normaliser: str) -> float | None:
    """The value a masked score stands for: its constant, or a hugely negative constant added to anything.

    None where it is neither, is NaN, or is too near to the scores of unmasked keys for skipping ever to pay.
    """
    limit = number(_saturated(masked))
    if normaliser == "none":
        return -math.inf if limit == 0 else None
    if limit is not None and math.isnan(limit):
        return None
    if isinstance(masked, Pointwise) and masked.op == "where":
        fills = [_fill_of(branch, normaliser) for branch in masked.args[1:]]
        return None if None in fills else max(f for f in fills if f is not None)
    value = number(masked)
    if value is not None:
        return float(value) if value <= -2 * FILL_MARGIN else None
    addend = _added_constant(masked)
    return addend if addend <= HUGE_FILL else None


def _saturated(expr: Expr) -> Expr:
    """`expr` with -inf for every sum that a hugely negative constant dominates, 0 for its multiples, and simplified."""
    children = tuple(_saturated(child) for child in expr.children)
    if expr.dtype.is_floating_point and isinstance(expr, Pointwise) and _added_constant(expr) <= HUGE_FILL:
        # What is added may be as large by itself: s + s * tanh(s).
        opposed = {"add": (math.inf, math.inf), "sub": (math.inf, -math.inf)}.get(expr.op, ())
        against = any(number(c) == infinity for c, infinity in zip(children, opposed, strict=False))
        return Const(expr.dtype, math.nan if against else -math.inf)
    if isinstance(expr, Pointwise) and expr.op == "mul" and any(number(child) == 0 for child in children):
        return Const(expr.dtype, 0.0)
    return make(expr.op, *children, dtype=expr.dtype) if isinstance(expr, Pointwise) else expr


def _added_constant(expr: Expr) -> float:
    """At most this is added to the rest of a sum, if it is negative; not negative when nothing is known to be."""
    return _constants(expr)[1]


def may_cancel(score: Expr) -> bool:
    """Whether a large negative constant in a sum may meet one that takes it away, and the score with it."""
    sums = (e for e in walk(score) if isinstance(e, Pointwise) and e.op in ("add", "sub"))
    return any(_opposed(*_addends(e)) for e in sums)


def _addends(expr: Pointwise) -> tuple[_Extent, _Extent]:
    one, other = map(_constants, expr.args)
    return one, _times(other, -1.0) if expr.op == "sub" else other


def _opposed(one: _Extent, other: _Extent) -> bool:
    return any(a[0] <= -TAKES_DIGITS and b[1] >= TAKES_DIGITS for a, b in ((one, other), (other, one)))


# The least and the most that something is.
_Extent = tuple[float, float]
_ANYTHING = (-math.inf, math.inf)
# No number is huge behind these.
_BOUNDED = frozenset({"tanh", "sigmoid", "erf", "sin", "cos", "atan", "sign"})


def _constants(expr: Expr) -> _Extent:
    """What the constants in a sum come to, where all else in it counts as 0: one may take another away."""
    match expr:
        case Const(value=value):
            return float(value), float(value)
        case Pointwise(op="add" | "sub"):
            return _sum(*_addends(expr))
        case Pointwise(op="neg", args=(inner,)):
            return _times(_constants(inner), -1.0)
        case Pointwise(op="mul", args=(inner, Const(value=c)) | (Const(value=c), inner)) if 0 < abs(c) < math.inf:
            return _times(_constants(inner), c)
        case Pointwise(op="div", args=(inner, Const(value=c))) if 0 < abs(c) < math.inf:
            return _times(_constants(inner), 1.0 / c)
        case Pointwise(op=op, args=(inner,)) if op in ROUNDINGS:
            return _constants(inner)
        case Pointwise(op="where", args=(_, *branches)):
            (low, high), (least, most) = map(_constants, branches)
            return min(low, least), max(high, most)
        case Pointwise(op="max" | "maximum" | "min" | "minimum" as op, args=args):
            choose = max if op.startswith("max") else min
            (low, high), (least, most) = map(_constants, args)
            return choose(low, least), choose(high, most)
        case Pointwise(op=op) if expr.dtype.is_floating_point and op not in _BOUNDED:
            huge = any(isinstance(e, Const) and abs(e.value) >= -HUGE_FILL for e in walk(expr))
            return _ANYTHING if huge else (0.0, 0.0)
    return 0.0, 0.0


def _sum(one: _Extent, other: _Extent) -> _Extent:
    low, high = (a + b for a, b in zip(one, other, strict=True))
    return -math.inf if math.isnan(low) else low, math.inf if math.isnan(high) else high


def _times(extent: _Extent, factor: float) -> _Extent:
    low, high = sorted(x * factor for x in extent)
    return low, high


def _replace_outermost(expr: Expr, mapping: Mapping[Expr, Expr]) -> Expr:
    """Replace sub-expressions, outermost match first, and simplify what held them."""
    if expr in mapping:
        return mapping[expr]
    children = tuple(_replace_outermost(child, mapping) for child in expr.children)
    if children == expr.children:
        return expr
    return make(expr.op, *children, dtype=expr.dtype) if isinstance(expr, Pointwise) else expr.with_children(children)
