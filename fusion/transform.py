"""Find, rewrite, describe: one graph in, the graph to compile and its report out.

Whatever fails in here costs the user only the rewrite: the graph compiles as Dynamo made it, and the failure goes into
the report.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing
from torch._subclasses.fake_tensor import FakeTensor

from flashfuse.patterns.site import AttentionSite, Location
from flashfuse.report import Failure, GraphBreak, Refused, Report, Site

if TYPE_CHECKING:
    from flashfuse.patterns.match import MatchResult
    from flashfuse.routes import Route

log = logging.getLogger(__name__)

Match = tuple[fx.GraphModule, tuple[AttentionSite, ...]]


@dataclass
class Findings:
    """What has come up in one graph.

    matches: per graph module (its own, and those of higher-order operators) the sites, and the module they are in:
    the graph module itself, or a copy with the functions that hold the sites opened and what is written told apart.
    tuned: whether the kernels of the sites are to be searched.
    routes: the sites that go to kernels of torch's own; `route` is the option that says which do.
    """

    strict: bool
    tuned: bool = False
    route: str = "auto"
    matches: dict[fx.GraphModule, Match] = field(default_factory=dict)
    routes: dict[AttentionSite, Route] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    refusals: list[Refused] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    @contextlib.contextmanager
    def guard(self, stage: str) -> Iterator[None]:
        """Turn an exception into a warning and an entry of the report; under strict let it through."""
        try:
            yield
        except Exception as error:
            if self.strict or is_control_flow(error):
                raise
            self.failures.append(failure(stage, error))


def transform(
    gm: fx.GraphModule, example_inputs: Sequence[Any], strict: bool, tuned: bool = False, route: str = "auto"
) -> tuple[fx.GraphModule, Report]:
    """Rewrite every attention of `gm` and of the graph modules inside it.

    A graph over tensor subclasses is left alone: they may give every operator another meaning.

    Returns the graph to compile, which is `gm` itself when nothing was rewritten and a new module otherwise (`gm` is
    never changed), and the report. With `strict`, exceptions of flashfuse's own are raised; with `tuned`, the operators
    ask for a search of their kernels.
    """
    with _disable_saved_tensors_hooks_during_tracing():
        return _transform(gm, example_inputs, Findings(strict, tuned, route))


def _transform(gm: fx.GraphModule, example_inputs: Sequence[Any], findings: Findings) -> tuple[fx.GraphModule, Report]:
    if subclass := _subclass(example_inputs):
        findings.refusals.append(Refused("tensor-subclass", f"the graph works on {subclass} tensors", Location(), ""))
    else:
        _search(gm, findings)
    breaks = graph_breaks(gm)
    with findings.guard("find"):
        from flashfuse.broken import divided

        findings.refusals += [refused for found in breaks for refused in divided(gm, found)]
    rewritten = gm
    with findings.guard("rewrite"):
        rewritten = _rebuild(gm, findings.matches, findings.routes)
    before = readable(gm)
    report = Report(
        graph=graph_id(),
        sites=() if rewritten is gm else tuple(findings.sites),
        refusals=tuple(findings.refusals),
        failures=tuple(findings.failures),
        before=before,
        after=before if rewritten is gm else readable(rewritten),
        graph_breaks=breaks,
    )
    counts = report.count("fused"), report.count("routed"), len(report.refusals)
    log.info("graph %s: %d sites fused, %d routed, %d refused", report.graph, *counts)
    for refusal in report.refusals:
        log.info("refused %s", refusal)
    log.debug("graph %s, rewritten:\n%s", report.graph, report.after)
    return rewritten, report


def _search(gm: fx.GraphModule, findings: Findings) -> None:
    for child in _subgraphs(gm).values():
        _search(child, findings)
    with findings.guard("find"):
        from flashfuse.describe import describe_refusal, describe_site
        from flashfuse.routes import route_of

        module, match = _find(gm)
        wanted = map(_tuned, match.sites) if findings.tuned else match.sites
        found = {site: route_of(site, findings.route) for site in wanted}
        sites = [describe_site(site, route) for site, route in found.items()]
        findings.refusals += [describe_refusal(refusal) for refusal in match.refusals]
        findings.sites += sites
        findings.routes.update({site: route for site, route in found.items() if route is not None})
        findings.matches[gm] = (module, tuple(found))


def _tuned(site: AttentionSite) -> AttentionSite:
    return replace(site, spec=replace(site.spec, tuned=True), plus=tuple(map(_tuned, site.plus)))


def _find(gm: fx.GraphModule) -> tuple[fx.GraphModule, MatchResult]:
    """The attentions of a graph, also in functions that Dynamo keeps whole, and the module that the sites are in.

    Only functions with a site inside stay open in it; the refusals of the others are kept.
    """
    from flashfuse.inline import inline
    from flashfuse.patterns.composite import composites
    from flashfuse.patterns.graph import Graph
    from flashfuse.patterns.match import MatchResult, find_attention
    from flashfuse.versions import with_versions

    graph = with_versions(Graph(gm))
    whole = composites(graph)
    opened = inline(graph, whole)
    match = find_attention(opened.module)
    refusals = (*opened.refusals, *match.refusals)
    with_site = {opened.origin[site.node] for site in match.sites if site.node in opened.origin}
    if with_site == set(whole):
        return opened.module, MatchResult(match.sites, refusals)
    opened = inline(graph, [node for node in whole if node in with_site])
    return opened.module, MatchResult(find_attention(opened.module).sites, refusals)


def _rebuild(
    gm: fx.GraphModule, matches: Mapping[fx.GraphModule, Match], routes: Mapping[AttentionSite, Route]
) -> fx.GraphModule:
    """`gm` with the sites of it and of its sub-graphs rewritten; `gm` itself where there are none."""
    from flashfuse.rewrite import rewrite

    rebuilt = {name: _rebuild(child, matches, routes) for name, child in _subgraphs(gm).items()}
    changed = {name: child for name, child in rebuilt.items() if child is not getattr(gm, name)}
    module, sites = matches.get(gm, (gm, ()))
    if not sites and not changed:
        return gm
    result = rewrite(module, sites, routes)
    for name, child in changed.items():
        setattr(result, name, child)
    return result


def _subgraphs(gm: fx.GraphModule) -> dict[str, fx.GraphModule]:
    """The bodies of the graph's higher-order operators (checkpoint, cond, ..), which Dynamo stores as attributes."""
    return {name: child for name, child in gm.named_children() if isinstance(child, fx.GraphModule)}


_PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor)


def _subclass(example_inputs: Sequence[Any]) -> str | None:
    """The name of the first type among the graph's tensors that is not torch's own."""
    kinds = [type(x) for x in example_inputs if isinstance(x, torch.Tensor)]
    return next((kind.__name__ for kind in kinds if kind not in _PLAIN), None)


def is_control_flow(error: BaseException) -> bool:
    """Whether Dynamo raised this to steer itself, which is no failure of anyone's."""
    from torch._dynamo import exc

    return isinstance(error, (exc.RestartAnalysis, exc.SkipFrame))


def failure(stage: str, error: Exception) -> Failure:
    """Warn about `error`, and the entry a report keeps of it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    summary = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
    warnings.warn(f"flashfuse: {stage} failed, compiling without the rewrite: {summary}", RuntimeWarning, stacklevel=2)
    log.info("%s failed", stage, exc_info=error)
    return Failure(stage, summary, "".join(traceback.format_exception(error)))


def graph_id() -> str:
    """Dynamo's id of the graph being compiled, such as "0/0", or "" outside a compilation."""
    return str(torch._guards.CompileContext.current_compile_id() or "")


def readable(gm: fx.GraphModule) -> str:
    """The graph as the Python that Dynamo's own logs print."""
    return gm.print_readable(print_output=False)


def graph_breaks(gm: fx.GraphModule) -> tuple[GraphBreak, ...]:
    """Why Dynamo ended this graph before the function did, if it did."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ()
    frame = reason.user_stack[-1] if reason.user_stack else None
    where = Location("", frame.filename, frame.lineno or 0, frame.line or "") if frame else Location()
    why = str(reason.reason)
    # As Dynamo says it where the two sides of an `if` become graphs.
    return (GraphBreak(f"a branch depends on the values of a tensor ({why})" if "_jump" in why else why, where),)
