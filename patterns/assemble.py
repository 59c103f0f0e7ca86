"""From a recognised attention to an `AttentionSite`: axes sorted, operands chosen, the score over its own tensors."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import sympy
import torch
from torch import fx

from flashfuse.kernels.expr import Dot, Expr, Index, Load, Product, Softmax, free_symbols, loads
from flashfuse.kernels.normal import pointwise, rewrite
from flashfuse.kernels.spec import (
    KV_IDX,
    KV_LEN,
    Q_IDX,
    Q_LEN,
    AttentionSpec,
    batch_symbol,
    parse,
    size_symbol,
    to_text,
)
from flashfuse.patterns.axes import Roles
from flashfuse.patterns.graph import location, name_of, tensor, value
from flashfuse.patterns.indexing import Indices
from flashfuse.patterns.layout import Layout
from flashfuse.patterns.lift import CannotLift, Lifter
from flashfuse.patterns.normaliser import open_up
from flashfuse.patterns.operand import Reading, exactly_promotes, readings
from flashfuse.patterns.output_order import output_order
from flashfuse.patterns.refusal import Refused
from flashfuse.patterns.score import Score, settled
from flashfuse.patterns.site import AttentionSite

_SUPPORTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    layout = Layout(lifter, roles, score.program, options)
    q, k, v = layout.chosen
    program = score.program
    for reading in (q, k):
        for factor in reading.factors:
            program = _scaled(program, factor)
    program = settled(layout.substitute(program), score.dot.dtype)
    axes = layout.batch
    captured = _captured(program)
    _check_captured(lifter, captured, node)
    q_len = lifter.ranges[roles.i] if roles.i is not None else sympy.Integer(1)
    kv_len = lifter.ranges[roles.j]
    program, sizes = _named(program, axes, roles, captured, q_len, kv_len)
    product_dtype = _product_dtype(q.load.dtype, k.load.dtype, dtype)
    types = tuple(_captured_dtype(n) for n in captured)
    score_dtype = torch.float64 if product_dtype == torch.float64 else torch.float32
    out_axes, out_order, free_layout = output_order(node, position, roles, layout)
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
        q=layout.operand(q, (*axes, roles.i, roles.r), product_dtype),
        k=layout.operand(k, (*axes, roles.j, roles.r), product_dtype),
        v=layout.operand(v, (*axes, roles.j, roles.d), values.dtype),
        captured=captured,
        batch=tuple(lifter.ranges[a] for a in axes),
        sizes=sizes,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=score.dot.extent,
        value_dim=lifter.ranges[roles.d] if roles.d is not None else sympy.Integer(1),
        out_axes=out_axes,
        free_layout=free_layout,
        chain=chain,
    )


def _check_types(node: fx.Node, values: Dot, score: Score) -> None:
    for dot in (values, score.dot):
        if dot.dtype not in _SUPPORTED:
            raise Refused("dtype", f"attention is computed in {dot.dtype}, which the kernels do not take", node)
    if (values.dtype == torch.float64) != (score.dot.dtype == torch.float64):
        raise Refused("dtype", "one product is computed in float64 and the other is not", node)


def _check_plain(lifter: Lifter, side: Expr, other: Expr, roles: Roles, node: fx.Node) -> None:
    """Refuse an operand that is itself a matrix of scores: a product of the keys with an axis the other side lacks."""
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


def _product_dtype(q: torch.dtype, k: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The narrowest type in which the product is still exact: bf16 operands cast up to float32 multiply as bf16."""
    narrow = q == k and q in (torch.float16, torch.bfloat16) and exactly_promotes(q, dtype) and dtype == torch.float32
    return q if narrow else dtype


def _captured(program: Expr) -> tuple[fx.Node, ...]:
    """The graph tensors that the program reads, in order of first use."""
    return tuple(dict.fromkeys(x.tensor for x in loads(program) if isinstance(x.tensor, fx.Node)))


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
    slots: dict[Hashable, int] = {node: slot for slot, node in enumerate(captured)}
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
                return Load(e.dtype, slots[e.tensor], tuple(i.xreplace(names) for i in e.indices))
            case Index():
                return Index(e.dtype, sympy.expand(e.value.xreplace(names)))
        return None

    return rewrite(program, rule), tuple(sizes)
