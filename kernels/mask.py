"""Mask structure: which tiles of a score program hold only masked scores, and which hold none.

A boolean sub-expression P that depends on positions and sizes only is *necessary* when the score with P false is a
known fill: minus infinity or a finite constant, or anything plus a hugely negative constant. Where P is false on a
whole tile the tile can be skipped; where it is true on a whole tile it need not be evaluated. Each necessary P like
`kv_idx <= slope * q_idx + offset`, or `>=`, is a line that bounds the keys a tile of queries has to visit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import sympy
import torch

from flashfuse.kernels.expr import Const, Expr, Gather, Index, Load, Pointwise, Product, walk
from flashfuse.kernels.normal import FALSE, TRUE, conjunction, conjuncts
from flashfuse.kernels.normal import pointwise as make
from flashfuse.kernels.spec import KV_IDX, KV_LEN, Q_IDX, Q_LEN, to_text

# The query tile [q_start, q_stop) that loop bounds are written for; never empty.
Q_START = sympy.Symbol("q_start", integer=True, nonnegative=True)
Q_STOP = sympy.Symbol("q_stop", integer=True, positive=True)

# Adding a constant below this to any meaningful score leaves a probability of exactly zero beside an unmasked key.
HUGE_FILL = -1e30
# exp(-FILL_MARGIN) vanishes beside 1 even when summed over 2**31 keys, in float64 too.
FILL_MARGIN = 128.0


@dataclass(frozen=True)
class Line:
    """The key position slope * q_idx + offset; `offset` holds sizes and batch positions only."""

    slope: int
    offset: sympy.Expr

    def smallest(self) -> sympy.Expr:
        """The least position on the line over the queries [q_start, q_stop)."""
        return sympy.expand(self.slope * (Q_START if self.slope >= 0 else Q_STOP - 1) + self.offset)

    def largest(self) -> sympy.Expr:
        """The greatest position on the line over the queries [q_start, q_stop)."""
        return sympy.expand(self.slope * (Q_STOP - 1 if self.slope >= 0 else Q_START) + self.offset)


class KvRange(NamedTuple):
    """For one query tile: keys outside [start, end) are masked, keys in [full_start, full_end) are not.

    0 <= start <= full_start <= full_end <= end <= kv_len.
    """

    start: int
    full_start: int
    full_end: int
    end: int


@dataclass(frozen=True)
class MaskStructure:
    """What positions alone say about a score program.

    full: the score where every line below is satisfied.
    fill: the largest value a skipped score can stand for, give or take a score that is added to it; None when no
        predicate is necessary. Skipping is exact for -inf; otherwise rows at or below `fill_threshold` need every key.
    lower, upper: a key is masked for a query when it lies before a lower line or behind an upper line.
    rest: necessary predicates that are not lines; they stay inside `full`.
    """

    full: Expr
    fill: float | None
    lower: tuple[Line, ...]
    upper: tuple[Line, ...]
    rest: tuple[Expr, ...]

    @property
    def bounded(self) -> bool:
        """Whether some tiles may be skipped at all."""
        return bool(self.lower or self.upper)

    def fill_threshold(self, scale: float = 1.0) -> float | None:
        """Rows whose running maximum is not above this see the skipped keys; None when skipping is exact.

        scale: natural-log units in one unit of the score, where a factor has been taken out of it.
        """
        if not self.bounded or self.fill is None or self.fill == -math.inf:
            return None
        return self.fill / 2 if self.fill <= HUGE_FILL else self.fill + FILL_MARGIN / scale

    def starts(self) -> tuple[sympy.Expr, ...]:
        """`KvRange.start` is the largest of these (and of 0)."""
        return tuple(line.smallest() for line in self.lower)

    def full_starts(self) -> tuple[sympy.Expr, ...]:
        """`KvRange.full_start` is the largest of these (and of `start`)."""
        return tuple(line.largest() for line in self.lower)

    def full_ends(self) -> tuple[sympy.Expr, ...]:
        """`KvRange.full_end` is the smallest of these (and of `end`)."""
        return tuple(line.smallest() + 1 for line in self.upper)

    def ends(self) -> tuple[sympy.Expr, ...]:
        """`KvRange.end` is the smallest of these (and of kv_len)."""
        return tuple(line.largest() + 1 for line in self.upper)

    def kv_range(self, values: Mapping[sympy.Symbol, int]) -> KvRange:
        """The bounds as integers. `values` gives q_start, q_stop, kv_len and every other symbol of the program."""

        def evaluate(terms: tuple[sympy.Expr, ...]) -> list[int]:
            return [int(term.subs(values)) for term in terms]

        kv_len = values[KV_LEN]
        start = min(max(0, *evaluate(self.starts()), 0), kv_len)
        end = max(min(kv_len, *evaluate(self.ends()), kv_len), start)
        full_start = min(max(start, *evaluate(self.full_starts()), 0), end)
        full_end = max(min(end, *evaluate(self.full_ends()), end), full_start)
        return KvRange(start, full_start, full_end, end)

    def describe(self) -> str:
        """The structure in words: "none", "causal", "causal, window 1024", ..., or the predicate itself."""
        lower = [line for line in self.lower if (line.slope, line.offset) != (0, 0)]
        upper = [line for line in self.upper if (line.slope, line.offset) != (0, KV_LEN - 1)]
        if self.rest or len(lower) > 1 or len(upper) > 1 or any(line.slope != 1 for line in lower + upper):
            return self._predicate_text()
        if not lower and not upper:
            return "none"
        left = lower[0].offset if lower else None
        right = upper[0].offset if upper else None
        if right == 0 or right == KV_LEN - Q_LEN:
            name = "causal" if right == 0 else "causal (bottom-right)"
            return name if left is None else f"{name}, window {sympy.expand(right - left + 1)}"
        return f"window {'' if left is None else left}..{'' if right is None else right}"

    def _predicate_text(self) -> str:
        lines = [f"kv_idx >= {line.slope * Q_IDX + line.offset}" for line in self.lower]
        lines += [f"kv_idx <= {line.slope * Q_IDX + line.offset}" for line in self.upper]
        return " & ".join(lines + [to_text(term) for term in self.rest])


def analyze(score: Expr) -> MaskStructure:
    """Find the necessary predicates of a score program and split them into lines and the rest."""
    lower: dict[Line, None] = {}
    upper: dict[Line, None] = {}
    rest: dict[Expr, None] = {}
    fills: list[float] = []
    kept: dict[Expr, Expr] = {}
    for predicate in dict.fromkeys(_structured_predicates(score)):
        found = _necessary(score, predicate)
        if found is None:
            continue
        needed, fill = found
        fills.append(fill)
        opaque = []
        for term in conjuncts(_push_not_inwards(needed)):
            match _as_line(term):
                case ("lower", line):
                    lower[line] = None
                case ("upper", line):
                    upper[line] = None
                case _:
                    opaque.append(term)
        rest.update(dict.fromkeys(opaque))
        remaining = conjunction(opaque)
        kept[predicate] = remaining if needed is predicate else make("not", remaining)
    return MaskStructure(
        full=_replace_outermost(score, kept),
        fill=max(fills, default=None),
        lower=tuple(lower),
        upper=tuple(upper),
        rest=tuple(rest),
    )


def _structured_predicates(expr: Expr) -> Iterator[Expr]:
    """The largest boolean sub-expressions that read no tensor and no product."""
    if (
        expr.dtype == torch.bool
        and not isinstance(expr, Const)
        and not any(isinstance(e, (Load, Gather, Product)) for e in walk(expr))
    ):
        yield expr
        return
    for child in expr.children:
        yield from _structured_predicates(child)


def _necessary(score: Expr, predicate: Expr) -> tuple[Expr, float] | None:
    """What must hold for a score not to be a fill (`predicate` or its negation), and that fill; None when neither."""
    for verdict, needed in ((FALSE, predicate), (TRUE, make("not", predicate))):
        fill = _fill_of(_replace_outermost(score, {predicate: verdict}))
        if fill is not None:
            return needed, fill
    return None


def _fill_of(masked: Expr) -> float | None:
    """The value a masked score stands for: its constant, or a hugely negative constant added to anything."""
    if isinstance(masked, Const):
        return float(masked.value)
    addend = _added_constant(masked)
    return addend if addend <= HUGE_FILL else None


def _added_constant(expr: Expr) -> float:
    """The most negative constant that is added to the rest of a sum; 0 when there is none."""
    match expr:
        case Const(value=value):
            return float(value)
        case Pointwise(op="add", args=args):
            return min(_added_constant(a) for a in args)
        case Pointwise(op="sub", args=(left, _)):
            return _added_constant(left)
    return 0.0


def _replace_outermost(expr: Expr, mapping: Mapping[Expr, Expr]) -> Expr:
    """Replace sub-expressions, outermost match first, and simplify what held them."""
    if expr in mapping:
        return mapping[expr]
    children = tuple(_replace_outermost(child, mapping) for child in expr.children)
    if children == expr.children:
        return expr
    return make(expr.op, *children, dtype=expr.dtype) if isinstance(expr, Pointwise) else expr.with_children(children)


_NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
_DUAL = {"and": "or", "or": "and"}


def _push_not_inwards(expr: Expr, negate: bool = False) -> Expr:
    """The same predicate with every `not` directly on a comparison, which it turns round."""
    match expr:
        case Pointwise(op="not", args=(arg,)):
            return _push_not_inwards(arg, not negate)
        case Pointwise(op=op, args=args) if op in _DUAL:
            return make(_DUAL[op] if negate else op, *(_push_not_inwards(a, negate) for a in args))
        case Pointwise(op=op, args=(Index() as left, Index() as right)) if negate and op in _NEGATED:
            return make(_NEGATED[op], left, right)
    return make("not", expr) if negate else expr


def _as_line(term: Expr) -> tuple[str, Line] | None:
    """A comparison of indices as a bound on kv_idx; None when it is not affine in q_idx and +-kv_idx."""
    match term:
        case Pointwise(op=op, args=(Index(value=left), Index(value=right))) if op in ("lt", "le", "gt", "ge"):
            slack = right - left if op in ("lt", "le") else left - right
            slack = sympy.expand(slack - (1 if op in ("lt", "gt") else 0))
        case _:
            return None
    # term says: slack >= 0, with slack = kv_slope * kv_idx + q_slope * q_idx + offset.
    kv_slope, q_slope = slack.coeff(KV_IDX, 1), slack.coeff(Q_IDX, 1)
    offset = sympy.expand(slack - kv_slope * KV_IDX - q_slope * Q_IDX)
    if kv_slope not in (1, -1) or not q_slope.is_Integer or offset.free_symbols & {KV_IDX, Q_IDX}:
        return None
    if kv_slope == -1:
        return "upper", Line(int(q_slope), offset)
    return "lower", Line(-int(q_slope), -offset)
