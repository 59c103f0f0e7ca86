"""Attention in a function that Dynamo keeps whole: `F.multi_head_attention_forward` in every form of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import graph_of
from numerics import assert_close_to_exact
from torch import nn

import flashfuse
from flashfuse.inline import inline
from flashfuse.patterns.composite import composites
from flashfuse.patterns.graph import Graph
from flashfuse.report import Report
from flashfuse.transform import transform

BATCH, LENGTH, EMBED, HEADS = 2, 6, 16, 2


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (LENGTH, BATCH, EMBED)))


def _causal() -> torch.Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


def _padding() -> torch.Tensor:
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    mask[0, -2:] = True
    return mask


def _float(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, float("-inf"))


def _per_head(mask: torch.Tensor) -> torch.Tensor:
    return mask.expand(BATCH * HEADS, LENGTH, LENGTH).contiguous()


def _compiled(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> tuple[Any, Report]:
    options = {"flashfuse.inner": "eager", "flashfuse.strict": True}
    out = torch.compile(fn, backend="flashfuse", options=options, dynamic=dynamic, fullgraph=True)(*args)
    return out, flashfuse.reports()[-1]


def _codes(report: Report) -> list[str]:
    return [refusal.code for refusal in report.refusals]


MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "batch_first": {"batch_first": True},
    "extra_key": {"add_bias_kv": True},
    "extra_zero": {"add_zero_attn": True},
    "extra_both": {"add_bias_kv": True, "add_zero_attn": True},
    "dropout_in_eval": {"dropout": 0.3},
}
MASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "bool": lambda: {"attn_mask": _causal()},
    "float": lambda: {"attn_mask": _float(_causal())},
    "per_head": lambda: {"attn_mask": _per_head(_causal())},
    "padding": lambda: {"key_padding_mask": _padding()},
    "both": lambda: {"attn_mask": _causal(), "key_padding_mask": _padding()},
    "hint": lambda: {"attn_mask": _causal(), "is_causal": True},
}


@pytest.mark.parametrize(
    ("settings", "mask", "need_weights"),
    [(settings, mask, (i + j) % 2 == 1) for i, settings in enumerate(MODULES) for j, mask in enumerate(MASKS)],
)
def test_every_combination_is_one_site(settings: str, mask: str, need_weights: bool) -> None:
    """Of settings and masks, each with weights and without somewhere.

    Asking for weights and dropping them costs nothing either: nobody uses the probabilities.
    """
    module = nn.MultiheadAttention(EMBED, HEADS, **MODULES[settings]).eval()
    given = MASKS[mask]()
    x = _x(BATCH, LENGTH, EMBED) if settings == "batch_first" else _x()

    def attend(x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        return module(x, x, x, need_weights=need_weights, **given)[0]

    out, report = _compiled(attend, x, given)
    assert len(report.sites) == 1, report.refusals
    assert "multi_head_attention_forward" not in report.after
    assert "multi_head_attention_forward" in report.before
    eager = attend(x, given)
    module.double()
    exact = attend(x.double(), {n: g.double() if _is_float(g) else g for n, g in given.items()})
    assert_close_to_exact(out, eager, exact)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("mask", ["none", "both"])
def test_weights_that_are_used_have_to_exist(mask: str, average: bool) -> None:
    module = nn.MultiheadAttention(EMBED, HEADS).eval()
    given, x = MASKS[mask](), _x()

    def attend(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return module(x, x, x, average_attn_weights=average, **given)

    out, report = _compiled(attend, x)
    assert not report.sites
    (refusal,) = report.refusals
    assert refusal.code == "probabilities-used"
    assert refusal.location.file == __file__
    assert "module(x, x, x" in refusal.location.code
    torch.testing.assert_close(out, attend(x), rtol=0, atol=0)


def test_separate_projections_and_other_lengths() -> None:
    module = nn.MultiheadAttention(EMBED, HEADS, kdim=12, vdim=20).eval()
    inputs = _x(3, BATCH, EMBED), _x(7, BATCH, 12), _x(7, BATCH, 20)
    out, report = _compiled(lambda q, k, v: module(q, k, v, need_weights=False)[0], *inputs)
    assert len(report.sites) == 1, report.refusals
    torch.testing.assert_close(out, module(*inputs)[0])


@pytest.mark.parametrize("need_weights", [False, True])
def test_unbatched(need_weights: bool) -> None:
    module = nn.MultiheadAttention(EMBED, HEADS).eval()
    x, padding = _x(LENGTH, EMBED), _padding()[0]
    out, report = _compiled(lambda x: module(x, x, x, padding, need_weights=need_weights)[0], x)
    assert len(report.sites) == 1, report.refusals
    torch.testing.assert_close(out, module(x, x, x, padding)[0])


def test_static_keys_and_values() -> None:
    module = nn.MultiheadAttention(EMBED, HEADS).eval()
    x, k, v = _x(), _x(BATCH * HEADS, 9, EMBED // HEADS), _x(BATCH * HEADS, 9, EMBED // HEADS)

    def attend(x: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0
        end = module.out_proj.weight, module.out_proj.bias
        kept = {"training": False, "need_weights": False, "static_k": k, "static_v": v}
        return F.multi_head_attention_forward(x, x, x, EMBED, HEADS, *weights, *end, **kept)[0]

    out, report = _compiled(attend, x, k, v)
    assert len(report.sites) == 1, report.refusals
    torch.testing.assert_close(out, attend(x, k, v))


@pytest.mark.parametrize("need_weights", [False, True])
def test_gradients(need_weights: bool) -> None:
    module = nn.MultiheadAttention(EMBED, HEADS)

    def attend(x: torch.Tensor) -> torch.Tensor:
        return module(x, x, x, need_weights=need_weights)[0]

    x = _x()
    with torch.enable_grad():
        out, report = _compiled(attend, x)
        found = torch.autograd.grad(out.square().sum(), list(module.parameters()))
        expected = torch.autograd.grad(attend(x).square().sum(), list(module.parameters()))
    assert len(report.sites) == 1, report.refusals
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("settings", ["batch_first", "extra_key", "extra_zero", "dropout_in_eval"])
def test_sizes_stay_symbolic(settings: str, need_weights: bool) -> None:
    """One graph serves every batch and length, with padding and a causal mask."""
    module = nn.MultiheadAttention(EMBED, HEADS, **MODULES[settings]).eval()

    def attend(x: torch.Tensor, padding: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return module(x, x, x, padding, need_weights=need_weights, attn_mask=mask)[0]

    options = {"flashfuse.inner": "eager", "flashfuse.strict": True}
    run = torch.compile(attend, backend="flashfuse", options=options, dynamic=True, fullgraph=True)
    for batch, length in ((2, 6), (3, 11), (5, 4)):
        x = _x(batch, length, EMBED) if settings == "batch_first" else _x(length, batch, EMBED)
        padding, mask = torch.zeros(batch, length, dtype=torch.bool), torch.ones(length, length, dtype=torch.bool)
        padding[0, -1] = True
        torch.testing.assert_close(run(x, padding, mask.triu(1)), attend(x, padding, mask.triu(1)))
    (report,) = flashfuse.reports()
    assert len(report.sites) == 1, report.refusals


@pytest.mark.parametrize("need_weights", [False, True])
def test_opening_adds_no_guards(need_weights: bool) -> None:
    module = nn.MultiheadAttention(EMBED, HEADS, add_bias_kv=True).eval()
    mask = _float(_causal())
    gm = graph_of(lambda x: module(x, x, x, attn_mask=mask, need_weights=need_weights)[0], _x(), dynamic=True)
    graph = Graph(gm)
    assert graph.fake_mode is not None
    shape_env = graph.fake_mode.shape_env
    assert shape_env is not None
    guards, replaced = len(shape_env.guards), dict(shape_env.replacements)
    opened = inline(graph, composites(graph))
    assert opened.origin
    assert not opened.refusals
    assert (len(shape_env.guards), dict(shape_env.replacements)) == (guards, replaced)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_in_training(need_weights: bool, dynamic: bool | None) -> None:
    """The probability may be a number of the graph, which the calls inside take from the node that gives it."""
    module = nn.MultiheadAttention(EMBED, HEADS, dropout=0.5).train()
    _, report = _compiled(lambda x: module(x, x, x, need_weights=need_weights)[0], _x(), dynamic=dynamic)
    assert [site.spec.dropout for site in report.sites] == [0.5], report.refusals


def test_inside_a_checkpoint() -> None:
    from torch.utils.checkpoint import checkpoint

    module = nn.MultiheadAttention(EMBED, HEADS).eval()

    def attend(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: module(x, x, x, need_weights=False)[0], x, use_reentrant=False)

    x = _x()
    out, report = _compiled(attend, x)
    assert len(report.sites) == 1, report.refusals
    torch.testing.assert_close(out, attend(x))


def test_input_written_before_and_after() -> None:
    module = nn.MultiheadAttention(EMBED, HEADS).eval()

    def attend(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x.mul_(2)
        out = module(x, x, x, need_weights=False)[0]
        x.add_(1)
        return out + x

    x = _x()
    out, report = _compiled(attend, x)
    assert len(report.sites) == 1, report.refusals
    torch.testing.assert_close(out, attend(x))


def test_autocast_reaches_inside() -> None:
    module = nn.MultiheadAttention(EMBED, HEADS).eval()

    def attend(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x, x, x, need_weights=False)[0]

    x = _x()
    out, report = _compiled(attend, x)
    assert len(report.sites) == 1, report.refusals
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, attend(x))


def test_inductor_compiles_the_opened_function() -> None:
    module = nn.MultiheadAttention(EMBED, HEADS).eval()
    x = _x()
    out = torch.compile(lambda x: module(x, x, x, need_weights=False)[0], backend="flashfuse")(x)
    (report,) = flashfuse.reports()
    assert len(report.sites) == 1, report.refusals
    torch.testing.assert_close(out, module(x, x, x)[0])


def test_only_the_function_with_a_site_is_opened() -> None:
    module = nn.MultiheadAttention(EMBED, HEADS).eval()

    def attend(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first, weights = module(x, x, x)
        return module(first, x, x, need_weights=False)[0], weights

    x = _x()
    out, report = _compiled(attend, x)
    assert len(report.sites) == 1
    assert _codes(report) == ["probabilities-used"]
    assert report.before.count("torch.nn.functional.multi_head_attention_forward(") == 2
    assert report.after.count("torch.nn.functional.multi_head_attention_forward(") == 1
    torch.testing.assert_close(out, attend(x))


def test_graph_without_a_site_is_the_very_same_object() -> None:
    module = nn.MultiheadAttention(EMBED, HEADS).eval()
    gm = graph_of(lambda x: module(x, x, x), _x())
    code, nodes = gm.code, [(node.name, dict(node.meta)) for node in gm.graph.nodes]
    assert len(composites(Graph(gm))) == 1
    result, report = transform(gm, [], strict=True)
    assert result is gm
    assert report.before == report.after
    assert gm.code == code
    assert [(node.name, dict(node.meta)) for node in gm.graph.nodes] == nodes


def test_no_other_function_is_opened() -> None:
    def mixed(x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(F.softmax(x, -1) + F.gelu(x), x.shape[-1:])
        return F.scaled_dot_product_attention(F.normalize(x), F.dropout(x, 0.0), F.pad(x, (0, 0)))

    assert composites(Graph(graph_of(mixed, _x(1, 2, 4, 8)))) == ()


def test_function_that_looks_at_data_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of a function stands for it only when no branch in it depends on data."""
    module = nn.MultiheadAttention(EMBED, HEADS).eval()
    gm = graph_of(lambda x: module(x, x, x, need_weights=False)[0], _x())
    monkeypatch.setitem(F.multi_head_attention_forward.__globals__, "_mha_shape_check", lambda q, *_: q.sum() > 0)
    graph = Graph(gm)
    opened = inline(graph, composites(graph))
    (refusal,) = opened.refusals
    assert refusal.code == "opaque-function"
    assert refusal.location.file == __file__
    assert [n.name for n in opened.module.graph.nodes] == [n.name for n in gm.graph.nodes]


def test_views_of_an_opened_operator_are_in_its_memory() -> None:
    """A write through a view of scores was refused beside the site: the opened operator had other memory."""

    def fn(q: Any, k: Any, v: Any, bias: Any, keep: Any) -> Any:
        s = torch.baddbmm(bias, F.linear(q, v[0]) * 0.2, k.mT)
        s[..., :1].masked_fill_(keep[..., :1], -30000.0)
        return s.cos().softmax(-1) @ v

    q, k, v = (torch.randn(2, 5, 5) for _ in range(3))
    report = flashfuse.explain(fn)(q, k, v, torch.randn(5, 5), torch.rand(2, 5, 5) > 0.5)
    assert (len(report.sites), report.refusals) == (1, ())
