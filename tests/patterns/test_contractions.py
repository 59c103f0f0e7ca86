"""Products that are no `matmul` of matrices: of vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import check_fused
from graphs import only_site

S, T, D, E = 6, 10, 8, 3


def qkv() -> tuple[torch.Tensor, ...]:
    return torch.randn(2, S, D), torch.randn(2, T, D), torch.randn(2, T, E)


def vector_query(q: Any, k: Any, v: Any) -> Any:
    return (q[0, 0] @ k[0].mT).softmax(-1) @ v[0]


def vector_behind_keys(q: Any, k: Any, v: Any) -> Any:
    return (k @ q[0, 0]).softmax(-1)[:, None] @ v


def vector_under_autocast(q: Any, k: Any, v: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return vector_query(q, k, v)


@pytest.mark.parametrize("fn", [vector_query, vector_behind_keys, vector_under_autocast], ids=lambda f: f.__name__)
def test_a_vector_is_one_query(fn: Callable[..., Any]) -> None:
    """`matmul` of a vector and a matrix was refused for the operator by which torch makes a vector of its result."""
    site = only_site(fn, *qkv())
    assert (site.q_len, site.kv_len, site.head_dim, site.value_dim) == (1, T, D, E)
    check_fused(fn, *qkv())
