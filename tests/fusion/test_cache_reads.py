"""A decode step reads keys and values where the cache has them: the compiler gets no copy of either to make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from decoders import decoder, prompt
from functorch.compile import make_boxed_func
from torch import fx
from torch._inductor.compile_fx import compile_fx

from flashfuse.transform import transform

transformers = pytest.importorskip("transformers")

aten = torch.ops.aten
# How transformers' caches store one step's keys and values, as Inductor gets it.
UPDATES = {aten.cat.default, aten.index_put.default, aten.index_copy.default, aten.copy_.default}
PAST, SLOTS = 100, 128


def decode_graphs(attention: str, cache: str, padded: bool, rewritten: bool) -> list[fx.GraphModule]:
    """What Inductor is asked to compile for the steps behind a prompt; a growing cache's last is of symbolic length."""
    graphs: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, _: list[Any], **__: Any) -> Callable[..., Any]:
        graphs.append(module)
        return make_boxed_func(module.forward)

    def backend(module: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        made = transform(module, examples, strict=True)[0] if rewritten else module
        return compile_fx(made, examples, inner_compile=keep)

    model = decoder(transformers, "llama", attention)
    inputs = prompt("llama", 2, PAST, padded)
    config = model.config
    past = (
        transformers.DynamicCache(config=config)
        if cache == "dynamic"
        else transformers.StaticCache(config=config, max_cache_len=SLOTS)
    )
    mask = inputs["attention_mask"]
    model(inputs["input_ids"], attention_mask=mask if padded else None, past_key_values=past)
    step = torch.compile(model, backend=backend)
    for token in inputs["input_ids"].split(1, 1)[:3]:
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
        positions = mask.sum(1, keepdim=True) - 1
        step(token, attention_mask=mask if padded else None, position_ids=positions, past_key_values=past)
    return graphs


def made(graph: fx.Graph) -> Iterator[tuple[Any, int]]:
    """Every operator that gives memory of its own, and how many elements."""
    for node in graph.nodes:
        out = node.meta.get("val")
        if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(out, torch.Tensor):
            continue
        if any(r.alias_info and not r.alias_info.is_write for r in node.target._schema.returns):
            continue
        numel = out.numel()
        yield node.target, numel.node.hint if isinstance(numel, torch.SymInt) else numel


def of_cache_size(graph: fx.Graph) -> Counter[Any]:
    """How often each operator makes a tensor with as many elements as the keys of the past."""
    keys = 2 * 2 * PAST * 16
    return Counter(target for target, numel in made(graph) if numel >= keys)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("attention", "padded"), [("eager", False), ("eager", True), ("sdpa", True)])
def test_no_copy_of_the_keys_or_values(attention: str, cache: str, padded: bool) -> None:
    graphs = decode_graphs(attention, cache, padded, rewritten=True)
    assert graphs
    for module in graphs:
        assert torch.ops.flashfuse.attention.default in {node.target for node in module.graph.nodes}
        found = of_cache_size(module.graph)
        assert set(found) <= UPDATES
        assert set(found.values()) == {2}


def test_the_library_copies_both() -> None:
    """What the test above looks for is there without the rewrite: heads repeated in memory."""
    for module in decode_graphs("eager", "static", False, rewritten=False):
        assert of_cache_size(module.graph)[aten.clone.default] >= 2
