"""What CUDA graphs need not copy: Inductor is told of static inputs as it is of an unchanged graph's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._inductor.compile_fx import compile_fx

from flashfuse.transform import transform


class Cached(torch.nn.Module):
    """A step of attention over a cache that it writes into; weights and cache stay where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, keys: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        q = self.project(x)
        keys.index_copy_(1, count, q)
        count.add_(1)
        late = torch.arange(keys.shape[1]) >= count
        return torch.softmax((q @ keys.mT).masked_fill(late, float("-inf")), -1) @ keys


@pytest.mark.parametrize("rewritten", [False, True])
def test_static_inputs_stay_static(rewritten: bool) -> None:
    """Of a rewritten graph none was known: CUDA graphs were given up for a written cache, or copied every weight."""
    told: list[list[int]] = []

    def keep(module: torch.fx.GraphModule, _: Any, static_input_idxs: Any = (), **__: Any) -> Any:
        told.append(list(static_input_idxs))
        return make_boxed_func(module.forward)

    def backend(module: torch.fx.GraphModule, examples: list[Any]) -> Any:
        made, report = transform(module, examples, strict=True)
        report.assert_fused(sites=1)
        return compile_fx(made if rewritten else module, examples, inner_compile=keep)

    keys, count = torch.randn(2, 8, 16), torch.tensor([3])
    for x in (keys, count):
        torch._dynamo.mark_static_address(x)
    torch.compile(Cached(), backend=backend)(torch.randn(2, 1, 16), keys, count)
    assert [len(places) for places in told] == [4]
