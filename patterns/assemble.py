"""From a recognised attention to an `AttentionSite`: axes sorted, operands chosen, the score over its own tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import sympy
import torch
from torch import fx

from flashfuse.kernels.expr import Dot, Expr, Pointwise, Product, free_symbols, loads
from flashfuse.kernels.normal import pointwise, rewrite
from flashfuse.kernels.spec import MAX_BATCH_AXES, AttentionSpec, parse, to_text
from flashfuse.patterns.axes import Roles
from flashfuse.patterns.calls import name_of
from flashfuse.patterns.cancelled import check_sums
from flashfuse.patterns.choices import product_options, value_options
from flashfuse.patterns.dropout import check_apart
from flashfuse.patterns.ending import Ending
from flashfuse.patterns.found import Score
from flashfuse.patterns.graph import location, raw_value, tensor, value, wants_gradient
from flashfuse.patterns.indexing import Indices
from flashfuse.patterns.joined import elements
from flashfuse.patterns.layout import Layout, Option
from flashfuse.patterns.lift import CannotLift, Lifter
from flashfuse.patterns.naming import named
from flashfuse.patterns.narrow import masks_of, with_narrow_sums
from flashfuse.patterns.opened import open_up
from flashfuse.patterns.operand import Reading, exactly_promotes
from flashfuse.patterns.output_order import output_order
from flashfuse.patterns.refusal import Refused
from flashfuse.patterns.settled import settled
from flashfuse.patterns.site import AttentionSite, Operand
from flashfuse.patterns.table import Table
from flashfuse.patterns.transforms import mapped_axes

_SUPPORTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def assemble(
    lifter: Lifter,
    node: fx.Node,
    position: Indices,
    values: Dot,
    value_side: Expr,
    end: Ending,
    score: Score,
    chain: tuple[fx.Node, ...],
) -> AttentionSite:
    """The site whose output is `node` at `position`. Raises Refused where the parts do not fit the operator."""
    out = tensor(node)
    assert out is not None
    _check_types(node, values, score)
    check_sums(score.program, score.opener)
    roles = _roles(node, position, values, value_side, score, end)
    if end.dropout is not None:
        needed = (*roles.batch, roles.j, *(() if roles.i is None else (roles.i,)))
        check_apart(end.dropout, needed, lifter.ranges)
    for term in score.terms:
        _check_plain(lifter, term.dot.lhs, term.dot.rhs, roles, node)
        for keys in elements(term.dot.rhs, roles.j):
            _check_plain(lifter, keys, term.dot.lhs, roles, node)
    options = [*product_options(lifter, score, roles, node), value_options(lifter, value_side, values, roles, node)]
    layout = Layout(lifter, roles, (score.program, *end.programs.values()), [part for side in options for part in side])
    chosen = iter(layout.chosen)
    *factors, v = ([next(chosen) for _ in side] for side in options)
    program = score.program
    for factor in (f for side in factors for reading in side for f in reading.factors):
        program = _scaled(program, factor)
    program = settled(layout.substitute(program), score.dtype)
    program = with_narrow_sums(program, masks_of(score.program, score.opener))
    axes = layout.batch
    if len(axes) + mapped_axes(raw_value(node)) > MAX_BATCH_AXES:
        raise Refused("transform", f"with the axes of vmap there are more than {MAX_BATCH_AXES} batch axes", node)
    of_elements = {"key": factors[1][0].program, "value": v[0].program}
    further = {**end.programs, **{name: e for name, e in of_elements.items() if e is not None}}
    programs = {"score": program, **{name: layout.substitute(e) for name, e in further.items()}}
    captured = _captured(programs.values())
    _check_captured(lifter, captured, node)
    q_len = lifter.ranges[roles.i] if roles.i is not None else sympy.Integer(1)
    kv_len = lifter.ranges[roles.j]
    finished, sizes = named([*programs.values()], axes, roles, captured, q_len, kv_len)
    narrow = [
        _product_dtype((*q, *k), term.dot.dtype)
        for term, q, k in zip(score.terms, factors[::2], factors[1::2], strict=True)
    ]
    product_dtype = functools.reduce(torch.promote_types, narrow)
    *read, values_read = [*zip(options, (*factors, v), strict=True)]
    terms = [
        (_operand(layout, q, dtype, term.factor), _operand(layout, k, dtype))
        for term, q, k, dtype in zip(score.terms, read[::2], read[1::2], narrow, strict=True)
    ]
    types = tuple(_captured_dtype(n) for n in captured)
    score_dtype = torch.float64 if product_dtype == torch.float64 else torch.float32
    out_axes, out_order, free_layout = output_order(node, position, roles, layout)
    parts = {name: parse(to_text(e), types, score_dtype) for name, e in zip(programs, finished, strict=True)}
    spec = AttentionSpec(
        batch_axes=len(axes),
        score=parts["score"],
        captured=types,
        num_sizes=len(sizes),
        product_dtype=product_dtype,
        probs_dtype=values.dtype,
        out_dtype=out.dtype,
        empty_row=end.empty_row,
        out_order=out_order,
        normaliser=end.normaliser,
        sink=parts.get("sink"),
        factor=parts.get("factor"),
        dropout=0.0 if end.dropout is None else end.dropout.tensor.p,
        key=parts.get("key"),
        value=parts.get("value"),
    )
    return AttentionSite(
        node=node,
        location=location(node),
        spec=spec,
        q=terms[0][0],
        k=terms[0][1],
        v=_operand(layout, values_read, values.dtype),
        captured=captured,
        batch=tuple(lifter.ranges[a] for a in axes),
        sizes=sizes,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=sympy.Add(*(term.dot.extent for term in score.terms)),
        value_dim=lifter.ranges[roles.d] if roles.d is not None else sympy.Integer(1),
        out_axes=out_axes,
        free_layout=free_layout,
        chain=chain,
        more=tuple(terms[1:]),
        draw=end.dropout,
        overwritten=_written_later(lifter, node, node) is not None,
    )


def _check_types(node: fx.Node, values: Dot, score: Score) -> None:
    for dot in (values, *(term.dot for term in score.terms)):
        if dot.dtype not in _SUPPORTED:
            raise Refused("dtype", f"attention is computed in {dot.dtype}, which the kernels do not take", node)
    if (values.dtype == torch.float64) != (score.dtype == torch.float64):
        raise Refused("dtype", "one product is computed in float64 and the other is not", node)


def _check_plain(lifter: Lifter, side: Expr, other: Expr, roles: Roles, node: fx.Node) -> None:
    """Refuse an operand that is itself a matrix of scores: a product of the keys with an axis the other side lacks.

    The product may be scaled or masked.
    """
    try:
        inner = open_up(lifter, side)
        while isinstance(inner, Pointwise):
            whole = [a for a in inner.args if free_symbols(a) == free_symbols(inner)]
            if len(whole) != 1:
                return
            inner = open_up(lifter, whole[0])
    except CannotLift:
        return
    if not isinstance(inner, Dot):
        return
    for x, y in ((inner.lhs, inner.rhs), (inner.rhs, inner.lhs)):
        paired = free_symbols(y) - free_symbols(x) - free_symbols(other) - {roles.r}
        if roles.j in free_symbols(x) and paired & lifter.ranges.keys():
            raise Refused("head-mixing", "the scores are mixed across heads before the softmax", node)


def _roles(node: fx.Node, position: Indices, values: Dot, value_side: Expr, score: Score, end: Ending) -> Roles:
    """Sort the output's symbols: d is only in the values, i only in the queries, the rest is batch."""
    j, r = values.axis, score.dot.axis
    outs = [o for o in position if isinstance(o, sympy.Symbol)]
    in_values = free_symbols(value_side)
    parts = [score.program, *end.programs.values(), *(side for t in score.terms for side in (t.dot.lhs, t.dot.rhs))]
    parts += [] if end.dropout is None else [end.dropout]
    in_program = frozenset().union(*map(free_symbols, parts))
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


def _operand(
    layout: Layout, side: tuple[Sequence[Option], Sequence[Reading]], dtype: torch.dtype, factor: float = 1.0
) -> Operand:
    """The operand that a side's readings are, one behind the other."""
    first, *behind = (
        layout.operand(reading, (*layout.batch, *own), dtype, factor) for (_, own), reading in zip(*side, strict=True)
    )
    return replace(first, behind=tuple(behind))


def _scaled(program: Expr, factor: Expr) -> Expr:
    """The program with its product scaled by a factor that was passed on the way to an operand."""
    return rewrite(program, lambda e: pointwise("mul", e, factor, dtype=e.dtype) if isinstance(e, Product) else None)


def _product_dtype(operands: Sequence[Reading], dtype: torch.dtype) -> torch.dtype:
    """The narrowest type in which a product is still exact: bf16 operands cast up to float32 multiply as bf16."""
    types = {x.load.dtype if x.program is None else dtype for x in operands}
    narrow = types.pop() if len(types) == 1 and dtype == torch.float32 else dtype
    return narrow if narrow in (torch.float16, torch.bfloat16) and exactly_promotes(narrow, dtype) else dtype


def _captured(programs: Iterable[Expr]) -> tuple[fx.Node | Table, ...]:
    """The tensors that the programs read, in order of first use."""
    return tuple(dict.fromkeys(x.tensor for e in programs for x in loads(e) if isinstance(x.tensor, (fx.Node, Table))))


def _captured_dtype(captured: fx.Node | Table) -> torch.dtype:
    if isinstance(captured, Table):
        return captured.dtype
    t = tensor(captured)
    return torch.float64 if t is None else t.dtype


def _written_later(lifter: Lifter, node: fx.Node, site: fx.Node) -> fx.Node | None:
    """Who writes the memory behind a node after the attention, if a backward pass reads it again."""
    return lifter.graph.writer_between(node, site, lifter.graph.nodes[-1]) if wants_gradient(site) else None


def _check_captured(lifter: Lifter, captured: Sequence[fx.Node | Table], site: fx.Node) -> None:
    for node in captured:
        if isinstance(node, Table):
            continue
        writer = lifter.writer_before(node, site)
        if writer is not None:
            raise Refused(
                "mutation",
                f"`{node.name}` is written by `{name_of(writer)}` before the attention's output is computed",
                writer,
            )
        later = _written_later(lifter, node, site)
        if later is not None:
            # A sum saves neither addend for its gradient; the kernels read both again.
            told = f"`{node.name}` is written by `{name_of(later)}` after the attention, whose gradients read it again"
            raise Refused("mutation", told, later)
        if not isinstance(value(node), (torch.Tensor, torch.SymFloat)):
            raise Refused("unknown-operator", f"`{node.name}` in the score is not a tensor", node)
