"""Write the Triton source of a score program: one small readable module for each distinct spec.

The forward kernel is one ordinary file; what differs between attentions is how a tile of products becomes a tile of
scores and which keys a tile of queries visits. Those are three generated functions, in a module of their own in a cache
folder, whose names hold a hash of their text: Triton keys its caches by name and text, and equal names have collided.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.expr import (
    Const,
    Expr,
    Gather,
    Index,
    Load,
    Pointwise,
    Product,
    free_symbols,
    loads,
    pointwise,
    walk,
)
from flashfuse.kernels.mask import HUGE_FILL, MaskStructure, analyze
from flashfuse.kernels.operators import OPS
from flashfuse.kernels.scale import peel_scale
from flashfuse.kernels.spec import KV_IDX, Q_IDX, AttentionSpec, batch_symbol, to_text

Guards = tuple[Expr, ...]


@dataclass(frozen=True, eq=False)
class ScoreProgram:
    """The compiled-in part of one attention.

    score_masked, score_full: tile of products -> tile of inner scores, for tiles that meet a mask or the end of the
        keys, and for those that do not.
    kv_bounds: query tile -> (start, full_start, full_end, end), see `mask.KvRange`.
    scale: score = scale * inner score.
    fill_threshold: rows whose largest inner score is not above it must see the skipped keys; None when none ever must.
    huge_factor: a power of two for rows whose scores are so large that multiplying them by log2(e) overflows; None when
        no row can be.
    lowest: the score that the smallest finite inner score stands for.
    longest_first: whether later query tiles have more keys to visit.
    shared_batch: whether captured elements are loaded for each score, and are the same along the first batch axis.
    path: the generated source.
    """

    score_masked: Any
    score_full: Any
    kv_bounds: Any
    scale: float
    fill_threshold: float | None
    huge_factor: float | None
    lowest: float
    longest_first: bool
    shared_batch: bool
    path: Path


@functools.lru_cache(maxsize=1024)
def load_program(spec: AttentionSpec) -> ScoreProgram:
    """Generate, write and import the functions of a spec."""
    scale, inner = peel_scale(spec.score)
    mask = analyze(inner)
    digest, source = generate(spec)
    path = _write(digest, source)
    module = _import(path)
    return ScoreProgram(
        score_masked=getattr(module, f"score_masked_{digest}"),
        score_full=getattr(module, f"score_full_{digest}"),
        kv_bounds=getattr(module, f"kv_bounds_{digest}"),
        scale=scale,
        fill_threshold=mask.fill_threshold(scale),
        huge_factor=_huge_factor(scale) if any(_may_be_huge(e) for e in walk(inner)) else None,
        lowest=_lowest(spec.score, scale),
        longest_first=any(line.slope > 0 for line in mask.upper),
        shared_batch=_shares_first_batch_axis(spec.score),
        path=path,
    )


def _shares_first_batch_axis(score: Expr) -> bool:
    tiles = [free_symbols(e) for e in loads(score) if {Q_IDX, KV_IDX} <= free_symbols(e)]
    return bool(tiles) and not any(batch_symbol(0) in symbols for symbols in tiles)


def _huge_factor(scale: float) -> float:
    """The largest power of two that is at most one half and at most scale * log2(e)."""
    return 2.0 ** min(-1, math.floor(math.log2(scale * math.log2(math.e))))


def _lowest(score: Expr, scale: float) -> float:
    """A fill that would overflow when divided by the scale became the smallest inner score; otherwise that, scaled."""
    smallest = torch.finfo(torch.float32).min * scale
    fills = (e.value for e in walk(score) if isinstance(e, Const) and math.isfinite(e.value))
    return min([smallest, *fills])


def _may_be_huge(expr: Expr) -> bool:
    match expr:
        case Const(value=value):
            return math.isfinite(value) and abs(value) >= -HUGE_FILL
        case Load(dtype=dtype) | Gather(dtype=dtype):
            return dtype.is_floating_point
    return False


# --------------------------------------------------------------------------------------------------------------------
# Source text

_TEMPLATE = '''"""score = {score}

Mask: {mask}. The functions below give score / {scale!r}; the kernel applies that factor inside its exponential.
"""

import triton
import triton.language as tl
{imports}

@triton.jit
def score_masked_HASH(qk, n0, n1, n2, n3, q_idx, kv_idx, q_len, kv_len, sizes, captured, strides):
    """{masked}"""
{masked_body}


@triton.jit
def score_full_HASH(qk, n0, n1, n2, n3, q_idx, kv_idx, q_len, kv_len, sizes, captured, strides):
    """{full}"""
{full_body}


@triton.jit
def kv_bounds_HASH(q_start, q_stop, n0, n1, n2, n3, q_len, kv_len, sizes):
    """Keys outside [start, end) are masked for queries [q_start, q_stop); keys in [full_start, full_end) are not."""
{bounds_body}
'''

_LIBDEVICE = "from triton.language.extra import libdevice"
_TANH = "from flashfuse.kernels.elementary import tanh"
# What of a capped score is lost near 0 is far below what operands of 16 bits have lost already.
_BOUNDED_TANH = "from flashfuse.kernels.elementary import bounded_tanh as tanh"


def _imports(spec: AttentionSpec, bodies: Iterable[str]) -> list[str]:
    text = "".join(bodies)
    tanh = _BOUNDED_TANH if spec.product_dtype.itemsize == 2 else _TANH
    return [line for use, line in (("libdevice.", _LIBDEVICE), ("tanh(", tanh)) if use in text]


def generate(spec: AttentionSpec) -> tuple[str, str]:
    """(hash, source text) of the spec's module."""
    scale, inner = peel_scale(spec.score)
    mask = analyze(inner)
    bodies = {
        "masked_body": _score_body(inner, spec.compute_dtype, keys_end=True),
        "full_body": _score_body(mask.full, spec.compute_dtype, keys_end=False),
        "bounds_body": _bounds_body(mask),
    }
    imports = _imports(spec, bodies.values())
    source = _TEMPLATE.format(
        score=to_text(spec.score),
        mask=mask.describe(),
        scale=scale,
        imports="\n".join([*imports, ""]) if imports else "",
        masked=to_text(inner),
        full=to_text(mask.full),
        **bodies,
    )
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    return digest, source.replace("_HASH", f"_{digest}")


def _score_body(score: Expr, float_dtype: torch.dtype, keys_end: bool) -> str:
    writer = _Writer(score, float_dtype, keys_end)
    result = writer.emit(score)
    if not any(isinstance(e, Product) for e in walk(score)):
        result = f"tl.full(qk.shape, 0, qk.dtype) + {result}"
    return _indented([*writer.lines, f"return {result}"])


def _bounds_body(mask: MaskStructure) -> str:
    def extreme(function: str, first: str, terms: Iterable[sympy.Expr]) -> str:
        return functools.reduce(lambda text, term: f"{function}({text}, {index_source(term)})", terms, first)

    def clamped(low: str, value: str, high: str) -> str:
        return f"tl.minimum(tl.maximum({value}, {low}), {high})"

    starts, ends = mask.starts(), mask.ends()
    lines = [
        f"start = {clamped('0', extreme('tl.maximum', '0', starts), 'kv_len')}" if starts else "start = kv_len * 0",
        f"end = tl.maximum({extreme('tl.minimum', 'kv_len', ends)}, start)" if ends else "end = kv_len",
        f"full_start = {clamped('start', extreme('tl.maximum', 'start', mask.full_starts()), 'end')}"
        if starts
        else "full_start = start",
        f"full_end = tl.maximum({extreme('tl.minimum', 'end', mask.full_ends())}, full_start)"
        if ends
        else "full_end = end",
        "return start, full_start, full_end, end",
    ]
    return _indented(lines)


def _indented(lines: Iterable[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


class _Writer:
    """Emits statements for one score expression; `lines` collects the named intermediate values.

    A value keeps size 1 on the tile axes it does not depend on: q_idx is [block_q, 1] and kv_idx is [1, block_kv].
    """

    def __init__(self, score: Expr, float_dtype: torch.dtype, keys_end: bool) -> None:
        self.lines: list[str] = []
        self._float = f"tl.{str(float_dtype).removeprefix('torch.')}"
        self._keys_end = keys_end
        self._uses = Counter(walk(score))
        self._names: dict[tuple[Expr, Guards], str] = {}

    def emit(self, expr: Expr, guards: Guards = ()) -> str:
        """The text of a value; `guards` are the conditions under which it is used at all."""
        key = (expr, guards if any(isinstance(e, (Load, Gather)) for e in walk(expr)) else ())
        if key in self._names:
            return self._names[key]
        text = self._text(expr, key[1])
        read = isinstance(expr, (Load, Gather))
        if not read and not (isinstance(expr, Pointwise) and self._uses[expr] > 1):
            return text
        name = f"t{expr.tensor}_{len(self.lines)}" if isinstance(expr, (Load, Gather)) else f"x{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        self._names[key] = name
        return name

    def _text(self, expr: Expr, guards: Guards) -> str:
        match expr:
            case Product():
                return "qk"
            case Const(value=value):
                return self._constant(value)
            case Index(value=value):
                return index_source(value)
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
            case Pointwise(op=op, args=args):
                return OPS[op].triton.format(*(self.emit(a, guards) for a in args))
        raise TypeError(f"a score program holds no {type(expr).__name__}")

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
        address = " + ".join([f"captured[{load.tensor}]", *self._offsets(load, guards)])
        positions = _positions(load)
        masks = [self.emit(g) for g in guards if _positions(g) <= positions]
        if self._keys_end and KV_IDX in positions:
            masks.append("(kv_idx < kv_len)")
        masked = f", mask={' & '.join(masks)}, other=0" if masks else ""
        widened = f".to({self._float})" if load.dtype.is_floating_point else ""
        return f"tl.load({address}{masked}){widened}"

    def _offsets(self, load: Load | Gather, guards: Guards) -> list[str]:
        """The terms of the address: scalars first, and terms in both positions last."""
        if isinstance(load, Gather):
            strides = [f"strides[{load.tensor}][{axis}]" for axis in range(len(load.at))]
            return [f"({self.emit(a, guards)}).to(tl.int64) * {s}" for a, s in zip(load.at, strides, strict=True)]
        terms = []
        for axis, index in enumerate(load.indices):
            stride = f"strides[{load.tensor}][{axis}]"
            terms += [(_position_rank(t), _offset(t, stride)) for t in sympy.Add.make_args(sympy.expand(index))]
        return [text for _, text in sorted(terms, key=lambda t: t[0]) if text]


def _with_guard(guards: Guards, condition: Expr) -> Guards:
    """`guards` and `condition`, when the latter depends on positions and sizes only."""
    if any(isinstance(e, (Load, Gather, Product)) for e in walk(condition)):
        return guards
    return tuple(dict.fromkeys((*guards, condition)))


def _positions(expr: Expr) -> frozenset[sympy.Symbol]:
    return free_symbols(expr) & {Q_IDX, KV_IDX}


def _position_rank(term: sympy.Expr) -> int:
    """Scalars 0, one tile axis 1, both 2."""
    return len(term.free_symbols & {Q_IDX, KV_IDX})


def _offset(term: sympy.Expr, stride: str) -> str:
    """The 64-bit offset of one term of an index; empty for 0."""
    if term == 0:
        return ""
    if term.is_Integer:
        return f"({index_source(term)} * {stride})"
    return f"{index_source(term)}.to(tl.int64) * {stride}"


def index_source(value: sympy.Expr) -> str:
    """A sympy index expression as Triton source. Division rounds down where C's, and so Triton's, rounds to zero."""
    if isinstance(value, sympy.Symbol):
        return f"sizes[{value.name[4:]}]" if value.name[:4] == "size" else value.name
    if value.is_Integer:
        return str(int(value))
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
    if value.is_Add or value.is_Mul:
        return "(" + (" + " if value.is_Add else " * ").join(index_source(a) for a in value.args) + ")"
    raise TypeError(f"no Triton form for the index expression {value} ({type(value).__name__})")


# --------------------------------------------------------------------------------------------------------------------
# Files


def cache_folder() -> Path:
    """Where generated modules are written: $FLASHFUSE_CACHE_DIR, or ~/.cache/flashfuse."""
    return Path(os.environ.get("FLASHFUSE_CACHE_DIR") or Path.home() / ".cache" / "flashfuse")


def _write(digest: str, source: str) -> Path:
    """Write the module unless it is there already. Other processes never see half a file."""
    path = cache_folder() / f"score_{digest}.py"
    if path.exists() and path.read_text() == source:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".py", delete=False) as file:
        file.write(source)
    os.replace(file.name, path)
    return path


def _import(path: Path) -> Any:
    name = f"flashfuse_generated.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import the generated module {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module
