"""A mask in words, for reports: "causal, window 1024", "chunks of 512, causal", "documents (t0)"."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.expr import Expr, Index, Load, Pointwise, free_symbols, loads
from flashfuse.kernels.normal import TRUE, conjuncts, substitute
from flashfuse.kernels.predicate import disjuncts
from flashfuse.kernels.solve import solved
from flashfuse.kernels.spec import KV_IDX, KV_LEN, Q_IDX, Q_LEN, index_text, to_text


def in_words(predicate: Expr) -> str:
    """What must hold for a key to be attended to (`MaskStructure.needed`), in words; the text of what has none."""
    if predicate == TRUE:
        return "none"
    lines = _Lines()
    others = [words for term in conjuncts(predicate) if not lines.take(term) for words in [_term_in_words(term)]]
    return ", ".join([*lines.words(), *others]) or "none"


def _term_in_words(term: Expr) -> str:
    branches = list(disjuncts(term))
    if len(branches) > 1:
        return " or ".join(in_words(branch) for branch in branches)
    return next((words for rule in _TERMS if (words := rule(term)) is not None), to_text(term))


# --------------------------------------------------------------------------------------------------------------------
# Comparisons of positions, together: two lines may be one window, or one chunk


class _Lines:
    """Bounds on kv_idx, which hold at once: kv_idx <= u for each of `upper`, kv_idx >= l for each of `lower`."""

    def __init__(self) -> None:
        self.upper: list[sympy.Expr] = []
        self.lower: list[sympy.Expr] = []

    def take(self, term: Expr) -> bool:
        """Whether the term is such bounds, which are kept."""
        match term:
            case Pointwise(op=op, args=(Index(value=left), Index(value=right))):
                lines = [solved(o, left, right) for o in _ORDERS.get(op, ())]
            case _:
                return False
        for line in lines:
            if line is None:
                return False
            if not (line.at - (KV_LEN - 1 if line.upper else 0)).is_zero:
                (self.upper if line.upper else self.lower).append(line.at)
        return bool(lines)

    def words(self) -> Iterator[str]:
        for low in list(self.lower):
            size = _block(low)
            if size is not None and sympy.expand(low + size - 1) in self.upper:
                self.lower.remove(low)
                self.upper.remove(sympy.expand(low + size - 1))
                yield f"chunks of {index_text(size)}"
        yield from self._band()
        yield from map(_upper_in_words, self.upper)
        yield from (f"keys from {index_text(low)}" for low in self.lower)

    def _band(self) -> Iterator[str]:
        """The diagonals: at most one to the left and one to the right make a window."""
        right, left = ([at for at in side if not (at - Q_IDX).has(Q_IDX)] for side in (self.upper, self.lower))
        if max(len(right), len(left)) != 1:
            return
        self.upper = [at for at in self.upper if at not in right]
        self.lower = [at for at in self.lower if at not in left]
        ends = [sympy.expand(at - Q_IDX) for at in (*left, *right)]
        yield _window(ends[0] if left else None, ends[-1] if right else None)


_ORDERS = {op: (op,) for op in ("lt", "le", "gt", "ge")} | {"eq": ("le", "ge")}


def _block(at: sympy.Expr) -> sympy.Expr | None:
    """C where `at` is the first key of the query's block of C."""
    factor, rest = at.as_coeff_Mul()
    return factor if factor > 1 and rest == FloorDiv(Q_IDX, factor) else None


def _window(left: sympy.Expr | None, right: sympy.Expr | None) -> str:
    if right is not None and right in (0, KV_LEN - Q_LEN):
        name = "causal" if right == 0 else "causal (bottom-right)"
        return name if left is None else f"{name}, window {index_text(sympy.expand(right - left + 1))}"
    first, last = ("" if end is None else index_text(end) for end in (left, right))
    return f"window {first}..{last}"


def _upper_in_words(at: sympy.Expr) -> str:
    if not at.has(Q_IDX):
        return f"prefix {index_text(sympy.expand(at + 1))}"
    size = next((size for quotient in at.atoms(FloorDiv) if (size := quotient.args[1]).is_Integer), None)
    if size is not None and _block(sympy.expand(at + 1 - size)) == size:
        return f"causal in blocks of {size}"
    return f"kv_idx <= {index_text(at)}"


# --------------------------------------------------------------------------------------------------------------------
# Other terms, one rule each


def _dilated(term: Expr) -> str | None:
    match term:
        case Pointwise(op="eq", args=(Index(value=Mod() as rest), Index(value=sympy.S.Zero))):
            distance, step = rest.args
            # q_idx + kv_idx is as good as q_idx - kv_idx where only the remainder by 2 counts.
            same = any(sympy.Mod(distance - sign * (Q_IDX - KV_IDX), step) == 0 for sign in (1, -1))
            return f"dilated by {index_text(step)}" if same else None
    return None


def _documents(term: Expr) -> str | None:
    match term:
        case Pointwise(op="eq", args=(Load() as a, Load() as b)):
            swapped = {Q_IDX: KV_IDX, KV_IDX: Q_IDX}
            along = {frozenset(free_symbols(x) & {Q_IDX, KV_IDX}) for x in (a, b)}
            if substitute(a, swapped) == b and along == {frozenset({Q_IDX}), frozenset({KV_IDX})}:
                return f"documents (t{a.tensor})"
    return None


# What tensors are called by the positions that they, and the rest of the term, depend on.
_DATA = {
    (frozenset({KV_IDX}), frozenset({KV_IDX})): "padding",
    (frozenset({Q_IDX}), frozenset({Q_IDX})): "query padding",
    (frozenset({Q_IDX}), frozenset({Q_IDX, KV_IDX})): "positions",
    (frozenset(), frozenset({KV_IDX})): "lengths",
    (frozenset({Q_IDX, KV_IDX}), frozenset({Q_IDX, KV_IDX})): "mask",
}


def _data(term: Expr) -> str | None:
    read = loads(term)
    along = {frozenset(free_symbols(load) & {Q_IDX, KV_IDX}) for load in read}
    if len(along) != 1:
        return None
    name = _DATA.get((along.pop(), frozenset(free_symbols(term) & {Q_IDX, KV_IDX})))
    return name and f"{name} ({_names(load.tensor for load in read)})"


def _names(slots: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(f"t{slot}" for slot in slots))


_TERMS: tuple[Callable[[Expr], str | None], ...] = (_dilated, _documents, _data)
