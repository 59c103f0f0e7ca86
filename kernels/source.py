"""Score programs as Triton source text.

A value keeps size 1 on the tile axes it does not depend on: q_idx is [block_q, 1] and kv_idx is [1, block_kv].
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import sympy
import torch

from flashfuse.kernels.expr import (
    Const,
    Element,
    Expr,
    Gather,
    Index,
    Load,
    Loaded,
    Pointwise,
    Product,
    free_symbols,
    loads,
    places,
    walk,
)
from flashfuse.kernels.index_source import fits_32_bits, index_source, whole_source
from flashfuse.kernels.normal import number, pointwise
from flashfuse.kernels.operators import OPS
from flashfuse.kernels.spec import D_IDX, KV_IDX, MAX_BATCH_AXES, Q_IDX, batch_symbol

Guards = tuple[Expr, ...]

# What a generated function takes: one of a tile of products, of the rows [block_q, block_d] and columns [block_d,
# block_kv] that make one, of the rows of a tile, of a tile of keys or values.
_POSITIONS = "n0, n1, n2, n3, q_idx, kv_idx, q_len, kv_len, sizes, captured, strides"
TILE_ARGUMENTS = f"qk, {_POSITIONS}"
OPERANDS_ARGUMENTS = f"q, k, PRECISION: tl.constexpr, {_POSITIONS}"
ROW_ARGUMENTS = "n0, n1, n2, n3, q_idx, q_len, kv_len, sizes, captured, strides"
STORED_ARGUMENTS = "x, n0, n1, n2, n3, kv_idx, d_idx, q_len, kv_len, sizes, captured, strides"


def tile_body(programs: Sequence[Expr], float_dtype: torch.dtype, keys_end: bool) -> str:
    """Statements that return the values of programs on a tile of products `qk`, sharing what they share.

    keys_end: whether the tile may reach behind the last key.
    """
    lines, results = tile_values(programs, float_dtype, keys_end)
    return indented([*lines, f"return {', '.join(results)}"])


def operands_body(program: Expr, float_dtype: torch.dtype, keys_end: bool) -> str:
    """Statements that return (value of the program on a tile, the tile of products `qk`), which they form themselves.

    Reads come first: Triton lays out the rows of a tile as the last of products and reads has its tile laid out, and as
    a read has it, a row's largest score takes shuffles through all lanes. Tiles that are copied ahead of time stay.
    """
    writer = Writer([program], float_dtype, keys_end)
    result = writer.emit(program) if _products(program) else writer.filled(program, "qk.shape")
    made = [e for _, e in writer.lines if isinstance(e, (Load, Gather)) and not isinstance(e, Loaded)]
    reads = [read for read in made if keys_end or not _is_copied_ahead(read)]
    first = {e for read in reads for e in walk(read)}
    before = [text for text, e in writer.lines if not _products(e) and (e in first or not loads(e))]
    after = [text for text, _ in writer.lines if text not in before]
    return indented([*before, "qk = product(q, k, PRECISION)", *after, f"return {result}, qk"])


def _is_copied_ahead(read: Load | Gather) -> bool:
    """Whether Triton may copy a read to shared memory ahead of time: of pairs, those of neighbouring keys together."""
    last = places(read)[-1] if {Q_IDX, KV_IDX} <= free_symbols(read) else None
    return isinstance(last, Index) and not {Q_IDX, KV_IDX} & (last.value - KV_IDX).free_symbols


def _lanes_along(read: Load | Gather) -> str | None:
    """The positions along which neighbours are read from the same row of a tensor, if the others choose its row."""
    *outer, last = map(free_symbols, places(read))
    rows = frozenset().union(*outer) & {Q_IDX, KV_IDX}
    if len(rows) != 1 or not {Q_IDX, KV_IDX} <= last:
        return None
    return "q_idx" if KV_IDX in rows else "kv_idx"


def tile_values(programs: Sequence[Expr], float_dtype: torch.dtype, keys_end: bool) -> tuple[list[str], list[str]]:
    """Statements, and the texts of the programs' values after them, each in the shape of the tile `qk`."""
    writer = Writer(programs, float_dtype, keys_end)
    results = [writer.emit(p) if _products(p) else writer.filled(p, "qk.shape") for p in programs]
    return writer.texts, results


def row_body(program: Expr) -> str:
    """Statements that return the value of a program that `is_row`, for each of the positions q_idx.

    In float32: other arithmetic is done in torch.
    """
    writer = Writer([program], torch.float32, keys_end=False)
    result = writer.filled(program, "q_idx.shape")
    return indented([*writer.texts, f"return {result}"])


def stored_body(program: Expr) -> str:
    """Statements that return the value of a program of keys or values on a tile `x` of stored elements, in float32."""
    writer = Writer([program], torch.float32, keys_end=False)
    result = writer.filled(program, "x.shape")
    return indented([*writer.texts, f"return {result}"])


def reads_body(reads: Sequence[Load], types: Sequence[torch.dtype]) -> str:
    """Statements that return the elements of reads of queries or of keys as a tuple, of these types."""
    writer = Writer(reads, torch.float32, keys_end=True)
    found = [f"{writer.emit(read)}.to(tl.{str(dtype)[6:]})" for read, dtype in zip(reads, types, strict=True)]
    return indented([*writer.texts, f"return ({', '.join(found)},)"])


def is_needed_everywhere(program: Expr, read: Load) -> bool:
    """Whether a read of a program lies inside its tensor at every position: no condition decides on it."""
    writer = Writer([program], torch.float32, keys_end=True)
    writer.emit(program)
    return not any(e == read and guards for e, guards in writer.values)


def is_row(program: Expr) -> bool:
    """Whether a program has one value for all keys of a query."""
    return KV_IDX not in free_symbols(program) and not _products(program)


def _products(expr: Expr) -> bool:
    return any(isinstance(e, Product) for e in walk(expr))


def indented(lines: Iterable[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


class Writer:
    """Emits statements for programs.

    lines: the statements that name intermediate values, in order, and those values.
    """

    def __init__(self, programs: Sequence[Expr], float_dtype: torch.dtype, keys_end: bool) -> None:
        self.lines: list[tuple[str, Expr]] = []
        self._float = f"tl.{str(float_dtype).removeprefix('torch.')}"
        self._keys_end = keys_end
        self._uses = Counter(e for program in programs for e in walk(program))
        self._names: dict[tuple[Expr, Guards], str] = {}

    @property
    def texts(self) -> list[str]:
        return [text for text, _ in self.lines]

    def filled(self, program: Expr, shape: str) -> str:
        """The text of a value spread over `shape`."""
        value = number(program)
        if value is not None and math.isfinite(value):
            return f"tl.full({shape}, {value}, {self._float})"
        return f"tl.full({shape}, 0, {self._float}) + {self.emit(program)}"

    def emit(self, expr: Expr, guards: Guards = ()) -> str:
        """The text of a value; `guards` are the conditions under which it is used at all."""
        key = (expr, _relevant(guards, expr))
        if key in self._names:
            return self._names[key]
        text = self._text(expr, key[1])
        read = isinstance(expr, (Load, Gather))
        if not read and not (isinstance(expr, Pointwise) and self._uses[expr] > 1):
            return text
        name = f"t{expr.tensor}_{len(self.lines)}" if isinstance(expr, (Load, Gather)) else f"x{len(self.lines)}"
        self.lines.append((f"{name} = {text}", expr))
        self._names[key] = name
        return name

    @property
    def values(self) -> Iterable[tuple[Expr, Guards]]:
        """What has a name, and the conditions under which it is used."""
        return self._names

    def _text(self, expr: Expr, guards: Guards) -> str:
        match expr:
            case Product(slot=0):
                return "qk"
            case Element():
                return "x"
            case Const(dtype=dtype, value=int() as value) if dtype != torch.bool and not dtype.is_floating_point:
                return whole_source(value)
            case Const(value=value):
                return self._constant(value)
            case Index(value=value):
                return index_source(value)
            case Loaded(name=name):
                widened = f"{name}.to({self._float})" if expr.dtype.is_floating_point else name
                return f"({name} != 0)" if expr.dtype == torch.bool else widened
            case Load() | Gather():
                return self._load(expr, guards)
            case Pointwise(op="to_float", args=(Index(value=value),)):
                return self._float_of(value)
            case Pointwise(op="to_float", args=(arg,)):
                return f"({self.emit(arg, guards)}).to({self._float})"
            case Pointwise(op="where", args=(condition, left, right)):
                branches = (
                    self.emit(condition, guards),
                    self.emit(left, _with_guard(guards, condition)),
                    self.emit(right, _with_guard(guards, pointwise("not", condition))),
                )
                return OPS["where"].triton.format(*branches)
            case Pointwise(op="and" | "or" as op, args=(left, right)):
                # A side counts only where the other one does not decide.
                left_counts, right_counts = _with_guard(guards, _open(op, right)), _with_guard(guards, _open(op, left))
                return OPS[op].triton.format(self.emit(left, left_counts), self.emit(right, right_counts))
            case Pointwise(op="pow", args=(arg, exponent)) if number(exponent) in _WHOLE_POWERS:
                return f"power({self._emit_float(arg, guards)}, {number(exponent):.0f})"
            case Pointwise(dtype=torch.int64, op=op, args=args) if op != "to_int" and not fits_32_bits(expr):
                return OPS[op].triton.format(*(f"tl.cast({self.emit(a, guards)}, tl.int64)" for a in args))
            case Pointwise(op=op, args=args):
                emit = self._emit_float if OPS[op].result == "float" else self.emit
                return OPS[op].triton.format(*(emit(a, guards) for a in args))
        raise TypeError(f"a score program holds no {type(expr).__name__}")

    def _emit_float(self, expr: Expr, guards: Guards) -> str:
        """The text of an argument of a function of floats, which may be an integer or a boolean."""
        if expr.dtype.is_floating_point or number(expr) is not None:
            return self.emit(expr, guards)
        return self.emit(Pointwise(torch.float32, "to_float", (expr,)), guards)

    def _float_of(self, value: sympy.Expr) -> str:
        """A position as a float: its terms in the query and in the key apart, so that no score needs a conversion."""
        terms = sympy.Add.make_args(sympy.expand(value))
        keys = sympy.Add(*(t for t in terms if KV_IDX in t.free_symbols))
        parts = (keys, sympy.expand(value - keys)) if Q_IDX not in keys.free_symbols else (value,)
        texts = [f"{index_source(p)}.to({self._float})" for p in parts if p != 0 and not p.is_Integer]
        texts += [self._constant(float(p)) for p in parts if p != 0 and p.is_Integer]
        return f"({' + '.join(texts)})" if texts else self._constant(0.0)

    def _constant(self, value: float | int | bool) -> str:
        if isinstance(value, bool):
            return repr(value)
        if math.isinf(value):
            return f'float("{"-" if value < 0 else ""}inf")'
        # Triton reads a Python float as float32 where it fits.
        exact = self._float == "tl.float32" and (value == 0 or abs(value) >= torch.finfo(torch.float32).tiny)
        return repr(value) if exact else f"tl.full((), {value!r}, {self._float})"

    def _load(self, load: Load | Gather, guards: Guards) -> str:
        """A load, masked by the conditions under which its value is used, and behind the last key.

        Indices may leave the tensor where a `where` discards the value. Rows behind the last query repeat it and need
        no mask.
        """
        positions = _positions(load)
        used = [g for g in guards if _positions(g) <= positions]
        terms = [f"captured[{load.tensor}]", *self._offsets(load, guards)]
        if not positions:
            # Where batch positions lie along rows, a single address takes no mask that differs from row to row.
            apart = set().union(*map(free_symbols, used)) - free_symbols(load)
            terms += [f"{s.name} * 0" for s in sorted(apart & _BATCH, key=str)]
        address = " + ".join(terms)
        masks = [self.emit(g) for g in used]
        if self._keys_end and KV_IDX in positions and "(kv_idx < kv_len)" not in masks:
            masks.append("(kv_idx < kv_len)")
        widened = f".to({self._float})" if load.dtype.is_floating_point else ""
        along = _lanes_along(load) if positions else None
        if along:
            return f"load_along({address}, {' & '.join(masks) or None}, {along}){widened}"
        masked = f", mask={' & '.join(masks)}, other=0" if masks else ""
        return f"tl.load({address}{masked}){widened}"

    def _offsets(self, load: Load | Gather, guards: Guards) -> list[str]:
        """The terms of the address: scalars first, and terms in both positions last."""
        terms: list[tuple[int, str]] = []
        for axis, at in enumerate(places(load)):
            stride = f"strides[{load.tensor}][{axis}]"
            if isinstance(at, Index):
                terms += [(_position_rank(t), _offset(t, stride)) for t in sympy.Add.make_args(sympy.expand(at.value))]
            else:
                terms.append((2, f"({self.emit(at, guards)}).to(tl.int64) * {stride}"))
        return [text for _, text in sorted(terms, key=lambda t: t[0]) if text]


_WHOLE_POWERS = range(2, 9)
_BATCH = {batch_symbol(axis) for axis in range(MAX_BATCH_AXES)}


def _open(op: str, side: Expr) -> Expr:
    """Where this side of an "and" or "or" leaves the decision to the other one."""
    return side if op == "and" else pointwise("not", side)


def _with_guard(guards: Guards, condition: Expr) -> Guards:
    """`guards`, and those terms of `condition` that depend on positions and sizes only."""
    terms = (t for t in _terms(condition) if not loads(t) and not _products(t))
    return tuple(dict.fromkeys((*guards, *terms)))


def _terms(condition: Expr) -> tuple[Expr, ...]:
    """What holds, each by itself, where `condition` does."""
    match condition:
        case Pointwise(op="not", args=(Pointwise(op="or", args=args),)):
            return tuple(t for a in args for t in _terms(pointwise("not", a)))
        case Pointwise(op="and", args=args):
            return tuple(t for a in args for t in _terms(a))
    return (condition,)


def _relevant(guards: Guards, expr: Expr) -> Guards:
    """The guards that a read in `expr` can be masked by."""
    reads = [_positions(read) for read in loads(expr)]
    return tuple(g for g in guards if any(_positions(g) <= positions for positions in reads))


def _positions(expr: Expr) -> frozenset[sympy.Symbol]:
    return free_symbols(expr) & {Q_IDX, KV_IDX, D_IDX}


def _position_rank(term: sympy.Expr) -> int:
    """Scalars 0, one tile axis 1, both 2."""
    return len(term.free_symbols & {Q_IDX, KV_IDX, D_IDX})


def _offset(term: sympy.Expr, stride: str) -> str:
    """The 64-bit offset of one term of an index; empty for 0."""
    if term == 0:
        return ""
    if term.is_Integer:
        return f"(tl.full((), {int(term)}, tl.int64) * {stride})"
    return f"{index_source(term)}.to(tl.int64) * {stride}"
