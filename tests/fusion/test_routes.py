"""Which sites go to kernels of torch's own, and what the graph and the report then say."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from graphs import only_site

from flashfuse import routes
from flashfuse.describe import describe_site
from flashfuse.kernels.spec import AttentionSpec, parse
from flashfuse.options import parse as parse_options
from flashfuse.patterns.graph import tensor
from flashfuse.report import Report
from flashfuse.rewrite import rewrite
from flashfuse.routes import Plain, Route, Row, fastest, plain_attention, plain_score, route_of

aten = torch.ops.aten


def spec_of(score: str, **others: Any) -> AttentionSpec:
    narrow = torch.bfloat16
    return AttentionSpec(2, parse(score), (), 0, narrow, narrow, narrow, "nan", (0, 1, 2, 3), **others)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.125, -1) @ v


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return torch.softmax((q @ k.transpose(-1, -2) * 0.125).masked_fill(~mask, -math.inf), -1) @ v


def operands(*batch: int, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> list[torch.Tensor]:
    return [torch.randn(*batch, 16, 64, dtype=dtype, **settings) for _ in range(3)]


@pytest.mark.parametrize(
    "score",
    [
        "where(kv_idx <= q_idx, qk * 0.125, -inf)",
        "where(kv_idx > q_idx, -inf, qk * 0.125)",
        "qk * 0.125 + where(kv_idx <= q_idx, 0.0, -inf)",
        "where(kv_idx <= q_idx + kv_len - q_len, qk * 0.125, -3e38)",
    ],
)
def test_a_causal_mask_is_one_in_any_spelling_at_equal_lengths(score: str) -> None:
    assert plain_score(spec_of(score), 16, 16) == (0.125, True)
    assert plain_score(spec_of(score), 8, 16) is None


def test_a_scale_is_plain_at_any_lengths() -> None:
    assert plain_score(spec_of("qk"), 16, 16) == (1.0, False)
    assert plain_score(spec_of("qk * 0.125"), 1, 16) == (0.125, False)


@pytest.mark.parametrize(
    "score",
    [
        "where(kv_idx <= q_idx, qk, -1e4)",
        "where(kv_idx < q_idx, qk, -inf)",
        "where((kv_idx <= q_idx) & (kv_idx > q_idx - 8), qk, -inf)",
        "where(kv_idx <= q_idx, tanh(qk), -inf)",
        "where(kv_idx <= q_idx, qk, -inf) + 1.0 * q_idx",
        "qk * -0.5",
        "qk + 1.0 * kv_idx",
    ],
)
def test_other_scores_are_not_plain(score: str) -> None:
    assert plain_score(spec_of(score), 16, 16) is None


@pytest.mark.parametrize("part", [{"dropout": 0.1}, {"sink": parse("0.0")}, {"factor": parse("2.0")}])
def test_what_stands_around_the_score_is_not_plain(part: dict[str, Any]) -> None:
    assert plain_score(spec_of("qk", **part), 16, 16) is None


def test_sizes_and_types_of_a_graph() -> None:
    assert plain_attention(only_site(causal, *operands(2, 3))) == Plain(0.125, True, False, (2, 3), 16, 16, 64)
    assert plain_attention(only_site(attention, *operands(2, 3, dtype=torch.float32))) is None
    assert plain_attention(only_site(attention, *operands(2, 3), dynamic=True)) is None


def test_the_recorded_search_decides_by_capability_sizes_and_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row((9, 0), "cudnn", (64, 96), (128, 512), (False,), (True,), (2048, 4096))
    monkeypatch.setattr(routes, "FASTER", (row,))
    site = only_site(attention, *operands(2, 3))
    plain = Plain(0.125, False, True, (2, 3), 512, 512, 64)
    assert fastest(plain, (9, 0), site) == ("cudnn",)
    assert fastest(plain, (8, 0), site) == ()
    for change in (
        {"kv_len": 513},
        {"q_len": 127},
        {"head_dim": 128},
        {"head_dim": 56},
        {"causal": True},
        {"trains": False},
        {"shape": (3, 3)},
        {"shape": (3,)},
    ):
        assert fastest(dataclasses.replace(plain, **change), (9, 0), site) == ()


def test_nothing_is_routed_on_a_cpu() -> None:
    assert route_of(only_site(attention, *operands(2, 3)), "always") is None


@pytest.mark.usefixtures("gradients")
def test_a_site_trains_where_its_gradient_is_wanted() -> None:
    found = plain_attention(only_site(attention, *operands(2, 3, requires_grad=True)))
    assert found is not None
    assert found.trains


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 3, 2)])
def test_the_graph_calls_torchs_operator(kernel: str, batch: tuple[int, ...]) -> None:
    q, k, v = operands(*batch, requires_grad=True)
    site = only_site(attention, q, k, v)
    route = Route(kernel, 0.125, False, "in a test")
    made = rewrite(site.node.graph.owning_module, [site], {site: route})
    (call,) = made.graph.find_nodes(op="call_function", target=route.operator)
    assert not made.graph.find_nodes(op="call_function", target=torch.ops.flashfuse.attention.default)
    assert call.kwargs == {"scale": 0.125}
    assert [tensor(x).dim() for x in call.args[:3]] == [4, 4, 4]  # type: ignore[union-attr, arg-type]
    if kernel == "cudnn":
        assert call.args[4] is True, "a backward needs the log-sum-exp"
    (result,) = made.graph.output_node().args[0]  # type: ignore[misc]
    assert tensor(result).shape == q.shape  # type: ignore[union-attr, arg-type]


def test_operands_that_share_all_of_an_axis_and_begin_in_between() -> None:
    def shared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(*(x.expand(4, -1, -1, -1) for x in (q, k, v)))

    q, k, v = operands(1, 3)
    between = torch.cat([k.new_zeros(1), k.flatten()])[1:].view(k.shape)
    site = only_site(shared, q, between, v)
    route = Route("flash", 0.125, False, "in a test")
    made = rewrite(site.node.graph.owning_module, [site], {site: route})
    (result,) = made.graph.output_node().args[0]  # type: ignore[misc]
    assert tensor(result).shape == (4, *q.shape[1:])  # type: ignore[union-attr, arg-type]
    (call,) = made.graph.find_nodes(op="call_function", target=route.operator)
    assert all(tensor(x).storage_offset() % 8 == 0 for x in call.args[:3])  # type: ignore[union-attr, arg-type]


def test_a_report_tells_routed_from_fused() -> None:
    site = only_site(attention, *operands(2, 3))
    described = describe_site(site, Route("cudnn", 0.125, False, "faster by the recorded search at these lengths"))
    assert described.status == "routed"
    assert described.kernel.startswith("aten::_scaled_dot_product_cudnn_attention, faster by")
    report = Report("0/0", (described, describe_site(site)))
    assert (report.count("fused"), report.count("routed")) == (1, 1)
    report.assert_fused(sites=1)
    report.assert_found(sites=2)
    assert "1 attention sites fused, 1 routed to torch's kernels, 0 left alone" in str(report)
    with pytest.raises(AssertionError, match="expected 2 fused"):
        report.assert_fused(sites=2)


def test_the_option() -> None:
    assert parse_options(None).route == "auto"
    assert parse_options({"flashfuse.route": "never"}).route == "never"
    with pytest.raises(ValueError, match="'auto' or 'never' or 'always'"):
        parse_options({"flashfuse.route": True})
