"""Unusual inputs are fused correctly or left to the inner compiler; nothing here may fail, warn or change a result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import flashfuse


@pytest.fixture(autouse=True)
def flashfuse_does_not_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="flashfuse")
        yield


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) * 0.5, dim=-1) @ v


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return torch.softmax((q @ k.transpose(-2, -1)).masked_fill(~mask, float("-inf")), dim=-1) @ v


def run(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, inner: str = "aot_eager") -> Any:
    options = {"flashfuse.inner": inner, "flashfuse.strict": True}
    return torch.compile(fn, backend="flashfuse", options=options, dynamic=dynamic)(*args)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("q_shape", "kv_shape"),
    [
        ((0, 2, 5, 8), (0, 2, 5, 8)),
        ((2, 0, 5, 8), (2, 0, 5, 8)),
        ((2, 2, 0, 8), (2, 2, 5, 8)),
        ((2, 2, 5, 8), (2, 2, 0, 8)),
        ((2, 2, 0, 8), (2, 2, 0, 8)),
        ((2, 2, 1, 8), (2, 2, 1, 8)),
        ((1, 1, 1, 1), (1, 1, 1, 1)),
        ((5, 8), (6, 8)),
    ],
)
@pytest.mark.parametrize("fn", [attention, causal])
def test_empty_and_tiny(fn: Any, q_shape: tuple[int, ...], kv_shape: tuple[int, ...], dynamic: bool) -> None:
    q, k, v = torch.randn(q_shape), torch.randn(kv_shape), torch.randn(kv_shape)
    torch.testing.assert_close(run(fn, q, k, v, dynamic=dynamic), fn(q, k, v))


def test_zero_head_dim() -> None:
    q, v = torch.randn(2, 5, 0), torch.randn(2, 5, 4)
    torch.testing.assert_close(run(attention, q, q, v), attention(q, q, v))


def test_float64_stays_float64() -> None:
    q, k, v = (torch.randn(2, 3, 12, 8, dtype=torch.float64) for _ in range(3))
    out = run(attention, q, k, v)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, attention(q, k, v), rtol=1e-13, atol=1e-13)


def test_complex_is_left_alone() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        probs = torch.softmax((x @ x.mH).real, dim=-1)
        return probs.to(x.dtype) @ x

    x = torch.randn(2, 6, 4, dtype=torch.complex64)
    torch.testing.assert_close(run(model, x), model(x))


def test_integer_graph_is_left_alone() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return (x @ x.mT).argmax(-1) + x.sum(-1)

    x = torch.randint(9, (2, 5, 5))
    assert torch.equal(run(model, x), model(x))
    assert flashfuse.reports()[0].sites == ()


def test_integer_operands_of_a_float_attention() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax((x @ x.mT).float() * 0.1, dim=-1) @ x.float()

    x = torch.randint(-3, 3, (2, 6, 4))
    torch.testing.assert_close(run(model, x), model(x))


def test_meta_device() -> None:
    q = torch.randn(2, 3, 12, 8, device="meta")
    out = run(attention, q, q, q)
    assert out.device.type == "meta"
    assert out.shape == q.shape


def test_module_on_meta_device() -> None:
    with torch.device("meta"):
        model = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
        x = torch.randn(2, 5, 16)
    assert run(lambda y: model(y, y, y)[0], x).shape == x.shape


def test_sparse() -> None:
    def model(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return attention(torch.sparse.mm(a, x), x, x)

    a, x = torch.eye(6).to_sparse(), torch.randn(6, 4)
    torch.testing.assert_close(run(model, a, x), model(a, x))


def test_nested() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, [2, 4]).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(-2)

    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=torch.jagged)
    torch.testing.assert_close(run(model, x).values(), model(x).values())


class Tagged(torch.Tensor):
    """A subclass that goes through __torch_function__ unchanged."""


def test_tensor_subclass() -> None:
    x = torch.randn(2, 6, 4)
    out = run(attention, *[x.clone().as_subclass(Tagged) for _ in range(3)], inner="eager")
    torch.testing.assert_close(out.as_subclass(torch.Tensor), attention(x, x, x))
    assert [refusal.code for refusal in flashfuse.reports()[0].refusals] == ["tensor-subclass"]


def test_wrapper_subclass() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    x, y = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    out = run(attention, *[TwoTensor(x, y)] * 3)
    torch.testing.assert_close(out.a, attention(x, x, x))
    torch.testing.assert_close(out.b, attention(y, y, y))


def test_masks_of_unusual_types() -> None:
    def model(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ q.mT + (1 - mask) * -1e4, dim=-1) @ q

    q, mask = torch.randn(2, 6, 4), torch.tensor([[[1, 1, 1, 0, 0, 0]], [[1, 1, 1, 1, 1, 1]]])
    for dtype in (torch.int64, torch.int32, torch.bfloat16, torch.float16):
        torch.testing.assert_close(run(model, q, mask.to(dtype)), model(q, mask.to(dtype)))


# --------------------------------------------------------------------------------------------------------------------
# Masks that do not fit


def masked_fill(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.softmax((q @ q.mT).masked_fill(mask, float("-inf")), dim=-1) @ q


def chosen(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.softmax(torch.where(mask, q @ q.mT, -1e9), dim=-1) @ q


def added(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ q.mT + mask, dim=-1) @ q


def functional(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)


BOOL, S = torch.bool, 6
UNFIT = {
    "keys": (torch.ones(S, S - 1, dtype=BOOL), (masked_fill, chosen, added, functional)),
    "batch": (torch.ones(3, 1, S, S, dtype=BOOL), (masked_fill, chosen, added, functional)),
    "no keys": (torch.ones(S, 0, dtype=BOOL), (masked_fill, chosen, added, functional)),
    "dimensions": (torch.ones(1, 2, 4, S, S, dtype=BOOL), (functional,)),
    "integers": (torch.ones(S, S, dtype=torch.int64), (masked_fill, chosen, functional)),
    "floats": (torch.ones(S, S), (masked_fill, chosen)),
    "another precision": (torch.ones(S, S, dtype=torch.float16), (masked_fill, chosen, functional)),
    "complex": (torch.ones(S, S, dtype=torch.complex64), (masked_fill, chosen, functional)),
    "device": (torch.ones(S, S, dtype=BOOL, device="meta"), (masked_fill, chosen, added)),
}


def message(error: BaseException) -> str:
    """What went wrong, without addresses and Dynamo's own stack."""
    return str(error).split("from user code")[0].split(" at 0x")[0]


@pytest.mark.parametrize(("mask", "fn"), [(m, f) for m, (_, fns) in UNFIT.items() for f in fns])
def test_a_mask_that_does_not_fit_raises_as_it_does_without_flashfuse(mask: str, fn: Callable[..., Any]) -> None:
    """`torch.compile` raises eager's error, most often wrapped in its own; with flashfuse it is the very same."""
    q, given = torch.randn(2, 4, S, 8), UNFIT[mask][0]
    with pytest.raises(RuntimeError):
        fn(q, given)
    with pytest.raises(RuntimeError) as expected:
        torch.compile(fn, backend="eager")(q, given)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError) as found:
        run(fn, q, given, inner="eager")
    assert type(found.value) is type(expected.value)
    assert message(found.value) == message(expected.value)


def test_a_mask_larger_than_the_scores_raises() -> None:
    """Fake tensors let a mask enlarge the batch of `scaled_dot_product_attention`; the attention was given one."""
    q, mask = torch.randn(1, 4, S, 8), torch.ones(1, 2, 4, S, S, dtype=BOOL)
    with pytest.raises(RuntimeError, match="broadcast shape"):
        functional(q, mask)
    with pytest.raises(RuntimeError, match="broadcast shape"):
        run(functional, q, mask, inner="eager")


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("fn", [masked_fill, chosen, functional])
def test_a_mask_without_a_true_entry_gives_what_eager_gives(fn: Callable[..., Any], inner: str) -> None:
    """NaN where the fill is -inf, the average of the values where it is finite, zeros where torch defines zeros."""
    q, nothing = torch.randn(2, 4, S, 8), torch.zeros(2, 1, 1, S, dtype=BOOL)
    nothing = ~nothing if fn is masked_fill else nothing
    torch.testing.assert_close(run(fn, q, nothing, inner=inner), fn(q, nothing), equal_nan=True)
    assert flashfuse.reports()[0].sites


@pytest.mark.parametrize("fill", [float("-inf"), torch.finfo(torch.float32).min, -1e4, float("nan")])
def test_an_additive_mask_over_every_key_gives_what_eager_gives(fill: float) -> None:
    q, mask = torch.randn(2, 4, S, 8), torch.zeros(2, 1, S, S)
    mask[0, :, 2] = fill
    mask[1] = fill
    torch.testing.assert_close(run(added, q, mask), added(q, mask), equal_nan=True)
    assert flashfuse.reports()[0].sites


def test_a_mask_of_another_shape_later_raises_too() -> None:
    compiled = torch.compile(added, backend="flashfuse", options={"flashfuse.strict": True})
    q = torch.randn(2, 4, S, 8)
    compiled(q, torch.zeros(S, S))
    with pytest.raises(RuntimeError):
        compiled(q, torch.zeros(S, S - 1))
    torch.testing.assert_close(compiled(q, torch.ones(S, S).tril()), added(q, torch.ones(S, S).tril()))
