"""Score programs on tiles: every operator, how tensors are read, and the reference that is built on it."""

import gc
import math
import weakref
from dataclasses import replace

import pytest
import sympy
import torch
from attention_cases import make_call
from numerics import log_sum_exp
from torch.utils._sympy.functions import FloorDiv, Mod

from flashfuse.kernels.evaluate import Tile, evaluate, evaluate_index
from flashfuse.kernels.expr import Const, Expr, Index, Load, Pointwise, Softmax
from flashfuse.kernels.operators import OPS
from flashfuse.kernels.reference import attention_reference
from flashfuse.kernels.scatter import scatter_add
from flashfuse.kernels.spec import KV_IDX, KV_LEN, Q_IDX, Q_LEN, batch_symbol, parse, size_symbol

N0 = batch_symbol(0)


def make_tile(captured: tuple = (), queries: range = range(2, 5), keys: range = range(1, 7)) -> Tile:
    axes = ((N0, range(1, 3)), (Q_IDX, queries), (KV_IDX, keys))
    product = torch.linspace(0.1, 0.9, 2 * len(queries) * len(keys)).view(2, len(queries), len(keys))
    sizes = {Q_LEN: 5, KV_LEN: 7, size_symbol(0): 2}
    return Tile(axes, sizes, (product,), captured, torch.float32, torch.device("cpu"))


def positions() -> dict[sympy.Symbol, torch.Tensor]:
    return dict(zip((N0, Q_IDX, KV_IDX), torch.meshgrid(*map(torch.arange, (3, 5, 7)), indexing="ij"), strict=True))


def element_by_element(load: Load, tensor: torch.Tensor, tile: Tile) -> torch.Tensor:
    """The loaded values, one position at a time, by sympy's own arithmetic."""
    shape = [len(r) for _, r in tile.axes]
    values = []
    for n in tile.axes[0][1]:
        for i in tile.axes[1][1]:
            for j in tile.axes[2][1]:
                at = {N0: n, Q_IDX: i, KV_IDX: j, **tile.sizes}
                values.append(tensor[tuple(int(sympy.sympify(x).subs(at)) for x in load.indices)])
    return torch.stack(values).view(shape)


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_operator(op: str) -> None:
    tile = make_tile((torch.rand(3, 5, 7) < 0.5,))
    flag = Load(torch.bool, 0, (N0, Q_IDX, KV_IDX))
    product = parse("qk")
    args: tuple[Expr, ...] = (product, Const(torch.float32, 0.3), Const(torch.float32, 0.7))[: OPS[op].arity]
    if op in ("and", "or", "not"):
        args = (flag, flag)[: OPS[op].arity]
    if op == "where":
        args = (flag, *args[:2])
    values = [evaluate(a, tile) for a in args]
    expected = OPS[op].torch(*values)
    torch.testing.assert_close(evaluate(Pointwise(torch.float32, op, args), tile), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("indices", "is_view"),
    [
        ("q_idx, kv_idx", True),
        ("kv_idx, q_idx", True),
        ("0, kv_idx", True),
        ("q_idx, q_idx", True),
        ("n0, q_idx + kv_idx", True),
        ("2 * n0, kv_idx + size0", True),
        ("q_len, kv_len", True),
        ("q_idx - kv_idx + 6, kv_idx", True),
        ("q_idx, kv_idx - q_idx + 4", False),
        ("n0, q_idx - kv_idx + 6", False),
        ("n0, kv_idx - q_idx + 4", False),
        ("2 * n0, kv_idx - q_idx + size0 + 2", False),
        ("kv_idx - q_idx + 4, kv_idx - q_idx + 4", False),
        ("n0, kv_idx - 2 * q_idx + 8", False),
        ("n0 // size0, kv_idx", False),
        ("q_idx % 2, n0", False),
    ],
)
def test_loads(indices: str, is_view: bool) -> None:
    base = torch.randn(13, 12).T[::1]
    load = parse(f"t0[{indices}]", (base.dtype,))
    assert isinstance(load, Load)
    tile = make_tile((base,))
    found = evaluate(load, tile)
    assert (found.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()) == is_view
    torch.testing.assert_close(found.expand(2, 3, 6), element_by_element(load, base, tile), rtol=0, atol=0)


@pytest.mark.parametrize(
    "indices",
    [
        "n0, q_idx, kv_idx",
        "0, 0, kv_idx",
        "n0, 0, kv_idx - q_idx + 4",
        "0, 1, kv_idx - q_idx + 3",
        "n0, 0, 2 * (kv_idx - q_idx) + 6",
        "n0, kv_idx - q_idx + 4, 3",
        "n0, kv_idx - q_idx + 3, kv_idx - q_idx + 3",
        "n0, 0, q_idx - kv_idx + 6",
        "n0, q_idx, kv_idx - q_idx + 4",
        "n0, kv_idx - q_idx + 4, q_idx",
        "n0, q_idx % 2, kv_idx // 2",
        "n0, q_idx, kv_idx % 3",
        "kv_idx // 3, q_idx // 3 + kv_idx % 3, n0",
        "0, q_idx * 2 + kv_idx // 3, kv_idx % 3 + 1",
        "kv_idx % 2, n0, kv_idx // 2 % 2 + q_idx",
        "kv_idx // 4, kv_idx // 2 % 2 + q_idx, kv_idx % 2",
        "n0, kv_idx % 6 + q_idx, kv_idx % 2",
        "n0, q_idx + kv_idx, 2",
        "n0 // 3, kv_idx // 8 + q_idx % 4, kv_idx % 12",
    ],
)
@pytest.mark.parametrize(("queries", "keys"), [(range(2, 5), range(1, 7)), (range(3), range(6))], ids=str)
def test_what_a_load_reads_is_where_its_gradient_goes(indices: str, queries: range, keys: range) -> None:
    """Sums of pairs that read one element, as all of one distance do in a table of distances."""
    read = parse(f"t0[{indices}]", (torch.float64,))
    assert isinstance(read, Load)
    base = torch.zeros(3, 11, 17, dtype=torch.float64, requires_grad=True)
    tile = make_tile((base.detach(),), queries, keys)
    grad = torch.randn(2, 3, 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad(element_by_element(read, base, tile), base, grad)
    total = torch.ones(3, 11, 17, dtype=torch.float64)
    scatter_add(total, read, grad, tile)
    torch.testing.assert_close(total, 1 + expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "indices",
    [
        "n0, q_idx, min(max(kv_idx - q_idx, -1), 2) + 1",
        "min(max(kv_idx - q_idx, 0), 2), q_idx, 3 * n0 + 1",
        "2, t1[q_idx, kv_idx], n0",
        "t1[n0, kv_idx], q_idx, 2 * kv_idx",
        "n0, t1[q_idx, kv_idx], t1[0, kv_idx]",
        "t1[n0, 0], t1[0, n0], kv_idx % 2",
        "n0, t1[q_idx // 2, kv_idx // 3], kv_idx % 3",
    ],
)
def test_what_a_look_up_reads_is_where_its_gradient_goes(indices: str) -> None:
    """Once for all positions that only choose among look-ups, whichever dimensions of the tensor they go along."""
    read = parse(f"t0[{indices}]", (torch.float64, torch.int64))
    base = torch.randn(3, 11, 17, dtype=torch.float64, requires_grad=True)
    table = torch.randint(0, 3, (5, 7), generator=torch.Generator().manual_seed(0))
    grad = torch.randn(2, 3, 6, dtype=torch.float64)
    tile = replace(make_tile((base, table), range(3), range(6)), dtype=torch.float64)
    (expected,) = torch.autograd.grad(evaluate(read, tile).expand(2, 3, 6), base, grad)
    total = torch.ones(3, 11, 17, dtype=torch.float64)
    scatter_add(total, read, grad, tile)
    torch.testing.assert_close(total, 1 + expected, rtol=1e-14, atol=1e-14)


def test_a_load_outside_its_tensor_is_harmless_where_it_is_discarded() -> None:
    """A concatenation lifts to a `where` between loads, each of them outside its tensor half of the time."""
    first, second = torch.randn(3), torch.randn(4)
    program = parse("where(kv_idx < 3, t0[kv_idx], t1[kv_idx - 3])", (torch.float32, torch.float32))
    found = evaluate(program, make_tile((first, second), keys=range(7)))
    torch.testing.assert_close(found.flatten(), torch.cat([first, second]), rtol=0, atol=0)
    nothing = evaluate(parse("where(kv_idx < 0, t0[kv_idx], 2.0)", (torch.float32,)), make_tile((torch.empty(0),)))
    assert (nothing == 2.0).all()


def test_values_keep_size_one_where_they_do_not_vary() -> None:
    tile = make_tile((torch.randn(7, dtype=torch.float16),))
    assert evaluate(parse("kv_idx <= q_idx"), tile).shape == (1, 3, 6)
    bias = evaluate(parse("t0[kv_idx]", (torch.float16,)), tile)
    assert bias.shape == (1, 1, 6)
    assert bias.dtype == torch.float32


def test_small_integers_do_not_wrap() -> None:
    tile = make_tile((torch.full((7,), 200, dtype=torch.uint8),))
    assert (evaluate(parse("t0[kv_idx] + t0[kv_idx]", (torch.uint8,)), tile) == 400).all()


@pytest.mark.parametrize(
    "index",
    [
        FloorDiv(Q_IDX - KV_IDX, 2),
        Mod(KV_IDX + 3 * N0, 4),
        sympy.Min(Q_IDX, KV_IDX, 2),
        sympy.Max(Q_IDX - 3, 0),
        sympy.Min(size_symbol(0), 3) * N0,
    ],
)
def test_index_expressions_agree_with_sympy(index: sympy.Expr) -> None:
    symbols = {**positions(), size_symbol(0): 2}
    found = torch.as_tensor(evaluate_index(index, symbols)).broadcast_to(3, 5, 7)
    for n, i, j in ((0, 0, 0), (1, 4, 2), (2, 1, 6), (0, 3, 3)):
        assert found[n, i, j] == int(index.subs({N0: n, Q_IDX: i, KV_IDX: j, size_symbol(0): 2}))


def test_a_tile_is_released_at_once() -> None:
    """Its evaluation was a reference cycle, so a pass over many tiles held the tensors of all until a collection."""
    tile = make_tile()
    held = weakref.ref(tile.products[0])
    gc.disable()
    try:
        evaluate(parse("where(kv_idx <= q_idx, tanh(qk) * 2, -inf)"), tile)
        del tile
        assert held() is None
    finally:
        gc.enable()


def test_what_no_score_program_holds_is_named() -> None:
    with pytest.raises(TypeError, match="Softmax"):
        evaluate(Softmax(torch.float32, parse("qk"), KV_IDX, KV_IDX, KV_LEN), make_tile())
    with pytest.raises(TypeError, match="sin"):
        evaluate(Index(torch.int64, sympy.sin(Q_IDX)), make_tile())


def test_reference_is_eager_attention() -> None:
    mask = torch.rand(2, 7) < 0.7
    mask[1] = False
    bias = torch.randn(3, 5, 7)
    call = make_call(
        "where(t0[n0, kv_idx], qk * 0.25 + t1[n1, q_idx, kv_idx], -inf)", (2, 3, 5, 8), 7, captured=[mask, bias]
    )
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    scores = (q @ k.mT * 0.25 + bias.double()).masked_fill(~mask[:, None, None], -math.inf)
    out, lse = attention_reference(call, torch.float64)
    torch.testing.assert_close(out, torch.softmax(scores, -1) @ v, equal_nan=True, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_sum_exp(lse[0]), torch.logsumexp(scores, -1)[0], rtol=1e-12, atol=1e-12)
    assert (lse[1, ..., 0] == -math.inf).all()
    assert lse[1, ..., 1].isnan().all()
    assert out[1].isnan().all()
    assert not out[0].isnan().any()


def test_reference_rounds_to_the_spec_types() -> None:
    call = make_call("qk * 0.25", (2, 5, 8), dtype=torch.bfloat16)
    probs = torch.softmax((call.q.float() @ call.k.float().mT) * 0.25, -1).bfloat16().float()
    out, lse = call.eager()
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, (probs @ call.v.float()).bfloat16(), rtol=0, atol=0)
