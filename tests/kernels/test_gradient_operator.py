"""`flashfuse::attention_backward` and autograd of the attention operator, as compilers and users see them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import Call, make_call
from numerics import assert_close_to_exact
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import flashfuse.kernels.ops  # noqa: F401

attention = torch.ops.flashfuse.attention
attention_backward = torch.ops.flashfuse.attention_backward
CAUSAL = "where(kv_idx <= q_idx, qk * 0.3, -inf)"


def biased(**changes: Any) -> Call:
    """A call whose captured tensors are a bias, positions (which have no gradient) and a scale."""
    captured = [torch.randn(3, 6, 5).transpose(1, 2), torch.arange(6), torch.rand(3, dtype=torch.bfloat16)]
    score = "qk * t2[n1] + t0[n1, q_idx, kv_idx] * to_float(t1[kv_idx])"
    return make_call(score, (2, 3, 5, 8), 6, captured=captured, **changes)


def backward_arguments(call: Call, needs: list[bool]) -> tuple[Any, ...]:
    q, k, v, *rest = call.arguments
    out, lse = attention(*call.arguments)
    return torch.randn_like(out), q, k, v, out, lse, *rest, needs


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(order: tuple[int, ...], permuted: bool) -> None:
    """Under autograd too: all tests of `opcheck`, the compiled gradients among them."""
    call = biased(out_order=order)
    tensors = [call.q, call.k, call.v]
    if permuted:
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    q, k, v = (x.requires_grad_() for x in tensors)
    captured = [c.requires_grad_() if c.is_floating_point() else c for c in call.captured]
    torch.library.opcheck(attention.default, (q, k, v, captured, call.sizes, call.spec.to_text()))


def test_opcheck_without_batch_axes_and_with_ranges() -> None:
    call = make_call("where(t0[kv_idx], qk, -inf)", (200, 8), captured=[torch.arange(200) < 70])
    kv_ranges = torch.ops.flashfuse.mask_ranges(call.captured, [], 0, 200, 200, "t0[kv_idx]", "t0[kv_idx]")
    call.q.requires_grad_()
    torch.library.opcheck(attention.default, call.arguments)
    torch.library.opcheck(attention.default, (*call.arguments[:6], kv_ranges))


@pytest.mark.parametrize("needs", [[True] * 5, [False, True, False, True, False], [False] * 5], ids=str)
def test_opcheck_of_the_backward(needs: list[bool]) -> None:
    tests = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(attention_backward.default, backward_arguments(biased(), needs), test_utils=tests)


@pytest.mark.parametrize("permutation", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 1, 0, 2)])
def test_fake_strides_are_the_real_ones(permutation: tuple[int, ...]) -> None:
    call = biased()
    back = [permutation.index(d) for d in range(4)]
    q, k = (x.permute(permutation).contiguous().permute(back) for x in (call.q, call.k))
    v = call.v[:, :1].expand(2, 3, 6, 8)
    call = Call(call.spec, q, k, v, call.captured, call.sizes)
    grad, q, k, v, out, lse, captured, *rest = backward_arguments(call, [True] * 5)
    real = attention_backward(grad, q, k, v, out, lse, captured, *rest)
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(x) for x in (grad, q, k, v, out, lse)]
        fake = attention_backward(*tensors, [mode.from_tensor(c) for c in captured], *rest)
    assert len(real) == len(fake) == 5
    for x, y in zip(fake, real, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


def test_sizes_stay_symbolic() -> None:
    call = make_call(CAUSAL, (2, 3, 16, 8))

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out, _ = attention(q, k, v, [], [q.shape[0], q.shape[1]], call.spec.to_text())
        return torch.autograd.grad(out.square().sum(), (q, k, v))

    traced = make_fx(function, tracing_mode="symbolic")(call.q, call.k, call.v)
    assert any(node.target == attention_backward.default for node in traced.graph.nodes)
    longer = make_call(CAUSAL, (4, 3, 23, 8))
    torch.testing.assert_close(traced(longer.q, longer.k, longer.v), function(longer.q, longer.k, longer.v))


def test_log_sum_exp_has_no_gradient() -> None:
    call = biased()
    call.q.requires_grad_()
    out, lse = attention(*call.arguments)
    assert out.requires_grad
    assert not lse.requires_grad


def test_one_tensor_in_two_places() -> None:
    call = make_call(CAUSAL, (2, 3, 5, 8))
    x = call.q.requires_grad_()
    attention(x, x, x, [], call.sizes, call.spec.to_text())[0].square().sum().backward()
    parts = [call.q.detach().clone().requires_grad_() for _ in range(3)]
    attention(*parts, [], call.sizes, call.spec.to_text())[0].square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, sum(p.grad for p in parts))


def test_autocast_changes_nothing() -> None:
    call = make_call(CAUSAL, (2, 3, 16, 8))
    found = []
    for enabled in (False, True):
        q = call.q.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, _ = attention(q, *call.arguments[1:])
            found.append(torch.autograd.grad(out.square().sum(), q))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_second_derivative_says_that_there_is_none() -> None:
    call = biased()
    call.q.requires_grad_()
    out, _ = attention(*call.arguments)
    (grad,) = torch.autograd.grad(out.sum(), call.q, create_graph=True)
    with pytest.raises(RuntimeError, match="flashfuse::attention has no second derivative"):
        grad.sum().backward()


def test_what_every_key_has_in_common_has_no_gradient() -> None:
    """A vector added to all keys changes no probability: its gradient is the rounding errors of a row's scores.

    A causal mask cut the few keys of a row into two tiles, and each took the row's sum of products from the output,
    whose own rounding left one and a half times as much as eager code leaves.
    """
    call = make_call(CAUSAL, (2, 3, 21, 8))
    kept = torch.ones(21, 21, dtype=torch.bool).tril()
    q, k, v = leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
    fused, _ = attention(*leaves, [], call.sizes, call.spec.to_text())
    eager = (q @ k.mT * 0.3).masked_fill(~kept, -torch.inf).softmax(-1) @ v
    found: list[list[torch.Tensor]] = [[], []]
    for seed in range(32):
        grad = torch.randn(fused.shape, generator=torch.Generator().manual_seed(seed))
        for sums, out in zip(found, (fused, eager), strict=True):
            sums.append(torch.autograd.grad(out, k, grad, retain_graph=True)[0].double().sum((0, 2)))
    mine, theirs = (torch.stack(sums) for sums in found)
    assert_close_to_exact(mine, theirs, torch.zeros_like(mine), dtype=torch.float32)


def test_wrong_number_of_flags_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="expected 5 flags in needs, got 3"):
        attention_backward(*backward_arguments(biased(), [True] * 3))


def test_forward_mode_says_that_there_is_none() -> None:
    """The formula that torch makes by itself lost the tangents: the output's was zero."""
    call = make_call(CAUSAL, (2, 3, 5, 8))
    with pytest.raises(NotImplementedError, match="flashfuse::attention has no forward-mode derivative"):
        torch.func.jvp(lambda q: attention(q, *call.arguments[1:])[0], (call.q,), (call.k,))


def test_gradients_stop_in_no_grad_regions_of_every_level() -> None:
    call = make_call(CAUSAL, (2, 3, 5, 8))

    def detached(q: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out, _ = attention(q, *call.arguments[1:])
        return (out * q).sum()

    out, _ = attention(*call.arguments)
    torch.testing.assert_close(torch.func.grad(detached)(call.q), out, rtol=0, atol=0)


# Which of q, k, v, a look-up's positions, a table and a scale a batch is mapped over.
MAPPED = [(0, 0, 0, 0, 0, 0), (0, None, None, None, None, None), (None, 1, 1, None, None, None),
          (None, None, None, None, 0, 1), (2, 0, None, 0, None, None)]  # fmt: skip


@pytest.mark.parametrize("in_dims", MAPPED, ids=str)
def test_vmap_is_a_loop(in_dims: tuple[int | None, ...]) -> None:
    """Forward, and the gradients of each example."""
    captured = [torch.randint(7, (5, 6)), torch.randn(7, 3), torch.rand(3)]
    call = make_call(
        "qk * t2[n1] + t1[t0[q_idx, kv_idx], n1]", (2, 3, 5, 8), 6, captured=captured, out_order=(0, 2, 1, 3)
    )

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        return attention(*inputs[:3], list(inputs[3:]), call.sizes, call.spec.to_text())[0]

    def derive(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.func.grad(lambda *x: run(*x).square().sum(), argnums=(0, 1, 2, 4, 5))(*inputs)

    plain = (call.q, call.k, call.v, *captured)
    mapped = [
        x if at is None else torch.stack([x, x.flip(0), x.roll(1, 0)], at) for x, at in zip(plain, in_dims, strict=True)
    ]
    for function in (run, derive):
        each = [function(*(x if at is None else x.select(at, i) for x, at in zip(mapped, in_dims, strict=True)))
                for i in range(3)]  # fmt: skip
        expected = torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *each)
        torch.testing.assert_close(torch.vmap(function, in_dims=in_dims)(*mapped), expected)


def test_vmap_maps_ranges() -> None:
    """Each example leaves out its own keys: NaN behind them is not read."""
    keep = torch.arange(300) < torch.tensor([[70], [130]])
    call = make_call("where(t0[kv_idx], qk, -inf)", (300, 8), captured=[keep[0]])

    def found(kept: torch.Tensor) -> torch.Tensor:
        return torch.ops.flashfuse.mask_ranges([kept], [], 0, 300, 300, "t0[kv_idx]", "t0[kv_idx]")

    def run(kept: torch.Tensor, k: torch.Tensor, kv_ranges: torch.Tensor) -> torch.Tensor:
        return attention(call.q, k, call.v, [kept], call.sizes, call.spec.to_text(), kv_ranges)[0]

    k = torch.stack([call.k, call.k])
    k[0, 128:] = torch.nan
    inputs = keep, k, torch.stack([*map(found, keep)])
    out = torch.vmap(run)(*inputs)
    assert out.isfinite().all()
    torch.testing.assert_close(out, torch.stack([run(*example) for example in zip(*inputs, strict=True)]))


def test_vmap_of_four_axes_is_an_error() -> None:
    call = make_call(CAUSAL, (1, 1, 2, 2, 5, 8))
    with pytest.raises(RuntimeError, match=r"has 4 batch axes, and torch\.vmap would add one more"):
        torch.vmap(lambda q: attention(q, *call.arguments[1:])[0])(call.q[None])
