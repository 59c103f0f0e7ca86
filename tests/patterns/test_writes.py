"""What a write leaves: the new value where it went, the old one elsewhere and before; and writes that are not read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import graph_of, only_refusal, only_site, score_of
from torch import fx
from watched import find_attention

from flashfuse.kernels.spec import to_text
from flashfuse.patterns.graph import tensor
from flashfuse.rewrite import rewrite

B, H, S, D = 2, 4, 6, 8
Attention = Callable[..., Any]


def qkv() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(B, H, S, D) for _ in range(3))


def triangle() -> torch.Tensor:
    return torch.ones(S, S, dtype=torch.bool).triu(1)


def product(q: Any, k: Any) -> Any:
    return q @ k.transpose(-1, -2)


def with_scores(write: Callable[[Any], Any]) -> Attention:
    """An attention whose scores are written."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        s = product(q, k)
        write(s)
        return s.softmax(-1) @ v

    return fn


def with_bias(write: Callable[[Any], Any], of: Callable[[], Any] = lambda: torch.zeros(H, S, S)) -> Attention:
    """An attention whose bias is made in the graph and written."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        made = of()
        write(made)
        return (product(q, k) + made).softmax(-1) @ v

    return fn


def mask_in_front(s: Any) -> None:
    s[triangle().expand(B, H, S, S)] = float("-inf")


def mask_behind(s: Any) -> None:
    s[:, :, triangle()] = float("-inf")


def mask_after_dots(s: Any) -> None:
    s[..., triangle()] = float("-inf")


def mask_of_a_part(s: Any) -> None:
    s[:, 1:3, triangle()] = -7.0


def mask_of_a_head(s: Any) -> None:
    s[0, 1].masked_fill_(triangle(), float("-inf"))


def mask_put(s: Any) -> None:
    s.index_put_((triangle().expand(B, H, S, S),), torch.tensor(float("-inf")))


def first_keys(s: Any) -> None:
    s[..., :2] = 0


def last_keys(s: Any) -> None:
    s[..., s.shape[-1] - 2 :] = float("-inf")


def every_second(s: Any) -> None:
    s[..., 1::2] = float("-inf")


def diagonal(s: Any) -> None:
    s.diagonal(dim1=-2, dim2=-1).fill_(-1.0)


def listed_diagonal(s: Any) -> None:
    i = torch.arange(S)
    s[:, :, i, i] = -1.0


def counted_from_the_end(s: Any) -> None:
    s[..., torch.arange(2) - 2] = -5.0


def filled_columns(s: Any) -> None:
    s.index_fill_(-1, torch.arange(2), float("-inf"))


def added_to_a_head(s: Any) -> None:
    s[:, 1] += torch.arange(S) * 0.5


def transposed(s: Any) -> None:
    s.transpose(-1, -2).mul_(0.5)


def through_two_views(s: Any) -> None:
    part = s[:, 1:]
    part[..., :4][:, 0] = -3.0
    part[:, 1] += 2


def assigned_to_itself(s: Any) -> None:
    s[..., 1:] = s[..., 1:] * 2


def columns_that_are_none(s: Any) -> None:
    s.unsqueeze(-1)[..., 1:] = -9.0


def chosen_into(s: Any) -> None:
    torch.where(triangle(), torch.tensor(-1e9), s, out=s)


CAUSAL = "where((kv_idx >= (1 + q_idx)), -inf, qk)"
SCORES = {
    mask_in_front: CAUSAL,
    mask_behind: CAUSAL,
    mask_after_dots: CAUSAL,
    mask_put: CAUSAL,
    mask_of_a_part: "where((((0 < n1) & (n1 < 3)) & (kv_idx >= (1 + q_idx))), -7.0, qk)",
    mask_of_a_head: "where((((n0 == 0) & (n1 == 1)) & (kv_idx >= (1 + q_idx))), -inf, qk)",
    first_keys: "where((kv_idx < 2), 0.0, qk)",
    last_keys: "where((3 < kv_idx), -inf, qk)",
    every_second: "where(((0 < kv_idx) & (((1 + kv_idx) % 2) == 0)), -inf, qk)",
    diagonal: "where((kv_idx == q_idx), -1.0, qk)",
    listed_diagonal: "where((kv_idx == q_idx), -1.0, qk)",
    counted_from_the_end: "where((3 < kv_idx), -5.0, qk)",
    filled_columns: "where((kv_idx < 2), -inf, qk)",
    added_to_a_head: "(qk + where((n1 == 1), (kv_idx * 0.5), 0.0))",
    transposed: "(qk * 0.5)",
    through_two_views: "(where((((0 < n1) & (kv_idx < 4)) & ((-1 + n1) == 0)), -3.0, qk) + where((n1 == 2), 2, 0))",
    assigned_to_itself: "where((0 < kv_idx), (qk * 2.0), qk)",
    columns_that_are_none: "qk",
    chosen_into: "where((kv_idx >= (1 + q_idx)), -1000000000.0, qk)",
}


@pytest.mark.parametrize("write", SCORES, ids=lambda f: f.__name__)
def test_scores(write: Callable[[Any], Any]) -> None:
    """A write through an index left a value that no node stood for."""
    site = only_site(with_scores(write), *qkv())
    assert score_of(site.spec) == SCORES[write]
    assert not site.captured
    check(with_scores(write), *qkv())


def test_a_mask_in_the_shape_of_one_row_of_scores() -> None:
    """`mask.expand_as(scores)` was read as a tensor of the graph where it has one row, and refused, `row-dependent`."""

    def fn(q: Any, k: Any, v: Any, keep: Any) -> Any:
        p = product(q, k).softmax(-1)
        p[~keep.expand_as(p)] = 0
        return p @ v

    q, k, v = qkv()
    given = (q[:, :, :1].clone(), k, v, torch.arange(S) % 3 > 0)
    assert len(only_site(fn, *given).captured) == 1
    check(fn, *given)


def test_a_mask_of_a_length_that_is_a_quotient() -> None:
    """The mask's length is equal by a guard of Dynamo's, and was taken for another one than the scores'."""

    def fn(q: Any, k: Any, v: Any, keep: Any) -> Any:
        b = k.shape[0] // H
        q, k, v = (x.view(b, H, x.shape[1], D).transpose(0, 1) for x in (q, k, v))
        s = product(q, k)
        m = keep.unsqueeze(1)
        s[..., :1].masked_fill_(~m[..., :1], -1e4)
        return s.softmax(-1) @ v

    q, k, v = (x.flatten(0, 1) for x in qkv())
    given = (q, k, v, torch.arange(B * S).view(B, S) % 3 > 0)
    for x in given:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    assert "-10000.0" in score_of(only_site(fn, *given).spec)


def columns_then_rows(bias: Any) -> None:
    bias[..., 0] = 1
    bias[:, 2:, 3:] = float("-inf")


def slopes(bias: Any) -> None:
    for h in range(H):
        bias[h] -= torch.arange(S) * 2.0**-h


def seen_through_an_earlier_view(bias: Any) -> None:
    row = bias[:, 1]
    bias[..., 0] = 2
    row.mul_(3).zero_()
    row += 1


BIASES = {
    columns_then_rows: "(qk + where(((1 < q_idx) & (2 < kv_idx)), -inf, where((kv_idx == 0), 1.0, 0.0)))",
    slopes: None,
    seen_through_an_earlier_view: None,
}


@pytest.mark.parametrize("write", BIASES, ids=lambda f: f.__name__)
def test_biases(write: Callable[[Any], Any]) -> None:
    site = only_site(with_bias(write), *qkv())
    assert BIASES[write] in (None, score_of(site.spec))
    assert not site.captured
    check(with_bias(write), *qkv())


def test_a_loop_of_edits_is_a_chain() -> None:
    """An edit of a part is in its new value and beside it: without care 16 of them were 65,536 products."""
    fn = with_scores(lambda s: [s[:, h % H].add_(h * torch.arange(S)) for h in range(16)])
    assert score_of(only_site(fn, *qkv()).spec).count("qk") == 1
    check(fn, *qkv())


def test_many_writes_stay_a_tensor() -> None:
    def rows(mask: Any) -> None:
        for i in range(40):
            mask[i % S, : i % S] = -1.0

    fn = with_bias(rows, lambda: torch.zeros(S, S))
    assert len(only_site(fn, *qkv()).captured) == 1
    check(fn, *qkv())


def test_a_write_over_one_that_is_not_read() -> None:
    """What the first leaves is no formula, and memory does not hold it any more: the tensor is read as it is."""

    def write(mask: Any) -> None:
        mask.view(-1)[:9] = -1.0
        mask.diagonal().fill_(2.0)

    fn = with_bias(write, lambda: torch.zeros(S, S))
    assert len(only_site(fn, *qkv()).captured) == 1
    check(fn, *qkv())


def test_weights() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        p = product(q, k).softmax(-1)
        p[..., 0] = 0
        return p @ v

    factor = only_site(fn, *qkv()).spec.factor
    assert factor is not None
    assert to_text(factor) == "where((kv_idx != 0), 1.0, 0.0)"
    check(fn, *qkv())


def test_what_was_read_before_a_write_is_the_old_value() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        made = torch.zeros(S, S)
        before = made + 1
        made[0] = 3
        made[:, 1] = before[:, 1] * 2
        return (product(q, k) + made + before).softmax(-1) @ v

    text = score_of(only_site(fn, *qkv()).spec)
    assert text == "((qk + where((kv_idx == 1), 2.0, where((q_idx == 0), 3.0, 0.0))) + 1.0)"
    check(fn, *qkv())


def test_scores_in_a_larger_tensor() -> None:
    """A softmax with one more column, whose scores are assigned."""

    def fn(q: Any, k: Any, v: Any) -> Any:
        s = torch.zeros(B, H, S, S + 1)
        s[..., :-1] = product(q, k)
        return s.softmax(-1)[..., :-1] @ v

    spec = only_site(fn, *qkv()).spec
    assert spec.sink is not None
    assert to_text(spec.sink) == "0.0"
    check(fn, *qkv())


def given_mask(q: Any, k: Any, v: Any, keep: Any) -> Any:
    keep[..., 0] = True
    return product(q, k).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def mask_read_elsewhere(q: Any, k: Any, v: Any, keep: Any) -> Any:
    drop = ~keep
    drop[..., 0] = False
    return product(q, k).masked_fill(drop, float("-inf")).softmax(-1) @ v + drop.sum()


@pytest.mark.parametrize("fn", [given_mask, mask_read_elsewhere], ids=lambda f: f.__name__)
def test_a_write_that_others_see_stays(fn: Attention) -> None:
    args = (*qkv(), torch.rand(B, 1, S, S) > 0.4)
    only_site(fn, *args)
    assert "setitem = " in check(fn, *args)


def test_a_write_that_nobody_sees_goes() -> None:
    for fn in (with_scores(mask_behind), with_bias(slopes)):
        code = check(fn, *qkv())
        assert "setitem" not in code
        assert "zeros" not in code


def data_positions(q: Any, k: Any, v: Any) -> Any:
    s = product(q, k)
    s[..., v[0, 0, :2, 0].long()] = 0
    return s.softmax(-1) @ v


def one_after_the_other(q: Any, k: Any, v: Any) -> Any:
    s = product(q, k)
    s[0, 0, triangle()] = torch.zeros(15)
    return s.softmax(-1) @ v


def listed_positions(q: Any, k: Any, v: Any) -> Any:
    s = product(q, k)
    s[..., [0, 2]] = 0
    return s.softmax(-1) @ v


def other_rows(q: Any, k: Any, v: Any) -> Any:
    s = product(q, k)
    s[:, 1] = s[:, 0]
    return s.softmax(-1) @ v


def read_in_between(q: Any, k: Any, v: Any) -> Any:
    s = product(q, k)
    largest = s.amax(-1)
    s[..., 0] = 0
    return s.softmax(-1) @ v, largest


def larger_tensor_returned(q: Any, k: Any, v: Any) -> Any:
    s = torch.zeros(B, H, S, S + 1)
    s[..., :-1] = product(q, k)
    return s.softmax(-1)[..., :-1] @ v, s


def earlier_view_of_larger_tensor_read(q: Any, k: Any, v: Any) -> Any:
    s = torch.zeros(B, H, S, S + 1)
    head = s[:, 1]
    s[..., :-1] = product(q, k)
    return s.softmax(-1)[..., :-1] @ v, head + 1


def written_and_returned(q: Any, k: Any, v: Any) -> Any:
    s = product(q, k)
    s[..., :2] *= 2
    return s.softmax(-1) @ v, s


def output_written_elsewhere(q: Any, k: Any, v: Any) -> Any:
    out = torch.empty(B, H, S, D)
    torch.matmul(product(q, k).softmax(-1), v, out=out)
    return out + 1


REFUSED = [
    (data_positions, "unknown-operator", "assigns at positions that depend on data", "s[..., v[0"),
    (one_after_the_other, "unknown-operator", "one element after the other to what a mask", "s[0, 0, triangle()]"),
    (listed_positions, "unknown-operator", "listed one by one", "s[..., [0, 2]]"),
    (other_rows, "square-intermediate", "two products", "q @ k.transpose"),
    (read_in_between, "scores-used", "`amax`", "s.amax"),
    (larger_tensor_returned, "mutation", "which is read elsewhere", "s[..., :-1]"),
    (earlier_view_of_larger_tensor_read, "mutation", "which is read elsewhere", "s[..., :-1]"),
    (written_and_returned, "scores-used", "are returned", "s[..., :2]"),
    (output_written_elsewhere, "mutation", "which is read elsewhere", "torch.matmul"),
]


@pytest.mark.parametrize(("fn", "code", "reason", "line"), REFUSED, ids=lambda x: getattr(x, "__name__", None))
def test_refused(fn: Attention, code: str, reason: str, line: str) -> None:
    refusal = only_refusal(fn, *qkv())
    assert refusal.code == code, refusal
    assert reason in refusal.reason
    assert line in refusal.location.code
    check(fn, *qkv(), sites=0)


def check(fn: Attention, *args: torch.Tensor, sites: int = 1) -> str:
    """The rewritten graph gives, and leaves in its inputs, what the graph does. Returns its code."""
    before = graph_of(fn, *args)
    after = rewrite(before, find_attention(before).sites)
    results = []
    for gm in (before, after):
        given = [like(node, seed) for seed, node in enumerate(gm.graph.find_nodes(op="placeholder"))]
        results.append((*gm(*given), *given))
    torch.testing.assert_close(*results, equal_nan=True)
    code = after.code
    assert code.count("flashfuse.attention") == sites
    assert not sites or "after_write" not in code
    return code


def test_products_that_are_read_are_read_after_they_are_written() -> None:
    """A product that stays a tensor, as of relative positions, was refused where it is edited through a view."""

    def fn(q: Any, k: Any, v: Any, r: Any) -> Any:
        shifted = torch.einsum("bhid,td->bhit", q, r).reshape(B, H, 2 * S, S)[:, :, 1:]
        shifted = shifted.reshape(B, H, S, 2 * S - 1)[..., :S]
        shifted *= 0.5
        shifted[..., 0] = 0
        return (product(q, k) + shifted).softmax(-1) @ v

    assert score_of(only_site(fn, *qkv(), torch.randn(2 * S, D)).spec) == "(qk + t0[n0, n1, q_idx, kv_idx])"
    check(fn, *qkv(), torch.randn(2 * S, D))


def like(node: fx.Node, seed: int) -> torch.Tensor:
    """Numbers for an input of a graph."""
    t = tensor(node)
    assert t is not None
    numbers = torch.randn(t.shape, generator=torch.Generator().manual_seed(seed))
    return numbers > 0 if t.dtype == torch.bool else numbers
