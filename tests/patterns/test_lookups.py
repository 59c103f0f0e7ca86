"""Look-ups: positions that are formulas are one more layout; positions that depend on data are read in the kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import check_fused
from graphs import only_site, score_of

B, H, S, D = 2, 4, 6, 8
SPAN = 5


def qkv() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(B, H, S, D) for _ in range(3))


def attend(s: Any, v: Any) -> Any:
    return torch.softmax(s, -1) @ v


# --------------------------------------------------------------------------------------------------------------------
# Look-ups in a product: content to position and position to content


def distances() -> torch.Tensor:
    return torch.randint(2 * SPAN, (S, S))


def disentangled_gather(q: Any, k: Any, v: Any, table: Any, at: Any) -> Any:
    index = at.expand(B, H, S, S)
    c2p = torch.gather(q @ table.mT, -1, index)
    p2c = torch.gather(k @ table.mT, -1, index).transpose(-1, -2)
    return attend((q @ k.mT + c2p + p2c) * 0.25, v)


def disentangled_take_folded(q: Any, k: Any, v: Any, table: Any, at: Any) -> Any:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    table = table.repeat(B, 1, 1)
    index = at[None].expand(B * H, S, S)
    s = torch.bmm(q, k.mT)
    s = s + torch.gather(torch.bmm(q, table.mT), dim=2, index=index)
    s += torch.gather(torch.bmm(k, table.mT), dim=2, index=index).mT
    return torch.bmm(torch.softmax(s * 0.25, -1), v).view(B, H, S, D)


def test_gathers_of_a_second_product_are_read_in_the_kernel() -> None:
    args = (*qkv(), torch.randn(H, 2 * SPAN, D), distances())
    site = only_site(disentangled_gather, *args)
    assert score_of(site.spec) == (
        "(((qk + t0[n0, n1, q_idx, min(max(t1[q_idx, kv_idx], 0), 9)])"
        " + t2[n0, n1, kv_idx, min(max(t1[kv_idx, q_idx], 0), 9)]) * 0.25)"
    )
    assert [n.name for n in site.captured] == ["matmul", "l_at_", "matmul_1"]
    folded = only_site(disentangled_take_folded, *args)
    assert score_of(folded.spec) == score_of(site.spec).replace("n0, n1", "(n1 + (4 * n0))")
    check_fused(disentangled_gather, *args)
    check_fused(disentangled_take_folded, *args)


def test_clamped_distances_need_no_index_tensor() -> None:
    """Positions made of positions are computed in the kernel, and are known to lie inside."""

    span = 3

    def fn(q: Any, k: Any, v: Any, table: Any) -> Any:
        i = torch.arange(S)
        at = torch.clamp(i[:, None] - i[None] + span, 0, 2 * span - 1)
        return attend(q @ k.mT + torch.gather(q @ table.mT, -1, at.expand(B, H, S, S)), v)

    args = (*qkv(), torch.randn(H, 2 * span, D))
    site = only_site(fn, *args)
    assert score_of(site.spec) == "(qk + t0[n0, n1, q_idx, min(max((3 + q_idx + (-1 * kv_idx)), 0), 5)])"
    check_fused(fn, *args)


def test_clamps_of_the_users_make_others_needless() -> None:
    """What clamps a position before the look-up is seen through, and not done twice; one that does nothing goes."""

    def fn(q: Any, k: Any, v: Any, table: Any, at: Any) -> Any:
        at = torch.clamp(at + SPAN, 0, 2 * SPAN - 1)
        return attend(q @ k.mT + torch.gather(q @ table.mT, -1, at.expand(B, H, S, S)), v)

    args = (*qkv(), torch.randn(H, 2 * SPAN, D), torch.randint(-9, 9, (S, S)))
    site = only_site(fn, *args)
    assert score_of(site.spec) == "(qk + t0[n0, n1, q_idx, min(max((t1[q_idx, kv_idx] + 5), 0), 9)])"
    check_fused(fn, *args)


def test_plain_distances_are_positions() -> None:
    def fn(q: Any, k: Any, v: Any, table: Any) -> Any:
        i = torch.arange(S)
        at = (i[None] - i[:, None] + S - 1).expand(B, H, S, S)
        return attend(q @ k.mT + torch.gather(q @ table.mT, -1, at), v)

    def taken(q: Any, k: Any, v: Any, table: Any) -> Any:
        i = torch.arange(S)
        return attend(q @ k.mT + torch.take_along_dim(q @ table.mT, (i[None] - i[:, None] + S - 1)[None, None], -1), v)

    args = (*qkv(), torch.randn(H, 2 * S - 1, D))
    for f in (fn, taken):
        assert score_of(only_site(f, *args).spec) == "(qk + t0[n0, n1, q_idx, (5 + kv_idx + (-1 * q_idx))])"
        check_fused(f, *args)


# --------------------------------------------------------------------------------------------------------------------
# Tables: shared over the batch they stay the graph's, looked up for each batch element they are read in the kernel


def table_of_windows(q: Any, k: Any, v: Any, table: Any, at: Any) -> Any:
    bias = table[at.view(-1)].view(S, S, -1).permute(2, 0, 1).contiguous()
    return attend(q @ k.mT + bias.unsqueeze(0), v)


def embedded_distances(q: Any, k: Any, v: Any, table: Any, at: Any) -> Any:
    return attend(q @ k.mT + F.embedding(at, table).permute(2, 0, 1)[None], v)


def test_a_table_that_the_batch_shares_stays_the_graphs() -> None:
    args = (*qkv(), torch.randn(2 * SPAN, H), distances())
    site = only_site(table_of_windows, *args)
    assert score_of(site.spec) == "(qk + t0[n1, q_idx, kv_idx])"
    assert site.captured[0].name == "bias"
    site = only_site(embedded_distances, *args)
    assert score_of(site.spec) == "(qk + t0[q_idx, kv_idx, n1])"
    assert site.captured[0].name == "embedding"
    check_fused(table_of_windows, *args)
    check_fused(embedded_distances, *args)


def bucketed(q: Any, k: Any, v: Any, table: Any) -> Any:
    i = torch.arange(S)
    apart = i[None] - i[:, None]
    far = 2 + (torch.log(apart.abs().float() / 2) / math.log(4) * 2).to(torch.long)
    bucket = (apart > 0).long() * 4 + torch.where(apart.abs() < 2, apart.abs(), far.clamp(max=3))
    return attend(q @ k.mT + F.embedding(bucket, table).permute(2, 0, 1)[None], v)


def test_logarithmic_buckets_are_computed_by_the_graph() -> None:
    """A logarithm that decides a bucket has to be torch's own, to the last bit."""
    args = (*qkv(), torch.randn(8, H))
    site = only_site(bucketed, *args)
    assert score_of(site.spec) == "(qk + t0[n1, (5 + kv_idx + (-1 * q_idx))])"
    assert site.spec.captured == (torch.float32,)
    check_fused(bucketed, *args)


def graph_distances(q: Any, k: Any, v: Any, table: Any, at: Any) -> Any:
    return attend(q @ k.mT + F.embedding(at, table).permute(0, 3, 1, 2), v)


def graph_distances_indexed(q: Any, k: Any, v: Any, table: Any, at: Any) -> Any:
    return attend(q @ k.mT + table[at].movedim(-1, 1), v)


def graph_distances_selected(q: Any, k: Any, v: Any, table: Any, at: Any) -> Any:
    chosen = torch.index_select(table, 0, at.flatten()).view(B, S, S, H)
    return attend(q @ k.mT + chosen.permute(0, 3, 1, 2), v)


@pytest.mark.parametrize(
    "fn", [graph_distances, graph_distances_indexed, graph_distances_selected], ids=lambda f: f.__name__
)
def test_a_table_looked_up_for_each_batch_element_is_read_in_the_kernel(fn: Callable[..., Any]) -> None:
    """Otherwise the biases would be as large as the scores: [B, H, S, S]."""
    args = (*qkv(), torch.randn(SPAN, H), torch.randint(SPAN, (B, S, S)))
    site = only_site(fn, *args)
    place = "t1[n0, q_idx, kv_idx]"
    if fn is graph_distances_indexed:
        place = f"where(({place} < 0), ({place} + {SPAN}), {place})"
    assert score_of(site.spec) == f"(qk + t0[min(max({place}, 0), {SPAN - 1}), n1])"
    assert [n.op for n in site.captured] == ["placeholder"] * 2
    check_fused(fn, *args)


def test_negative_positions_in_a_table_count_from_the_end() -> None:
    args = (*qkv(), torch.randn(SPAN, H), torch.randint(-SPAN, SPAN, (B, S, S), dtype=torch.int32))
    check_fused(graph_distances_indexed, *args)


def test_look_up_by_two_index_tensors() -> None:
    """Rows of a table of pairs, chosen by token types of query and key."""

    def fn(q: Any, k: Any, v: Any, table: Any, kind: Any) -> Any:
        return attend(q @ k.mT + table[kind[:, :, None], kind[:, None, :]].permute(0, 3, 1, 2), v)

    args = (*qkv(), torch.randn(3, 3, H), torch.randint(3, (B, S)))
    site = only_site(fn, *args)
    assert site.spec.captured == (torch.float32, torch.int64)
    assert "q_idx, kv_idx" not in score_of(site.spec)
    check_fused(fn, *args)


def test_a_formula_that_may_leave_the_table_stays_the_users_look_up() -> None:
    """The user's own look-up raises as it does eagerly; one moved into the kernel would not."""

    def fn(q: Any, k: Any, v: Any, table: Any) -> Any:
        i = torch.arange(S)
        return attend(q @ k.mT + torch.gather(q @ table.mT, -1, (i[None] - i[:, None] + S).expand(B, H, S, S)), v)

    options = {"flashfuse.inner": "eager", "flashfuse.strict": True}
    compiled = torch.compile(fn, backend="flashfuse", options=options)
    with torch.no_grad(), pytest.raises((RuntimeError, IndexError)):
        compiled(*qkv(), torch.randn(H, 2 * S - 1, D))
