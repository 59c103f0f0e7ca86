"""Write the derivatives of an attention's programs as Triton functions, for a backward kernel.

They come in a module of their own and take the arguments of the forward's functions, so that a kernel can call both on
one tile. As there, s is the inner score, score = scale * s, and the derivatives of the score are `scale` times those of
s. The gradient of a captured tensor is what its reads scatter: at every (n.., q_idx, kv_idx) the gradient of the score
times d score / d read is added to the element that was read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashfuse.kernels.derivative import Leaf, derivative, is_finite, leaves
from flashfuse.kernels.expr import Expr, Pointwise, Product, walk
from flashfuse.kernels.mask import mask_of
from flashfuse.kernels.modules import finished, load_module
from flashfuse.kernels.normal import const, number, pointwise
from flashfuse.kernels.scale import inner_score, unscaled
from flashfuse.kernels.source import ROW_ARGUMENTS, TILE_ARGUMENTS, is_row, row_body, tile_body
from flashfuse.kernels.spec import AttentionSpec, to_text


@dataclass(frozen=True, eq=False)
class LeafDerivative:
    """The derivative of one program with respect to one of its leaves.

    leaf: a product, or a read of a captured floating-point tensor.
    masked, full: its values on a tile that may reach behind the last key, and on one that meets neither that nor a
        mask; one and the same function of rows where the program is one of rows.
    """

    leaf: Leaf
    masked: Any
    full: Any


@dataclass(frozen=True, eq=False)
class DerivativeProgram:
    """What a backward kernel compiles in for one attention.

    score_and_grad_masked, score_and_grad_full: tile of products -> (s, d score / d product divided by `slope`).
    reads: ds / d read, for every distinct read of a floating-point tensor in the score.
    sink, factor: the derivatives of these programs, empty where the spec has none.
    scale: score = scale * s.
    slope: the derivative of the score with respect to the product, where one number is all there is of it beside
        masks: a sum is multiplied by it at its end. Else `scale`.
    is_flat: whether it is that number, or 0, for each pair.
    masked_where, full_where: what takes the gradient from scores that a mask has made, on either kind of tile. "slope":
        it is 0 there. "product": it is, and elsewhere may be infinite. None where no mask, not even of data, is left.
    path: the generated source.
    """

    score_and_grad_masked: Any
    score_and_grad_full: Any
    reads: tuple[LeafDerivative, ...]
    sink: tuple[LeafDerivative, ...]
    factor: tuple[LeafDerivative, ...]
    scale: float
    slope: float
    is_flat: bool
    masked_where: str
    full_where: str | None
    path: Path


@functools.lru_cache(maxsize=1024)
def load_derivatives(spec: AttentionSpec, ranged: bool = False) -> DerivativeProgram:
    """Generate, write and import the derivatives of a spec.

    ranged: for calls with `kv_ranges`, which vouch for what data masks too; see `load_program`.
    """
    digest, source = generate_derivatives(spec, ranged)
    path, module = load_module(f"derivatives_{digest}", source)

    def functions(name: str) -> tuple[Any, Any]:
        of_rows = getattr(module, f"{name}_{digest}", None)
        variants = tuple(getattr(module, f"{name}_{variant}_{digest}", of_rows) for variant in ("masked", "full"))
        return variants[0], variants[1]

    def derivatives(name: str, of: tuple[Leaf, ...]) -> tuple[LeafDerivative, ...]:
        return tuple(LeafDerivative(leaf, *functions(f"{name}_grad{i}")) for i, leaf in enumerate(of))

    scale, inner = inner_score(spec)
    slope = derivative(inner, _product_of(inner))
    masked_where = "slope" if is_finite(slope) else "product"
    masked, full = functions("score_and_grad")
    return DerivativeProgram(
        score_and_grad_masked=masked,
        score_and_grad_full=full,
        reads=derivatives("score", _reads(inner)),
        sink=() if spec.sink is None else derivatives("sink", leaves(spec.sink)),
        factor=() if spec.factor is None else derivatives("factor", leaves(spec.factor)),
        scale=scale,
        slope=scale * _only_number(slope),
        is_flat=all(found in (0, _only_number(slope)) for found in _numbers(slope)),
        masked_where=masked_where,
        full_where=masked_where if _is_masked(_unmasked(spec, ranged)) else None,
        path=path,
    )


# --------------------------------------------------------------------------------------------------------------------
# Source text

_HEADER = '''"""Derivatives of score = {score}

s is score / {scale!r}, the inner score of the forward kernel: derivatives of the score are {scale!r} times those of s.
"""

IMPORTS'''

_FUNCTION = '''@triton.jit
def {name}_HASH({arguments}):
    """
    {formulas}
    """
{body}
'''

Formulas = Mapping[str, Expr]


def generate_derivatives(spec: AttentionSpec, ranged: bool = False, by_score: bool = False) -> tuple[str, str]:
    """(hash, source text) of the module of a spec's derivatives, for calls with `kv_ranges` or for those without.

    by_score: whether slopes ask the score, not the mask, where a mask has made it -inf. Kept for a second use, the
    masks of a tile may take more registers than there are.
    """
    scale, inner = inner_score(spec)
    full = _unmasked(spec, ranged=False)
    divisor = _only_number(derivative(inner, _product_of(inner)))
    masked, unmasked = (_with_product(score, divisor, by_score) for score in (inner, _unmasked(spec, ranged)))
    functions = [*_tiles("score_and_grad", masked, unmasked, spec)]
    # An added mask that is zero throughout a tile has a gradient there all the same.
    for i, leaf in enumerate(_reads(inner)):
        functions += _tiles(f"score_grad{i}", _derivative("s", inner, leaf), _derivative("s", full, leaf), spec)
    for name, program in (("sink", spec.sink), ("factor", spec.factor)):
        functions += [] if program is None else _further(name, program, spec)
    header = _HEADER.format(score=to_text(spec.score), scale=scale)
    return finished("\n\n".join([header, *functions]), spec.product_dtype)


def _reads(program: Expr) -> tuple[Leaf, ...]:
    return tuple(leaf for leaf in leaves(program) if not isinstance(leaf, Product))


def _derivative(name: str, program: Expr, leaf: Leaf) -> Formulas:
    return {f"d{name}/d{to_text(leaf)}": derivative(program, leaf)}


def _with_product(score: Expr, divisor: float, by_score: bool) -> Formulas:
    product = _product_of(score)
    name = f"ds/d{to_text(product)}"
    if divisor != 1.0:
        name = f"{name} / {divisor!r}"
    slope = _slope_by_score(score, product) if by_score else derivative(score, product)
    return {"s": score, name: _divided(slope, divisor)}


def _slope_by_score(score: Expr, product: Product) -> Expr:
    if isinstance(score, Pointwise) and score.op == "where":
        _, *branches = score.args
        for fill, kept in (branches, branches[::-1]):
            if number(fill) == -math.inf:
                masked = pointwise("eq", score, fill)
                return pointwise("where", masked, const(0.0), derivative(kept, product))
    return derivative(score, product)


def _unmasked(spec: AttentionSpec, ranged: bool) -> Expr:
    """The inner score on tiles that meet no mask but, without ranges, those of data."""
    scale, _ = inner_score(spec)
    mask = mask_of(spec)
    return unscaled(mask.unmasked if ranged else mask.full, scale)


def _is_masked(score: Expr) -> bool:
    """Whether somewhere a score has no gradient."""
    return 0 in _numbers(derivative(score, _product_of(score)))


def _only_number(slope: Expr) -> float:
    """The number that a slope is where it is not 0, if that is one number; else 1."""
    numbers = {found for found in _numbers(slope) if found != 0}
    found = numbers.pop() if len(numbers) == 1 else None
    return 1.0 if found is None or not math.isfinite(found) else found


def _numbers(slope: Expr) -> Iterator[float | None]:
    match slope:
        case Pointwise(op="where", args=(_, left, right)):
            yield from _numbers(left)
            yield from _numbers(right)
        case _:
            yield number(slope)


def _divided(slope: Expr, divisor: float) -> Expr:
    """slope / divisor. Unless that is 1, the slope is of numbers, of which it is the `_only_number`."""
    match slope:
        case Pointwise(op="where", args=(condition, left, right), dtype=dtype):
            return pointwise("where", condition, _divided(left, divisor), _divided(right, divisor), dtype=dtype)
    found = number(slope)
    return slope if found is None or divisor == 1.0 else const(found / divisor, dtype=slope.dtype)


def _product_of(score: Expr) -> Product:
    return next((e for e in walk(score) if isinstance(e, Product)), Product(score.dtype, 0))


def _further(name: str, program: Expr, spec: AttentionSpec) -> Iterator[str]:
    """The derivatives of a sink or a factor: functions of rows or of tiles, as the program itself."""
    for i, leaf in enumerate(leaves(program)):
        formulas = _derivative(name, program, leaf)
        if is_row(program):
            yield _function(f"{name}_grad{i}", ROW_ARGUMENTS, formulas, row_body(*formulas.values()))
        else:
            yield from _tiles(f"{name}_grad{i}", formulas, formulas, spec)


def _tiles(name: str, masked: Formulas, full: Formulas, spec: AttentionSpec) -> Iterator[str]:
    """The functions of tiles that may meet a mask or the end of the keys, and of the others."""
    for variant, formulas, keys_end in (("masked", masked, True), ("full", full, False)):
        body = tile_body(list(formulas.values()), spec.compute_dtype, keys_end)
        yield _function(f"{name}_{variant}", TILE_ARGUMENTS, formulas, body)


def _function(name: str, arguments: str, formulas: Formulas, body: str) -> str:
    text = "\n    ".join(f"{left} = {to_text(right)}" for left, right in formulas.items())
    return _FUNCTION.format(name=name, arguments=arguments, formulas=text, body=body)
