"""A decode step reads keys and values where the cache has them: the compiler gets no copy of either to make."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from decoders import decoder, prompt
from functorch.compile import make_boxed_func
from numerics import assert_close_to_exact
from torch import fx
from torch._inductor.compile_fx import compile_fx

from flashfuse.transform import transform

transformers = pytest.importorskip("transformers")

aten = torch.ops.aten
# How transformers' caches store one step's keys and values, as Inductor gets it.
UPDATES = {aten.cat.default, aten.index_put.default, aten.index_copy.default, aten.copy_.default}
PAST, SLOTS = 100, 128


def received(rewritten: bool) -> tuple[Callable[..., Any], list[fx.GraphModule]]:
    """A backend, and the graphs that Inductor is asked to compile behind it."""
    graphs: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, _: list[Any], **__: Any) -> Callable[..., Any]:
        graphs.append(module)
        return make_boxed_func(module.forward)

    def backend(module: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        made = transform(module, examples, strict=True)[0] if rewritten else module
        return compile_fx(made, examples, inner_compile=keep)

    return backend, graphs


def decode_graphs(attention: str, cache: str, padded: bool, rewritten: bool) -> list[fx.GraphModule]:
    """What Inductor is asked to compile for the steps behind a prompt; a growing cache's last is of symbolic length."""
    backend, graphs = received(rewritten)
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
    """How often each operator makes a tensor with as many elements as the keys of the past, [2, 2, PAST, 16]."""
    keys = 2 * 2 * PAST * 16
    return Counter(target for target, numel in made(graph) if numel >= keys)


@pytest.mark.parametrize(
    ("attention", "padded", "cache"),
    [("eager", False, "static"), ("eager", True, "dynamic"), ("sdpa", True, "dynamic"), ("sdpa", True, "static")],
)
def test_no_copy_of_the_keys_or_values(attention: str, padded: bool, cache: str) -> None:
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


class Quantised(torch.nn.Module):
    """One layer's attention over a static cache in a narrow type, as model code around transformers' layers writes it.

    scaled: None without scales, or the sizes [heads, slots, columns] of which each token's are quantised together.
    """

    def __init__(self, stored: torch.dtype, scaled: tuple[int, ...] | None, groups: int = 3) -> None:
        super().__init__()
        self.groups = groups
        shape = (2, 2, SLOTS, 16)
        cached = torch.randn(2, *shape) * (1.0 if stored.is_floating_point else 40.0)
        self.register_buffer("k", cached[0].to(stored))
        self.register_buffer("v", cached[1].to(stored))
        self.register_buffer("scale", None if scaled is None else 0.01 + 0.02 * torch.rand(2, *scaled))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        self.k[:, :, at] = k
        self.v[:, :, at] = v
        k, v = (self.repeated(self.dequantised(x, q.dtype)) for x in (self.k, self.v))
        weights = q @ k.transpose(2, 3) * 0.25
        weights = weights.masked_fill(torch.arange(SLOTS) > at, torch.finfo(q.dtype).min)
        return weights.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    def dequantised(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x.to(dtype) if self.scale is None else x.to(dtype) * self.scale.to(dtype)

    def repeated(self, x: torch.Tensor) -> torch.Tensor:
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, self.groups, n, d).reshape(b, h * self.groups, n, d)


QUANTISED = {
    "int8-by-token": (torch.int8, (2, SLOTS, 1), torch.float16),
    "int8-by-head": (torch.int8, (2, 1, 1), torch.float16),
    "int8-by-channel": (torch.int8, (2, 1, 16), torch.float32),
    "float8-by-token": (torch.float8_e5m2, (2, SLOTS, 1), torch.bfloat16),
    "float8": (torch.float8_e4m3fn, None, torch.float16),
    "bfloat16-under-float16": (torch.bfloat16, None, torch.float16),
}


def quantised_step(name: str) -> tuple[Quantised, tuple[torch.Tensor, ...]]:
    stored, scaled, dtype = QUANTISED[name]
    model = Quantised(stored, scaled)
    new = (torch.randn(2, 2, 2, 1, 16) * (1.0 if stored.is_floating_point else 40.0)).to(stored)
    return model, (torch.randn(2, 6, 1, 16).to(dtype), new[0], new[1], torch.tensor([PAST]))


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_caches_are_read_as_they_are(name: str) -> None:
    """Nothing of their size is made in the type that is computed in; what stores the step's own is their own type."""
    model, step = quantised_step(name)
    backend, graphs = received(rewritten=True)
    torch.compile(model, backend=backend)(*step)
    (module,) = graphs
    found = of_cache_size(module.graph)
    assert set(found) <= UPDATES
    assert {n.meta["val"].dtype for n in module.graph.nodes if n.target in found} <= {model.k.dtype}
    (attention,) = (n for n in module.graph.nodes if n.target is torch.ops.flashfuse.attention.default)
    assert [x.meta["val"].dtype for x in attention.args[1:3]] == [model.k.dtype] * 2


def test_the_graph_itself_dequantises_them() -> None:
    """What the test above looks for is there without the rewrite."""
    model, step = quantised_step("int8-by-token")
    backend, graphs = received(rewritten=False)
    torch.compile(model, backend=backend)(*step)
    (module,) = graphs
    assert of_cache_size(module.graph)[aten.mul.Tensor] >= 2


@pytest.mark.parametrize("name", QUANTISED)
def test_steps_over_quantised_caches(name: str) -> None:
    """Through Inductor, as near to float64 as eager code, and the cache afterwards is the same."""
    model, step = quantised_step(name)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model)
    found = torch.compile(model, backend="flashfuse", options={"flashfuse.strict": True})(*step)
    expected = eager(*step)
    exact.scale = None if exact.scale is None else exact.scale.to(step[0].dtype)
    precise = exact(step[0].double(), *step[1:])
    assert_close_to_exact(found, expected, precise)
    for one, other in zip(model.buffers(), eager.buffers(), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
