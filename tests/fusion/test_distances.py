"""Biases of distances: the graph makes them at each distance once, with the user's own operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import check_fused
from graphs import graph_of, matched, only_site, score_of
from torch import fx

import flashfuse
from flashfuse.describe import describe_site
from flashfuse.patterns.graph import shape, tensor
from flashfuse.patterns.match import find_attention
from flashfuse.patterns.table import Table
from flashfuse.rewrite import rewrite
from flashfuse.tables import Tables

B, H, S, D, BUCKETS = 2, 4, 12, 8, 32
Attention = Callable[..., Any]


def qkv(q_len: int = S, kv_len: int = S) -> tuple[torch.Tensor, ...]:
    return torch.randn(B, H, q_len, D), torch.randn(B, H, kv_len, D), torch.randn(B, H, kv_len, D)


def attend(q: Any, k: Any, v: Any, bias: Any) -> Any:
    return (q @ k.mT + bias).softmax(-1) @ v


def apart(q: Any, k: Any, past: int = 0) -> Any:
    """Key minus query position, [Tq, Tkv]."""
    return torch.arange(k.shape[2]) - (torch.arange(q.shape[2])[:, None] + past)


def bucket(distance: Any, both_ways: bool = True, buckets: int = BUCKETS, furthest: int = 128) -> Any:
    """T5's relative_position_bucket, with its additions in place."""
    found = 0
    if both_ways:
        buckets //= 2
        found += (distance > 0).to(torch.long) * buckets
        distance = torch.abs(distance)
    else:
        distance = -torch.min(distance, torch.zeros_like(distance))
    exact = buckets // 2
    far = exact + (torch.log(distance.float() / exact) / math.log(furthest / exact) * (buckets - exact)).to(torch.long)
    far = torch.min(far, torch.full_like(far, buckets - 1))
    found += torch.where(distance < exact, distance, far)
    return found


def encoder(q: Any, k: Any, v: Any, weight: Any) -> Any:
    return attend(q, k, v, F.embedding(bucket(apart(q, k)), weight).permute(2, 0, 1)[None])


def decoder(q: Any, k: Any, v: Any, weight: Any) -> Any:
    """The last query stands beside the last key."""
    distance = apart(q, k, past=k.shape[2] - q.shape[2])
    return attend(q, k, v, weight[bucket(distance, both_ways=False)].permute(2, 0, 1)[None])


def sliced(q: Any, k: Any, v: Any, weight: Any) -> Any:
    """The biases of all positions, of which the last queries take theirs."""
    bias = F.embedding(bucket(apart(k, k)), weight).permute(2, 0, 1)[None]
    return attend(q, k, v, bias[:, :, -q.shape[2] :])


def clipped(q: Any, k: Any, v: Any, weight: Any) -> Any:
    return attend(q, k, v, weight[apart(q, k).clamp(-4, 4) + 4].movedim(-1, 0))


def copied_for_the_batch(q: Any, k: Any, v: Any, weight: Any) -> Any:
    values = weight[bucket(apart(q, k))].permute(2, 0, 1)[None].expand(q.shape[0], -1, -1, -1).contiguous()
    return attend(q, k, v, values)


def scaled(q: Any, k: Any, v: Any, weight: Any) -> Any:
    """A factor of the whole table, and one of each head."""
    bias = torch.index_select(weight, 0, bucket(apart(q, k)).flatten()).view(q.shape[2], k.shape[2], H)
    return attend(q, k, v, (bias * 0.5).permute(2, 0, 1) * weight[0].view(1, H, 1, 1))


FORMS = {
    encoder: "(qk + t0[n1, (11 + kv_idx + (-1 * q_idx))])",
    decoder: "(qk + t0[n1, (11 + kv_idx + (-1 * q_idx))])",
    sliced: "(qk + t0[n1, (11 + kv_idx + (-1 * q_idx))])",
    clipped: "(qk + t0[n1, (11 + kv_idx + (-1 * q_idx))])",
    copied_for_the_batch: "(qk + t0[n1, (11 + kv_idx + (-1 * q_idx))])",
    scaled: "(qk + ((t0[n1, (11 + kv_idx + (-1 * q_idx))] * 0.5) * t1[0, n1]))",
}


@pytest.mark.parametrize("fn", FORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kv_len", [S, S + 9])
def test_read_at_a_distance(fn: Attention, kv_len: int) -> None:
    args = (*qkv(kv_len=kv_len), torch.randn(BUCKETS, H))
    site = only_site(fn, *args)
    assert score_of(site.spec) == FORMS[fn]
    table = site.captured[0]
    assert isinstance(table, Table)
    assert table.extents == (H, S + kv_len - 1)
    assert "over kv_idx - q_idx" in describe_site(site).math
    check_fused(fn, *args)


@pytest.mark.parametrize("fn", FORMS, ids=lambda f: f.__name__)
def test_nothing_of_the_size_of_the_scores_is_left(fn: Attention) -> None:
    """The buckets of all pairs used to stay in the graph where they were added up in place."""
    graph = graph_of(fn, *qkv(kv_len=S + 9), torch.randn(BUCKETS, H))
    left = rewrite(graph, find_attention(graph).sites)
    shapes = [shape(t) for n in left.graph.nodes if (t := tensor(n)) is not None]
    assert not [s for s in shapes if S in s and S + 9 in s]


@pytest.mark.parametrize("fn", [encoder, decoder, sliced])
def test_lengths_may_be_symbols(fn: Attention) -> None:
    args = (*qkv(kv_len=S + 9), torch.randn(BUCKETS, H))
    assert "t0[n1, (-1 + kv_idx + q_len + (-1 * q_idx))]" in score_of(only_site(fn, *args, dynamic=True).spec)
    check_fused(fn, *args, dynamic=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("both_ways", [True, False])
def test_every_bucket_is_the_source_s_to_the_last_bit(both_ways: bool, dtype: torch.dtype) -> None:
    """A logarithm decides where a bucket ends; in a kernel it need not be torch's."""
    length = 700

    def fn(q: Any, k: Any, v: Any, weight: Any) -> Any:
        return attend(q, k, v, F.embedding(bucket(apart(q, k), both_ways), weight).permute(2, 0, 1)[None])

    weight = torch.randn(BUCKETS, 2).to(dtype)
    args = [torch.randn(1, 2, length, D).to(dtype) for _ in range(3)]
    graph = graph_of(fn, *args, weight)
    (site,) = find_attention(graph).sites
    (table,) = site.captured
    assert isinstance(table, Table)
    made = Tables({n: n for n in graph.graph.nodes}).node(table)
    graph.graph.output_node().args = ((made,),)
    graph.recompile()
    named = dict(zip("qkv", args, strict=True), weight=weight)
    inputs = [named[str(n.target).strip("L_").split("_")[0]] for n in graph.graph.nodes if n.op == "placeholder"]
    (found,) = graph(*inputs)
    distance = torch.arange(2 * length - 1) - (length - 1)
    assert torch.equal(found, F.embedding(bucket(distance, both_ways), weight).T)


def test_layers_share_a_table() -> None:
    def fn(q: Any, k: Any, v: Any, weight: Any) -> Any:
        bias = F.embedding(bucket(apart(q, k)), weight).permute(2, 0, 1)[None]
        return attend(attend(q, k, v, bias), k, v, bias * 0.5)

    graph = graph_of(fn, *qkv(), torch.randn(BUCKETS, H))
    first, second = find_attention(graph).sites
    assert first.captured[0] == second.captured[0]
    left = rewrite(graph, (first, second))
    assert sum(n.target is torch.log for n in left.graph.nodes) == 1


# --------------------------------------------------------------------------------------------------------------------
# What is no function of the distance, or not made by operators that may be applied to fewer elements


def positions_from_outside(q: Any, k: Any, v: Any, weight: Any, at: Any) -> Any:
    return attend(q, k, v, weight[bucket(at - at[:, None])].movedim(-1, 0))


def query_beside_distance(q: Any, k: Any, v: Any, weight: Any, at: Any) -> Any:
    """Another bias for even queries."""
    even = torch.arange(q.shape[2])[:, None] % 2
    return attend(q, k, v, weight[bucket(apart(q, k)) * even].movedim(-1, 0))


def sum_of_positions(q: Any, k: Any, v: Any, weight: Any, at: Any) -> Any:
    return attend(q, k, v, weight[(torch.arange(S) + torch.arange(S)[:, None]).clamp(max=9)].movedim(-1, 0))


def normalised_over_one(q: Any, k: Any, v: Any, weight: Any, at: Any) -> Any:
    """Over a dimension of size 1 a norm is pointwise; applied to the table it would be a norm of the table."""
    values = F.normalize(weight[:, :1][bucket(apart(q, k))], dim=-1)
    return attend(q, k, v, values[..., 0])


def in_another_region(q: Any, k: Any, v: Any, weight: Any, at: Any) -> Any:
    """Autocast decides the type that the logarithms are taken in."""
    distance = apart(q, k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = bucket(distance)
    return attend(q, k, v, weight[found].movedim(-1, 0))


def weight_written_in_between(q: Any, k: Any, v: Any, weight: Any, at: Any) -> Any:
    weight = weight * 1
    values = weight[bucket(apart(q, k))]
    weight.mul_(2)
    return attend(q, k, v, values.movedim(-1, 0)) + weight.sum()


STAY = (positions_from_outside, query_beside_distance, sum_of_positions, normalised_over_one, in_another_region)


@pytest.mark.parametrize("fn", STAY, ids=lambda f: f.__name__)
def test_what_stays_a_tensor_of_pairs(fn: Attention) -> None:
    args = (*qkv(), torch.randn(BUCKETS, H), torch.randint(20, (S,)))
    site = only_site(fn, *args)
    assert all(isinstance(captured, fx.Node) for captured in site.captured)
    check_fused(fn, *args)


def test_a_table_is_made_where_its_source_is() -> None:
    """Between there and the attention its weight may be written."""
    args = (*qkv(), torch.randn(BUCKETS, H), torch.randint(20, (S,)))
    assert isinstance(only_site(weight_written_in_between, *args).captured[0], Table)
    check_fused(weight_written_in_between, *args)


def test_memory_that_is_read_keeps_its_writer() -> None:
    """What is written in place goes only where nothing reads it after that."""

    def fn(q: Any, k: Any, v: Any, weight: Any) -> Any:
        found = bucket(apart(q, k))
        view = found.view(-1)
        out = attend(q, k, v, weight[found].movedim(-1, 0))
        found.add_(1)
        return out, view

    args = (*qkv(), torch.randn(BUCKETS, H))
    assert len(matched(fn, *args).sites) == 1
    options = {"flashfuse.inner": "eager", "flashfuse.strict": True}
    _, view = torch.compile(fn, backend="flashfuse", options=options)(*args)
    assert torch.equal(view, fn(*args)[1])


@pytest.mark.parametrize("changed", [{"padding_idx": 3}, {"scale_grad_by_freq": True}], ids=str)
def test_gradient_of_an_embedding_that_is_no_lookups(changed: dict[str, Any]) -> None:
    """A padding row got a gradient, and a frequent one all of it: the table of distances was a plain look-up."""

    def fn(q: Any, k: Any, v: Any, weight: Any) -> Any:
        return attend(q, k, v, F.embedding(apart(q, k).clamp(-4, 4) + 4, weight, **changed).movedim(-1, 0))

    args = (*qkv(), torch.randn(9, H))
    assert isinstance(only_site(fn, *args).captured[0], Table)
    with torch.enable_grad():
        weights = [args[3].clone().requires_grad_() for _ in range(2)]
        compiled = torch.compile(
            fn, backend="flashfuse", options={"flashfuse.inner": "eager", "flashfuse.strict": True}
        )
        flashfuse.reset()
        for run, weight in zip((fn, compiled), weights, strict=True):
            run(*args[:3], weight).square().sum().backward()
    flashfuse.reports()[-1].assert_fused(sites=1)
    torch.testing.assert_close(weights[1].grad, weights[0].grad)
