"""Keys and values are read where a cache stores them: what programs of elements are recovered, and what is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import check_fused
from graphs import only_site, score_of
from numerics import assert_close_to_exact

from flashfuse.kernels.expr import Expr
from flashfuse.kernels.spec import to_text
from flashfuse.patterns.site import AttentionSite

BATCH, HEADS, GROUPS, KV_LEN, DIM = 2, 2, 3, 10, 8
FP16, FP32, INT8 = torch.float16, torch.float32, torch.int8
Operand = Callable[..., torch.Tensor]


def stored(dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(BATCH, HEADS, KV_LEN, DIM, generator=torch.Generator().manual_seed(0))
    return x.to(dtype) if dtype.is_floating_point else (x * 40).clamp(-127, 127).to(dtype)


def scale(*shape: int, dtype: torch.dtype = FP16) -> torch.Tensor:
    return (0.01 + 0.04 * torch.rand(shape, generator=torch.Generator().manual_seed(1))).to(dtype)


def repeated(x: torch.Tensor) -> torch.Tensor:
    """transformers' repeat_kv"""
    b, h, n, d = x.shape
    return x[:, :, None].expand(b, h, GROUPS, n, d).reshape(b, h * GROUPS, n, d)


def attention(dequantise: Operand) -> Callable[..., Any]:
    """Attention whose keys and values are both made by `dequantise(q, stored, *further)`."""

    def fn(q: Any, k: Any, v: Any, *further: Any) -> Any:
        k, v = repeated(dequantise(q, k, *further)), repeated(dequantise(q, v, *further))
        return (q @ k.transpose(2, 3) * 0.35).softmax(-1) @ v

    return fn


def queries(q_len: int = 1, dtype: torch.dtype = FP16) -> torch.Tensor:
    q = torch.randn(BATCH, HEADS * GROUPS, q_len, DIM, generator=torch.Generator().manual_seed(2))
    return q.to(dtype)


def programs(site: AttentionSite) -> tuple[str | None, str | None]:
    def text(e: Expr | None) -> str | None:
        return None if e is None else to_text(e)

    return text(site.spec.key), text(site.spec.value)


BY_TOKEN = scale(BATCH, HEADS, KV_LEN, 1)
FOUND: dict[str, tuple[Operand, torch.dtype, tuple[torch.Tensor, ...], str | None]] = {
    "multiplied": (lambda q, x, s: x.to(q.dtype) * s, INT8, (BY_TOKEN,), "(x * t0[n0, n1, kv_idx, 0])"),
    "promoted": (lambda q, x, s: s * x, INT8, (BY_TOKEN,), "(t0[n0, n1, kv_idx, 0] * x)"),
    "in-float32": (
        lambda q, x, s: (x.float() * s.float()).to(q.dtype), INT8, (BY_TOKEN,), "(x * t0[n0, n1, kv_idx, 0])",
    ),
    "divided": (lambda q, x, s: x.type_as(q).div(s), INT8, (1 / BY_TOKEN,), "(x / t0[n0, n1, kv_idx, 0])"),
    "expanded-scales": (
        lambda q, x, s: x.to(q.dtype) * s.expand_as(x), INT8, (BY_TOKEN,), "(x * t0[n0, n1, kv_idx, 0])",
    ),
    "by-channel": (lambda q, x, s: x.to(q.dtype) * s, INT8, (scale(HEADS, 1, DIM),), "(x * t0[n1, 0, d_idx])"),
    "by-group": (
        lambda q, x, s: (x.view(*x.shape[:-1], 2, 4).to(q.dtype) * s[..., None]).view(x.shape),
        INT8, (scale(BATCH, HEADS, KV_LEN, 2),), "(x * t0[n0, n1, kv_idx, (d_idx // 4), 0])",
    ),
    "zero-point": (
        lambda q, x, s, z: (x.to(q.dtype) - z) * s, torch.uint8, (BY_TOKEN, BY_TOKEN * 100),
        "((x - t0[n0, n1, kv_idx, 0]) * t1[n0, n1, kv_idx, 0])",
    ),
    "affine": (
        lambda q, x, s: x * s + s, INT8, (scale(HEADS, 1, DIM),), "((x * t0[n1, 0, d_idx]) + t0[n1, 0, d_idx])",
    ),
    "e4m3": (lambda q, x: x.to(q.dtype), torch.float8_e4m3fn, (), None),
    "e4m3-by-token": (
        lambda q, x, s: x.to(q.dtype) * s, torch.float8_e4m3fn, (BY_TOKEN,), "(x * t0[n0, n1, kv_idx, 0])",
    ),
    "e5m2": (
        lambda q, x, s: x.to(FP32).mul(s).to(q.dtype), torch.float8_e5m2, (BY_TOKEN,), "(x * t0[n0, n1, kv_idx, 0])",
    ),
    "bfloat16": (lambda q, x: x.to(q.dtype), torch.bfloat16, (), "to_float16(x)"),
    "rounded-on-the-way": (
        lambda q, x, s: (x.to(FP16) * s).to(torch.bfloat16).to(q.dtype), INT8, (BY_TOKEN,),
        "to_bfloat16((x * t0[n0, n1, kv_idx, 0]))",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_programs_of_elements(name: str) -> None:
    """Behind repeat_kv: the cache itself is read, once for each of its heads."""
    dequantise, dtype, further, text = FOUND[name]
    fn = attention(dequantise)
    args = (queries(), stored(dtype), stored(dtype).flip(2), *further)
    site = only_site(fn, *args)
    assert (site.k.node.name, site.v.node.name) == ("l_k_", "l_v_")
    assert (site.k.dtype, site.v.dtype) == (dtype, dtype)
    key, value = programs(site)
    assert key == text
    # A view of scales that is made once for each operand is two tensors.
    assert (value or "").replace("t1[n0, n1, kv_idx, (", "t0[n0, n1, kv_idx, (") == (text or "")
    check_fused(fn, *args)


def test_factors_of_whole_heads_are_the_scores() -> None:
    """A key's scale that all of a product shares multiplies the product; a value's is in its program."""
    site = only_site(attention(lambda q, x, s: x.to(q.dtype) * s), queries(), *[stored(INT8)] * 2, scale(HEADS, 1, 1))
    assert programs(site) == (None, "(x * t0[n1, 0, 0])")
    assert score_of(site.spec) == "((qk * t0[n1, 0, 0]) * 0.35)"
    assert site.k.dtype == INT8


def test_scales_that_are_python_numbers() -> None:
    """As constants, and as the symbolic floats that numbers become when they change from call to call."""

    def fn(q: Any, k: Any, v: Any, scale: float) -> Any:
        return (q @ (k.to(q.dtype) * scale).mT).softmax(-1) @ (v.to(q.dtype) * scale)

    args = (queries()[:, :HEADS], stored(INT8), stored(INT8))
    assert programs(only_site(fn, *args, 0.25)) == (None, "(x * 0.25)")
    assert programs(only_site(fn, *args, 0.25, dynamic=True)) == (None, "(x * t0[()])")
    check_fused(fn, *args, 0.02, dynamic=True)


def test_float32_products_of_float16_queries() -> None:
    """Products stay float32 where keys are no float16."""

    def fn(q: Any, k: Any, v: Any, s: Any) -> Any:
        return (q.float() @ (k.float() * s.float()).mT).softmax(-1) @ (v.float() * s.float())

    q = queries()[:, :HEADS]
    for dtype in (INT8, torch.float8_e5m2, FP16):
        site = only_site(fn, q, stored(dtype), stored(dtype), BY_TOKEN)
        assert programs(site) == ("(x * t0[n0, n1, kv_idx, 0])",) * 2
        assert site.spec.product_dtype == FP32
        check_fused(fn, q, stored(dtype), stored(dtype), BY_TOKEN)


def test_functional_attention() -> None:
    def fn(q: Any, k: Any, v: Any, s: Any) -> Any:
        return F.scaled_dot_product_attention(q, k.to(q.dtype) * s, v.to(q.dtype) * s, enable_gqa=True)

    args = (queries(5), stored(INT8), stored(INT8), BY_TOKEN)
    assert programs(only_site(fn, *args)) == ("(x * t0[n0, n1, kv_idx, 0])",) * 2
    check_fused(fn, *args)


def test_symbolic_lengths() -> None:
    fn = attention(lambda q, x, s: x.to(q.dtype) * s)
    args = (queries(), stored(INT8), stored(INT8), BY_TOKEN)
    site = only_site(fn, *args, dynamic=True)
    assert programs(site) == ("(x * t0[n0, n1, kv_idx, 0])",) * 2
    check_fused(fn, *args, dynamic=True)


def static_cache(read: Callable[..., Any]) -> Callable[..., Any]:
    """The step's own keys, values and scales are written into the cache before it is read."""

    def fn(q: Any, k: Any, v: Any, s: Any, new: Any, new_scale: Any, at: Any) -> Any:
        k.index_copy_(2, at, new)
        v.index_copy_(2, at, new)
        s.index_copy_(2, at, new_scale)
        return read(q, k, v, s)

    return fn


def test_caches_written_before() -> None:
    fn = static_cache(attention(lambda q, x, s: x.to(q.dtype) * s))
    new = stored(INT8)[:, :, :1]
    cache = (stored(INT8), stored(INT8), BY_TOKEN.clone())
    site = only_site(fn, queries(), *cache, new, BY_TOKEN[:, :, :1], torch.tensor([4]))
    assert programs(site) == ("(x * t0[n0, n1, kv_idx, 0])",) * 2


@pytest.mark.parametrize("dtype", [INT8, torch.float8_e5m2], ids=str)
def test_growing_caches(dtype: torch.dtype) -> None:
    """What the cache was and what the step adds, put together before or behind the dequantisation."""

    def before(q: Any, k: Any, s: Any, new: Any, new_scale: Any) -> Any:
        x = torch.cat((k, new), 2).to(q.dtype) * torch.cat((s, new_scale), 2)
        return (q @ x.mT).softmax(-1) @ x

    def behind(q: Any, k: Any, s: Any, new: Any, new_scale: Any) -> Any:
        x = torch.cat((k.to(q.dtype) * s, new.to(q.dtype) * new_scale), 2)
        return (q @ x.mT).softmax(-1) @ x

    args = (queries()[:, :HEADS], stored(dtype), BY_TOKEN, stored(dtype)[:, :, :2], BY_TOKEN[:, :, :2])
    site = only_site(before, *args)
    assert (site.k.dtype, site.v.dtype) == (dtype, dtype)
    assert programs(site)[0] == "(x * t0[n0, n1, kv_idx, 0])"
    assert programs(only_site(behind, *args)) == (None, None)
    for fn in (before, behind):
        check_fused(fn, *args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_parts_of_a_cache(dynamic: bool) -> None:
    """The first of its slots, however many."""

    def fn(q: Any, k: Any, v: Any, s: Any, mask: Any) -> Any:
        n = mask.shape[0]
        k, v, s = k[:, :, :n], v[:, :, :n], s[:, :, :n]
        return (q @ (k.to(q.dtype) * s).mT + mask).softmax(-1) @ (v.to(q.dtype) * s)

    args = (queries()[:, :HEADS], stored(INT8), stored(INT8), BY_TOKEN, torch.zeros(7, dtype=FP16))
    site = only_site(fn, *args, dynamic=dynamic)
    assert programs(site)[1] is not None
    assert (site.k.dtype, site.v.dtype) == (INT8, INT8)
    check_fused(fn, *args, dynamic=dynamic)


def after(write: Callable[..., Any]) -> Callable[..., Any]:
    """Something of the cache is written between the place where it is dequantised and the attention."""

    def fn(q: Any, k: Any, v: Any, s: Any) -> Any:
        keys, values = k.to(q.dtype) * s, v.to(q.dtype) * s
        write(k, v, s)
        return (q @ keys.mT).softmax(-1) @ values

    return fn


def moved(q: Any, k: Any, v: Any, s: Any) -> Any:
    """Two elements of the cache for each of the keys."""
    x = k.to(q.dtype) * s
    turned = torch.cat((-x[..., DIM // 2 :], x[..., : DIM // 2]), -1)
    return (q @ (x + turned).mT).softmax(-1) @ (v.to(q.dtype) * s)


AS_BEFORE: dict[str, tuple[Callable[..., Any], tuple[bool, bool]]] = {
    "keys-written-later": (after(lambda k, v, s: k.zero_()), (False, True)),
    "values-written-later": (after(lambda k, v, s: v.add_(1)), (True, False)),
    "scales-written-later": (after(lambda k, v, s: s.mul_(2)), (False, False)),
    "turned": (moved, (False, True)),
    "exponentials-of-rows": (
        lambda q, k, v, s: (q @ (k.to(q.dtype) * s).softmax(-1).mT).softmax(-1) @ (v.to(q.dtype) * s), (False, True),
    ),
    "two-ways": (
        lambda q, k, v, s: (q @ (k.to(q.dtype) * (k.to(q.dtype) - q[:, :, :1]).sin()).mT).softmax(-1)
        @ (v.to(q.dtype) * s), (False, True),
    ),
}  # fmt: skip


def test_arithmetic_of_bytes_is_the_graphs() -> None:
    """It may wrap around; what comes of it is stored elements like any others."""

    def fn(q: Any, k: Any, v: Any, s: Any) -> Any:
        return (q @ ((k - k[:, :, :1]).to(q.dtype) * s).mT).softmax(-1) @ (v.to(q.dtype) * s)

    args = queries(4)[:, :HEADS], stored(INT8), stored(INT8), BY_TOKEN
    site = only_site(fn, *args)
    assert (site.k.node.name, site.k.dtype) == ("sub", INT8)
    check_fused(fn, *args)


@pytest.mark.parametrize("name", AS_BEFORE)
def test_what_the_graph_dequantises(name: str) -> None:
    """The attention is found all the same, over what the graph makes."""
    fn, expected = AS_BEFORE[name]
    q = queries(4)[:, :HEADS]

    def args() -> tuple[torch.Tensor, ...]:
        return q, stored(INT8), stored(INT8), BY_TOKEN.clone()

    site = only_site(fn, *args())
    assert (site.k.dtype == INT8, site.v.dtype == INT8) == expected
    with torch.no_grad():
        fused = torch.compile(fn, backend="flashfuse", options={"flashfuse.inner": "eager"})(*args())
        exact = [x.double() if x.is_floating_point() else x for x in args()]
        assert_close_to_exact(fused, fn(*args()), fn(*exact))


def test_where_a_gradient_is_wanted() -> None:
    """Of the queries or of scales: dequantised by the graph, whose gradients are autograd's."""
    fn = attention(lambda q, x, s: x.to(q.dtype) * s)
    for of in (0, 3):
        args = [queries(dtype=FP32), stored(INT8), stored(INT8), BY_TOKEN.float()]
        args[of].requires_grad_()
        site = only_site(fn, *args)
        assert programs(site) == (None, None)
        assert (site.k.dtype, site.v.dtype) == (FP32, FP32)
        fused = torch.compile(fn, backend="flashfuse", options={"flashfuse.inner": "eager"})
        (found,) = torch.autograd.grad(fused(*args).sum(), args[of])
        (expected,) = torch.autograd.grad(fn(*args).sum(), args[of])
        torch.testing.assert_close(found, expected)


def test_ordinary_operands_are_read_as_before() -> None:
    """Normalised keys of the products' own type are no stored elements, nor are those of a wider one."""

    def fn(q: Any, k: Any, v: Any, w: Any) -> Any:
        x = k.float()
        k = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w).to(q.dtype)
        return (q @ k.mT).softmax(-1) @ v

    q = queries()[:, :HEADS]
    for dtype in (FP16, FP32):
        site = only_site(fn, q, stored(dtype), stored(FP16), torch.ones(DIM))
        assert programs(site) == (None, None)
        assert (site.k.dtype, site.k.node.name) == (FP16, "k") or site.k.node.name.startswith("to")
