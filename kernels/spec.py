"""`AttentionSpec`: one attention, as a value. Two sites with equal specs share one kernel.

An attention is, over batch axes n0, n1, .. (batch, key/value head, query group, ... whatever the model has):

    out[n.., i, d] = sum_j factor(n.., i, j) * P[n.., i, j] * v[n.., j, d]
    P[n.., i, j]   = exp(S[n.., i, j]) / (exp(sink(n.., i)) + sum_j exp(S[n.., i, j]))
    S[n.., i, j]   = score(sum_r q[n.., i, r] * k[n.., j, r], n.., i, j)
    k[n.., j, r]   = key(stored k[n.., j, r], n.., j, r), and the same for v by value

without `key` and `value` k and v are what is stored, without `factor` and `sink` it is an ordinary softmax attention.
With the normaliser "none" P is S itself, as in sigmoid attention. With dropout p a weight of a value becomes 0 with
probability p, or else is divided by 1 - p: see `dropout`.

Operands are tensors [N0, .., Nm, T, D] that broadcast against each other over the batch axes: an axis of size 1 (or of
stride 0) is shared. Grouped-query attention is therefore q [B, Hkv, G, Tq, D] with k and v [B, Hkv, 1, Tkv, D]; no
operand is ever expanded in memory. The spec's text form is what the operator carries, so a compiled graph that was
cached by another process still knows its program.
"""

from __future__ import annotations

import ast
import functools
import json
import math
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.expr import Const, Element, Expr, Gather, Index, Load, Pointwise, Product, free_symbols, gather
from flashfuse.kernels.normal import cast, const, index, pointwise
from flashfuse.kernels.operators import OPS

MAX_BATCH_AXES = 4

# Symbols a score program may use. q_idx and kv_idx are absolute positions in the query and key/value sequence. Programs
# of keys and values use d_idx, the position in a head, and no q_idx.
Q_IDX = sympy.Symbol("q_idx", integer=True, nonnegative=True)
KV_IDX = sympy.Symbol("kv_idx", integer=True, nonnegative=True)
D_IDX = sympy.Symbol("d_idx", integer=True, nonnegative=True)
Q_LEN = sympy.Symbol("q_len", integer=True, positive=True)
KV_LEN = sympy.Symbol("kv_len", integer=True, positive=True)


@functools.cache
def batch_symbol(axis: int) -> sympy.Symbol:
    """Position on batch axis number `axis`."""
    return sympy.Symbol(f"n{axis}", integer=True, nonnegative=True)


@functools.cache
def size_symbol(slot: int) -> sympy.Symbol:
    """The run-time integer `sizes[batch_axes + slot]` of the operator call."""
    return sympy.Symbol(f"size{slot}", integer=True)


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention computes, independent of sizes and strides.

    batch_axes: how many leading batch axes every operand has, 0 to 4.
    score: the score at (n.., q_idx, kv_idx) in natural-log units; `Product(0)` is the query-key product, and
        `Load(c, ..)` reads captured tensor number c.
    captured: element type of each captured tensor.
    num_sizes: how many run-time integers (`size0`, ..) the program uses besides q_len and kv_len.
    product_dtype: element type in which q and k are multiplied (accumulation is float32, float64 for float64).
    probs_dtype: element type in which the probabilities meet v.
    out_dtype: element type of the output.
    empty_row: "nan" or "zero", what a row whose every score is -inf gives, whatever its sink. Beside a sink in the
        softmax itself such a row is "zero"; where the sink is applied to a softmax's result it is "nan".
    out_order: memory order of the output's axes [n.., q, d], outermost first; the last is always d.
    normaliser: "softmax", or "none" where `score` is the weight of the value itself.
    sink: one more score of each row, at (n.., q_idx), that takes probability and has no value; None for no sink.
        Softmax-plus-one is the sink 0.
    factor: what the probability at (n.., q_idx, kv_idx) is multiplied by after the softmax; None for 1. A boolean one
        is the same for a whole row, and a row where it is false gives 0, even one without a key.
    dropout: the probability with which a weight is dropped, 0 <= dropout < 1.
    key, value: the element of k, of v at (n.., kv_idx, d_idx) as a function of the one that is stored, `Element`, and
        of captured tensors: how a quantised cache is read. It is computed in `compute_dtype` and rounded to
        `product_dtype`, or `probs_dtype`. None where those hold what is stored, and it is used as it is.
    tuned: whether kernels and tiles are to be searched on the device (`tuning`). It is no part of what is computed, so
        specs that differ in it are equal and share kernels; their texts differ, and so do compiled graphs.
    """

    batch_axes: int
    score: Expr
    captured: tuple[torch.dtype, ...]
    num_sizes: int
    product_dtype: torch.dtype
    probs_dtype: torch.dtype
    out_dtype: torch.dtype
    empty_row: str
    out_order: tuple[int, ...]
    normaliser: str = "softmax"
    sink: Expr | None = None
    factor: Expr | None = None
    dropout: float = 0.0
    key: Expr | None = None
    value: Expr | None = None
    tuned: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.batch_axes <= MAX_BATCH_AXES:
            raise ValueError(f"an attention has 0 to {MAX_BATCH_AXES} batch axes, got {self.batch_axes}")
        if self.empty_row not in ("nan", "zero"):
            raise ValueError(f"empty_row is 'nan' or 'zero', got {self.empty_row!r}")
        if self.normaliser not in ("softmax", "none"):
            raise ValueError(f"normaliser is 'softmax' or 'none', got {self.normaliser!r}")
        if self.normaliser == "none" and self.sink is not None:
            raise ValueError("a sink takes part in a softmax, and the normaliser is 'none'")
        if self.factor is not None and self.factor.dtype == torch.bool and KV_IDX in free_symbols(self.factor):
            raise ValueError("a boolean factor decides over whole rows, and this one differs along the keys")
        if any(Q_IDX in free_symbols(e) for e in (self.key, self.value) if e is not None):
            raise ValueError("keys and values are the same for all queries, and a program of them uses q_idx")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a probability below 1, got {self.dropout}")
        rank = self.batch_axes + 2
        if sorted(self.out_order) != list(range(rank)) or self.out_order[-1] != rank - 1:
            raise ValueError(
                f"out_order must be a permutation of {rank} axes that ends with {rank - 1}, got {self.out_order}"
            )

    @functools.cached_property
    def _hash(self) -> int:
        programs = (self.score, self.sink, self.factor, self.key, self.value)
        return hash((self.batch_axes, programs, self.captured, self.product_dtype, self.probs_dtype, self.out_order))

    def __hash__(self) -> int:
        """Kept: a spec is looked up on every call of the operator, and its program may be a large expression."""
        return self._hash

    @property
    def programs(self) -> tuple[Expr, ...]:
        """Every expression over queries and keys."""
        return tuple(e for e in (self.score, self.sink, self.factor) if e is not None)

    def shares_stored(self, axis: int) -> bool:
        """Whether the programs of keys and values are the same along batch axis number `axis`."""
        return not any(batch_symbol(axis) in free_symbols(e) for e in (self.key, self.value) if e is not None)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Element type of scores, running maximum, sum and accumulator."""
        return torch.float64 if self.product_dtype == torch.float64 else torch.float32

    def fields(self) -> dict[str, Any]:
        """The spec as values that JSON has, its expressions written as maths."""
        return {
            "score": to_text(self.score),
            "batch_axes": self.batch_axes,
            "captured": [_name(d) for d in self.captured],
            "num_sizes": self.num_sizes,
            "product_dtype": _name(self.product_dtype),
            "probs_dtype": _name(self.probs_dtype),
            "out_dtype": _name(self.out_dtype),
            "empty_row": self.empty_row,
            "out_order": list(self.out_order),
            "normaliser": self.normaliser,
            "sink": None if self.sink is None else to_text(self.sink),
            "factor": None if self.factor is None else to_text(self.factor),
            "dropout": self.dropout,
            "key": None if self.key is None else to_text(self.key),
            "value": None if self.value is None else to_text(self.value),
            "tuned": self.tuned,
        }

    def to_text(self) -> str:
        """`fields` as one line; `from_text` reads it back.

        It is JSON in single quotes, which C++ that Inductor writes can hold in a string as it is.
        """
        return json.dumps(self.fields()).replace('"', "'")

    @staticmethod
    def from_text(text: str) -> AttentionSpec:
        """Parse `to_text`'s form. Raises ValueError on anything else."""
        return _parse_spec(text)


@functools.lru_cache(maxsize=4096)
def _parse_spec(text: str) -> AttentionSpec:
    fields = json.loads(text.replace("'", '"'))
    captured = tuple(_dtype(d) for d in fields["captured"])
    product_dtype = _dtype(fields["product_dtype"])
    score_dtype = torch.float64 if product_dtype == torch.float64 else torch.float32

    def optional(name: str) -> Expr | None:
        return None if fields[name] is None else parse(fields[name], captured, score_dtype)

    return AttentionSpec(
        batch_axes=fields["batch_axes"],
        score=parse(fields["score"], captured, score_dtype),
        captured=captured,
        num_sizes=fields["num_sizes"],
        product_dtype=product_dtype,
        probs_dtype=_dtype(fields["probs_dtype"]),
        out_dtype=_dtype(fields["out_dtype"]),
        empty_row=fields["empty_row"],
        out_order=tuple(fields["out_order"]),
        normaliser=fields["normaliser"],
        sink=optional("sink"),
        factor=optional("factor"),
        dropout=fields["dropout"],
        key=optional("key"),
        value=optional("value"),
        tuned=fields["tuned"],
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a torch dtype")
    return dtype


# --------------------------------------------------------------------------------------------------------------------
# Text form: Python expression syntax, over q_idx, kv_idx, d_idx, n0.., q_len, kv_len, size0.., qk (the product), x (the
# stored element) and t0[..]

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "eq": "==", "ne": "!=", "and": "&", "or": "|",
}  # fmt: skip


def to_text(expr: Expr) -> str:
    """The expression as Python-like maths, with every operation in parentheses."""
    match expr:
        case Product(slot=slot):
            return "qk" if slot == 0 else f"qk{slot}"
        case Element():
            return "x"
        case Const(value=value):
            return repr(value) if isinstance(value, bool) or math.isfinite(value) else f"{'-' if value < 0 else ''}inf"
        case Index(value=value):
            return index_text(value)
        case Load(tensor=slot, indices=indices):
            return f"t{slot}[{', '.join(index_text(i) for i in indices) or '()'}]"
        case Gather(tensor=slot, at=at):
            return f"t{slot}[{', '.join(to_text(a) for a in at)}]"
        case Pointwise(op=op, args=args):
            texts = [to_text(a) for a in args]
            if op == "not":
                return f"(~{texts[0]})"
            return f"({texts[0]} {_INFIX[op]} {texts[1]})" if op in _INFIX else f"{op}({', '.join(texts)})"
    raise TypeError(f"a score program holds no {type(expr).__name__}")


def index_text(value: Any) -> str:
    """A sympy index expression as Python source, with // for floor division and % for remainder."""
    value = sympy.sympify(value)
    if isinstance(value, sympy.Symbol):
        return value.name
    if value.is_Integer:
        return str(int(value))
    if isinstance(value, FloorDiv):
        return f"({index_text(value.args[0])} // {index_text(value.args[1])})"
    if isinstance(value, (Mod, sympy.Mod)):
        return f"({index_text(value.args[0])} % {index_text(value.args[1])})"
    if value.is_Add:
        return "(" + " + ".join(index_text(a) for a in value.args) + ")"
    if value.is_Mul:
        return "(" + " * ".join(index_text(a) for a in value.args) + ")"
    if value.is_Pow and value.exp.is_Integer and value.exp > 0:
        return "(" + " * ".join([index_text(value.base)] * int(value.exp)) + ")"
    raise TypeError(f"no text form for the index expression {value} ({type(value).__name__})")


_BINARY: dict[type[ast.AST], str] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.BitAnd: "and", ast.BitOr: "or",
    ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge", ast.Eq: "eq", ast.NotEq: "ne",
}  # fmt: skip


def parse(text: str, captured: tuple[torch.dtype, ...] = (), score_dtype: torch.dtype = torch.float32) -> Expr:
    """Read the text form of a score program. Captured tensor t{c} has element type captured[c]. Raises ValueError."""

    def number(node: ast.expr) -> sympy.Expr:
        parsed = build(node)
        if not isinstance(parsed, Index):
            raise ValueError(f"{ast.unparse(node)} is not an index expression in {text!r}")
        return parsed.value

    def position(node: ast.expr) -> Expr:
        parsed = build(node)
        if parsed.dtype.is_floating_point or parsed.dtype == torch.bool:
            raise ValueError(f"{ast.unparse(node)} is not an index expression in {text!r}")
        return parsed

    def build(node: ast.expr) -> Expr:
        match node:
            case ast.Constant(value=bool() | int() | float() as value):
                return const(value, score_dtype) if isinstance(value, float) else const(value)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                inner = build(operand)
                return Const(inner.dtype, -inner.value) if isinstance(inner, Const) else pointwise("neg", inner)
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                return pointwise("not", build(operand))
            case ast.Name(id="inf"):
                return Const(score_dtype, math.inf)
            case ast.Name(id="x"):
                return Element(score_dtype)
            case ast.Name(id=name) if name.startswith("qk"):
                return Product(score_dtype, int(name[2:] or 0))
            case ast.Name(id=name):
                return index(_symbol(name))
            case ast.Subscript(value=ast.Name(id=name), slice=inner):
                slot = int(name.removeprefix("t"))
                parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
                return gather(captured[slot], slot, tuple(position(p) for p in parts))
            case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
                return index(FloorDiv(number(left), number(right)))
            case ast.BinOp(left=left, op=ast.Mod(), right=right):
                return index(Mod(number(left), number(right)))
            case ast.BinOp(left=left, op=op, right=right):
                return pointwise(_BINARY[type(op)], build(left), build(right))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return pointwise(_BINARY[type(op)], build(left), build(right))
            case ast.Call(func=ast.Name(id=name), args=args):
                if name not in OPS:
                    raise ValueError(f"unknown operator {name} in {text!r}")
                return cast(build(args[0]), score_dtype) if name == "to_float" else pointwise(name, *map(build, args))
        raise ValueError(f"cannot read {ast.unparse(node)!r} in the score program {text!r}")

    return build(ast.parse(text, mode="eval").body)


def _symbol(name: str) -> sympy.Symbol:
    known = {"q_idx": Q_IDX, "kv_idx": KV_IDX, "d_idx": D_IDX, "q_len": Q_LEN, "kv_len": KV_LEN}
    if name in known:
        return known[name]
    if name[:1] == "n" and name[1:].isdigit():
        return batch_symbol(int(name[1:]))
    if name[:4] == "size" and name[4:].isdigit():
        return size_symbol(int(name[4:]))
    raise ValueError(f"unknown name {name!r} in a score program")
