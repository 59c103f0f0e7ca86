"""The rewritten graph: one operator for each attention, everything else as Dynamo made it, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import graph_of, matched
from numerics import assert_close_to_exact
from torch import fx

import flashfuse
from flashfuse.patterns.match import find_attention
from flashfuse.rewrite import rewrite

B, H, S, D = 2, 4, 33, 16


def qkv(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(B, H, S, D, dtype=dtype) for _ in range(3))


def rewritten(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    before = graph_of(fn, *args, **kwargs)
    return before, rewrite(before, find_attention(before).sites)


def targets(gm: fx.GraphModule) -> list[str]:
    return [getattr(n.target, "__name__", str(n.target)) for n in gm.graph.nodes if n.op.startswith("call")]


def operators(gm: fx.GraphModule) -> int:
    return sum(n.target is torch.ops.flashfuse.attention.default for n in gm.graph.nodes)


def block(x: Any, w: Any) -> Any:
    q, k, v = (t.view(B, S, H, D).transpose(1, 2) for t in (F.layer_norm(x, x.shape[-1:]) @ w).chunk(3, -1))
    i = torch.arange(S)
    scores = (q @ k.mT / D**0.5).masked_fill(i > i[:, None], float("-inf"))
    return x + (scores.softmax(-1) @ v).transpose(1, 2).contiguous().view(B, S, H * D)


def test_only_the_attention_is_gone() -> None:
    before, after = rewritten(block, torch.randn(B, S, H * D), torch.randn(H * D, 3 * H * D))
    gone = {n.name for n in before.graph.nodes} - {n.name for n in after.graph.nodes}
    assert {n.target for n in before.graph.nodes if n.name in gone and n.op == "call_method"} == {
        "chunk", "view", "transpose", "masked_fill", "softmax",
    }  # fmt: skip
    left = [n.name for n in before.graph.nodes if n.name not in gone]
    assert [n.name for n in after.graph.nodes if n.name in left] == left
    assert not {"softmax", "masked_fill", "arange", "gt"} & set(targets(after))
    assert operators(after) == 1


def test_the_given_graph_is_not_changed() -> None:
    before = graph_of(block, torch.randn(B, S, H * D), torch.randn(H * D, 3 * H * D))
    code = before.code
    after = rewrite(before, find_attention(before).sites)
    assert before.code == code
    assert after is not before


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_numbers_through_every_inner_compiler(inner: str) -> None:
    x, w = torch.randn(B, S, H * D), torch.randn(H * D, 3 * H * D) * 0.1
    compiled = torch.compile(block, backend="flashfuse", options={"flashfuse.inner": inner, "flashfuse.strict": True})
    assert_close_to_exact(compiled(x, w), block(x, w), block(x.double(), w.double()))
    flashfuse.reports()[0].assert_fused(sites=1)


def test_every_new_node_says_what_it_is_and_where_it_comes_from() -> None:
    _, after = rewritten(block, torch.randn(B, S, H * D), torch.randn(H * D, 3 * H * D))
    for node in after.graph.nodes:
        if node.op == "call_function":
            assert "example_value" in node.meta, node
            assert "stack_trace" in node.meta, node
    assert "'score': 'where((kv_idx > q_idx), -inf, (qk * 0.25))'" in after.code


def test_user_code_may_view_the_output() -> None:
    """The product's output is contiguous, and user code may count on it."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        out = (q @ k.mT).softmax(-1) @ v
        return out.view(B * H, S, D)

    options = {"flashfuse.inner": "aot_eager", "flashfuse.strict": True}
    compiled = torch.compile(fn, backend="flashfuse", options=options)
    q, k, v = (torch.randn(B, S, H, D).transpose(1, 2) for _ in range(3))
    torch.testing.assert_close(compiled(q, k, v), fn(q, k, v))


def test_a_transposing_user_gets_its_layout_without_a_copy() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(B, S, H * D)

    site = matched(fn, *qkv()).sites[0]
    assert site.spec.out_order == (0, 2, 1, 3)


def test_autocast_region_keeps_its_nodes() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = (q @ k.mT).softmax(-1) @ v
            return F.linear(out, out.new_ones(D, D))

    before, after = rewritten(fn, *qkv())
    for name in ("_enter_autocast", "_exit_autocast", "linear"):
        assert targets(after).count(name) == targets(before).count(name) == 1
    compiled = torch.compile(fn, backend="flashfuse", options={"flashfuse.strict": True})
    fused, eager = compiled(*(args := qkv())), fn(*args)
    q, k, v = (x.double() for x in args)
    exact = ((q @ k.mT).softmax(-1) @ v).sum(-1, keepdim=True).expand(B, H, S, D)
    assert fused.dtype == eager.dtype == torch.bfloat16
    assert_close_to_exact(fused, eager, exact)


def test_in_place_chain_leaves_nothing_behind() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        s = q @ k.mT
        s /= 4.0
        s.masked_fill_(torch.ones(S, S, dtype=torch.bool).triu(1), float("-inf"))
        return s.softmax(-1) @ v

    _, after = rewritten(fn, *qkv())
    assert operators(after) == 1
    assert not {"itruediv", "masked_fill_", "matmul", "softmax", "triu"} & set(targets(after))
    compiled = torch.compile(fn, backend="flashfuse", options={"flashfuse.strict": True})
    args = qkv()
    assert_close_to_exact(compiled(*args), fn(*args), fn(*(a.double() for a in args)))


def test_static_cache_is_read_after_it_is_written() -> None:
    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(B, H, S, D))

        def forward(self, q: Any, k: Any, v: Any, at: Any) -> Any:
            keys = self.cache.index_copy_(2, at, k)
            past = torch.arange(S)[None, None, None] <= at[0]
            return (q @ keys.mT).masked_fill(~past, float("-inf")).softmax(-1) @ v

    q, k, v, at = torch.randn(B, H, 1, D), torch.randn(B, H, 1, D), torch.randn(B, H, S, D), torch.tensor([5])
    plain, fused = Step(), Step()
    compiled = torch.compile(fused, backend="flashfuse", options={"flashfuse.strict": True})
    for step in range(3):
        position = at + step
        torch.testing.assert_close(compiled(q, k * step, v, position), plain(q, k * step, v, position))
    assert torch.equal(plain.cache, fused.cache)
    flashfuse.reports()[0].assert_fused(sites=1)


def test_dynamic_lengths_compile_once() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        past = j <= i + (k.shape[2] - q.shape[2])
        return torch.where(past, q @ k.mT, float("-inf")).softmax(-1) @ v

    compiled = torch.compile(fn, backend="flashfuse", dynamic=True, options={"flashfuse.strict": True})
    for s, t in ((7, 19), (33, 64), (64, 64), (2, 301)):
        q, k, v = torch.randn(B, H, s, D), torch.randn(B, H, t, D), torch.randn(B, H, t, D)
        assert_close_to_exact(compiled(q, k, v), fn(q, k, v), fn(q.double(), k.double(), v.double()))
    assert sum(len(r.sites) for r in flashfuse.reports()) == len(flashfuse.reports())
    assert len(flashfuse.reports()) <= 2


def test_scale_given_as_a_symbolic_float() -> None:
    def fn(q: Any, k: Any, v: Any, scale: float) -> Any:
        return (q @ k.mT * scale).softmax(-1) @ v

    args = qkv()
    with torch._dynamo.config.patch(specialize_float=False):
        compiled = torch.compile(fn, backend="flashfuse", dynamic=True, options={"flashfuse.strict": True})
        for scale in (0.25, 0.5):
            torch.testing.assert_close(compiled(*args, scale), fn(*args, scale))


def test_attention_inside_a_higher_order_operator() -> None:
    from torch.utils.checkpoint import checkpoint

    def fn(q: Any, k: Any, v: Any) -> Any:
        return checkpoint(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, q, k, v, use_reentrant=False)

    args = qkv()
    compiled = torch.compile(fn, backend="flashfuse", options={"flashfuse.strict": True})
    torch.testing.assert_close(compiled(*args), fn(*args))
    assert sum(len(r.sites) for r in flashfuse.reports()) == 1


def test_operands_scaled_in_place_are_scaled_once() -> None:
    """q /= 4 leaves its memory scaled; the kernel must not read that memory and scale again."""

    def fn(x: Any, k: Any, v: Any) -> Any:
        q = (x + 1).transpose(1, 2)
        q /= 4.0
        q *= 2.0
        return (q @ k.mT).softmax(-1) @ v

    x, k, v = torch.randn(B, S, H, D), torch.randn(B, H, S, D), torch.randn(B, H, S, D)
    compiled = torch.compile(fn, backend="flashfuse", options={"flashfuse.strict": True})
    assert_close_to_exact(compiled(x, k, v), fn(x, k, v), fn(x.double(), k.double(), v.double()))
    flashfuse.reports()[0].assert_fused(sites=1)


def test_limits_of_sizes_are_computed_by_the_graph() -> None:
    """What a window's cache keeps starts at max(0, length - window), which the text of a program could not hold."""

    def fn(q: Any, k: Any, v: Any, past: Any) -> Any:
        length = past.shape[0]
        kept = torch.arange(k.shape[2]) + max(length - 20, 0)
        seen = (kept > min(length, 30) - 16) & (kept <= length)
        return (q @ k.mT).masked_fill(~seen, float("-inf")).softmax(-1) @ v

    options = {"flashfuse.inner": "eager", "flashfuse.strict": True}
    compiled = torch.compile(fn, backend="flashfuse", dynamic=True, options=options)
    q, k, v = qkv()
    for length in (12, 25, 31):
        args = q[:, :, :1], k, v, torch.zeros(length)
        assert_close_to_exact(compiled(*args), fn(*args), fn(*(a.double() for a in args)))
    for report in flashfuse.reports():
        report.assert_fused(sites=1)
