"""Derivatives of score programs with respect to the product and to what they read.

A derivative is a program again, in the same few nodes. It is built forwards: the derivative of a sub-expression is a
value and the condition under which it counts, and the condition is applied once, last. So a value that is infinite or
NaN where a `where` or a clamp has discarded it is never multiplied by the zero that stands there.

At kinks the derivative is what torch's autograd gives, see docs/numerics.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from flashfuse.kernels.expr import Const, Expr, Gather, Load, Pointwise, Product, loads, walk
from flashfuse.kernels.normal import TRUE, cast, const, number, pointwise
from flashfuse.kernels.operators import ROUNDINGS

Leaf = Product | Load | Gather
ONE, ZERO = const(1.0), const(0.0)


@dataclass(frozen=True)
class Tangent:
    """The derivative `value` where `support` holds, and 0 elsewhere, whatever `value` is there.

    clean: whether `value` is 0 there too.
    """

    value: Expr
    support: Expr = TRUE
    clean: bool = False

    @property
    def program(self) -> Expr:
        return self.value if self.clean else pointwise("where", self.support, self.value, ZERO)


def leaves(expr: Expr) -> tuple[Leaf, ...]:
    """What a program can be differentiated by: its products, then its distinct reads of floating-point tensors."""
    products = dict.fromkeys(e for e in walk(expr) if isinstance(e, Product))
    return (*products, *(read for read in loads(expr) if read.dtype.is_floating_point))


def differentiable(programs: Iterable[Expr]) -> frozenset[Leaf]:
    """The leaves that a gradient of the programs may reach."""
    leaves_of = ((e, leaf) for e in programs if e.dtype.is_floating_point for leaf in leaves(e))
    return frozenset(leaf for e, leaf in leaves_of if number(derivative(e, leaf)) != 0)


def derivative(expr: Expr, wrt: Leaf) -> Expr:
    """d expr / d wrt at the same position, a program over the same symbols and captured tensors.

    wrt: a product, or one read of a floating-point tensor; every read at other indices is constant, so the gradient of
    a tensor is the sum of what its reads scatter. Raises TypeError for a node that no score program holds, ValueError
    for a leaf without a derivative.
    """
    if not wrt.dtype.is_floating_point:
        raise ValueError(f"only floating-point values have derivatives, and {wrt} is {wrt.dtype}")
    known: dict[Expr, Tangent | None] = {wrt: Tangent(ONE)}

    def tangent(e: Expr) -> Tangent | None:
        if e not in known:
            known[e] = compute(e) if e.dtype.is_floating_point else None
        return known[e]

    def compute(e: Expr) -> Tangent | None:
        if isinstance(e, (Product, Load, Gather, Const)):
            return None
        if not isinstance(e, Pointwise):
            raise TypeError(f"a score program holds no {type(e).__name__}")
        inner = [tangent(a) for a in e.args]
        if e.op == "where":
            return _chosen(e.args[0], inner[1], inner[2])
        total: Tangent | None = None
        for slope, arg in zip(SLOPES[e.op], inner, strict=True):
            if arg is not None:
                total = _added(total, _chained(slope(e, *e.args), arg))
        return total

    found = tangent(expr)
    dtype = torch.promote_types(torch.float32, expr.dtype)
    return const(0.0, dtype) if found is None else cast(found.program, dtype)


# Operations that give finite numbers, of finite numbers or of all.
_FINITE_OF_FINITE = frozenset({"add", "sub", "mul", "neg", "to_float", "to_float32"})
_FINITE = frozenset({"tanh", "sigmoid"})


def is_finite(expr: Expr) -> bool:
    """Whether the value is known to be finite, or NaN where the program's own is."""
    match expr:
        case Const():
            return math.isfinite(expr.value)
        case Pointwise(op="where"):
            return all(map(is_finite, expr.args[1:]))
        case Pointwise():
            return expr.op in _FINITE or (expr.op in _FINITE_OF_FINITE and all(map(is_finite, expr.args)))
    return False


# --------------------------------------------------------------------------------------------------------------------
# Combining tangents; None is the zero tangent


def _chained(slope: Tangent | None, arg: Tangent) -> Tangent | None:
    """slope * arg"""
    if slope is None:
        return None
    value = _times(slope.value, arg.value)
    if number(value) == 0:
        return None
    clean = arg.clean and slope.support == TRUE and math.isfinite(number(slope.value) or math.inf)
    return Tangent(value, pointwise("and", arg.support, slope.support), clean)


def _added(a: Tangent | None, b: Tangent | None) -> Tangent | None:
    if a is None or b is None:
        return b if a is None else a
    if a.support == b.support:
        return Tangent(_sum(a.value, b.value), a.support, a.clean and b.clean)
    return Tangent(pointwise("add", a.program, b.program), pointwise("or", a.support, b.support), clean=True)


def _chosen(condition: Expr, yes: Tangent | None, no: Tangent | None) -> Tangent | None:
    """The tangent of where(condition, yes, no)."""
    if yes == no:
        return yes
    otherwise = pointwise("not", condition)
    if yes is None or no is None:
        one, when = (yes, condition) if no is None else (no, otherwise)
        return Tangent(one.value, pointwise("and", when, one.support)) if one else None
    value = pointwise("where", condition, yes.program, no.program)
    if yes.support == no.support == TRUE:
        return Tangent(value)
    supports = (pointwise("and", when, one.support) for when, one in ((condition, yes), (otherwise, no)))
    return Tangent(value, pointwise("or", *supports), clean=True)


# The largest number that float32 holds.
LARGEST = torch.finfo(torch.float32).max


def _scaled(rest: Expr, scale: float) -> Expr:
    """rest * scale; a number that float32 does not hold stays two, the second of which `factored` takes off."""
    if LARGEST < abs(scale) < LARGEST**2:
        smaller = _scaled(rest, scale / LARGEST)
        return Pointwise(smaller.dtype, "mul", (smaller, const(LARGEST)))
    if rest == ONE or scale == 0:
        return const(scale)
    return pointwise("neg", rest) if scale == -1 else pointwise("mul", rest, const(scale))


def _sum(a: Expr, b: Expr) -> Expr:
    (scale_a, rest_a), (scale_b, rest_b) = _coefficient(a), _coefficient(b)
    both = scale_a + scale_b
    return _scaled(rest_a, both) if rest_a == rest_b and abs(both) > LARGEST else pointwise("add", a, b)


def _times(a: Expr, b: Expr) -> Expr:
    """a * b with the constant factors of both in one."""
    (scale_a, rest_a), (scale_b, rest_b) = _coefficient(a), _coefficient(b)
    return _scaled(_product(rest_a, rest_b), scale_a * scale_b)


def _coefficient(expr: Expr) -> tuple[float, Expr]:
    """(c, rest) with expr = c * rest."""
    if (value := number(expr)) is not None:
        return float(value), ONE
    match expr:
        case Pointwise(op="neg", args=(arg,)):
            scale, rest = _coefficient(arg)
            return -scale, rest
        case Pointwise(op="mul", args=(left, right)) if number(left) is not None or number(right) is not None:
            factor, arg = (left, right) if number(left) is not None else (right, left)
            scale, rest = _coefficient(arg)
            return scale * float(number(factor) or 0.0), rest
    return 1.0, expr


def factored(slope: Expr, least: float = LARGEST) -> tuple[float, Expr]:
    """(c, rest) with slope = c * rest, c being 1 unless it is a number above `least`: one that float32 does not hold.

    A gradient is multiplied by it last, so that it is infinite where the source's is.
    """
    scale, rest = _coefficient(slope)
    match slope:
        case Pointwise(op="where", args=(condition, value, other)) if other == ZERO:
            scale, rest = _coefficient(value)
            rest = pointwise("where", condition, rest, ZERO)
    return (scale, rest) if least < abs(scale) < math.inf else (1.0, slope)


def _product(a: Expr, b: Expr) -> Expr:
    """a * b, where a factor 1 / x divides the other."""
    for one, other in ((a, b), (b, a)):
        if one == ONE:
            return other
        if isinstance(one, Pointwise) and one.op == "div" and number(one.args[0]) == 1:
            return pointwise("div", other, one.args[1])
    return pointwise("mul", a, b)


# --------------------------------------------------------------------------------------------------------------------
# A slope for each argument of each operator: the partial derivative, from the value y and the arguments

Slope = Callable[..., Tangent | None]


def _smooth(formula: Callable[..., Expr]) -> Slope:
    """A slope that counts everywhere."""
    return lambda y, *args: Tangent(formula(y, *args))


def _flat(*_: Expr) -> None:
    return None


def _mul(a: Expr, b: Expr) -> Expr:
    return pointwise("mul", a, b)


def _minus(a: Expr) -> Expr:
    return _times(const(-1.0), a)


def _reciprocal(a: Expr) -> Expr:
    value = number(a)
    return pointwise("div", ONE, a) if value is None or value == 0 else const(1.0 / value)


def _sign(_: Expr, a: Expr) -> Tangent:
    """0 at 0."""
    return Tangent(pointwise("where", pointwise("lt", a, ZERO), const(-1.0), ONE), pointwise("ne", a, ZERO))


def _shared(op: str, mine: int) -> Slope:
    """1 where the comparison of argument `mine` with the other one holds, but one half where they are equal."""

    def slope(_: Expr, *args: Expr) -> Tangent:
        a, b = args[mine], args[1 - mine]
        return Tangent(pointwise("where", pointwise("eq", a, b), const(0.5), ONE), pointwise(op, a, b))

    return slope


def _compared(op: str) -> Slope:
    """1 where the comparison of the two arguments holds."""
    return lambda _, a, bound: Tangent(ONE, pointwise(op, a, bound))


def _pow_base(_: Expr, a: Expr, exponent: Expr) -> Tangent:
    """Zero to the power of zero is flat."""
    value = number(exponent)
    lower = pointwise("sub", exponent, ONE) if value is None else const(value - 1.0)
    return Tangent(_times(exponent, pointwise("pow", a, lower)), pointwise("ne", exponent, ZERO))


def _pow_exponent(y: Expr, a: Expr, exponent: Expr) -> Tangent:
    """log(0) * 0 ** b counts as 0 for b >= 0."""
    flat = pointwise("and", pointwise("eq", a, ZERO), pointwise("ge", exponent, ZERO))
    return Tangent(_mul(y, pointwise("log", a)), pointwise("not", flat))


_one = _smooth(lambda y, *_: ONE)

SLOPES: Mapping[str, tuple[Slope, ...]] = {
    "add": (_one, _one),
    "sub": (_one, _smooth(lambda y, a, b: const(-1.0))),
    "mul": (_smooth(lambda y, a, b: b), _smooth(lambda y, a, b: a)),
    "div": (
        _smooth(lambda y, a, b: _reciprocal(b)),
        _smooth(lambda y, a, b: _minus(pointwise("div", y, b))),
    ),
    "neg": (_smooth(lambda y, a: const(-1.0)),),
    "abs": (_sign,),
    "min": (_compared("le"), _compared("gt")),
    "max": (_compared("ge"), _compared("lt")),
    "minimum": (_shared("le", 0), _shared("le", 1)),
    "maximum": (_shared("ge", 0), _shared("ge", 1)),
    "pow": (_pow_base, _pow_exponent),
    "exp": (_smooth(lambda y, a: y),),
    "exp2": (_smooth(lambda y, a: _mul(y, const(math.log(2.0)))),),
    "expm1": (_smooth(lambda y, a: pointwise("add", y, ONE)),),
    "log": (_smooth(lambda y, a: _reciprocal(a)),),
    "log2": (_smooth(lambda y, a: pointwise("div", const(1.0 / math.log(2.0)), a)),),
    "log1p": (_smooth(lambda y, a: _reciprocal(pointwise("add", a, ONE))),),
    "sqrt": (_smooth(lambda y, a: pointwise("div", const(0.5), y)),),
    "rsqrt": (_smooth(lambda y, a: _mul(_mul(y, _mul(y, y)), const(-0.5))),),
    "tanh": (_smooth(lambda y, a: pointwise("sub", ONE, _mul(y, y))),),
    "sigmoid": (_smooth(lambda y, a: _mul(y, pointwise("sub", ONE, y))),),
    "erf": (_smooth(lambda y, a: _mul(pointwise("exp", pointwise("neg", _mul(a, a))), const(2 / math.sqrt(math.pi)))),),
    "sin": (_smooth(lambda y, a: pointwise("cos", a)),),
    "cos": (_smooth(lambda y, a: pointwise("neg", pointwise("sin", a))),),
    "atan": (_smooth(lambda y, a: _reciprocal(pointwise("add", _mul(a, a), ONE))),),
    "asinh": (_smooth(lambda y, a: pointwise("rsqrt", pointwise("add", _mul(a, a), ONE))),),
    "floor": (_flat,),
    "sign": (_flat,),
    "fmod": (_one, _smooth(lambda y, a, b: pointwise("div", pointwise("sub", y, a), b))),
    "to_float": (_one,),
    # Rounding passes its derivative on, as torch's conversions do.
    **{name: (_one,) for name in ROUNDINGS},
}
