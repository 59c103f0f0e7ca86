"""Derivatives of score programs against torch's autograd in float64, at kinks and at masked positions too."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from score_programs import F64, HEADS, KEYS, PROGRAMS, QUERIES, SIZE0, product, random

from flashfuse.kernels.derivative import SLOPES, derivative, is_finite, leaves
from flashfuse.kernels.evaluate import Tile, evaluate
from flashfuse.kernels.expr import Expr, Load, Product, Softmax
from flashfuse.kernels.normal import const, pointwise
from flashfuse.kernels.operators import OPS
from flashfuse.kernels.scale import peel_scale
from flashfuse.kernels.spec import KV_IDX, KV_LEN, Q_IDX, Q_LEN, batch_symbol, parse, size_symbol, to_text


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
    sizes = {Q_LEN: QUERIES, KV_LEN: KEYS, size_symbol(0): SIZE0}
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


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_scale_comes_out_of_derivatives_too(name: str) -> None:
    c = case(*PROGRAMS[name])
    scale, inner = peel_scale(c.program)
    for leaf in leaves(c.program):
        whole, part = (evaluate(derivative(program, leaf), c.tile).detach() for program in (c.program, inner))
        torch.testing.assert_close(scale * part.expand(c.shape), whole.expand(c.shape))


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("where(qk > 0.0, log(qk), 0.0)", 0.0),
        ("where(qk < 0.0, -1.0, sqrt(qk))", -1.0),
        ("max(log(qk), -10.0)", 0.0),
        ("max(0.0, log(qk))", 0.0),
        ("maximum(log(abs(qk)), -10.0)", 0.0),
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
        ("max(0.0, qk)", "qk", "where((0.0 < qk), 1.0, 0.0)"),
        ("min(qk * 2.0, t0[0, 0])", "t0[0, 0]", "where(((qk * 2.0) > t0[0, 0]), 1.0, 0.0)"),
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("where(kv_idx <= q_idx, qk * 0.125, -inf)", True),
        ("where(kv_idx <= q_idx, tanh(qk * 0.5) * 50.0, -inf)", True),
        ("to_float32(qk) * 0.125 - sigmoid(qk)", True),
        ("qk * t0[kv_idx]", False),
        ("sqrt(qk)", False),
        ("where(kv_idx <= q_idx, exp(qk), qk)", False),
    ],
)
def test_which_slopes_are_finite(text: str, expected: bool) -> None:
    """A kernel multiplies by those without looking for a gradient of 0, so none of the others may be among them."""
    program = parse(text, (F64,), F64)
    assert is_finite(derivative(program, Product(F64, 0))) == expected


def test_leaves() -> None:
    program = parse(
        "where(t1[kv_idx], qk + t0[t2[q_idx]] * t0[kv_idx], t0[kv_idx])", (F64, torch.bool, torch.int64), F64
    )
    assert [to_text(leaf) for leaf in leaves(program)] == ["qk", "t0[t2[q_idx]]", "t0[kv_idx]"]


def test_what_has_no_derivative_is_named() -> None:
    flag = Load(torch.bool, 0, (Q_IDX,))
    with pytest.raises(ValueError, match=r"only floating-point values have derivatives.*torch\.bool"):
        derivative(pointwise("where", flag, const(1.0), const(2.0)), flag)
    with pytest.raises(TypeError, match="Softmax"):
        derivative(pointwise("neg", Softmax(F64, parse("qk"), KV_IDX, KV_IDX, KV_LEN)), Product(F64, 0))
