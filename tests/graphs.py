"""Dynamo graphs of small functions, for tests that look at graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from watched import find_attention

from flashfuse.kernels.spec import AttentionSpec, to_text
from flashfuse.patterns.graph import Graph
from flashfuse.patterns.match import MatchResult
from flashfuse.patterns.site import AttentionSite, Refusal
from flashfuse.versions import with_versions


def graph_of(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> fx.GraphModule:
    """The graph Dynamo makes of fn(*args, **kwargs), as it is analysed; there must be exactly one."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=keep, dynamic=dynamic, fullgraph=True)(*args, **kwargs)
    assert len(graphs) == 1
    return with_versions(Graph(graphs[0])).module


def matched(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> MatchResult:
    return find_attention(graph_of(fn, *args, **kwargs))


def only_site(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> AttentionSite:
    result = matched(fn, *args, **kwargs)
    assert not result.refusals, [str(r) for r in result.refusals]
    assert len(result.sites) == 1, f"{len(result.sites)} sites"
    return result.sites[0]


def only_refusal(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Refusal:
    result = matched(fn, *args, **kwargs)
    assert not result.sites, [s.spec.to_text() for s in result.sites]
    assert len(result.refusals) == 1, [str(r) for r in result.refusals]
    return result.refusals[0]


def score_of(spec: AttentionSpec) -> str:
    return to_text(spec.score)
