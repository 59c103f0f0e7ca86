"""Elementary functions that Triton lacks, or has only as a device library call that no interpreter runs."""

import triton
import triton.language as tl
from triton.language.core import builtin, constexpr


@triton.jit
def tanh(x):
    """tanh(x) = sign(x) (1 - e) / (1 + e) with e = exp(-2 |x|), and its series near 0 where that cancels."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    near = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315)))
    return tl.where(size < 0.2, near, tl.where(x < 0, -far, far))


@triton.jit
def bounded_tanh(x):
    """tanh(x) = 1 - 2 / (1 + exp(2 x)), and its series near 0: the error is some units in the last place of 1."""
    square = x * x
    near = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315)))
    return tl.where(square < 0.04, near, 1.0 - tl.fdiv(2.0, tl.exp2(x * 2.8853900817779268) + 1.0))


@triton.jit
def expm1(x):
    """exp(x) - 1, and its series near 0 where that cancels."""
    near = x
    for n in tl.static_range(9):
        near = x + near * (x * (1.0 / (10 - n)))
    return tl.where(tl.abs(x) < 0.7, near, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x), and near 0, where that cancels, the series of 2 artanh(z) with z = x / (2 + x)."""
    z = x / (2.0 + x)
    square = z * z
    near = 2.0 * z * (1.0 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square / 9))))
    return tl.where((x > -0.3) & (x < 0.5), near, tl.log(1.0 + x))


@triton.jit
def atan(x):
    """Cephes' atanf: a polynomial near 0, and pi/2 - atan(1 / x) and pi/4 + atan((x - 1) / (x + 1)) from there on."""
    size = tl.abs(x)
    far, middle = size > 2.414213562373095, size > 0.4142135623730950
    near = tl.where(far, -1.0 / size, tl.where(middle, (size - 1.0) / (size + 1.0), size))
    square = near * near
    series = 8.05374449538e-2 * square - 1.38776856032e-1
    series = (series * square + 1.99777106478e-1) * square - 3.33329491539e-1
    angle = tl.where(far, 1.5707963267948966, tl.where(middle, 0.7853981633974483, 0.0))
    angle += near + near * square * series
    return tl.where(x < 0, -angle, angle)


@triton.jit
def asinh(x):
    """sign(x) log(|x| + sqrt(x^2 + 1)), which is log(2 |x|) where the square may overflow."""
    size = tl.abs(x)
    root = tl.where(size > 1e9, size, size * (size / (1.0 + tl.sqrt(size * size + 1.0))))
    result = log1p(size + root)
    return tl.where(x < 0, -result, result)


@triton.jit
def sign(x):
    """0 for 0 and for NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def scaled_exp2(x, SCALE: tl.constexpr):
    """2 ** (SCALE x) for x <= 0, to half a unit in the last place or so.

    An instruction's own 2 ** x is off by some units, and for x < -1 mostly to one side: as a factor of sums, from tile
    to tile, that adds up. Within half of 0 it is better, and whole powers are exact.
    """
    scale = tl.full(x.shape, SCALE, x.dtype)
    scaled = tl.fma(x, scale, 0.0)
    whole = tl.floor(scaled + 0.5)
    rest = (scaled - whole) + tl.fma(x, scale, -scaled)
    return tl.where(scaled < -2000.0, 0.0, tl.exp2(rest) * tl.exp2(whole))


@triton.jit
def power(x, N: tl.constexpr):
    """x ** N for a whole N > 0."""
    result = x
    for _ in tl.static_range(N - 1):
        result *= x
    return result


@triton.jit
def through(grad, slope):
    """grad * slope, but 0 where either is: what a mask discards stays 0 beside a NaN or an infinity."""
    return tl.where((grad == 0) | (slope == 0), 0.0, grad * slope)


@builtin
def _rounds_pairs(_semantic=None):
    """Whether the target has an instruction that rounds two numbers to bfloat16: NVIDIA's from capability 8.0 on."""
    options = _semantic.builder.options
    return constexpr(options.backend_name == "cuda" and int(options.arch.removeprefix("sm")) >= 80)


@triton.jit
def to_bfloat16(x):
    """x rounded to bfloat16, in float32. Pairs, since single numbers would wait for the unit that exp2 runs on."""
    PAIRS: tl.constexpr = len(x.shape) > 0 and _rounds_pairs()
    if PAIRS:
        return tl.inline_asm_elementwise(
            """
            {
                .reg .b32 pair;
                cvt.rn.bf16x2.f32 pair, $3, $2;
                shl.b32 $0, pair, 16;
                and.b32 $1, pair, 0xffff0000;
            }
            """,
            "=f,=f,f,f", [x.to(tl.float32)], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(tl.bfloat16).to(tl.float32)
