"""Key ranges of masks that depend on data, in the rewritten graph: one node for all layers, and the right numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import graph_of
from numerics import assert_close_to_exact
from torch import fx

import flashfuse
from flashfuse.patterns.match import find_attention
from flashfuse.rewrite import rewrite

B, H, S, D = 2, 4, 200, 16
MIN = torch.finfo(torch.float32).min


def heads(x: Any) -> Any:
    return x.view(x.shape[0], x.shape[1], H, D).transpose(1, 2)


def attention(x: Any, mask: Callable[[Any], Any]) -> Any:
    q = heads(x)
    return (mask(q @ q.mT * 0.25).softmax(-1) @ q).transpose(1, 2).reshape(x.shape)


def padded(keep: Any) -> Callable[[Any], Any]:
    def mask(s: Any) -> Any:
        i = torch.arange(s.shape[-1])
        return s.masked_fill(~(keep[:, None, None, :] & (i <= i[:, None])), MIN)

    return mask


def two_layers(x: Any, keep: Any) -> Any:
    x = x + attention(x, padded(keep))
    return x + attention(x, lambda s: padded(keep)(torch.tanh(s)))


def inputs(batch: int = B, length: int = S) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, length, H * D), torch.arange(length) < torch.tensor(
        [[length // 3], [length]] * (batch // 2)
    )


def rewritten(fn: Callable[..., Any], *args: Any) -> fx.GraphModule:
    graph = graph_of(fn, *args)
    return rewrite(graph, find_attention(graph).sites)


def calls(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.target is target]


def ranges_and_their_users(gm: fx.GraphModule) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes that compute ranges, and what each attention of the graph is given."""
    attentions = calls(gm, torch.ops.flashfuse.attention.default)
    return calls(gm, torch.ops.flashfuse.mask_ranges.default), [n.args[6] for n in attentions if len(n.args) > 6]


def test_layers_share_one_node() -> None:
    after = rewritten(two_layers, *inputs())
    (ranges,), given = ranges_and_their_users(after)
    assert given == [ranges, ranges]
    needed, idle = "(t0[n0, kv_idx] & (kv_idx <= q_idx))", "t0[n0, kv_idx]"
    assert ranges.args[1:] == ([B, 1], 2, S, S, needed, idle)


def test_layers_with_masks_of_their_own_do_not_share() -> None:
    def fn(x: Any, a: Any, b: Any) -> Any:
        return attention(x + attention(x, padded(a)), padded(b))

    x, keep = inputs()
    made, given = ranges_and_their_users(rewritten(fn, x, keep, ~keep))
    assert given == made
    assert len(made) == 2


def test_a_mask_written_in_between_is_another_mask() -> None:
    def fn(x: Any, keep: Any, edit: Any) -> Any:
        y = attention(x, padded(keep))
        return attention(y, padded(keep.logical_and_(edit)))

    x, keep = inputs()
    edit = torch.arange(S).expand(B, S) > 20
    made, given = ranges_and_their_users(rewritten(fn, x, keep.clone(), edit))
    assert given == made
    assert [node.args[0][0].op for node in made] == ["placeholder", "call_method"]
    compiled = torch.compile(fn, backend="flashfuse", options={"flashfuse.inner": "aot_eager"})
    found, eager = (f(x, keep.clone(), edit) for f in (compiled, fn))
    assert_close_to_exact(found, eager, fn(x.double(), keep.clone(), edit))


def test_positions_alone_need_no_ranges() -> None:
    def fn(x: Any) -> Any:
        return attention(x, lambda s: s.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), MIN))

    assert ranges_and_their_users(rewritten(fn, inputs()[0])) == ([], [])


def one_layer(x: Any, keep: Any) -> Any:
    return attention(x, padded(keep))


@pytest.mark.parametrize(
    ("inner", "fn"), [("aot_eager", two_layers), ("inductor", one_layer)], ids=["eager", "inductor"]
)
def test_numbers_with_dynamic_sizes(inner: str, fn: Callable[..., Any]) -> None:
    """One compilation serves other lengths and batches, less than a block of queries too, and its ranges follow."""
    options = {"flashfuse.inner": inner, "flashfuse.strict": True}
    compiled = torch.compile(fn, backend="flashfuse", dynamic=True, options=options)
    for batch, length in ((2, 200), (4, 333), (2, 70)):
        x, keep = inputs(batch, length)
        assert_close_to_exact(compiled(x, keep), fn(x, keep), fn(x.double(), keep))
    assert len(flashfuse.reports()) == 1
    sites = flashfuse.reports()[0].sites
    assert {site.mask for site in sites} == {"causal, padding (t0)"}
    assert len(sites) == (2 if fn is two_layers else 1)


@pytest.mark.parametrize("shape", [(B, S), (B, 1, 1, S), (B, 1, S, S)], ids=str)
def test_numbers_of_added_masks(shape: tuple[int, ...]) -> None:
    """Masks that come in as float tensors, rows without a key among them, and documents."""

    def fn(x: Any, mask: Any, ids: Any) -> Any:
        x = attention(x, lambda s: s + (mask[:, None, None] if mask.dim() == 2 else mask))
        return attention(x, lambda s: s.masked_fill(ids[:, None, :, None] != ids[:, None, None], -torch.inf))

    x, keep = inputs()
    mask = torch.where(keep.view(B, *(1,) * (len(shape) - 2), S), 0.0, MIN).expand(shape).contiguous()
    mask[0] = MIN
    ids = torch.arange(S).expand(B, S) // 70
    compiled = torch.compile(
        fn, backend="flashfuse", options={"flashfuse.inner": "aot_eager", "flashfuse.strict": True}
    )
    assert_close_to_exact(compiled(x, mask, ids), fn(x, mask, ids), fn(x.double(), mask.double(), ids))
    flashfuse.reports()[0].assert_fused(sites=2)
    assert flashfuse.reports()[0].after.count("flashfuse.mask_ranges") == 2


MADE_MASKS: dict[str, Callable[[Any, Any], Any]] = {
    "compared": lambda s, ids: s.masked_fill(ids[:, None, None, :] == 0, -1e9),
    "added": lambda s, ids: s + (1.0 - ids[:, None, None].to(s.dtype)) * MIN,
    "lengths": lambda s, ids: s.masked_fill(torch.arange(s.shape[-1]) >= ids.sum(1)[:, None, None, None], -torch.inf),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", MADE_MASKS)
def test_a_mask_that_every_layer_makes_is_one(name: str, dynamic: bool) -> None:
    """Each layer had its own, with its own ranges, unless a gradient was wanted: AOTAutograd finds equal ones then."""

    def fn(x: Any, ids: Any) -> Any:
        for _ in range(3):
            x = attention(x, lambda s: MADE_MASKS[name](s, ids))
        return x

    seen: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        seen.append(rewrite(gm, find_attention(gm).sites))
        return seen[-1]

    x, keep = inputs()
    found = torch.compile(fn, backend=backend, dynamic=dynamic)(x, keep.long())
    assert_close_to_exact(found, fn(x, keep.long()), fn(x.double(), keep.long()))
    (ranges,), given = ranges_and_their_users(seen[0])
    assert given == [ranges] * 3
    assert len(calls(seen[0], torch.arange)) <= 1


def test_masks_made_alike_that_differ() -> None:
    """By what was written in between, by chance, and by an argument."""

    def edited(x: Any, ids: Any) -> Any:
        x = attention(x, lambda s: s.masked_fill(ids[:, None, None, :] == 0, MIN))
        ids[:, 100:] = 0
        return attention(x, lambda s: s.masked_fill(ids[:, None, None, :] == 0, MIN))

    def drawn(x: Any, ids: Any) -> Any:
        x = attention(x, lambda s: s.masked_fill(torch.rand(B, 1, 1, S) < 0.3, MIN))
        return attention(x, lambda s: s.masked_fill(torch.rand(B, 1, 1, S) < 0.3, MIN))

    def counted(x: Any, ids: Any) -> Any:
        x = attention(x, lambda s: s.masked_fill(ids[:, None, None, :] == 0, MIN))
        return attention(x, lambda s: s.masked_fill(ids[:, None, None, :] == 1, MIN))

    x, keep = inputs()
    for fn in (edited, drawn, counted):
        made, given = ranges_and_their_users(rewritten(fn, x, keep.long()))
        assert given == made
        assert len(made) == 2
        assert made[0].args[0] != made[1].args[0]
