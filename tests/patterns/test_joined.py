"""Scores put together along the keys, and probabilities that meet their values in parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import check_fused
from graphs import matched, only_refusal, only_site, score_of

import flashfuse
from flashfuse.kernels.spec import to_text

B, H, S, T, M, D, E = 2, 3, 6, 10, 5, 8, 4


def inputs(queries: int = S) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values, and memory tokens that all of a batch shares."""
    shapes = ((B, H, queries, D), (B, H, T, D), (B, H, T, E), (H, M, D), (H, M, E))
    return tuple(torch.randn(shape) for shape in shapes)


def memory_in_front(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
    s = torch.cat([q @ mk.mT, q @ k.mT], dim=-1) * 0.5
    return s.softmax(-1) @ torch.cat([mv.expand(B, -1, -1, -1), v], dim=-2)


def memory_behind(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
    s, s_memory = torch.einsum("bhsd,bhtd->bhst", q, k) / 2, torch.einsum("bhsd,htd->bhst", q, mk) / 2
    return torch.cat((s, s_memory), -1).softmax(-1) @ torch.cat((v, mv.expand(B, -1, -1, -1)), 2)


def causal_beside_memory(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
    s = (q @ k.mT * 0.5).masked_fill(torch.ones(S, T).tril(T - S) == 0, -math.inf)
    p = torch.cat([q @ mk.mT * 0.5, s], -1).softmax(-1)
    return p[..., :M] @ mv + p[..., M:] @ v


def three_parts(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
    p = (torch.cat([q @ mk.mT, q @ k[:, :, :4].mT, q @ k[:, :, 4:].mT], -1) * 0.5).softmax(-1)
    first, second, third = p.split([M, 4, T - 4], -1)
    return third @ v[:, :, 4:] + (first @ mv + second @ v[:, :, :4])


def scaled_apart(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
    p = torch.cat([q @ mk.mT, q @ k.mT * 0.5], -1).softmax(-1)
    return p @ torch.cat([mv.expand(B, -1, -1, -1), v], -2)


def values_in_two_parts(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
    p = (q @ k.mT * 0.5).softmax(-1)
    return p[..., :M] @ mv + p[..., M:] @ v[:, :, M:]


def one_token(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
    p = (torch.cat([q @ mk[:, :1].mT, q @ k.mT], -1) * 0.5).softmax(-1)
    return p[..., 1:] @ v + p[..., :1] @ mv[:, :1]


def one_token_of_repeated_heads(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
    """Query heads that share keys are axes that the values lack, and so are queries."""
    q = q.unflatten(2, (2, S // 2)).flatten(0, 2)
    k = k[:, :, None].expand(-1, -1, 2, -1, -1).flatten(0, 2)
    p = (torch.cat([q @ k[:, :1].mT, q @ (k[:, 1:].tanh()).mT], -1) * 0.5).softmax(-1)
    return torch.einsum("bhgst,bhte->bhgse", p.view(B, H, 2, S // 2, T), v)


def one_tensor_in_two_parts(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
    p = (q @ k.mT * 0.5).softmax(-1).to(v.dtype)
    return torch.matmul(p[..., M:], v[:, :, M:]).add(p[..., :M] @ v[:, :, :M])


SCORES = {
    memory_in_front: "(qk * 0.5)",
    memory_behind: "(qk * 0.5)",
    causal_beside_memory: "where(((kv_idx >= 5) & ((-5 + kv_idx) > (4 + q_idx))), -inf, (qk * 0.5))",
    three_parts: "(qk * 0.5)",
    one_token: "(qk * 0.5)",
    one_token_of_repeated_heads: "(qk * 0.5)",
    scaled_apart: "where((kv_idx < 5), qk, (qk * 0.5))",
    values_in_two_parts: "(qk * 0.5)",
    one_tensor_in_two_parts: "(qk * 0.5)",
}
# How many tensors the keys and the values are read from.
TENSORS = {
    memory_in_front: (2, 1), memory_behind: (2, 1), scaled_apart: (2, 1), causal_beside_memory: (2, 2),
    three_parts: (2, 2), one_token: (2, 2), one_token_of_repeated_heads: (2, 1), values_in_two_parts: (1, 2),
    one_tensor_in_two_parts: (1, 1),
}  # fmt: skip


@pytest.mark.parametrize("fn", SCORES, ids=lambda f: f.__name__)
def test_parts_of_one_attention(fn: Callable[..., Any]) -> None:
    """It was refused, `extra-columns`: a second product's scores were in the softmax, or a part of it met values."""
    site = only_site(fn, *inputs())
    assert score_of(site.spec) == SCORES[fn]
    assert (len(site.k.nodes), len(site.v.nodes)) == TENSORS[fn]
    check_fused(fn, *inputs())


@pytest.mark.parametrize("fn", [causal_beside_memory, three_parts], ids=lambda f: f.__name__)
def test_gradients_of_parts(fn: Callable[..., Any]) -> None:
    args = [x.requires_grad_() for x in inputs()]
    with torch.enable_grad():
        fused = torch.compile(fn, backend="flashfuse", options={"flashfuse.inner": "eager", "flashfuse.strict": True})
        found, expected = (torch.autograd.grad(f(*args).square().sum(), args) for f in (fused, fn))
    flashfuse.reports()[-1].assert_fused(sites=1)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_parts_of_symbolic_length() -> None:
    def fn(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
        p = torch.cat([q @ mk.mT, q @ k.mT], -1).softmax(-1)
        return p[..., : mk.shape[-2]] @ mv + p[..., mk.shape[-2] :] @ v

    site = only_site(fn, *inputs(), dynamic=True)
    assert not site.kv_len.is_Integer
    check_fused(fn, *inputs(), dynamic=True)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_two_products_in_parts(scale: float) -> None:
    """Of content and of positions, the second of which is used once more: it was taken for the first, or crashed."""

    def fn(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
        a, b = q.flip(-1) @ mk.mT, q.flip(-1) @ k.mT
        scores = torch.cat([q @ mk.mT, q @ k.mT], -1) + torch.cat([a, b], -1)
        scores = scores + torch.cat([a * scale, b * scale], -1) if scale != 1 else scores
        return scores.softmax(-1) @ torch.cat([mv.expand(B, -1, -1, -1), v], -2)

    check_fused(fn, *inputs())


def test_weights_without_a_normaliser_in_parts() -> None:
    def fn(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
        p = (torch.cat([q @ mk.mT, q @ k.mT], -1) * 0.5).sigmoid()
        return p @ torch.cat([mv.expand(B, -1, -1, -1), v], -2)

    def split(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
        p = (q @ k.mT * 0.5).sigmoid()
        return p[..., :1] @ mv[:, :1] + p[..., 1:] @ v[:, :, 1:]

    for each in (fn, split):
        assert only_site(each, *inputs()).spec.normaliser == "none"
        check_fused(each, *inputs())


def of_other_queries(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
    p = torch.cat([q.tanh() @ mk.mT, q @ k.mT], -1).softmax(-1)
    return p @ torch.cat([mv.expand(B, -1, -1, -1), v], -2)


def overlapping(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
    p = (q @ k.mT).softmax(-1)
    return p[..., :6] @ v[:, :, :6] + p[..., 4:] @ v[:, :, 4:]


def with_a_hole(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
    p = (q @ k.mT).softmax(-1)
    return p[..., :4] @ v[:, :, :4] + p[..., 5:] @ v[:, :, 5:]


def beside_given_scores(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
    p = torch.cat([q[..., :M], q @ k.mT], -1).softmax(-1)
    return p @ torch.cat([mv.expand(B, -1, -1, -1), v], -2)


def one_column_alone(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
    return (q @ k.mT).softmax(-1)[..., :1] @ mv[:, :1]


NONE = [of_other_queries, one_column_alone, overlapping, with_a_hole, beside_given_scores]


@pytest.mark.parametrize("fn", NONE, ids=lambda f: f.__name__)
def test_parts_that_make_no_whole(fn: Callable[..., Any]) -> None:
    result = matched(fn, *inputs())
    assert not result.sites
    assert {refusal.code for refusal in result.refusals} == {"extra-columns"}


def test_one_query() -> None:
    """A step of decoding would copy all keys to save one row of scores."""
    refusal = only_refusal(memory_in_front, *inputs(queries=1))
    assert refusal.code == "extra-columns"
    assert "for one query it would cost more" in refusal.reason


def test_the_reason_of_the_sum_is_told() -> None:
    """It was that of the first part: that the one key it has takes all of the probability."""

    def fn(q: Any, k: Any, v: Any, mk: Any, mv: Any) -> Any:
        p = (q @ k.mT).softmax(-1) * q.new_zeros(B, H, S, T).normal_()
        return p[..., :1] @ mv[:, :1] + p[..., 1:] @ v[:, :, 1:]

    assert only_refusal(fn, *inputs()).code == "probability-factor"


SCALED: dict[str, tuple[Callable[..., Any], str]] = {
    "subtracted": (lambda a, b, g: a - b, "where((kv_idx < 5), 1.0, -1.0)"),
    "number": (lambda a, b, g: 2 * a + b / 0.5, "2.0"),
}


@pytest.mark.parametrize("name", SCALED)
def test_parts_that_are_scaled(name: str) -> None:
    """It was refused, `extra-columns`: the first part's values did not meet all of the probabilities."""
    combine, factor = SCALED[name]

    def fn(q: Any, k: Any, v: Any, gate: Any) -> Any:
        p = (q @ k.mT * 0.5).softmax(-1)
        return combine(p[..., :M] @ v[:, :, :M], p[..., M:] @ v[:, :, M:], gate)

    args = [*inputs()[:3], torch.rand(H, 1, 1)]
    assert to_text(only_site(fn, *args).spec.factor) == factor
    check_fused(fn, *args)
    check_fused(fn, *args, dynamic=True)
    check_fused(fn, *[x.half() for x in args])


@pytest.mark.parametrize(
    "combine",
    [
        lambda a, b, g: g * a + b * (1 - g),
        lambda a, b, g: b - a / g,
        lambda a, b, g: b + a * math.inf,
        lambda a, b, g: b + a / 1e-40,
        lambda a, b, g: b + a * 1e20 * 1e20,
    ],
)
def test_parts_that_a_tensor_or_a_number_out_of_bounds_scales(combine: Callable[..., Any]) -> None:
    """An infinity times a weight of 0 is no number, and times the product of the weights it is infinite."""

    def fn(q: Any, k: Any, v: Any, gate: Any) -> Any:
        p = (q @ k.mT * 0.5).softmax(-1)
        return combine(p[..., :M] @ v[:, :, :M], p[..., M:] @ v[:, :, M:], gate)

    refusal = only_refusal(fn, *inputs()[:3], torch.rand(H, 1, 1))
    assert refusal.code == "probability-factor"
    assert "a product with a part of the probabilities is multiplied" in refusal.reason


BETWEEN: dict[str, tuple[Callable[..., Any], str, str]] = {
    "feature": (lambda a, b, x: a * x[0, 0, 0] + b, "probability-factor", "divided by `getitem"),
    "boolean": (lambda a, b, x: a - b * (x[..., :1] > 0), "probability-factor", "divided by `gt"),
    "divisor": (lambda a, b, x: 2 * (a / x + b), "probability-factor", "divided by `L_x_`"),
    "choice": (lambda a, b, x: torch.where(x > 0, a, 0.0) + b, "value-product", "`where` stands between"),
    "function": (lambda a, b, x: a.tanh() + b, "value-product", "`tanh` stands between"),
    "addend": (lambda a, b, x: x + a + b, "value-product", "`L_x_` stands between"),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_reason_of_what_is_between_parts_and_their_sum(name: str) -> None:
    """One part was told, as if its softmax had further columns, at the line of the softmax."""
    combine, code, told = BETWEEN[name]

    def fn(q: Any, k: Any, v: Any, x: Any) -> Any:
        p = (q @ k.mT * 0.5).softmax(-1)
        return combine(p[..., :M] @ v[:, :, :M], p[..., M:] @ v[:, :, M:], x)

    refusal = only_refusal(fn, *inputs()[:3], torch.randn(B, H, S, E))
    assert (refusal.code, told in refusal.reason) == (code, True), refusal
    assert "combine" in refusal.location.code or "lambda a, b, x" in refusal.location.code


def test_parts_that_rsub_subtracts() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        p = (q @ k.mT * 0.5).softmax(-1)
        return torch.rsub(p[..., :M] @ v[:, :, :M], p[..., M:] @ v[:, :, M:], alpha=2)

    only_site(fn, *inputs()[:3])
    check_fused(fn, *inputs()[:3])


def test_parts_without_elements() -> None:
    """Scores with a part of no keys were refused, `extra-columns`, and so were values with one."""

    def joined(q: Any, k: Any, v: Any) -> Any:
        return torch.cat([q @ k.mT, q @ k[:, :, :0].mT], -1).softmax(-1) @ torch.cat([v[:, :, :0], v], -2)

    def added(q: Any, k: Any, v: Any) -> Any:
        p = (q @ k.mT).softmax(-1)
        return 2 * (p[..., :3] @ v[:, :, :3]) - p[..., 3:3] @ v[:, :, 3:3] + p[..., 3:] @ v[:, :, 3:]

    only_site(joined, *inputs()[:3])
    check_fused(joined, *inputs()[:3])
    assert only_refusal(added, *inputs()[:3]).code == "empty"


def test_reason_of_weights_without_a_normaliser_in_parts() -> None:
    """The reason of one part was told, as if the scores were used again by the other."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        p = (q.half() @ k.half().mT).sigmoid().to(v.dtype)
        return p[..., 1:] @ v[..., 1:, :] + p[..., :1] @ v[..., :1, :]

    q, k, v = (torch.randn(2, 7, 4, dtype=torch.float64) for _ in range(3))
    assert only_refusal(fn, q, k, v).code == "dtype"
