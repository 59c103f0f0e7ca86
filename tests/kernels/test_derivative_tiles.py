"""The generated derivatives on tiles: on a GPU where there is one, otherwise in Triton's interpreter.

The interpreter is chosen when triton is imported, so without a GPU these tests run in a process of their own, which
test_interpreter.py starts.
"""

import os

import pytest
import torch
from numerics import assert_close_to_exact
from score_programs import HEADS, KEYS, PROGRAMS, QUERIES, SIZE0, product

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from flashfuse.kernels.codegen_derivative import LeafDerivative, load_derivatives  # noqa: E402
from flashfuse.kernels.derivative import derivative, leaves  # noqa: E402
from flashfuse.kernels.evaluate import Tile, evaluate  # noqa: E402
from flashfuse.kernels.expr import Expr, Product  # noqa: E402
from flashfuse.kernels.scale import inner_score  # noqa: E402
from flashfuse.kernels.spec import (  # noqa: E402
    KV_IDX,
    KV_LEN,
    Q_IDX,
    Q_LEN,
    AttentionSpec,
    batch_symbol,
    parse,
    size_symbol,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1; test_interpreter.py runs them"
)

# Positions (first query, first key, block): all of them, and a tile that no mask of the programs touches.
WHOLE, INSIDE = (0, 0, 8), (4, 0, 4)


@triton.jit
def tile_kernel(
    out_ptr, second_ptr, qk_ptr, q_start, kv_start, q_len, kv_len, sizes, captured, strides,
    FUNCTION: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values of FUNCTION [n0, block, block] on the tile at (q_start, kv_start) of products [n0, q_len, kv_len]."""
    n0 = tl.program_id(0)
    zero = n0 * 0
    offsets = tl.arange(0, BLOCK)
    q_idx = tl.minimum(q_start + offsets, q_len - 1)
    kv_idx = kv_start + offsets
    rows = q_idx[:, None]
    columns = kv_idx[None, :]
    qk = tl.load(qk_ptr + (n0 * q_len + rows) * kv_len + columns, mask=columns < kv_len, other=0.0)
    at = (n0 * BLOCK + offsets[:, None]) * BLOCK + offsets[None, :]
    if KIND == "rows":
        value = FUNCTION(n0, zero, zero, zero, q_idx, q_len, kv_len, sizes, captured, strides)
        tl.store(out_ptr + at, tl.broadcast_to(value[:, None], at.shape))
    elif KIND == "pair":
        first, second = FUNCTION(qk, n0, zero, zero, zero, rows, columns, q_len, kv_len, sizes, captured, strides)
        tl.store(out_ptr + at, first)
        tl.store(second_ptr + at, second)
    else:
        value = FUNCTION(qk, n0, zero, zero, zero, rows, columns, q_len, kv_len, sizes, captured, strides)
        tl.store(out_ptr + at, value)


class Inputs:
    """A tile of float32 inputs, for the generated functions and for `evaluate`."""

    def __init__(self, captured: tuple[torch.Tensor, ...], place: tuple[int, int, int]) -> None:
        self.captured = [c.float() if c.is_floating_point() else c for c in captured]
        self.qk = product().float()
        self.q_start, self.kv_start, self.block = place
        self.queries = range(self.q_start, min(self.q_start + self.block, QUERIES))
        self.keys = range(self.kv_start, min(self.kv_start + self.block, KEYS))

    def run(self, function: object, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.full((2, HEADS, self.block, self.block), torch.nan, device=DEVICE)
        captured = tuple(c.to(DEVICE) for c in self.captured)
        tile_kernel[(HEADS,)](
            out[0], out[1], self.qk.to(DEVICE), self.q_start, self.kv_start, QUERIES, KEYS, (SIZE0,),
            captured, tuple(c.stride() for c in captured), FUNCTION=function, KIND=kind, BLOCK=self.block,
        )  # fmt: skip
        first, second = out[:, :, : len(self.queries), : len(self.keys)].cpu()
        return first, second

    def expected(self, program: Expr, dtype: torch.dtype) -> torch.Tensor:
        """In torch, of the same values in float32 or float64."""
        axes = ((batch_symbol(0), range(HEADS)), (Q_IDX, self.queries), (KV_IDX, self.keys))
        sizes = {Q_LEN: QUERIES, KV_LEN: KEYS, size_symbol(0): SIZE0}
        rows, columns = (slice(r.start, r.stop) for r in (self.queries, self.keys))
        captured = [c.to(dtype) if c.is_floating_point() else c for c in self.captured]
        tile = Tile(axes, sizes, (self.qk[:, rows, columns].to(dtype),), captured, dtype, torch.device("cpu"))
        return evaluate(program, tile).expand(HEADS, len(self.queries), len(self.keys))

    def check(self, found: torch.Tensor, program: Expr) -> None:
        assert_close_to_exact(found, self.expected(program, torch.float32), self.expected(program, torch.float64))


def make_spec(
    text: str, captured: tuple[torch.Tensor, ...], normaliser: str = "softmax", **programs: str
) -> AttentionSpec:
    f32 = torch.float32
    types = tuple(f32 if c.is_floating_point() else c.dtype for c in captured)
    further = {name: parse(program, types) for name, program in programs.items()}
    return AttentionSpec(1, parse(text, types), types, 1, f32, f32, f32, "nan", (0, 1, 2), normaliser, **further)


def check_leaf(inputs: Inputs, of: LeafDerivative, program: Expr, variant: str, kind: str = "tile") -> None:
    found, _ = inputs.run(getattr(of, variant), kind)
    inputs.check(found, derivative(program, of.leaf))


# The interpreter has no device library, and cuts bits off where it should round to bfloat16.
ONLY_ON_A_GPU = ("power of a tensor", "powers of zero", "rounded to bfloat16")
NAMES = [name for name in PROGRAMS if not (INTERPRETED and name in ONLY_ON_A_GPU)]


@pytest.mark.parametrize("normaliser", ["softmax", "none"])
@pytest.mark.parametrize(("variant", "place"), [("masked", WHOLE), ("full", INSIDE)])
@pytest.mark.parametrize("name", NAMES)
def test_programs(name: str, variant: str, place: tuple[int, int, int], normaliser: str) -> None:
    text, captured = PROGRAMS[name]
    spec = make_spec(text, captured, normaliser)
    inputs = Inputs(captured, place)
    derivatives = load_derivatives(spec)
    scale, inner = inner_score(spec)
    score, grad = inputs.run(getattr(derivatives, f"score_and_grad_{variant}"), "pair")
    inputs.check(score, inner)
    inputs.check(grad * (derivatives.slope / scale), derivative(inner, Product(torch.float32, 0)))
    assert derivatives.scale == scale
    assert [d.leaf for d in derivatives.reads] == [e for e in leaves(inner) if not isinstance(e, Product)]
    for of in derivatives.reads:
        check_leaf(inputs, of, inner, variant)


@pytest.mark.parametrize(("variant", "place"), [("masked", WHOLE), ("full", INSIDE)])
def test_sinks_and_factors(variant: str, place: tuple[int, int, int]) -> None:
    captured = (torch.tensor([0.5, 0.25]), torch.rand(QUERIES), torch.rand(QUERIES, KEYS))
    spec = make_spec("qk", captured, sink="exp(t0[n0]) * t1[q_idx]", factor="t1[q_idx] * t2[q_idx, kv_idx]")
    inputs, derivatives = Inputs(captured, place), load_derivatives(spec)
    assert (len(derivatives.sink), len(derivatives.factor)) == (2, 2)
    assert spec.sink is not None
    assert spec.factor is not None
    for of in derivatives.sink:
        check_leaf(inputs, of, spec.sink, variant, "rows")
    for of in derivatives.factor:
        check_leaf(inputs, of, spec.factor, variant)


@pytest.mark.parametrize("variant", ["masked", "full"])
def test_a_factor_of_rows(variant: str) -> None:
    captured = (torch.tensor([0.5, 0.25]),)
    spec = make_spec("qk", captured, factor="t0[n0] * t0[n0]")
    (of,) = load_derivatives(spec).factor
    assert spec.factor is not None
    check_leaf(Inputs(captured, WHOLE), of, spec.factor, variant, "rows")
