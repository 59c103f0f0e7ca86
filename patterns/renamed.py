"""Results of matching over other nodes: what an analysis found, said of the nodes of a layer like it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from flashfuse.kernels.expr import Expr, Gather, Load
from flashfuse.patterns.calls import label_of, name_of
from flashfuse.patterns.draw import DrawLoad
from flashfuse.patterns.graph import location
from flashfuse.patterns.refusal import Refused
from flashfuse.patterns.site import AttentionSite, Operand
from flashfuse.patterns.table import Applied, Table

Renaming = Mapping[fx.Node, fx.Node]


def renamed_site(site: AttentionSite, nodes: Renaming) -> AttentionSite:
    """The site with other nodes. Raises KeyError where one has no counterpart."""
    draw = site.draw
    return replace(
        site,
        node=nodes[site.node],
        location=location(nodes[site.node]),
        q=_operand(site.q, nodes),
        k=_operand(site.k, nodes),
        v=_operand(site.v, nodes),
        captured=tuple(_table(c, nodes) if isinstance(c, Table) else nodes[c] for c in site.captured),
        chain=tuple(nodes[n] for n in site.chain),
        more=tuple((_operand(q, nodes), _operand(k, nodes)) for q, k in site.more),
        plus=tuple(renamed_site(term, nodes) for term in site.plus),
        draw=None if draw is None else _drawn(draw, nodes),
    )


def renamed_refusal(error: Refused, nodes: Renaming) -> Refused:
    """The refusal at another node. Raises KeyError where its sentence may name a node that is another one here."""
    words = set(re.findall(r"\w+", error.reason))
    for one, other in nodes.items():
        named = one.name in words or (not name_of(one) and label_of(one) in error.reason)
        if named and one is not other:
            raise KeyError(one)
    return Refused(error.code, error.reason, None if error.node is None else nodes[error.node])


def _operand(operand: Operand, nodes: Renaming) -> Operand:
    return replace(operand, node=nodes[operand.node], behind=tuple(_operand(part, nodes) for part in operand.behind))


def _drawn(draw: DrawLoad, nodes: Renaming) -> DrawLoad:
    return replace(draw, tensor=replace(draw.tensor, node=nodes[draw.tensor.node]))


def _table(table: Table, nodes: Renaming) -> Table:
    return replace(table, source=nodes[table.source], element=_expression(table.element, nodes))


def _expression(expr: Expr, nodes: Renaming) -> Expr:
    if isinstance(expr, (Load, Gather)) and isinstance(expr.tensor, fx.Node):
        expr = replace(expr, tensor=nodes[expr.tensor])
    if isinstance(expr, Applied):
        expr = replace(expr, node=nodes[expr.node], inputs=tuple(nodes[n] for n in expr.inputs))
    return expr.with_children(tuple(_expression(child, nodes) for child in expr.children))
