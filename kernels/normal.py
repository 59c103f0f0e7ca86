"""The normal form of expressions: smart constructors that simplify, so that equal meanings compare equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch

from flashfuse.kernels.expr import Const, Expr, Index, Load, Pointwise, Softmax, sympify, walk
from flashfuse.kernels.operators import OPS, ROUNDINGS, Op

TRUE = Const(torch.bool, True)
FALSE = Const(torch.bool, False)
# Beside a number of this size nothing is left of an ordinary one, and in float64 little.
TAKES_DIGITS = 2.0**40

_ALGEBRA: Mapping[str, Callable[..., sympy.Expr]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
}
_COMPARE: Mapping[str, Callable[[Any, Any], Any]] = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": sympy.Eq,
    "ne": sympy.Ne,
}


def const(value: float | int | bool, dtype: torch.dtype | None = None) -> Expr:
    """A constant, rounded to `dtype` as the source program would (so an overflowing mask value becomes infinite)."""
    if dtype is None:
        dtype = torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float32
    if dtype == torch.bool:
        return TRUE if value else FALSE
    if not dtype.is_floating_point:
        return Index(dtype, sympy.Integer(int(value)))
    return Const(dtype, _round(float(value), dtype))


def _round(value: float, dtype: torch.dtype) -> float:
    if not math.isfinite(value) or dtype == torch.float64:
        return value
    rounded = float(torch.tensor(value, dtype=torch.float64).to(dtype))
    # The limits of a narrow type are exact; other constants keep full precision, which can only be nearer to what
    # the source means.
    return rounded if not math.isfinite(rounded) or abs(value) >= torch.finfo(dtype).max else value


def stored(value: float | int | bool, dtype: torch.dtype) -> Expr:
    """A number as an element of a tensor of `dtype`, which holds no more digits of it than its type has."""
    return const(torch.tensor(value, dtype=torch.float64).to(dtype).item() if dtype.is_floating_point else value, dtype)


def index(value: Any, dtype: torch.dtype = torch.int64) -> Index:
    return Index(dtype, sympify(value))


def pointwise(op: str, *args: Expr, dtype: torch.dtype | None = None) -> Expr:
    """`op` applied to `args`, folded and simplified. Raises KeyError for an operator that is not in `OPS`."""
    info = OPS[op]
    if len(args) != info.arity:
        raise ValueError(f"{op} takes {info.arity} arguments, got {len(args)}")
    if dtype is None:
        dtype = _result_dtype(info, args)
    if all(isinstance(a, Index) for a in args):
        values = [a.value for a in args if isinstance(a, Index)]
        if op in _ALGEBRA:
            return Index(dtype, sympy.expand(_ALGEBRA[op](*values)))
        if op in _COMPARE:
            verdict = _COMPARE[op](*values)
            if verdict in (sympy.true, sympy.false):
                return TRUE if verdict == sympy.true else FALSE
    simplified = _simplify(op, args, dtype)
    return Pointwise(dtype, op, args) if simplified is None else simplified


def _result_dtype(info: Op, args: tuple[Expr, ...]) -> torch.dtype:
    if info.result == "bool":
        return torch.bool
    if info.result == "int":
        return torch.int64
    dtype = torch.bool
    for a in args[1:] if info.arity == 3 else args:
        dtype = torch.promote_types(dtype, a.dtype)
    return torch.float32 if info.result == "float" and not dtype.is_floating_point else dtype


def number(e: Expr) -> float | int | None:
    """The value of a constant expression, None for any other."""
    if isinstance(e, Const):
        return e.value
    if isinstance(e, Index) and e.value.is_Integer:
        return int(e.value)
    return None


def _simplify(op: str, args: tuple[Expr, ...], dtype: torch.dtype) -> Expr | None:
    """Identities that hold for every value, NaN and infinities of the other operand aside where the comment says so."""
    numbers = [number(a) for a in args]
    if op == "where":
        if args[0] in (TRUE, FALSE):
            return cast(args[1] if args[0] == TRUE else args[2], dtype)
        if args[1] == args[2]:
            return cast(args[1], dtype)
        return _boolean_choice(*args) if dtype == torch.bool else None
    if op in ("and", "or"):
        zero = FALSE if op == "and" else TRUE
        if zero in args:
            return zero
        kept = [a for a in dict.fromkeys(args) if a != (TRUE if op == "and" else FALSE)]
        if len(kept) < 2:
            return kept[0] if kept else (TRUE if op == "and" else FALSE)
        return None
    if op == "not":
        if args[0] in (TRUE, FALSE):
            return FALSE if args[0] == TRUE else TRUE
        return _negated(args[0])
    if op == "to_bool" and args[0].dtype == torch.bool:
        return args[0]
    if all(n is not None for n in numbers):
        return _fold(op, args, dtype)
    if (chosen := _through_choice(op, args, numbers, dtype)) is not None:
        return chosen
    if op == "add" and 0 in numbers:
        return cast(args[1 - numbers.index(0)], dtype)
    # A score is never +inf or NaN where the source is meaningful, so -inf absorbs what is added to it.
    if op == "add" and -math.inf in numbers and dtype.is_floating_point:
        return Const(dtype, -math.inf)
    if op == "sub" and numbers[1] == 0:
        return cast(args[0], dtype)
    if op == "mul" and 1 in numbers:
        return cast(args[1 - numbers.index(1)], dtype)
    if op in ("div", "pow") and numbers[1] == 1:
        return cast(args[0], dtype)
    if op == "pow" and numbers[1] == 0:
        return const(1.0, dtype)
    if op == "pow" and numbers[1] == -1:
        return pointwise("div", const(1.0), args[0], dtype=dtype)
    return None


_OPPOSITE = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq"}


def _negated(expr: Expr) -> Expr | None:
    if not isinstance(expr, Pointwise):
        return None
    if expr.op == "not":
        return expr.args[0]
    # Integers are totally ordered; with floats NaN makes a comparison and its opposite both false.
    if expr.op in _OPPOSITE and all(isinstance(a, Index) for a in expr.args):
        return pointwise(_OPPOSITE[expr.op], *expr.args)
    return None


def _boolean_choice(condition: Expr, yes: Expr, no: Expr) -> Expr | None:
    """where(c, True, x) as c | x, and its three kin."""
    if no == FALSE:
        return pointwise("and", condition, yes)
    if yes == TRUE:
        return pointwise("or", condition, no)
    if yes == FALSE:
        return pointwise("and", pointwise("not", condition), no)
    return pointwise("or", pointwise("not", condition), yes) if no == TRUE else None


def _through_choice(
    op: str, args: tuple[Expr, ...], numbers: list[float | int | None], dtype: torch.dtype
) -> Expr | None:
    """op(where(c, 1, 0), 2) as where(c, op(1, 2), op(0, 2)): arithmetic on a mask's numbers leaves a mask."""
    varying = [i for i, n in enumerate(numbers) if n is None]
    if len(varying) != 1 or op == "where":
        return None
    choice = args[varying[0]]
    if not isinstance(choice, Pointwise) or choice.op != "where" or any(number(a) is None for a in choice.args[1:]):
        return None
    folded = (_fold(op, tuple(b if i == varying[0] else a for i, a in enumerate(args)), dtype) for b in choice.args[1:])
    branches = [b for b in folded if b is not None]
    if len(branches) < 2:
        return None
    return pointwise("where", choice.args[0], *branches, dtype=dtype)


def _fold(op: str, args: tuple[Expr, ...], dtype: torch.dtype) -> Expr | None:
    if op not in OPS or any(
        isinstance(a, Const) and isinstance(a.value, bool) and OPS[op].result == "promote" for a in args
    ):
        return None
    work = torch.float64 if torch.float64 in (dtype, *(a.dtype for a in args)) else torch.float32
    try:
        values = [torch.tensor(number(a), dtype=work if a.dtype.is_floating_point else a.dtype) for a in args]
        # As torch computes it: in float32, then rounded to the result's own type.
        result = OPS[op].torch(*values).to(dtype)
    except (RuntimeError, ValueError):
        return None
    if result.is_floating_point() and bool(torch.isnan(result)):
        return None
    return const(result.item(), dtype)


def cast(expr: Expr, dtype: torch.dtype) -> Expr:
    """`expr` in another element type.

    Between floating types only the value matters to a score, and computing wider than the source is never less
    accurate, so such a cast leaves no node; a constant is still rounded, since overflow to infinity has a meaning.
    """
    if expr.dtype == dtype:
        return expr
    if dtype == torch.bool:
        return pointwise("to_bool", expr, dtype=torch.bool)
    if dtype.is_floating_point:
        if isinstance(expr, Const):
            return const(float(expr.value), dtype)
        if isinstance(expr, Index) and expr.value.is_Integer:
            return const(float(expr.value), dtype)
        if expr.dtype.is_floating_point:
            # A sum keeps the type that it was made in: a narrow one may have lost an addend (patterns/narrow.py).
            told = isinstance(expr, Pointwise) and expr.op not in ("add", "sub")
            return replace(expr, dtype=dtype) if told else expr
        if expr.dtype == torch.bool:
            return pointwise("where", expr, Const(dtype, 1.0), Const(dtype, 0.0), dtype=dtype)
        return Pointwise(dtype, "to_float", (expr,))
    if isinstance(expr, Index):
        return replace(expr, dtype=dtype)
    if expr.dtype == torch.bool:
        return pointwise("where", expr, index(1, dtype), index(0, dtype), dtype=dtype)
    if expr.dtype.is_floating_point:
        return Pointwise(dtype, "to_int", (expr,))
    return replace(expr, dtype=dtype) if isinstance(expr, Pointwise) else expr


def converted(expr: Expr, source: torch.dtype, dtype: torch.dtype) -> Expr:
    """`expr`, which holds a `source`, converted as a program asks with `.to(dtype)`: a narrower float rounds."""
    name = "to_" + str(dtype).removeprefix("torch.")
    if isinstance(expr, Const) or name not in ROUNDINGS or source == torch.bool or _holds(dtype, source):
        return cast(expr, dtype)
    wide = expr if source.is_floating_point else cast(expr, torch.float32)
    return pointwise(name, wide, dtype=dtype)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of `narrow` that a score program meets is one of `wide`; float32 holds all positions."""
    if not narrow.is_floating_point:
        return wide.itemsize >= 4
    return narrow.itemsize < 2 or torch.promote_types(narrow, wide) == wide


def conjunction(terms: list[Expr] | tuple[Expr, ...]) -> Expr:
    """The logical and of boolean terms; true when there are none."""
    result: Expr = TRUE
    for term in terms:
        result = pointwise("and", result, term)
    return result


def conjuncts(expr: Expr) -> tuple[Expr, ...]:
    """The terms whose logical and `expr` is."""
    if isinstance(expr, Pointwise) and expr.op == "and":
        return tuple(t for a in expr.args for t in conjuncts(a))
    return () if expr == TRUE else (expr,)


# --------------------------------------------------------------------------------------------------------------------
# Rebuilding


def rewrite(expr: Expr, rule: Callable[[Expr], Expr | None]) -> Expr:
    """Rebuild `expr` bottom-up: `rule` may replace a node (None keeps it), and pointwise nodes are simplified again.

    What an operator comes down to when it is simplified has been rewritten, and is not a second time.
    """
    children = tuple(rewrite(child, rule) for child in expr.children)
    if children != expr.children:
        if isinstance(expr, Pointwise):
            expr = pointwise(expr.op, *children, dtype=expr.dtype)
            if expr.children != children and any(expr == e for child in children for e in walk(child)):
                return expr
        else:
            expr = expr.with_children(children)
    replaced = rule(expr)
    return expr if replaced is None else replaced


def substitute(expr: Expr, mapping: Mapping[sympy.Symbol, sympy.Expr]) -> Expr:
    """Replace index symbols in every index of the expression."""

    def rule(e: Expr) -> Expr | None:
        match e:
            case Load():
                return replace(e, indices=tuple(sympify(i).xreplace(mapping) for i in e.indices))
            case Index():
                return index(e.value.xreplace(mapping))
            case Softmax():
                return replace(e, at=sympify(e.at).xreplace(mapping))
        return None

    return rewrite(expr, rule)
