"""Derivatives of score programs against torch's autograd in float64, at kinks and at masked positions too."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch

from flashfuse.kernels.derivative import SLOPES, derivative, leaves
from flashfuse.kernels.evaluate import Tile, evaluate
from flashfuse.kernels.expr import Expr, Load, Product
from flashfuse.kernels.normal import const, pointwise
from flashfuse.kernels.operators import OPS
from flashfuse.kernels.spec import KV_IDX, KV_LEN, Q_IDX, Q_LEN, batch_symbol, parse, size_symbol, to_text

F64 = torch.float64
HEADS, QUERIES, KEYS = 2, 5, 7
MIN = torch.finfo(torch.float32).min


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)), dtype=F64)


def product() -> torch.Tensor:
    """Products with exact zeros, ones and equal neighbours, where programs have their kinks."""
    qk = random(HEADS, QUERIES, KEYS) * 2
    qk[0, 1, :5] = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0])
    return qk


BIAS, KEEP = random(HEADS, QUERIES, KEYS), random(QUERIES, KEYS) > -0.5
TABLE, BUCKET = random(4, HEADS), torch.arange(QUERIES * KEYS).view(QUERIES, KEYS) % 4
PADDING = torch.tensor([True] * 5 + [False] * 2)
INF_BIAS = torch.where(KEEP, 0.0, -math.inf).to(F64)
SLOPE, CAP = torch.tensor([0.5, 0.25], dtype=F64), torch.tensor(3.0, dtype=F64)
# The products' own values here and there: ties.
TIES = torch.where(KEEP, product()[0], 0.5)
ZEROS = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0, 2.0, -0.0], dtype=F64)
EXPONENTS = torch.tensor([0.0, 1.0, 2.0, 3.5, 0.0, -1.0, 2.0], dtype=F64)

# A score, sink or factor program, and its captured tensors.
PROGRAMS: dict[str, tuple[str, tuple[torch.Tensor, ...]]] = {
    "plain": ("qk * 0.125", ()),
    "causal": ("where(kv_idx <= q_idx, qk * 0.125, -inf)", ()),
    "finite fill": (f"where(kv_idx <= q_idx, qk / 8.0, {MIN!r})", ()),
    "filled above": ("max((qk * 0.125) + where(t0[q_idx, kv_idx], 0.0, -1e9), -1e9)", (KEEP,)),
    "bias": ("qk * 0.125 + t0[n0, q_idx, kv_idx]", (BIAS,)),
    "bias of -inf": ("(qk + t0[q_idx, kv_idx]) * 0.125", (INF_BIAS,)),
    "two biases": ("(qk * 0.125 + t0[n0, q_idx, kv_idx]) + t1[kv_idx]", (BIAS, random(KEYS))),
    "one bias read twice": ("qk + t0[n0, q_idx, kv_idx] * t0[n0, q_idx, 0]", (BIAS,)),
    "linear bias": ("qk * 0.125 + t0[n0] * to_float(kv_idx - q_idx)", (SLOPE,)),
    "linear bias, distance": ("qk * 0.125 - abs(to_float(kv_idx - q_idx)) * t0[n0]", (SLOPE,)),
    "soft cap": ("tanh(qk * 0.02) * 50.0", ()),
    "soft cap, bias": ("tanh((qk + t0[n0, q_idx, kv_idx]) / 3.0) * 3.0 + t0[n0, q_idx, kv_idx]", (BIAS,)),
    "soft cap, masked": ("where(t0[q_idx, kv_idx] & (kv_idx <= q_idx), tanh(qk / t1[()]) * t1[()], -inf)", (KEEP, CAP)),
    "clamp": ("clamp_max(clamp_min(qk, -1.0), 1.0)", ()),
    "clamp between tensors": ("clamp_max(clamp_min(qk, t0[q_idx, kv_idx]), t1[()])", (TIES, CAP)),
    "maximum": ("max(qk, t0[q_idx, kv_idx]) + min(t0[q_idx, kv_idx], qk * 2.0)", (TIES,)),
    "maximum with itself": ("max(qk, qk * 2.0)", ()),
    "relu": ("relu(qk)", ()),
    "relu squared": ("relu(qk) * relu(qk)", ()),
    "sigmoid": ("sigmoid(qk * 0.125 + t0[()])", (CAP,)),
    "temperature": ("qk / t0[()]", (CAP,)),
    "temperature of heads": ("qk * exp(clamp_max(t0[n0], 0.25))", (SLOPE,)),
    "temperature of roots": ("(qk * sqrt(t0[n0])) / (rsqrt(t0[n0]) + 1.0)", (SLOPE,)),
    "look-up": ("qk * 0.125 + t0[t1[q_idx, kv_idx], n0]", (TABLE, BUCKET)),
    "concatenation": ("qk + where(kv_idx < 3, t0[kv_idx], t1[kv_idx - 3])", (random(3), random(4))),
    "padding": ("where((kv_idx < size0) & t0[kv_idx], qk * 0.125, -10000.0)", (PADDING,)),
    "distance penalty": ("qk - abs(qk - t0[q_idx, kv_idx]) * 0.5", (TIES,)),
    "powers": ("pow(qk, 2.0) + pow(qk, 3) - pow(qk, 1.0) + pow(qk, 0.0)", ()),
    "power of a tensor": ("pow(abs(qk) + 0.5, t0[n0]) + pow(2.0, qk)", (SLOPE,)),
    "powers of zero": ("pow(t0[kv_idx], t1[kv_idx])", (ZEROS, EXPONENTS)),
    "waves": ("sin(qk) * cos(t0[n0] * qk) - sin(to_float(q_idx)) * qk", (SLOPE,)),
    "gelu": ("qk * 0.5 * (1.0 + erf(qk * 0.7071067811865476))", ()),
    "softplus": ("where(qk > 20.0, qk, log(1.0 + exp(qk)))", ()),
    "rounded": ("to_float16(qk) * 0.125 + to_bfloat16(to_float32(t0[n0, q_idx, kv_idx]))", (BIAS,)),
    "steps": ("qk * floor(qk) + to_float(to_int(qk))", ()),
    "nothing": ("where(kv_idx <= q_idx, 0.0, -inf)", ()),
    "sink": ("t0[n0] * 2.0", (SLOPE,)),
    "head factor": ("where(t0[q_idx, kv_idx], t1[n0] * 1.25, 0.0)", (KEEP, SLOPE)),
    "nested": (
        "where(t0[q_idx, kv_idx], exp(where(kv_idx <= q_idx, qk, -inf)) + t1[n0], -(qk * t1[n0]))",
        (KEEP, SLOPE),
    ),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Case:
    """A program in float64 with leaf tensors that ask for gradients."""

    program: Expr
    tile: Tile
    tensors: tuple[torch.Tensor, ...] = field(default=())

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(positions) for _, positions in self.tile.axes)


def case(text: str, captured: tuple[torch.Tensor, ...], qk: torch.Tensor | None = None) -> Case:
    qk = (product() if qk is None else qk).clone().requires_grad_()
    captured = tuple(c.clone().requires_grad_(c.is_floating_point()) for c in captured)
    axes = ((batch_symbol(0), range(HEADS)), (Q_IDX, range(QUERIES)), (KV_IDX, range(KEYS)))
    sizes = {Q_LEN: QUERIES, KV_LEN: KEYS, size_symbol(0): 6}
    program = parse(text, tuple(c.dtype for c in captured), F64)
    return Case(program, Tile(axes, sizes, (qk,), captured, F64, torch.device("cpu")), (qk, *captured))


def assert_gradients_agree(c: Case) -> None:
    """Of a weighted sum of the program's values, with respect to the products and every captured tensor."""
    wanted = [t for t in c.tensors if t.requires_grad]
    # Whole numbers, so that a rounding does not round what comes back through it.
    weight = (random(*c.shape) * 4).round()

    def gradients(value: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
        value = value.expand(c.shape)
        if not value.requires_grad:
            return [torch.zeros_like(t) for t in wanted]
        return list(torch.autograd.grad(value, wanted, upstream, allow_unused=True, materialize_grads=True))

    expected = gradients(evaluate(c.program, c.tile), weight)
    found = [torch.zeros_like(t) for t in wanted]
    for leaf in leaves(c.program):
        slope = evaluate(derivative(c.program, leaf), c.tile).detach()
        assert slope.isfinite().all()
        # A leaf's own gradient is linear in what reaches it: it scatters.
        for total, part in zip(found, gradients(evaluate(leaf, c.tile), weight * slope), strict=True):
            total += part
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str) -> None:
    assert_gradients_agree(case(*PROGRAMS[name]))


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("where(qk > 0.0, log(qk), 0.0)", 0.0),
        ("where(qk < 0.0, -1.0, sqrt(qk))", -1.0),
        ("clamp_min(log(qk), -10.0)", 0.0),
        ("relu(log(qk))", 0.0),
        ("max(log(abs(qk)), -10.0)", 0.0),
        ("exp(where(kv_idx < 0, 1.0 / qk, -inf)) + qk", 0.0),
        ("pow(abs(qk), 0.5)", 0.0),
        ("where(qk != 0.0, where(q_idx >= 0, 1.0 / qk, qk), 0.0) * where(qk == 0.0, qk, 1.0)", 0.0),
    ],
)
def test_what_was_discarded_does_not_leak(text: str, at: float) -> None:
    """Autograd gives NaN in most of these: it multiplies the slope of a branch not taken, infinite, by zero."""
    c = case(text, (), torch.full((HEADS, QUERIES, KEYS), at, dtype=F64))
    assert evaluate(derivative(c.program, Product(F64, 0)), c.tile).isfinite().all()


def read(slot: int) -> Load:
    return Load(F64, slot, (Q_IDX, KV_IDX))


@pytest.mark.parametrize("op", sorted({*SLOPES, "where"}))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_operator(op: str, sign: float) -> None:
    arity = OPS[op].arity
    args: tuple[Expr, ...] = tuple(read(slot) for slot in range(arity))
    if op == "where":
        args = (pointwise("gt", read(2), const(0.0)), *args[:2])
    positive = op in ("log", "sqrt", "rsqrt", "pow")
    tensors = tuple(random(QUERIES, KEYS + slot)[:, :KEYS] * sign for slot in range(3))
    tensors = tuple(t.abs() for t in tensors) if positive else tensors
    c = case("qk", tensors)
    assert_gradients_agree(Case(pointwise(op, *args, dtype=F64), c.tile, c.tensors))


def test_every_operator_has_a_rule() -> None:
    floats = {op for op, info in OPS.items() if info.result in ("float", "promote")}
    assert {*SLOPES, "where"} == floats
    assert all(len(SLOPES[op]) == OPS[op].arity for op in SLOPES)


@pytest.mark.parametrize(
    ("text", "wrt", "expected"),
    [
        ("qk * 0.125", "qk", "0.125"),
        ("qk / 8.0 + t0[q_idx, kv_idx]", "qk", "0.125"),
        ("qk / 8.0 + t0[q_idx, kv_idx]", "t0[q_idx, kv_idx]", "1.0"),
        ("where(kv_idx <= q_idx, qk * 0.5, -inf)", "qk", "where((kv_idx <= q_idx), 0.5, 0.0)"),
        ("tanh(qk * 0.02) * 50.0", "qk", "(1.0 - (tanh((qk * 0.02)) * tanh((qk * 0.02))))"),
        ("qk / t0[0, 0]", "qk", "(1.0 / t0[0, 0])"),
        ("exp(t0[0, 0]) * qk", "t0[0, 0]", "(qk * exp(t0[0, 0]))"),
        ("relu(qk)", "qk", "where((qk > 0.0), 1.0, 0.0)"),
        ("clamp_max(qk * 2.0, t0[0, 0])", "t0[0, 0]", "where(((qk * 2.0) > t0[0, 0]), 1.0, 0.0)"),
        ("where(t0[0, 0] > 0.0, qk, qk + 1.0)", "t0[0, 0]", "0.0"),
        ("where(t0[0, 0] > 0.0, qk, qk + 1.0)", "qk", "1.0"),
        ("where(kv_idx < 2, qk * 2.0, qk)", "qk", "where((kv_idx < 2), 2.0, 1.0)"),
        ("tanh(where(kv_idx < 2, qk, qk + t0[0, 0]))", "t0[0, 1]", "0.0"),
        ("pow(qk, 2.0)", "qk", "(qk * 2.0)"),
        ("to_float16(qk)", "qk", "1.0"),
        ("floor(qk)", "qk", "0.0"),
    ],
)
def test_derivatives_are_simple(text: str, wrt: str, expected: str) -> None:
    leaf = parse(wrt, (F64,), F64)
    assert isinstance(leaf, Product | Load)
    found = derivative(parse(text, (F64,), F64), leaf)
    assert to_text(found) == expected
    assert found.dtype == F64


def test_leaves() -> None:
    program = parse(
        "where(t1[kv_idx], qk + t0[t2[q_idx]] * t0[kv_idx], t0[kv_idx])", (F64, torch.bool, torch.int64), F64
    )
    assert [to_text(leaf) for leaf in leaves(program)] == ["qk", "t0[t2[q_idx]]", "t0[kv_idx]"]


def test_what_has_no_derivative_is_named() -> None:
    flag = Load(torch.bool, 0, (Q_IDX,))
    with pytest.raises(ValueError, match=r"only floating-point values have derivatives.*torch\.bool"):
        derivative(pointwise("where", flag, const(1.0), const(2.0)), flag)
