"""Like layers are analysed once, and layers that differ in anything that matters are not taken for alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from graphs import graph_of
from watched import watching

from flashfuse.patterns import replay
from flashfuse.patterns.match import MatchResult, find_attention
from flashfuse.patterns.replay import Analyses
from flashfuse.patterns.site import AttentionSite

HEADS, DIM, LENGTH = 2, 8, 6
Layer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

WEIGHTS = [torch.nn.Parameter(torch.randn(HEADS * DIM, HEADS * DIM), requires_grad=False) for _ in range(3)]


def linear(x: torch.Tensor, number: int) -> torch.Tensor:
    return F.linear(x, WEIGHTS[number].to(x.dtype))


def split(x: torch.Tensor) -> torch.Tensor:
    return x.view(*x.shape[:2], HEADS, DIM).transpose(1, 2)


def merged(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], HEADS * DIM)


def plain(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q, k, v = split(linear(x, 0)), split(linear(x, 1)), split(linear(x, 2))
    scores = q @ k.transpose(-1, -2) * DIM**-0.5 + mask
    return merged(scores.softmax(-1) @ v)


# --------------------------------------------------------------------------------------------------------------------
# Each differs from `plain` in one thing


def other_scale(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q, k, v = split(linear(x, 0)), split(linear(x, 1)), split(linear(x, 2))
    return merged((q @ k.transpose(-1, -2) * 0.25 + mask).softmax(-1) @ v)


def mask_of_its_own(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return plain(x, mask * 2)


def one_operand_twice(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Queries and keys are one node."""
    q, v = split(linear(x, 0)), split(linear(x, 2))
    return merged((q @ q.transpose(-1, -2) * DIM**-0.5 + mask).softmax(-1) @ v)


def other_axis(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q, k, v = split(linear(x, 0)), split(linear(x, 1)), split(linear(x, 2))
    return merged((q @ k.transpose(-1, -2) * DIM**-0.5 + mask).softmax(-2) @ v)


def scores_used(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q, k, v = split(linear(x, 0)), split(linear(x, 1)), split(linear(x, 2))
    scores = q @ k.transpose(-1, -2) * DIM**-0.5 + mask
    return merged(scores.softmax(-1) @ v) + scores.sum()


def scores_measured(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Like `scores_used`, but that takes the size alone."""
    q, k, v = split(linear(x, 0)), split(linear(x, 1)), split(linear(x, 2))
    scores = q @ k.transpose(-1, -2) * DIM**-0.5 + mask
    return merged(scores.softmax(-1) @ v) + scores.new_ones(())


def dropped(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q, k, v = split(linear(x, 0)), split(linear(x, 1)), split(linear(x, 2))
    scores = q @ k.transpose(-1, -2) * DIM**-0.5 + mask
    return merged(F.dropout(scores.softmax(-1), 0.25) @ v)


def laid_out_otherwise(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What uses the output copies it in another order."""
    q, k, v = split(linear(x, 0)), split(linear(x, 1)), split(linear(x, 2))
    out = (q @ k.transpose(-1, -2) * DIM**-0.5 + mask).softmax(-1) @ v
    return out.permute(0, 2, 3, 1).reshape(x.shape)


def written_before(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The keys are written after they were multiplied."""
    q, k, v = split(linear(x, 0)), linear(x, 1), split(linear(x, 2))
    scores = q @ split(k).transpose(-1, -2) * DIM**-0.5 + mask
    k.zero_()
    return merged(scores.softmax(-1) @ v)


def written_after(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q, k, v = split(linear(x, 0)), linear(x, 1), split(linear(x, 2))
    out = merged((q @ split(k).transpose(-1, -2) * DIM**-0.5 + mask).softmax(-1) @ v)
    k.zero_()
    return out


def in_place(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q, k, v = split(linear(x, 0)), split(linear(x, 1)), split(linear(x, 2))
    scores = q @ k.transpose(-1, -2)
    scores *= DIM**-0.5
    scores += mask
    return merged(scores.softmax(-1) @ v)


def assigned(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q, k, v = split(linear(x, 0)), split(linear(x, 1)), split(linear(x, 2))
    scores = q @ k.transpose(-1, -2) * DIM**-0.5
    scores[..., 1:] += mask[..., 1:]
    scores[:, 0, :, 0] = -1.0
    return merged(scores.softmax(-1) @ v)


def assigned_elsewhere(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q, k, v = split(linear(x, 0)), split(linear(x, 1)), split(linear(x, 2))
    scores = q @ k.transpose(-1, -2) * DIM**-0.5
    scores[..., 1:] += mask[..., 1:]
    scores[:, 0, :, 1] = -1.0
    return merged(scores.softmax(-1) @ v)


def autocast(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return plain(x, mask).float()


def called(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q, k, v = split(linear(x, 0)), split(linear(x, 1)), split(linear(x, 2))
    return merged(F.scaled_dot_product_attention(q, k, v, mask))


def causal(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q, k, v = split(linear(x, 0)), split(linear(x, 1)), split(linear(x, 2))
    return merged(F.scaled_dot_product_attention(q, k, v, is_causal=True))


def sorted_scores(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Refused."""
    q, k, v = split(linear(x, 0)), split(linear(x, 1)), split(linear(x, 2))
    return merged((q @ k.transpose(-1, -2) * DIM**-0.5 + mask).sort(-1).values.softmax(-1) @ v)


def cached(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Keys and values are put behind those of an empty cache, a constant of each layer's own."""
    q, k, v = (split(linear(x, number)) for number in range(3))
    k, v = (torch.cat([torch.tensor([], dtype=x.dtype), t], dim=-2) for t in (k, v))
    return merged((q @ k.transpose(-1, -2) * DIM**-0.5 + mask).softmax(-1) @ v)


OTHERS = (
    *(other_scale, mask_of_its_own, one_operand_twice, other_axis, scores_used, scores_measured, dropped),
    *(laid_out_otherwise, written_before, written_after, in_place, assigned, assigned_elsewhere, autocast, called),
    *(causal, sorted_scores, cached),
)


def stacked(*layers: Layer) -> Layer:
    def run(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = x + layer(x, mask)
        return x

    return run


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, LENGTH, HEADS * DIM), torch.randn(LENGTH, LENGTH)


def counted(module: torch.fx.GraphModule) -> tuple[MatchResult, int]:
    """What is found, and how many analyses that took."""
    with patch.object(Analyses, "_analysed", autospec=True, side_effect=Analyses._analysed) as analysed:
        return find_attention(module), analysed.call_count


def told(site: AttentionSite) -> tuple[object, ...]:
    """The whole site; random numbers are read at symbols that only their own analysis knows."""
    draw = site.draw and site.draw.tensor
    return dataclasses.replace(site, draw=None), draw, site.chain


def assert_found_alike(module: torch.fx.GraphModule, layers: int) -> None:
    """Each layer is found to be what it is found to be when nothing is remembered, though something is."""
    result, count = counted(module)
    with patch.object(replay, "_MOST_KINDS", 0):
        alone, each = counted(module)
    assert [told(s) for s in result.sites] == [told(s) for s in alone.sites]
    assert [(r.node, r.code, r.reason, r.location) for r in result.refusals] == [
        (r.node, r.code, r.reason, r.location) for r in alone.refusals
    ]
    assert count < each == layers


@pytest.mark.parametrize("other", OTHERS, ids=lambda layer: layer.__name__)
def test_layers_that_differ(other: Layer) -> None:
    with torch.no_grad():
        assert_found_alike(graph_of(stacked(plain, other, plain, other, other), *inputs()), 5)


def test_inputs_that_repeat() -> None:
    """The third argument is the second one's node, or the first one's."""

    def of_keys(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k = split(linear(x, 0)), split(linear(x, 1))
        return merged(F.scaled_dot_product_attention(q, k, k, mask))

    def of_queries(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k = split(linear(x, 0)), split(linear(x, 1))
        return merged(F.scaled_dot_product_attention(q, k, q, mask))

    with torch.no_grad():
        assert_found_alike(graph_of(stacked(of_keys, of_queries, of_keys, of_queries), *inputs()), 4)


def test_constants() -> None:
    """Tensors of few elements are told by these."""

    def scaled(first: float, second: float) -> Layer:
        def layer(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            q, k, v = split(linear(x, 0)), split(linear(x, 1)), split(linear(x, 2))
            return merged((q @ k.transpose(-1, -2) * torch.tensor([first, second])[1]).softmax(-1) @ v)

        return layer

    with torch.no_grad():
        layers = (scaled(1.0, 0.5), scaled(1.0, 0.25), scaled(1.0, 0.5), scaled(1.0, 0.5))
        assert_found_alike(graph_of(stacked(*layers), *inputs()), 4)


def test_functions() -> None:
    """Nothing differs but which function the scores go through."""

    def capped(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = split(linear(x, 0)), split(linear(x, 1)), split(linear(x, 2))
        return merged(torch.tanh(q @ k.transpose(-1, -2)).softmax(-1) @ v)

    def squashed(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = split(linear(x, 0)), split(linear(x, 1)), split(linear(x, 2))
        return merged(torch.sigmoid(q @ k.transpose(-1, -2)).softmax(-1) @ v)

    with torch.no_grad():
        assert_found_alike(graph_of(stacked(capped, squashed, capped, squashed), *inputs()), 4)


def test_order() -> None:
    """The same nodes, of which one writes the keys before the attention's output is there, or after it."""
    with torch.no_grad():
        layers = (written_after, written_before, written_after, written_before)
        assert_found_alike(graph_of(stacked(*layers), *inputs()), 4)


def test_history_is_not_mixed_up() -> None:
    """A layer whose input ends its gradient is another one where gradients are wanted."""

    def ended(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return plain(x.detach(), mask)

    x, mask = inputs()
    assert_found_alike(graph_of(stacked(plain, ended, plain, ended), x.requires_grad_(), mask), 4)


def test_where_gradients_are_not_recorded() -> None:
    """The same operators inside and outside of `torch.no_grad`, where Dynamo's values of views are alike."""

    def layer(x: torch.Tensor, recorded: bool) -> torch.Tensor:
        q, k, v = split(linear(x, 0)), linear(x, 1), split(linear(x, 2))
        with torch.set_grad_enabled(recorded):
            k = split(k)
        return merged((q @ k.transpose(-1, -2)).softmax(-1) @ v)

    def recorded(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return layer(x, True)

    def unrecorded(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return layer(x, False)

    x, mask = inputs()
    layers = (recorded, unrecorded, recorded, unrecorded)
    assert_found_alike(graph_of(stacked(*layers), x.requires_grad_(), mask), 4)


def test_what_reaches_no_output() -> None:
    """Scores that are used by something whose result nobody takes."""
    with torch.no_grad():
        module = graph_of(stacked(*[scores_used] * 4), *inputs())
    total = [node for node in module.graph.nodes if node.target == "sum"][1]
    (added,) = total.users
    added.replace_all_uses_with(added.args[0])
    result, _ = counted(module)
    assert (len(result.sites), len(result.refusals)) == (1, 3)
    assert_found_alike(module, 4)


def test_memory_that_is_shared() -> None:
    """What takes the output is a copy of it in one layer and a view in another, of the same shape and strides."""
    with torch.no_grad():
        module = graph_of(stacked(*[plain] * 4), *inputs())
    copy = [node for node in module.graph.nodes if node.target == "reshape"][1]
    source, copied = (node.meta["example_value"] for node in (copy.args[0], copy))
    copy.meta["example_value"] = source.as_strided(copied.shape, copied.stride())
    result, _ = counted(module)
    assert [site.free_layout for site in result.sites] == [True, False, True, True]
    assert_found_alike(module, 4)


@pytest.mark.parametrize("layer", [plain, in_place, sorted_scores, cached], ids=lambda layer: layer.__name__)
def test_linear(layer: Layer) -> None:
    """Twice the layers are one analysis still, and every further layer costs the same number of looks at nodes."""
    looks = []
    for count in (3, 6, 9):
        with torch.no_grad():
            module = graph_of(stacked(*[layer] * count), *inputs())
        with watching() as reads:
            result, analysed = counted(module)
        assert len(result.sites) + len(result.refusals) == count
        assert analysed <= 2
        looks.append(reads.total())
    assert looks[2] - looks[1] == pytest.approx(looks[1] - looks[0], rel=0.02)
