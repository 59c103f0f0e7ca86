"""Writing a row: the decorator that puts a rule in the table of ATen operators, and what most rules need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy

from flashfuse.patterns.indexing import Indices
from flashfuse.patterns.lift import ATEN_ROWS, Row
from flashfuse.patterns.trace import AtenCall


def row(*functions: Any) -> Callable[[Row], Row]:
    """Make the decorated rule the row of these operators."""

    def add(rule: Row) -> Row:
        ATEN_ROWS.update(dict.fromkeys(functions, rule))
        return rule

    return add


def argument(call: AtenCall, number: int, name: str, default: Any = None) -> Any:
    """An argument by number or name, or the schema's default."""
    if number < len(call.args):
        return call.args[number]
    return call.kwargs.get(name, default)


def replaced(position: Indices, dim: int, at: sympy.Expr) -> Indices:
    """The position with another index on one dimension."""
    return (*position[:dim], at, *position[dim + 1 :])
