"""From a recognised attention to an `AttentionSite`: axes sorted, operands chosen, the score program over its own tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from flashfuse.kernels.expr import (
    Dot,
    Expr,
    Index,
    Load,
    Product,
    Softmax,
    free_symbols,
    loads,
    pointwise,
    rewrite,
    walk,
)
from flashfuse.kernels.spec import (
    KV_IDX,
    KV_LEN,
    MAX_BATCH_AXES,
    Q_IDX,
    Q_LEN,
    AttentionSpec,
    batch_symbol,
    parse,
    size_symbol,
    to_text,
)
from flashfuse.patterns.axes import fold, folds, radix, resimplify, substituted
from flashfuse.patterns.graph import location, name_of, tensor, value
from flashfuse.patterns.indexing import Indices
from flashfuse.patterns.lift import CannotLift, Lifter
from flashfuse.patterns.normaliser import open_up
from flashfuse.patterns.operand import Reading, exactly_promotes, readings, sizes_of
from flashfuse.patterns.refusal import Refused
from flashfuse.patterns.score import Score
from flashfuse.patterns.site import AttentionSite, Operand
from flashfuse.patterns.views import Step, view_plan

_SUPPORTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Roles:
    """What each symbol of a site is. `i` and `d` are None where that dimension has size 1."""

    batch: tuple[sympy.Symbol, ...]
    i: sympy.Symbol | None
    j: sympy.Symbol
    r: sympy.Symbol
    d: sympy.Symbol | None


def assemble(
    lifter: Lifter,
    node: fx.Node,
    position: Indices,
    values: Dot,
    value_side: Expr,
    softmax: Softmax,
    score: Score,
    chain: tuple[fx.Node, ...],
) -> AttentionSite:
    """The site whose output is `node` at `position`. Raises Refused where the parts do not fit the operator."""
    out = tensor(node)
    assert out is not None
    _check_types(node, values, score)
    if out.requires_grad:
        raise Refused("training", "gradients are wanted here, and the backward kernels do not exist yet", node)
    roles = _roles(node, position, values, value_side, score)
    q_side, k_side = score.dot.lhs, score.dot.rhs
    shared = free_symbols(q_side) & free_symbols(k_side) - {roles.r}
    _check_plain(lifter, q_side, k_side, roles, node)
    _check_plain(lifter, k_side, q_side, roles, node)
    dtype = score.dot.dtype
    options = (
        _options(lifter, q_side, shared, dtype, node, "queries", True),
        _options(lifter, k_side, shared, dtype, node, "keys", True),
        _options(lifter, value_side, frozenset(), values.dtype, node, "values", False),
    )
    split = _Splitter(lifter, roles, score.program, options)
    q, k, v = split.chosen
    program = score.program
    for reading in (q, k):
        for factor in reading.factors:
            program = _scaled(program, factor)
    program = split.substitute(program)
    axes = split.batch
    captured = tuple(dict.fromkeys(x.tensor for x in loads(program)))
    _check_captured(lifter, captured, node)
    q_len = lifter.ranges[roles.i] if roles.i is not None else sympy.Integer(1)
    kv_len = lifter.ranges[roles.j]
    program, sizes = _named(program, axes, roles, captured, q_len, kv_len)
    product_dtype = _product_dtype(q.load.dtype, k.load.dtype, dtype)
    types = tuple(_captured_dtype(n) for n in captured)
    score_dtype = torch.float64 if product_dtype == torch.float64 else torch.float32
    out_axes, out_order = _output(lifter, node, position, roles, split)
    spec = AttentionSpec(
        batch_axes=len(axes),
        score=parse(to_text(program), types, score_dtype),
        captured=types,
        num_sizes=len(sizes),
        product_dtype=product_dtype,
        probs_dtype=values.dtype,
        out_dtype=out.dtype,
        empty_row=softmax.empty_row,
        out_order=out_order,
    )
    return AttentionSite(
        node=node,
        location=location(node),
        spec=spec,
        q=split.operand(q, (*axes, roles.i, roles.r), product_dtype),
        k=split.operand(k, (*axes, roles.j, roles.r), product_dtype),
        v=split.operand(v, (*axes, roles.j, roles.d), values.dtype),
        captured=captured,
        batch=tuple(lifter.ranges[a] for a in axes),
        sizes=sizes,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=score.dot.extent,
        value_dim=lifter.ranges[roles.d] if roles.d is not None else sympy.Integer(1),
        out_axes=out_axes,
        chain=chain,
    )


def _check_types(node: fx.Node, values: Dot, score: Score) -> None:
    for dot in (values, score.dot):
        if dot.dtype not in _SUPPORTED:
            raise Refused("dtype", f"attention is computed in {dot.dtype}, which the kernels do not take", node)
    if (values.dtype == torch.float64) != (score.dot.dtype == torch.float64):
        raise Refused("dtype", "one product is computed in float64 and the other is not", node)


def _check_plain(lifter: Lifter, side: Expr, other: Expr, roles: Roles, node: fx.Node) -> None:
    """Refuse an operand that is itself a matrix of scores: a product pairing the keys with an axis the other side lacks."""
    try:
        inner = open_up(lifter, side)
    except CannotLift:
        return
    if not isinstance(inner, Dot):
        return
    for x, y in ((inner.lhs, inner.rhs), (inner.rhs, inner.lhs)):
        paired = free_symbols(y) - free_symbols(x) - free_symbols(other) - {roles.r}
        if roles.j in free_symbols(x) and paired:
            raise Refused("head-mixing", "the scores are mixed across heads before the softmax", node)


def _roles(node: fx.Node, position: Indices, values: Dot, value_side: Expr, score: Score) -> Roles:
    """Sort the output's symbols: d is only in the values, i only in the queries, the rest is batch."""
    j, r = values.axis, score.dot.axis
    outs = [o for o in position if isinstance(o, sympy.Symbol)]
    in_values = free_symbols(value_side)
    in_program = free_symbols(score.program) | free_symbols(score.dot.lhs) | free_symbols(score.dot.rhs)
    ds = [o for o in outs if o in in_values and o not in in_program]
    rows = [
        o
        for o in outs
        if o not in in_values and o in free_symbols(score.dot.lhs) and o not in free_symbols(score.dot.rhs)
    ]
    if len(ds) > 1:
        raise Refused("value-layout", "several dimensions of the values are kept in the output", node)
    if j not in in_values:
        raise Refused("value-layout", "the values are the same for every key", node)
    i = rows[-1] if rows else None
    batch = tuple(o for o in outs if o != i and o not in ds)
    return Roles(batch, i, j, r, ds[0] if ds else None)


def _options(
    lifter: Lifter,
    side: Expr,
    shared: frozenset[sympy.Symbol],
    dtype: torch.dtype,
    node: fx.Node,
    what: str,
    scaled: bool,
) -> list[Reading]:
    found = readings(lifter, side, shared, dtype, node, scaled)
    if not found:
        raise Refused("mutation", f"the {what} are written in place before the attention's output is computed", node)
    return found


def _scaled(program: Expr, factor: Expr) -> Expr:
    """The program with its product scaled by a factor that was passed on the way to an operand."""
    return rewrite(program, lambda e: pointwise("mul", e, factor, dtype=e.dtype) if isinstance(e, Product) else None)


class _Splitter:
    """Chooses how far back each operand is read, and splits folded batch axes so that each is a view."""

    def __init__(self, lifter: Lifter, roles: Roles, program: Expr, options: Sequence[list[Reading]]) -> None:
        self.lifter, self.roles = lifter, roles
        self.ranges = lifter.ranges
        self.mapping: dict[sympy.Symbol, sympy.Expr] = {}
        self.parts: dict[sympy.Symbol, tuple[sympy.Symbol, ...]] = {b: (b,) for b in roles.batch}
        self._split_for([i for x in loads(program) for i in x.indices] + _positions(program))
        chosen = []
        for number, found in enumerate(options):
            chosen.append(self._choose(found, number))
        self.chosen = tuple(chosen)

    @property
    def batch(self) -> tuple[sympy.Symbol, ...]:
        return tuple(p for b in self.roles.batch for p in self.parts[b])

    def _choose(self, found: list[Reading], number: int) -> Reading:
        for reading in reversed(found):
            if not self._split_for(reading.load.indices):
                continue
            last = (
                (self.roles.i, self.roles.j, self.roles.j)[number],
                (self.roles.r, self.roles.r, self.roles.d)[number],
            )
            if self._plan(reading.load, (*self.batch, *last)) is not None:
                return reading
        raise Refused("operand-layout", f"no view of `{found[0].load.tensor}` has the layout of an attention operand")

    def _split_for(self, indices: Sequence[sympy.Expr]) -> bool:
        """Split batch axes until no index divides one; False where they cannot be split so."""
        for _ in range(2 * MAX_BATCH_AXES):
            current = [resimplify(i.xreplace(self.mapping), self.ranges) for i in indices]
            pending = [(s, f) for s in self.batch if (f := folds(current, s))]
            if not pending:
                return True
            symbol, strides = pending[0]
            sizes = radix(self.ranges[symbol], strides)
            if sizes is None or len(self.batch) + len(sizes) - 1 > MAX_BATCH_AXES:
                return False
            self._split(symbol, sizes)
        return False

    def _split(self, symbol: sympy.Symbol, sizes: Sequence[sympy.Expr]) -> None:
        made = tuple(self.lifter.symbol("n", size) for size in sizes)
        replacement = {symbol: fold(made, self.ranges)}
        self.mapping = {k: sympy.expand(v.xreplace(replacement)) for k, v in self.mapping.items()} | replacement
        self.parts = {
            b: tuple(q for p in parts for q in (made if p == symbol else (p,))) for b, parts in self.parts.items()
        }

    def _plan(self, load: Load, axes: Sequence[sympy.Symbol | None]) -> tuple[Step, ...] | None:
        return view_plan(substituted(load.indices, self.mapping, self.ranges), sizes_of(load), axes, self.ranges)

    def operand(self, reading: Reading, axes: Sequence[sympy.Symbol | None], dtype: torch.dtype) -> Operand:
        assert isinstance(reading.load.tensor, fx.Node)
        steps = self._plan(reading.load, axes)
        if steps is None:
            raise Refused(
                "operand-layout", f"no view of `{reading.load.tensor}` has the layout of an attention operand"
            )
        kept = reading.load.dtype if exactly_promotes(reading.load.dtype, dtype) else dtype
        return Operand(reading.load.tensor, steps, kept)

    def substitute(self, expr: Expr) -> Expr:
        def rule(e: Expr) -> Expr | None:
            match e:
                case Load():
                    return replace(e, indices=substituted(e.indices, self.mapping, self.ranges))
                case Index():
                    return replace(e, value=resimplify(e.value.xreplace(self.mapping), self.ranges))
            return None

        return rewrite(expr, rule)


def _positions(program: Expr) -> list[sympy.Expr]:
    return [e.value for e in walk(program) if isinstance(e, Index)]


def _product_dtype(q: torch.dtype, k: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The narrowest type in which the product is still exact: bf16 operands cast up to float32 multiply as bf16."""
    narrow = q == k and q in (torch.float16, torch.bfloat16) and exactly_promotes(q, dtype) and dtype == torch.float32
    return q if narrow else dtype


def _captured_dtype(node: fx.Node) -> torch.dtype:
    t = tensor(node)
    return torch.float64 if t is None else t.dtype


def _check_captured(lifter: Lifter, captured: Sequence[fx.Node], site: fx.Node) -> None:
    for node in captured:
        writer = lifter.writer_before(node, site)
        if writer is not None:
            raise Refused(
                "mutation",
                f"`{node.name}` is written by `{name_of(writer)}` before the attention's output is computed",
                writer,
            )
        if not isinstance(value(node), (torch.Tensor, torch.SymFloat)):
            raise Refused("unknown-operator", f"`{node.name}` in the score is not a tensor", node)


def _named(
    program: Expr,
    axes: Sequence[sympy.Symbol],
    roles: Roles,
    captured: Sequence[fx.Node],
    q_len: sympy.Expr,
    kv_len: sympy.Expr,
) -> tuple[Expr, tuple[sympy.Expr, ...]]:
    """The program over the spec's own names, and the graph sizes that its size0, size1, .. stand for."""
    names: dict[sympy.Symbol, sympy.Expr] = {a: batch_symbol(n) for n, a in enumerate(axes)} | {roles.j: KV_IDX}
    if roles.i is not None:
        names[roles.i] = Q_IDX
    slots = {node: slot for slot, node in enumerate(captured)}
    used = set(free_symbols(program)) - set(names)
    sizes: list[sympy.Expr] = []
    for symbol in sorted(used, key=str):
        if symbol == kv_len:
            names[symbol] = KV_LEN
        elif symbol == q_len:
            names[symbol] = Q_LEN
        else:
            names[symbol] = size_symbol(len(sizes))
            sizes.append(symbol)

    def rule(e: Expr) -> Expr | None:
        match e:
            case Load():
                return Load(e.dtype, slots[e.tensor], tuple(i.xreplace(names) for i in e.indices))  # type: ignore[index]
            case Index():
                return Index(e.dtype, sympy.expand(e.value.xreplace(names)))
        return None

    return rewrite(program, rule), tuple(sizes)


def _output(
    lifter: Lifter, node: fx.Node, position: Indices, roles: Roles, split: _Splitter
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(how the operator's result is permuted to the node's dimensions, memory order of the operator's result)."""
    axes = (*split.batch, roles.i, roles.d)
    numbers = {a: n for n, a in enumerate(axes) if a is not None}
    groups = [[numbers[p] for p in split.parts.get(o, (o,))] if isinstance(o, sympy.Symbol) else [] for o in position]
    missing = [n for n, a in enumerate(axes) if a is None]
    out_axes = tuple(n for group in groups for n in group) + tuple(missing)
    order = [n for dim in _memory_order(node) for n in groups[dim]]
    order = [*(n for n in missing if n != len(axes) - 1), *order]
    if len(axes) - 1 in missing:
        order.append(len(axes) - 1)
    if order[-1] != len(axes) - 1:
        order = [n for n in range(len(axes))]
    return out_axes, tuple(order)


def _memory_order(node: fx.Node) -> list[int]:
    """Dimensions of the node's output, outermost in memory first.

    As the graph has it, except where all that is done with it is a transposition followed by a copy: then the order
    of that copy, which makes the copy disappear.
    """
    out = tensor(node)
    assert out is not None
    natural = sorted(range(out.dim()), key=lambda d: (_stride_key(out, d), d))
    users = [u for u in node.users if name_of(u) in ("transpose", "permute", "swapaxes", "movedim")]
    if (
        len(users) != 1
        or len(node.users) != 1
        or not all(name_of(u) in ("contiguous", "reshape", "flatten", "clone") for u in users[0].users)
    ):
        return natural
    moved = tensor(users[0])
    if moved is None or not users[0].users:
        return natural
    return _permutation(users[0], out.dim()) or natural


def _stride_key(out: torch.Tensor, dim: int) -> int:
    """Larger strides first; a symbolic stride keeps the dimension's own place."""
    stride = out.stride()[dim]
    return -stride if isinstance(stride, int) and all(isinstance(s, int) for s in out.stride()) else dim


def _permutation(user: fx.Node, rank: int) -> list[int] | None:
    args = [a for a in user.args[1:]]
    if name_of(user) == "permute":
        dims = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
        return [int(d) % rank for d in dims] if all(isinstance(d, int) for d in dims) else None
    if len(args) != 2 or not all(isinstance(a, int) for a in args):
        return None
    order = list(range(rank))
    a, b = int(args[0]), int(args[1])  # type: ignore[arg-type]
    order[a], order[b] = order[b], order[a]
    return order
