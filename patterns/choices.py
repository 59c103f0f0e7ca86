"""Where the operands of one attention may be read: of queries, keys and values, or of each part of them."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import fx

from flashfuse.kernels.expr import Dot, Expr, free_symbols, loads
from flashfuse.patterns.axes import Roles
from flashfuse.patterns.found import Score
from flashfuse.patterns.joined import Part, parts_of
from flashfuse.patterns.layout import Option
from flashfuse.patterns.lift import Lifter
from flashfuse.patterns.operand import Reading, readings
from flashfuse.patterns.refusal import Refused
from flashfuse.patterns.stored import Side


def product_options(lifter: Lifter, score: Score, roles: Roles, node: fx.Node) -> list[list[Option]]:
    """Readings of the queries and keys of every term, in parts.

    Of several terms, and of keys in several parts, each keeps its own factors in its operands.
    """
    found: list[list[Option]] = []
    for term in score.terms:
        dot = term.dot
        shared = free_symbols(dot.lhs) & free_symbols(dot.rhs) - {dot.axis}
        parts = parts_of(lifter, dot.rhs, roles.j)
        _check_worth(parts, roles, node)
        scaled = len(score.terms) == len(parts) == 1
        q = _options(lifter, dot.lhs, shared, dot.dtype, node, "queries", scaled)
        # The program of keys is one of the spec, so of several products' none has one.
        stored = _stored(lifter, roles, (roles.j, dot.axis), dot.dtype, node) if scaled else None
        keys = [_options(lifter, part.element, shared, dot.dtype, node, "keys", scaled, stored) for part in parts]
        found.append([(q, (roles.i, dot.axis))])
        found.append([(k, (part.at, dot.axis)) for k, part in zip(keys, parts, strict=True)])
    return found


def value_options(lifter: Lifter, side: Expr, values: Dot, roles: Roles, node: fx.Node) -> list[Option]:
    """Readings of the values, in parts."""
    parts = parts_of(lifter, side, roles.j)
    _check_worth(parts, roles, node)
    stored = _stored(lifter, roles, (roles.j, roles.d), values.dtype, node) if len(parts) == 1 else None
    found = [_options(lifter, p.element, frozenset(), values.dtype, node, "values", False, stored) for p in parts]
    return [(readings, (part.at, roles.d)) for readings, part in zip(found, parts, strict=True)]


def _check_worth(parts: Sequence[Part], roles: Roles, node: fx.Node) -> None:
    if len(parts) > 1 and roles.i is None:
        told = "keys or values are in several tensors, and for one query it would cost more to put them together"
        raise Refused("extra-columns", told, node)


def _options(
    lifter: Lifter,
    side: Expr,
    shared: frozenset[sympy.Symbol],
    dtype: torch.dtype,
    node: fx.Node,
    what: str,
    scaled: bool,
    stored: Side | None = None,
) -> list[Reading]:
    found = readings(lifter, side, shared, dtype, node, scaled, stored)
    if found:
        return found
    if any(isinstance(x.tensor, fx.Node) and lifter.writer_before(x.tensor, node) is not None for x in loads(side)):
        raise Refused("mutation", f"the {what} are written in place before the attention's output is computed", node)
    raise Refused("operand-layout", f"the {what} are made within an operator, and no tensor holds them", node)


def _stored(
    lifter: Lifter, roles: Roles, axes: Sequence[sympy.Symbol | None], dtype: torch.dtype, node: fx.Node
) -> Side:
    """Where the elements of keys or values are looked for, whose row and column are `axes`."""
    present = frozenset(a for a in axes if a is not None)
    own = frozenset(a for a in present if lifter.ranges.get(a, 1) != 1)
    return Side(own, present | frozenset(roles.batch), dtype, node)
