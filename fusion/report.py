"""`Report`: what flashfuse found in one graph, what it did with it, and why it left the rest alone.

A report holds text and values only, never a node or a tensor, so keeping it keeps no model alive.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from flashfuse.kernels.spec import AttentionSpec
from flashfuse.patterns.site import Location


@dataclass(frozen=True)
class Site:
    """One attention that was rewritten.

    status: "fused" (one of flashfuse's kernels computes it) or "routed" (handed to a kernel of torch's own).
    math, mask, heads: the recognised attention, the structure of its mask and how heads share operands, as text.
    dtypes: element types of product, probabilities and output. kernel: which implementation the operator takes.
    shape: sizes as "[batch.., Tq, Tkv, D, Dv]". bytes_saved: size of the scores and probabilities that are no longer
    stored, an int, or a formula as text where a size is symbolic.
    """

    status: str
    spec: AttentionSpec
    location: Location
    node: str
    math: str
    mask: str
    heads: str
    shape: str
    dtypes: str
    kernel: str
    bytes_saved: int | str


@dataclass(frozen=True)
class Refused:
    """A softmax that was left as it is: stable `code`, one plain sentence `reason`, and where in the user's model."""

    code: str
    reason: str
    location: Location
    node: str

    def __str__(self) -> str:
        return f"{self.code}: {self.reason} [{self.location}]"


@dataclass(frozen=True)
class Failure:
    """An exception of flashfuse's own in `stage` ("find", "rewrite", "compile"); the graph compiled unrewritten."""

    stage: str
    error: str
    traceback: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.error}"


@dataclass(frozen=True)
class GraphBreak:
    """Why Dynamo ended a graph, and the user's line."""

    reason: str
    location: Location


@dataclass(frozen=True)
class Report:
    """Everything flashfuse did with one compiled graph (or, from `explain`, with every graph of one call).

    graph: Dynamo's id of the compilation, such as "0/0". before, after: the graph as readable code. graphs: how many
    graphs this report covers.
    """

    graph: str
    sites: tuple[Site, ...] = ()
    refusals: tuple[Refused, ...] = ()
    failures: tuple[Failure, ...] = ()
    before: str = field(default="", repr=False)
    after: str = field(default="", repr=False)
    graph_breaks: tuple[GraphBreak, ...] = ()
    graphs: int = 1

    def count(self, status: str) -> int:
        """How many sites have a status."""
        return sum(site.status == status for site in self.sites)

    def assert_found(self, sites: int) -> None:
        """As `assert_fused`, where sites that are routed to a kernel of torch's own are as good."""
        self._assert(sites, len(self.sites), "fused or routed")

    def assert_fused(self, sites: int) -> None:
        """Raise AssertionError, naming every refusal and failure, unless exactly `sites` sites are fused."""
        self._assert(sites, self.count("fused"), "fused")

    def _assert(self, expected: int, found: int, what: str) -> None:
        if found == expected:
            return
        lines = [f"expected {expected} {what} attention sites in graph {self.graph}, found {found}"]
        lines += [f"  {site.status}: {site.location}" for site in self.sites]
        lines += [f"  refused {refusal}" for refusal in self.refusals]
        lines += [f"  failed {failure}" for failure in self.failures]
        raise AssertionError("\n".join(lines))

    def to_text(self, width: int = 120) -> str:
        """The report as plain text, in tables `width` characters wide."""
        from flashfuse.render import render

        return render(self, width)

    def to_json(self) -> str:
        """The report as one JSON object; a spec appears in its text form, parsed."""
        return json.dumps(_plain(self), indent=2)

    def __str__(self) -> str:
        return self.to_text()


def merge(reports: list[Report], graph: str) -> Report:
    """One report over several graphs, in order."""
    return Report(
        graph=graph,
        sites=tuple(s for r in reports for s in r.sites),
        refusals=tuple(x for r in reports for x in r.refusals),
        failures=tuple(f for r in reports for f in r.failures),
        before="\n\n".join(r.before for r in reports),
        after="\n\n".join(r.after for r in reports),
        graph_breaks=tuple(b for r in reports for b in r.graph_breaks),
        graphs=sum(r.graphs for r in reports),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, AttentionSpec):
        return value.fields()
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value


# The record of this process: one report per compiled graph, in order, until `reset`.
_RECORD: list[Report] = []


def record(report: Report) -> None:
    """Append a compiled graph's report to what `reports` lists."""
    _RECORD.append(report)


def reports() -> tuple[Report, ...]:
    """The report of every graph compiled since the process started or `reset` was called, oldest first."""
    return tuple(_RECORD)


def reset() -> None:
    """Forget every report. Compiled code stays; `torch._dynamo.reset()` drops that."""
    _RECORD.clear()
