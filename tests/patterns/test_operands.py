"""Operands of unusual sizes: a single key, and rows that the graph expands from one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from graphs import only_refusal


def test_functional_attention_to_one_key() -> None:
    """With one key the score has no key position, and the search ended in an exception of its own."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v)

    q, k = torch.randn(2, 2, 6, 4), torch.randn(2, 2, 1, 4)
    assert only_refusal(fn, q, k, k).code == "no-product"
