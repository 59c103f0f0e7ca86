"""Positions as Triton source text, in as many bits as they may need."""

from __future__ import annotations

import functools
import math

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.expr import Const, Expr, Index, Pointwise
from flashfuse.kernels.spec import MAX_BATCH_AXES, batch_symbol

# No more keys or queries have memory for their elements, and no more batch positions.
_MOST_POSITIONS, _MOST_BATCHES = 2**28, 2**20
_BATCH_POSITIONS = frozenset(map(batch_symbol, range(MAX_BATCH_AXES)))


def index_source(value: sympy.Expr) -> str:
    """A sympy index expression as Triton source. Division rounds down where C's, and so Triton's, rounds to zero.

    Positions and sizes have 32 bits; what can be larger is worked out in 64.
    """
    if isinstance(value, sympy.Symbol):
        return f"sizes[{value.name[4:]}]" if value.name[:4] == "size" else value.name
    if value.is_Integer:
        return whole_source(int(value))
    if isinstance(value, (FloorDiv, Mod, sympy.Mod)):
        left, right = (index_source(a) for a in value.args)
        remainder = f"({left} % {right})"
        if not value.args[0].is_nonnegative:
            remainder = f"(({remainder} + {right}) % {right})"
        if not isinstance(value, FloorDiv):
            return remainder
        return f"({left} // {right})" if value.args[0].is_nonnegative else f"(({left} - {remainder}) // {right})"
    if isinstance(value, (sympy.Min, sympy.Max)):
        function = "tl.minimum" if isinstance(value, sympy.Min) else "tl.maximum"
        return functools.reduce(lambda text, a: f"{function}({text}, {a})", map(index_source, value.args))
    if value.is_Add or value.is_Mul or _is_power(value):
        args = value.args if not value.is_Pow else (value.base,) * int(value.exp)
        texts = [index_source(a) for a in args]
        if _magnitude(value) >= 2**31:
            texts = [
                text if a.is_Integer else f"tl.cast({text}, tl.int64)" for a, text in zip(args, texts, strict=True)
            ]
        return "(" + (" + " if value.is_Add else " * ").join(texts) + ")"
    raise TypeError(f"no Triton form for the index expression {value} ({type(value).__name__})")


def whole_source(value: int) -> str:
    """A whole number; Triton would give it the type of what stands beside it."""
    return str(value) if -(2**31) <= value < 2**31 else f"tl.full((), {value}, tl.int64)"


def _magnitude(value: sympy.Expr) -> int:
    """What an index expression does not exceed in size."""
    if isinstance(value, sympy.Symbol):
        return _MOST_BATCHES if value in _BATCH_POSITIONS else _MOST_POSITIONS
    if value.is_Integer:
        return abs(int(value))
    sizes = [_magnitude(a) for a in value.args]
    if isinstance(value, FloorDiv):
        return sizes[0] // (max(sizes[1], 1) if value.args[1].is_Integer else 1) + 1
    if isinstance(value, (Mod, sympy.Mod)):
        return sizes[1]
    if isinstance(value, (sympy.Min, sympy.Max)):
        return max(sizes)
    if value.is_Pow:
        return sizes[0] ** sizes[1]
    return sum(sizes) if value.is_Add else math.prod(sizes)


def fits_32_bits(expr: Expr) -> bool:
    """Whether a whole number that a program works out of positions has no more bits, whatever they are."""
    return _largest(expr) < 2**31


def _largest(expr: Expr) -> float:
    match expr:
        case Index(value=value):
            return _magnitude(value)
        case Const(value=int() as value):
            return abs(value)
        case Pointwise(op="abs" | "neg" | "min" | "max" | "minimum" | "maximum", args=args):
            return max(map(_largest, args))
        case Pointwise(op="add" | "sub", args=args):
            return sum(map(_largest, args))
        case Pointwise(op="where", args=(_, left, right)):
            return max(_largest(left), _largest(right))
    return math.inf


def _is_power(value: sympy.Expr) -> bool:
    return bool(value.is_Pow and value.exp.is_Integer and value.exp > 0)
