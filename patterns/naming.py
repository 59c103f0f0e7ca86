"""Programs over the graph's tensors and symbols, as programs over a spec's own names."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import sympy
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

from flashfuse.kernels.expr import Expr, Gather, Index, Load, free_symbols, gather
from flashfuse.kernels.normal import rewrite
from flashfuse.kernels.spec import D_IDX, KV_IDX, KV_LEN, Q_IDX, Q_LEN, batch_symbol, size_symbol
from flashfuse.patterns.axes import Roles

# What the text of a program has no form for, or what would be computed again for every element.
_COMPUTED_ONCE = (FloorDiv, Mod, Max, Min, sympy.Max, sympy.Min, sympy.Pow)


def named(
    programs: Sequence[Expr],
    axes: Sequence[sympy.Symbol],
    roles: Roles,
    captured: Sequence[Hashable],
    q_len: sympy.Expr,
    kv_len: sympy.Expr,
) -> tuple[list[Expr], tuple[sympy.Expr, ...]]:
    """The programs over the spec's own names, and the graph sizes that its size0, size1, .. stand for."""
    names: dict[sympy.Symbol, sympy.Expr] = {a: batch_symbol(n) for n, a in enumerate(axes)} | {roles.j: KV_IDX}
    names[roles.r] = D_IDX
    if roles.d is not None:
        names[roles.d] = D_IDX
    if roles.i is not None:
        names[roles.i] = Q_IDX
    programs, computed = _with_sizes_computed(programs, frozenset(names))
    used = frozenset().union(*map(free_symbols, programs)) - set(names)
    sizes: list[sympy.Expr] = []
    for symbol in sorted(used, key=str):
        size = computed.get(symbol, symbol)
        if size == kv_len:
            names[symbol] = KV_LEN
        elif size == q_len:
            names[symbol] = Q_LEN
        else:
            names[symbol] = size_symbol(len(sizes))
            sizes.append(size)
    slots: dict[Hashable, int] = {node: slot for slot, node in enumerate(captured)}

    def rule(e: Expr) -> Expr | None:
        match e:
            case Load():
                return Load(e.dtype, slots[e.tensor], tuple(i.xreplace(names) for i in e.indices))
            case Gather():
                return gather(e.dtype, slots[e.tensor], e.at)
            case Index():
                return Index(e.dtype, sympy.expand(e.value.xreplace(names)))
        return None

    return [rewrite(program, rule) for program in programs], tuple(sizes)


def _with_sizes_computed(
    programs: Sequence[Expr], positions: frozenset[sympy.Symbol]
) -> tuple[list[Expr], dict[sympy.Symbol, sympy.Expr]]:
    """The programs with a symbol for each division, power or limit of sizes, which the graph computes once a call."""
    symbols: dict[sympy.Expr, sympy.Symbol] = {}

    def replaced(value: sympy.Expr) -> sympy.Expr:
        if isinstance(value, _COMPUTED_ONCE) and not value.free_symbols & positions:
            return symbols.setdefault(value, sympy.Symbol(f"computed{len(symbols)}", integer=True))
        return value.func(*map(replaced, value.args)) if value.args else value

    def rule(e: Expr) -> Expr | None:
        match e:
            case Load():
                return Load(e.dtype, e.tensor, tuple(replaced(i) for i in e.indices))
            case Index():
                return Index(e.dtype, replaced(e.value))
        return None

    return [rewrite(program, rule) for program in programs], {symbol: size for size, symbol in symbols.items()}
