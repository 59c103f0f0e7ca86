"""Every way of writing the same attention gives the same spec."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import graph_of, only_site, score_of

from flashfuse.patterns.match import find_attention

B, H, S, T, D, E = 2, 4, 6, 10, 8, 3
GROUPS = 2


def qkv(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(B, H, S, D, dtype=dtype),
        torch.randn(B, H, T, D, dtype=dtype),
        torch.randn(B, H, T, E, dtype=dtype),
    )


def plain(q: Any, k: Any, v: Any) -> Any:
    return torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * 0.5, dim=-1) @ v


def scaled_queries(q: Any, k: Any, v: Any) -> Any:
    return F.softmax((q * 0.5) @ k.mT, -1) @ v


def scaled_both(q: Any, k: Any, v: Any) -> Any:
    s = math.sqrt(0.5)
    return F.softmax((q * s) @ (k / (1 / s)).transpose(2, 3), -1) @ v


def folded_heads(q: Any, k: Any, v: Any) -> Any:
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) / 2, -1), v).view(B, H, S, E)


def baddbmm(q: Any, k: Any, v: Any) -> Any:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(torch.empty(B * H, S, T), q, k.transpose(1, 2), beta=0, alpha=0.5)
    return torch.bmm(scores.softmax(-1), v).view(B, H, S, E)


def einsum(q: Any, k: Any, v: Any) -> Any:
    return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).mul(0.5).softmax(-1), v)


def einsum_sequence_first(q: Any, k: Any, v: Any) -> Any:
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    probs = torch.softmax(torch.einsum("ibnd,jbnd->ijbn", q, k) * 0.5, dim=1)
    return torch.einsum("ijbn,jbnd->ibnd", probs, v).permute(1, 2, 0, 3)


def assembled(q: Any, k: Any, v: Any) -> Any:
    s = q @ k.transpose(-1, -2) * 0.5
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def assembled_with_max_values(q: Any, k: Any, v: Any) -> Any:
    s = q @ k.transpose(-1, -2) * 0.5
    e = (s - s.max(dim=-1, keepdim=True).values).exp()
    return torch.matmul(e * (1.0 / e.sum(dim=-1, keepdim=True)), v)


def unshifted(q: Any, k: Any, v: Any) -> Any:
    e = (q @ k.transpose(-1, -2) * 0.5).exp()
    return torch.div(e, torch.sum(e, -1)[..., None]) @ v


def base_two(q: Any, k: Any, v: Any) -> Any:
    s = q @ k.transpose(-1, -2) * (0.5 / math.log(2.0))
    e = torch.exp2(s - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def base_small(q: Any, k: Any, v: Any) -> Any:
    e = 1.5 ** (q @ k.transpose(-1, -2) * (0.5 / math.log(1.5)))
    return (e / e.sum(-1, keepdim=True)) @ v


def in_place(q: Any, k: Any, v: Any) -> Any:
    s = q @ k.transpose(-1, -2)
    s *= 0.5
    return s.softmax(-1) @ v


def transposed_output(q: Any, k: Any, v: Any) -> Any:
    probs = torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1)
    return torch.matmul(v.transpose(-1, -2), probs.transpose(-1, -2)).transpose(-1, -2)


def contiguous_everywhere(q: Any, k: Any, v: Any) -> Any:
    kt = k.permute(0, 1, 3, 2).contiguous()
    return torch.matmul(F.softmax(torch.matmul(q.contiguous(), kt) * 0.5, dim=3).clone(), v.contiguous())


def zero_dim_tensor_scale(q: Any, k: Any, v: Any) -> Any:
    return torch.softmax(q @ k.mT / torch.tensor(2.0), -1) @ v


def functional(q: Any, k: Any, v: Any) -> Any:
    return F.scaled_dot_product_attention(q, k, v, scale=0.5)


SPELLINGS = [
    plain, scaled_queries, scaled_both, folded_heads, baddbmm, einsum, einsum_sequence_first, assembled,
    assembled_with_max_values, unshifted, base_two, base_small, in_place, transposed_output, contiguous_everywhere,
    zero_dim_tensor_scale, functional,
]  # fmt: skip


@pytest.mark.parametrize("fn", SPELLINGS, ids=lambda f: f.__name__)
def test_one_meaning(fn: Callable[..., Any]) -> None:
    site = only_site(fn, *qkv())
    score = site.spec.score
    assert score.op == "mul"
    assert score_of(site.spec).startswith("(qk * 0.5") or score_of(site.spec).startswith("(qk * 0.4999")
    assert site.batch == (B, H)
    assert (site.q_len, site.kv_len, site.head_dim, site.value_dim) == (S, T, D, E)
    assert site.spec.captured == ()
    assert site.spec.empty_row == ("zero" if fn is functional else "nan")


def test_softmin() -> None:
    """It was passed over in silence, as exponentials to another base than e were."""
    site = only_site(lambda q, k, v: F.softmin(q @ k.mT * 0.5, -1) @ v, *qkv())
    assert score_of(site.spec) == "neg((qk * 0.5))"


@pytest.mark.parametrize("fn", SPELLINGS, ids=lambda f: f.__name__)
def test_operands_are_the_functions_own_inputs(fn: Callable[..., Any]) -> None:
    """No copy is left between what the caller passed and the kernel."""
    site = only_site(fn, *qkv())
    assert [o.node.op for o in (site.q, site.k, site.v)] == ["placeholder"] * 3


def repeat_kv(x: Any, n: int) -> Any:
    b, h, t, d = x.shape
    return x[:, :, None, :, :].expand(b, h, n, t, d).reshape(b, h * n, t, d)


REPEATS = {
    "expand_reshape": lambda x: repeat_kv(x, GROUPS),
    "repeat_interleave": lambda x: x.repeat_interleave(GROUPS, dim=1),
    "unsqueeze_repeat": lambda x: x.unsqueeze(2).repeat(1, 1, GROUPS, 1, 1).flatten(1, 2),
}


@pytest.mark.parametrize("repeat", REPEATS.values(), ids=REPEATS.keys())
def test_grouped_heads_read_the_small_tensor(repeat: Callable[..., Any]) -> None:
    q, k, v = torch.randn(B, H, S, D), torch.randn(B, H // GROUPS, T, D), torch.randn(B, H // GROUPS, T, E)
    site = only_site(lambda q, k, v: torch.softmax(q @ repeat(k).transpose(2, 3), -1) @ repeat(v), q, k, v)
    assert site.batch == (B, H // GROUPS, GROUPS)
    assert [site.k.moves_along(axis) for axis in range(3)] == [True, True, False]
    assert [site.v.moves_along(axis) for axis in range(3)] == [True, True, False]
    assert site.k.node.op == site.v.node.op == "placeholder"


def test_tiled_heads_are_another_grouping() -> None:
    """repeat puts query head h on key head h % kv_heads: the group axis is outside."""
    q, k, v = torch.randn(B, H, S, D), torch.randn(B, H // GROUPS, T, D), torch.randn(B, H // GROUPS, T, E)
    tile = lambda x: x.repeat(1, GROUPS, 1, 1)  # noqa: E731
    site = only_site(lambda q, k, v: torch.softmax(q @ tile(k).transpose(2, 3), -1) @ tile(v), q, k, v)
    assert site.batch == (B, GROUPS, H // GROUPS)
    assert [site.k.moves_along(axis) for axis in range(3)] == [True, False, True]


def test_multi_query_heads() -> None:
    q, k, v = torch.randn(B, H, S, D), torch.randn(B, T, D), torch.randn(B, T, E)
    site = only_site(
        lambda q, k, v: torch.einsum("bhij,bjd->bhid", torch.einsum("bhid,bjd->bhij", q, k).softmax(-1), v), q, k, v
    )
    assert site.batch == (B, H)
    assert not site.k.moves_along(1)
    assert not site.v.moves_along(1)


def test_enable_gqa() -> None:
    q, k, v = torch.randn(B, H, S, D), torch.randn(B, H // GROUPS, T, D), torch.randn(B, H // GROUPS, T, E)
    site = only_site(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), q, k, v)
    assert site.batch == (B, H // GROUPS, GROUPS)
    assert score_of(site.spec) == f"(qk * {1 / math.sqrt(D)!r})"


def test_enable_gqa_with_a_mask() -> None:
    """The shape of the mask was held to that of scores whose heads were taken to broadcast, which raised."""
    q, k, v = torch.randn(B, H, S, D), torch.randn(B, H // GROUPS, T, D), torch.randn(B, H // GROUPS, T, E)
    for heads in (1, H):
        m = torch.randn(B, heads, S, T)
        site = only_site(lambda *x: F.scaled_dot_product_attention(*x, enable_gqa=True), q, k, v, m)
        assert site.batch == (B, H // GROUPS, GROUPS)


def test_fused_projection_is_read_in_place() -> None:
    """chunk and view of one qkv projection: three views of one tensor."""

    def fn(x: Any) -> Any:
        q, k, v = (t.view(B, S, H, D).transpose(1, 2) for t in x.chunk(3, dim=-1))
        return (torch.softmax(q @ k.transpose(-2, -1), dim=-1) @ v).transpose(1, 2).reshape(B, S, H * D)

    site = only_site(fn, torch.randn(B, S, 3 * H * D))
    assert {o.node.op for o in (site.q, site.k, site.v)} == {"placeholder"}
    assert site.spec.out_order == (0, 2, 1, 3)


def causal_tril(s: Any) -> Any:
    return s.masked_fill(torch.tril(torch.ones(S, S)) == 0, float("-inf"))


def causal_triu_bool(s: Any) -> Any:
    return s.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), float("-inf"))


def causal_arange_where(s: Any) -> Any:
    i = torch.arange(S)
    return torch.where(i[:, None] >= i[None, :], s, float("-inf"))


def causal_additive(s: Any) -> Any:
    return s + torch.triu(torch.full((S, S), float("-inf")), diagonal=1)


def causal_additive_first(s: Any) -> Any:
    i = torch.arange(S)
    return torch.zeros(S, S).masked_fill(i > i.view(S, 1), float("-inf"))[None, None] + s


def causal_in_place(s: Any) -> Any:
    s.masked_fill_(~torch.tril(torch.ones(S, S, dtype=torch.bool)), float("-inf"))
    return s


MASKS = [causal_tril, causal_triu_bool, causal_arange_where, causal_additive, causal_additive_first, causal_in_place]


@pytest.mark.parametrize("mask", MASKS, ids=lambda f: f.__name__)
def test_causal_masks_are_positions(mask: Callable[..., Any]) -> None:
    from flashfuse.kernels.mask import analyze

    q, k, v = (torch.randn(B, H, S, D) for _ in range(3))
    site = only_site(lambda q, k, v: torch.softmax(mask(q @ k.transpose(-1, -2) * 0.5), -1) @ v, q, k, v)
    assert site.captured == ()
    assert analyze(site.spec.score).describe() == "causal"


def test_is_causal_is_aligned_top_left() -> None:
    site = only_site(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *qkv())
    assert score_of(site.spec) == f"where((kv_idx <= q_idx), (qk * {1 / math.sqrt(D)!r}), -inf)"


@pytest.mark.parametrize("shape", [(S, T), (B, 1, S, T), (1, H, S, T), (B, 1, 1, T), (H, 1, T)], ids=str)
def test_masks_from_outside_keep_their_broadcast_shape(shape: tuple[int, ...]) -> None:
    site = only_site(lambda q, k, v, m: torch.softmax(q @ k.mT + m, -1) @ v, *qkv(), torch.randn(shape))
    assert site.spec.captured == (torch.float32,)
    assert site.captured[0].op == "placeholder"
    assert site.spec.score.op == "add"


def test_boolean_mask_argument() -> None:
    site = only_site(
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        *qkv(),
        torch.ones(B, 1, S, T, dtype=torch.bool),
    )
    assert score_of(site.spec) == f"where(t0[n0, 0, q_idx, kv_idx], (qk * {1 / math.sqrt(D)!r}), -inf)"
    assert site.spec.empty_row == "zero"


def test_softmax_in_float32_of_half_precision() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        return F.softmax(q @ k.mT, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    site = only_site(fn, *qkv(torch.bfloat16))
    assert (site.spec.product_dtype, site.spec.probs_dtype, site.spec.out_dtype) == (torch.bfloat16,) * 3


def test_upcast_operands_multiply_in_their_own_type() -> None:
    """The product of two bf16 values is exact in float32, so q.float() @ k.float() reads q and k as they are."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        return torch.softmax(q.float() @ k.float().mT, -1).to(v.dtype) @ v

    site = only_site(fn, *qkv(torch.bfloat16))
    assert site.spec.product_dtype == torch.bfloat16
    assert site.q.node.op == "placeholder"


def test_autocast_decides_the_product_type() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.softmax(q @ k.mT, -1) @ v

    site = only_site(fn, *qkv())
    assert site.spec.product_dtype == torch.bfloat16
    assert site.q.dtype == torch.bfloat16


def test_scale_of_a_symbolic_head_dim() -> None:
    """torch's own scale was one that only a head dim known while compiling has."""
    site = only_site(F.scaled_dot_product_attention, *qkv(), dynamic=True)
    assert score_of(site.spec) == "(qk * rsqrt(to_float(size0)))"
    assert site.sizes == (site.head_dim,)


def test_dynamic_sizes_stay_symbolic() -> None:
    site = only_site(plain, *qkv(), dynamic=True)
    assert not site.q_len.is_Integer
    assert not site.kv_len.is_Integer


def test_causal_mask_sliced_from_a_computed_buffer_with_dynamic_sizes() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        t, s = k.shape[2], q.shape[2]
        i = torch.arange(t - s, t)[:, None]
        return torch.softmax((q @ k.mT).masked_fill(torch.arange(t)[None] > i, float("-inf")), -1) @ v

    site = only_site(fn, *qkv(), dynamic=True)
    assert score_of(site.spec) == "where((kv_idx > (q_idx + kv_len + (-1 * q_len))), -inf, qk)"


def test_batch_and_query_of_size_one_are_no_axes() -> None:
    q, k, v = torch.randn(1, H, 1, D), torch.randn(1, H, T, D), torch.randn(1, H, T, E)
    site = only_site(plain, q, k, v)
    assert site.batch == (H,)
    assert site.q_len == 1


def test_symbolic_float_scale() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any, scale: float) -> Any:
            return torch.softmax(q @ k.mT * scale, -1) @ v

    with torch._dynamo.config.patch(specialize_float=False):
        site = only_site(Module(), *qkv(), 0.37, dynamic=True)
    assert score_of(site.spec) == "(qk * t0[()])"


def test_linear_of_two_activations_is_a_product() -> None:
    q, k, v = torch.randn(S, D), torch.randn(T, D), torch.randn(E, T)
    site = only_site(lambda q, k, v: F.linear(torch.softmax(F.linear(q, k), -1), v), q, k, v)
    assert (site.q_len, site.kv_len, site.head_dim, site.value_dim) == (S, T, D, E)


def test_bases_above_e_are_left_alone() -> None:
    """A mask's lowest number times the logarithm of 3 is -inf: a row without a key was NaN, where eager's is finite."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        s = (q @ k.mT).masked_fill(torch.ones(4, 4).tril() == 0, torch.finfo(torch.float32).min)
        e = 3.0 ** (s - s.amax(-1, keepdim=True))
        return (e / e.sum(-1, keepdim=True)) @ v

    with torch.no_grad():
        assert not find_attention(graph_of(fn, *(torch.randn(2, 4, 8) for _ in range(3)))).sites
