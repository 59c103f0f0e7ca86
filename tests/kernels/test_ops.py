"""The operator as compilers see it."""

from collections.abc import Callable

import pytest
import torch
from attention_cases import Call, make_call
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from flashfuse.kernels import ops
from flashfuse.kernels.mask import MASK_BLOCK
from flashfuse.kernels.tiled import attention_tiled

CAUSAL = "where(kv_idx <= q_idx, qk * 0.3, -inf)"
attention = torch.ops.flashfuse.attention


def biased(**changes: object) -> Call:
    bias = torch.randn(3, 6, 5).transpose(1, 2)
    return make_call("qk * 0.3 + t0[n1, q_idx, kv_idx]", (2, 3, 5, 8), 6, captured=[bias], **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(order: tuple[int, ...], permuted: bool, requires_grad: bool) -> None:
    call = biased(out_order=order)
    q, k, v, *rest = call.arguments
    if permuted:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    q.requires_grad_(requires_grad)
    torch.library.opcheck(attention.default, (q, k, v, *rest))


def test_runs_the_tiled_path() -> None:
    call = biased()
    torch.testing.assert_close(attention(*call.arguments), attention_tiled(call), rtol=0, atol=0)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3)])
def test_fake_strides_are_the_real_ones(order: tuple[int, ...]) -> None:
    call = biased(out_order=order)
    real = attention(*call.arguments)
    with FakeTensorMode() as mode:
        q, k, v, captured, sizes, spec, *_ = call.arguments
        fake = attention(
            *(mode.from_tensor(x) for x in (q, k, v)), [mode.from_tensor(c) for c in captured], sizes, spec
        )
    for x, y in zip(fake, real, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


def test_sizes_stay_symbolic() -> None:
    call = biased()

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, [bias], [q.shape[0], q.shape[1]], call.spec.to_text())[0]

    traced = make_fx(function, tracing_mode="symbolic")(call.q, call.k, call.v, *call.captured)
    assert any(node.target == attention.default for node in traced.graph.nodes)
    longer = make_call("qk", (4, 3, 9, 8), 11)
    bias = torch.randn(3, 9, 11)
    expected = function(longer.q, longer.k, longer.v, bias)
    torch.testing.assert_close(traced(longer.q, longer.k, longer.v, bias), expected)


def test_unbacked_sizes() -> None:
    call = make_call(CAUSAL, (2, 5, 8))
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        length = mode.shape_env.create_unbacked_symint()  # type: ignore[union-attr]
        torch._check(length >= 2)
        q, k, v = (torch.empty(2, length, 8) for _ in range(3))
        out, lse = attention(q, k, v, [], [2], call.spec.to_text())
    assert out.shape[1] is length or out.shape[1] == length
    assert lse.dim() == 3


def test_compiles_with_dynamic_sizes() -> None:
    call = make_call(CAUSAL, (2, 3, 16, 8))
    spec = call.spec.to_text()

    def function(x: torch.Tensor) -> torch.Tensor:
        q, k, v = (x * scale for scale in (1.0, 2.0, 3.0))
        q, k, v = (y.unflatten(-1, (3, 8)).transpose(1, 2) for y in (q, k, v))
        out, _ = attention(q, k, v, [], [q.shape[0], q.shape[1]], spec)
        return out.transpose(1, 2).flatten(2) + 1.0

    compiled = torch.compile(function, dynamic=True, fullgraph=True)
    for length in (16, 21):
        x = torch.randn(2, length, 24)
        torch.testing.assert_close(compiled(x), function(x))


def test_inductor_passes_transposed_inputs_without_copies() -> None:
    from torch._inductor.utils import run_and_get_code

    call = make_call(CAUSAL, (2, 3, 16, 8))
    spec = call.spec.to_text()

    def function(x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (3, 8)).transpose(1, 2) for y in x.chunk(3, -1))
        return attention(q, k, v, [], [2, 3], spec)[0]

    x = torch.randn(2, 16, 72)
    found, (code,) = run_and_get_code(torch.compile(function, fullgraph=True), x)
    torch.testing.assert_close(found, function(x))
    assert "cpp_fused" not in code


def test_exports() -> None:
    call = make_call(CAUSAL, (2, 3, 16, 8))

    class Model(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention(q, k, v, [], [q.shape[0], q.shape[1]], call.spec.to_text())[0]

    length = torch.export.Dim("length", min=2, max=64)
    shapes = {name: {2: length} for name in "qkv"}
    program = torch.export.export(Model(), (call.q, call.k, call.v), dynamic_shapes=shapes)
    longer = make_call(CAUSAL, (2, 3, 23, 8))
    torch.testing.assert_close(program.module()(longer.q, longer.k, longer.v), Model()(longer.q, longer.k, longer.v))


def test_autocast_changes_nothing() -> None:
    for score in (CAUSAL, "tanh(qk)"):
        call = make_call(score, (2, 3, 16, 8))
        with torch.autocast("cpu", torch.bfloat16):
            inside = attention(*call.arguments)
        torch.testing.assert_close(inside, attention(*call.arguments), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(5, 8)}, "q needs 4 dimensions"),
        ({"k": torch.randn(2, 3, 6, 4)}, "q is 8 wide, k 4"),
        ({"v": torch.randn(2, 3, 7, 8)}, "6 keys, 7 values"),
        ({"v": torch.randn(2, 3, 6, 8).double()}, "cannot hold exactly"),
        ({"k": torch.randn(2, 2, 6, 8)}, "does not broadcast"),
        ({"captured": []}, "captured tensors"),
        ({"captured": [torch.randn(3, 5, 6, device="meta")]}, "captured tensor 0 is on meta"),
        ({"sizes": [2]}, "batch sizes"),
        ({"k": torch.randn(2, 3, 6, 8, device="meta")}, "k is on meta"),
    ],
)
def test_wrong_operands_are_named(changes: dict, message: str) -> None:
    call = biased()
    fields = {"q": call.q, "k": call.k, "v": call.v, "captured": call.captured, "sizes": call.sizes}
    with pytest.raises(RuntimeError, match=message):
        attention(*{**fields, **changes}.values(), call.spec.to_text())


def test_the_interpreter_runs_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    call = biased()
    out, lse = attention(*call.arguments)
    monkeypatch.setattr(ops, "_attention_triton", lambda: lambda *args: (torch.zeros_like(out), lse))
    assert torch.equal(attention(*call.arguments)[0], out)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not attention(*call.arguments)[0].any()
    monkeypatch.setattr(ops, "_attention_triton", lambda: None)
    assert torch.equal(attention(*call.arguments)[0], out)


def padded(**changes: object) -> tuple[Call, torch.Tensor]:
    keep = torch.arange(200) < torch.tensor([[70], [200]])
    call = make_call("where(t0[n0, kv_idx], qk * 0.3, -inf)", (2, 3, 140, 8), 200, captured=[keep], **changes)  # type: ignore[arg-type]
    predicate = "t0[n0, kv_idx]"
    return call, torch.ops.flashfuse.mask_ranges([keep], [2, 1], 2, 140, 200, predicate, predicate)


def test_opcheck_with_ranges() -> None:
    call, kv_ranges = padded()
    assert tuple(kv_ranges.shape) == (2, 1, -(-call.q_len // MASK_BLOCK), 4)
    tests = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(attention.default, (*call.arguments[:6], kv_ranges), test_utils=tests)


def test_ranges_are_the_torch_operators_they_are_made_of() -> None:
    """A compiler can fuse them; symbolic lengths stay symbolic."""
    keep = torch.arange(200) < torch.tensor([[70], [200]])

    def function(keep: torch.Tensor) -> torch.Tensor:
        batch, length = keep.shape
        predicate = "t0[n0, kv_idx] & (kv_idx <= q_idx)"
        return torch.ops.flashfuse.mask_ranges([keep], [batch, 1], 2, length, length, predicate, predicate)

    traced = make_fx(function, tracing_mode="symbolic")(keep)
    assert not [n for n in traced.graph.nodes if "flashfuse" in str(n.target)]
    for batch, length in ((2, 200), (3, 70), (1, 900)):
        other = torch.arange(length) < torch.arange(1, batch + 1)[:, None] * 60
        blocks = -(-length // MASK_BLOCK)
        torch.testing.assert_close(traced(other)[..., :blocks, :], function(other), rtol=0, atol=0)


WRONG = [lambda r: r.long(), lambda r: r[0], lambda r: r[..., :1, :], lambda r: r.expand(2, 2, -1, 4)]


@pytest.mark.parametrize("wrong", WRONG, ids=["dtype", "rank", "blocks", "batch"])
def test_ranges_of_another_mask_are_an_error(wrong: Callable[[torch.Tensor], torch.Tensor]) -> None:
    call, kv_ranges = padded()
    with pytest.raises(RuntimeError, match="kv_ranges must be int32 and broadcast to"):
        attention(*call.arguments[:6], wrong(kv_ranges))
