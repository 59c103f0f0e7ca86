"""Operands of unusual sizes: a single key, and rows that the graph expands from one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import only_refusal, only_site


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


def test_queries_made_within_a_product() -> None:
    """The einsum sums queries over an axis that keys lack; the refusal said that they were written in place."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        return torch.einsum("bgsd,btd->bst", q, k).softmax(-1) @ v

    refusal = only_refusal(fn, torch.randn(2, 3, 6, 4), torch.randn(2, 10, 4), torch.randn(2, 10, 4))
    assert refusal.code == "operand-layout"
    assert "queries are made within an operator" in refusal.reason
