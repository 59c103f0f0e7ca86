"""Complex tensors in a score: the graph computes with them, a kernel reads real numbers only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import check_fused
from graphs import only_site, score_of

READ: dict[str, tuple[Callable[..., Any], str]] = {
    "absolute": (lambda s, x: s + torch.complex(x, 2 * x).abs(), "(qk + t0[q_idx, kv_idx])"),
    "polar": (lambda s, x: s + torch.polar(x.abs(), x).abs(), "(qk + t0[q_idx, kv_idx])"),
    "compared": (
        lambda s, x: s.masked_fill(torch.complex(x, 2 * x) == torch.complex(x, x), -1.0),
        "where(t0[q_idx, kv_idx], -1.0, qk)",
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_made_of_complex_numbers_is_read_from_the_graph(name: str) -> None:
    """A kernel that read a complex tensor took real and imaginary parts in turn for its elements."""
    change, score = READ[name]

    def fn(q: Any, k: Any, v: Any, x: Any) -> Any:
        return change(q @ k.mT, x).softmax(-1) @ v

    args = (*(torch.randn(2, 3, n, 8) for n in (6, 7, 7)), torch.randn(6, 7))
    assert score_of(only_site(fn, *args).spec) == score
    check_fused(fn, *args)
