"""Operands of unusual sizes: a single key, and rows that the graph expands from one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import only_refusal, only_site

from flashfuse.kernels.expr import Const, walk


def test_functional_attention_to_one_key() -> None:
    """With one key the score has no key position, and the search ended in an exception of its own."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v)

    q, k = torch.randn(2, 2, 6, 4), torch.randn(2, 2, 1, 4)
    assert only_refusal(fn, q, k, k).code == "no-product"


@pytest.mark.parametrize("operand", ["queries", "values", "features", "value-features"])
def test_rows_expanded_in_the_graph(operand: str) -> None:
    """One row standing for all was an operand with a single row, which the operator does not take: a crash."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        q = q[:, :, :1].expand(-1, -1, 6, -1) if operand == "queries" else q
        q = q[..., :1].expand(-1, -1, -1, 4) if operand == "features" else q
        v = v[:, :, :1].expand(-1, -1, 10, -1) if operand == "values" else v
        v = v[..., :1].expand(-1, -1, -1, 4) if operand == "value-features" else v
        return (q @ k.mT).softmax(-1) @ v

    args = tuple(torch.randn(2, 2, n, 4) for n in (6, 10, 10))
    only_site(fn, *args)
    options = {"flashfuse.inner": "eager", "flashfuse.strict": True}
    torch.testing.assert_close(torch.compile(fn, backend="flashfuse", options=options)(*args), fn(*args))


def folded(batch: int) -> tuple[torch.Tensor, ...]:
    """All with batch and heads in one axis, keys and values with fewer heads; that axis and lengths are dynamic."""
    made = torch.randn(batch * 6, 5, 4), torch.randn(batch * 3, 7, 4), torch.randn(batch * 3, 7, 4)
    for x in made:
        torch._dynamo.maybe_mark_dynamic(x, 0)
        torch._dynamo.maybe_mark_dynamic(x, 1)
    return made


def grouped_function(q: Any, k: Any, v: Any) -> Any:
    batch = k.shape[0] // 3
    q, k, v = (x.reshape(batch, heads, x.shape[1], -1) for x, heads in ((q, 6), (k, 3), (v, 3)))
    return F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True)


def grouped_by_hand(q: Any, k: Any, v: Any) -> Any:
    batch = k.shape[0] // 3
    q, k, v = q.unflatten(0, (batch, 6)), k.unflatten(0, (batch, 3)), v.view(batch, 3, v.shape[1], -1)
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize(("fn", "batch"), [(grouped_function, 2), (grouped_by_hand, 1)])
def test_heads_that_a_reshape_names(fn: Callable[..., Any], batch: int) -> None:
    """Dynamo's size is a quotient of two lengths, with a guard that it is 6; they were refused, under three codes."""
    site = only_site(fn, *folded(batch))
    assert math.prod(site.batch[-2:]) == 6


def test_an_axis_that_is_read_as_far_as_it_is_needed() -> None:
    """With a batch of one, queries' 6 heads are an axis of unknown length, which no view split into groups."""
    args = folded(1)
    options = {"flashfuse.inner": "eager", "flashfuse.strict": True}
    fused = torch.compile(grouped_by_hand, backend="flashfuse", options=options)(*args)
    torch.testing.assert_close(fused, grouped_by_hand(*args))


def test_queries_made_within_a_product() -> None:
    """The einsum sums queries over an axis that keys lack; the refusal said that they were written in place."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        return torch.einsum("bgsd,btd->bst", q, k).softmax(-1) @ v

    refusal = only_refusal(fn, torch.randn(2, 3, 6, 4), torch.randn(2, 10, 4), torch.randn(2, 10, 4))
    assert refusal.code == "operand-layout"
    assert "queries are made within an operator" in refusal.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_that_divide_keep_their_digits(dtype: torch.dtype) -> None:
    """One over a number that divides queries, keys, or probabilities was rounded to their type: all scores were off."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        return ((q / 3.3) @ (k / 7.1).mT).softmax(-1).div(2.3) @ v

    spec = only_site(fn, *(torch.randn(2, 5, 4, dtype=dtype) for _ in range(3))).spec
    numbers = [e.value for program in (spec.score, spec.factor) for e in walk(program) if isinstance(e, Const)]
    assert numbers == pytest.approx([1 / (3.3 * 7.1), 1 / 2.3], rel=1e-6)
