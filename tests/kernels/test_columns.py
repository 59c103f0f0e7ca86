"""Which reads a kernel makes once for the columns of a tile."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from flashfuse.kernels.columns import Columns
from flashfuse.kernels.spec import KV_IDX, Q_IDX, parse, to_text

BOOL, INT, FLOAT, HALF = torch.bool, torch.int64, torch.float32, torch.float16


def columns(text: str, captured: Sequence[torch.dtype], of_queries: bool = False) -> Columns:
    return Columns.of(parse(text, tuple(captured)), Q_IDX if of_queries else KV_IDX)


@pytest.mark.parametrize(
    ("text", "captured", "read", "types"),
    [
        ("qk + t0[n1, kv_idx]", [HALF], ["t0[n1, kv_idx]"], [FLOAT]),
        ("where(t0[n0, kv_idx], qk, -inf)", [BOOL], ["t0[n0, kv_idx]"], [torch.int8]),
        ("qk + t0[kv_idx] + t1[kv_idx] + t2[kv_idx]", [FLOAT] * 3, ["t0[kv_idx]", "t1[kv_idx]"], [FLOAT] * 2),
        ("qk + t0[n1] + t1[q_idx] + t2[q_idx, kv_idx]", [FLOAT] * 3, [], []),
        # Behind a condition on positions there may be nothing to read.
        ("where(kv_idx < 7, qk + t0[kv_idx], qk)", [FLOAT], [], []),
        ("where(kv_idx < 7, qk + t0[kv_idx], qk) + t0[kv_idx]", [FLOAT], [], []),
        ("where(kv_idx <= q_idx, qk + t0[kv_idx], -inf)", [FLOAT], ["t0[kv_idx]"], [FLOAT]),
    ],
)
def test_what_is_read(
    text: str, captured: Sequence[torch.dtype], read: Sequence[str], types: Sequence[torch.dtype]
) -> None:
    found = columns(text, captured)
    assert [to_text(r) for r in found.reads] == list(read)
    assert list(found.types) == list(types)
    assert found.code_of is None


@pytest.mark.parametrize(
    ("text", "captured", "coded"),
    [
        ("where(t0[q_idx] == t0[kv_idx], qk, -inf)", [INT], True),
        ("where((t0[q_idx] != t1[n0, kv_idx]) | (kv_idx <= q_idx), -inf, qk)", [INT, INT], True),
        ("where(t0[q_idx] == t0[kv_idx], qk, -inf) + t1[kv_idx] * t2[q_idx]", [INT, FLOAT, FLOAT], True),
        # Only 64 bits tell which one is larger.
        ("where(t0[q_idx] < t0[kv_idx], qk, -inf)", [INT], False),
        ("where((t0[q_idx] == t0[kv_idx]) | (t0[kv_idx] < q_idx), qk, -inf)", [INT], False),
        ("where((t0[q_idx] == t0[kv_idx]) & (t0[q_idx] == t1[kv_idx]), qk, -inf)", [INT, INT], False),
        ("where(t0[kv_idx] == t1[kv_idx], qk, -inf)", [INT, INT], False),
        ("where(t0[kv_idx] == q_idx, qk, -inf)", [INT], False),
    ],
)
@pytest.mark.parametrize("of_queries", [False, True])
def test_what_is_coded(text: str, captured: Sequence[torch.dtype], coded: bool, of_queries: bool) -> None:
    found = columns(text, captured, of_queries)
    assert found.coded == (() if not coded else found.coded)
    assert (found.code_of == 0) == coded
    if coded:
        # Beside the codes of rows there is room for no more.
        assert found.types == (torch.int32,)
        assert set(found.sources()) == {"columns", "coded_rows"}
        assert len(found.made) == 2
