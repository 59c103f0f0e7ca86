"""Programs that look like plain attention and are not quite: each gave a wrong number once, or could."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import assert_close_to_exact
from torch import nn

import flashfuse

B, H, S, D = 2, 2, 6, 4
INF = float("inf")


def qkv(dtype: torch.dtype = torch.float32, length: int = S) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(B, H, length, D, dtype=dtype) for _ in range(3))


def check(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> None:
    """The compiled function gives what eager gives, and leaves its arguments as eager leaves them."""
    ours, theirs = ([a.clone() if isinstance(a, torch.Tensor) else a for a in args] for _ in range(2))
    options = {"flashfuse.inner": "aot_eager", "flashfuse.strict": True}
    got = torch.compile(fn, backend="flashfuse", dynamic=dynamic, options=options)(*ours)
    expected = fn(*theirs)
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, expected)), strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, equal_nan=True)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b)


def attend(s: Any, v: Any) -> Any:
    return torch.softmax(s, -1) @ v


ACTIVATIONS = [
    nn.LeakyReLU(0.1, inplace=True), nn.Hardtanh(inplace=True), nn.ReLU6(inplace=True), nn.CELU(inplace=True),
    nn.SiLU(inplace=True), nn.Hardswish(inplace=True), nn.ReLU(inplace=True),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("on", ["keys", "scores"])
def test_in_place_activations_are_seen(activation: nn.Module, on: str) -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        s = q @ k.mT
        activation(k if on == "keys" else s)
        return attend(s, v)

    check(fn, *qkv())


def test_foreach_writes_are_seen() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        s = q @ k.mT
        torch._foreach_mul_([k, v], 2.0)
        return attend(s, v)

    check(fn, *qkv())


def test_custom_operator_writes_are_seen() -> None:
    @torch.library.custom_op("flashfuse_test::double", mutates_args=("x",))
    def double(x: torch.Tensor) -> None:
        x.mul_(2)

    def fn(q: Any, k: Any, v: Any) -> Any:
        k = k + 0
        s = q @ k.mT
        torch.ops.flashfuse_test.double(k)
        return attend(s, v) + k.sum()

    check(fn, *qkv())


def test_scores_copied_into_a_buffer_exist() -> None:
    def fn(q: Any, k: Any, v: Any, buffer: Any) -> Any:
        s = q @ k.mT
        s.mul_(0.5)
        buffer[:] = s
        return attend(s, v)

    check(fn, *qkv(), torch.zeros(B, H, S, S))


def test_transposed_scores_returned_exist() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        s = q @ k.mT
        s.mul_(0.5)
        return attend(s, v), s.mT

    check(fn, *qkv())


def positions(q: Any) -> tuple[Any, Any]:
    i = torch.arange(q.shape[-2])
    return i[:, None], i[None]


LOOK_UPS = {
    "wraps": lambda t, i, j: t[i - j],
    "wraps_one_side": lambda t, i, j: t[j - 1] + 0 * i,
    "halved": lambda t, i, j: t[(i - j) // 2],
    "inside": lambda t, i, j: t[i - j + S - 1],
}


@pytest.mark.parametrize("look_up", LOOK_UPS.values(), ids=LOOK_UPS.keys())
def test_negative_positions_count_from_the_end(look_up: Callable[..., Any]) -> None:
    check(lambda q, k, v, t: attend(q @ k.mT + look_up(t, *positions(q)), v), *qkv(), torch.randn(2 * S - 1))


def test_look_up_outside_raises_as_eager_does() -> None:
    def fn(q: Any, k: Any, v: Any, t: Any) -> Any:
        i, j = positions(q)
        return attend(q @ k.mT + t[i - j + S], v)

    compiled = torch.compile(fn, backend="flashfuse", options={"flashfuse.inner": "eager", "flashfuse.strict": True})
    with pytest.raises((IndexError, RuntimeError)):
        compiled(*qkv(), torch.randn(S + 1))


def test_division_before_a_step_is_not_a_reciprocal() -> None:
    """41 * (1 / 41) is less than 1 in float32."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        block = (torch.arange(q.shape[-2]) / 41).floor()
        return attend((q @ k.mT).masked_fill(block[:, None] != block[None], -INF), v)

    check(fn, *qkv(length=90))


def test_offsets_may_be_negative() -> None:
    def fn(q: Any, k: Any, v: Any, offset: int) -> Any:
        j = torch.arange(k.shape[-2])
        return attend((q @ k.mT).masked_fill(~((j + offset) >= 0), -INF), v)

    check(fn, *qkv(), -3, dynamic=True)


def test_slices_begin_where_torch_begins_them() -> None:
    q, k, v = (torch.randn(3, 8, 5) for _ in range(3))
    check(lambda q, k, v, m: attend(q @ k.mT + m[:, -16:], v), q, k, v, torch.randn(8, 8), dynamic=True)
    check(lambda q, k, v, m, x: attend(q @ k.mT + m[k.shape[-2] - x.shape[0]], v),
          q, k, v, torch.randn(20, 8), torch.randn(16), dynamic=True)  # fmt: skip


def test_bits_written_through_another_type() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        q = q * 1.0
        q.view(torch.int32).bitwise_and_(0x7FFFFFFF)
        return attend(q @ k.mT, v)

    check(fn, *qkv())


INTEGERS = {
    "uint8": lambda a: (a.to(torch.uint8)[:, None] - a.to(torch.uint8)[None]) > 3,
    "int8": lambda a: (a * 60).to(torch.int8)[:, None] > (a * 60).to(torch.int8)[None],
    "int32": lambda a: ((a * 1000000).int()[:, None] * (a * 1000000).int()[None]) > 0,
    "bool": lambda a: (a > 2)[:, None] + (a > 4)[None],
}


@pytest.mark.parametrize("mask", INTEGERS.values(), ids=INTEGERS.keys())
def test_integers_wrap_as_they_do_in_torch(mask: Callable[..., Any]) -> None:
    check(lambda q, k, v: attend((q @ k.mT).masked_fill(mask(torch.arange(S)), -1e9), v), *qkv())
    check(lambda q, k, v, a: attend((q @ k.mT).masked_fill(mask(a), -1e9), v), *qkv(), torch.arange(S))


ROUNDED = {
    "underflow": lambda m: (m * 1e-9).half().bool(),
    "positions": lambda m: (i := torch.arange(300).bfloat16())[:, None] != i[None],
}


@pytest.mark.parametrize("mask", ROUNDED.values(), ids=ROUNDED.keys())
def test_explicit_rounding_of_masks_is_kept(mask: Callable[..., Any]) -> None:
    args = qkv(length=300)
    check(lambda q, k, v, m: attend((q @ k.mT).masked_fill(mask(m), -1e9), v), *args, torch.rand(300, 300).round())


def test_masks_overflow_in_half_precision() -> None:
    mask = torch.zeros(S, S)
    mask[2] = -1e9
    q, k, v = qkv(torch.float16)
    fn = lambda q, k, v, m: attend(q @ k.mT + m.half().to(q.dtype), v)  # noqa: E731
    compiled = torch.compile(fn, backend="flashfuse", options={"flashfuse.inner": "eager", "flashfuse.strict": True})
    exact = fn(q.double(), k.double(), v.double(), mask)
    assert exact[:, :, 2].isnan().all()
    assert_close_to_exact(compiled(q, k, v, mask), fn(q, k, v, mask), exact)


def test_rounded_operands_stay_rounded() -> None:
    check(lambda q, k, v: attend(q.half().float() @ k.mT, v.bfloat16().float()), *qkv())


def test_detached_operands_want_no_gradient() -> None:
    def fn(q: Any, k: Any, v: Any, w: Any) -> Any:
        return attend(q.detach() @ k.detach().mT, v.detach()) * w

    with torch.enable_grad():
        q, k, v = (x.requires_grad_() for x in qkv())
        w = torch.randn(B, H, S, D, requires_grad=True)
        compiled = torch.compile(fn, backend="flashfuse", options={"flashfuse.strict": True})
        compiled(q, k, v, w).sum().backward()
        (expected,) = torch.autograd.grad(fn(q, k, v, w).sum(), w)
    assert flashfuse.reports()[0].sites
    torch.testing.assert_close(w.grad, expected)
    assert q.grad is None


LAYOUTS = {
    "clone": lambda o: o.transpose(1, 2).clone().transpose(1, 2).view(B * H, S, D),
    "reshape": lambda o: o.transpose(1, 2).reshape(B, S, H, D).transpose(1, 2).reshape(B * H, S, D),
    "returned": lambda o: o.transpose(1, 2).clone(),
    "contiguous": lambda o: o.transpose(1, 2).contiguous().view(B, S, H * D),
}


@pytest.mark.parametrize("use", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_strides_are_eagers(use: Callable[..., Any]) -> None:
    check(lambda q, k, v: use(attend(q @ k.mT, v)), *qkv())


def test_channels_first_output_has_eagers_strides() -> None:
    check(lambda q, k, v: (v.mT @ torch.softmax(q @ k.mT, -1).mT).view(B, H * D, S), *qkv())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_narrow_types_do_not_stop_the_search(dtype: torch.dtype) -> None:
    check(lambda q, k, v: attend(q @ k.abs().to(dtype).float().mT, v), *qkv())
    check(lambda q, k, v, m: attend((q @ k.mT).masked_fill((m.to(torch.uint8) * 200) + 100 > 150, -1e9), v),
          *qkv(), torch.rand(S, S) > 0.5)  # fmt: skip


def test_exact_where_the_program_is_plain() -> None:
    args = qkv(length=65)
    fn = lambda q, k, v: attend(q @ k.mT / 2, v)  # noqa: E731
    compiled = torch.compile(fn, backend="flashfuse", options={"flashfuse.inner": "eager", "flashfuse.strict": True})
    assert_close_to_exact(compiled(*args), fn(*args), fn(*(x.double() for x in args)))
    flashfuse.reports()[0].assert_fused(sites=1)


def test_equal_sizes_share_a_symbol() -> None:
    """With batch == heads Dynamo gives both one symbol; the attention is found all the same."""
    q, k, v = (torch.randn(3, 3, S, D) for _ in range(3))
    check(lambda q, k, v: attend(q @ k.mT, v), q, k, v, dynamic=True)
    assert flashfuse.reports()[0].sites


def test_renormalised_and_running_tensors_are_seen() -> None:
    def embedding(q: Any, k: Any, v: Any, i: Any) -> Any:
        s = q @ k.mT
        e = torch.nn.functional.embedding(i, k[0, 0], max_norm=0.3)
        return attend(s, v), e

    def statistics(q: Any, k: Any, v: Any, b: Any) -> Any:
        s = q @ k.mT + b
        y = torch.nn.functional.batch_norm(v.reshape(-1, S), b, b.clone(), training=True)
        return attend(s, v), y

    def dunder(q: Any, k: Any, v: Any) -> Any:
        s = q @ k.mT
        k.__imod__(2)
        return attend(s, v)

    check(embedding, *qkv(), torch.arange(3))
    check(statistics, *qkv(), torch.randn(S))
    check(dunder, *qkv())


STEPS = {
    "float_sum": lambda m: (m.float() * 0.1 + 0.2) > 0.3,
    "half_product": lambda m: (m.half() * 2049) == 2048,
    "bfloat16_sum": lambda m: (m.bfloat16() * 256 + 1) > 256,
    "floor": lambda m: (m.float() * 0.3 / 0.1).floor() == 2,
    "truncated": lambda m: (m.float() * 0.29 * 100).long() == 28,
    "wide_integers": lambda m: (a := torch.arange(S) + 2**24).double()[:, None] != a.double()[None],
    "wide_floats": lambda m: (a := torch.arange(S).double() * 1e-12 + 1)[:, None] > a[None],
    "bfloat16_positions": lambda m: (torch.arange(S, dtype=torch.bfloat16) + 256)[:, None] == 257 + torch.arange(S),
    "int64_wraps": lambda m: (torch.full((S, 1), 2**62) * 2) < torch.arange(S),
    "int64_squares": lambda m: ((torch.arange(S) * 3037000500) ** 2 < 0)[:, None] | (torch.arange(S) < 1),
    "divided": lambda m: (torch.arange(S)[:, None] / 49.0) == (torch.arange(S)[None] * (1 / 49)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask", STEPS.values(), ids=STEPS.keys())
def test_what_decides_a_mask_is_computed_as_written(mask: Callable[..., Any], dtype: torch.dtype) -> None:
    check(lambda q, k, v, m: attend((q @ k.mT).masked_fill(mask(m), -1e9), v), *qkv(dtype), torch.rand(S, S) > 0.5)
