"""One row of the table of variants: what was recovered and measured, as text and as Markdown."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

import flashfuse
from benchmarks.measure import Run, graphed, measure, peak_bytes, versions, why
from flashfuse.kernels.spec import AttentionSpec, to_text

PEERS = ("flashfuse", "inductor", "flex")
ULPS = 4


@dataclass(frozen=True)
class Row:
    """What was found and measured.

    ms, bytes, errors: of each peer, milliseconds, extra peak memory, relative error against float64; a wrong result has
    no milliseconds. notes: what stood in a peer's way.
    """

    name: str
    shape: str
    sites: int = 0
    mask: str = "-"
    score: str = "-"
    eager_error: float | None = None
    mask_ms: float | None = None
    ms: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


AnyRow = TypeVar("AnyRow", bound=Row)


def relative_error(out: torch.Tensor, precise: torch.Tensor) -> float:
    """RMS error over RMS value, where the exact result is finite; infinite where only `out` is not."""
    finite = precise.isfinite()
    error = (out.double() - precise)[finite].norm() / precise[finite].norm()
    return error.item() if error.isfinite() else float("inf")


def allowed_error(eager_error: float, dtype: torch.dtype) -> float:
    """The relative error up to which a result counts as right: twice eager's, and a few ulps."""
    return 2 * eager_error + ULPS * torch.finfo(dtype).eps


def checked(
    row: Row, runs: Mapping[str, Run], error_of: Callable[[torch.Tensor], float], allowed: float, device: str = "cuda"
) -> dict[str, Run]:
    """The runs whose results are right; errors, peak memory and what went wrong are noted in the row."""
    right: dict[str, Run] = {}
    for name, run in runs.items():
        try:
            row.errors[name] = error_of(run())
            row.bytes[name] = peak_bytes(run, device)
        except Exception as error:
            row.notes[name] = why(error)
            continue
        if row.errors[name] <= allowed:
            right[name] = run
        else:
            row.notes[name] = f"wrong: relative error {row.errors[name]:.1e}, allowed {allowed:.1e}"
    return right


def timed(row: Row, runs: Mapping[str, Run], graph: bool, rounds: int) -> Row:
    """The row with every run's median; `graph` times launches captured in a CUDA graph."""
    times = measure({name: graphed(run) if graph else run for name, run in runs.items()}, rounds)
    return dataclasses.replace(row, ms={name: statistics.median(times[name]) for name in times})


def recovered(row: AnyRow) -> AnyRow:
    """The row with what flashfuse's report says about the graph just compiled."""
    reports = flashfuse.reports()
    if not reports:
        return row
    report = reports[-1]
    for what, entries in (("refused", report.refusals), ("failed", report.failures)):
        if entries:
            row.notes[what] = "; ".join(map(str, entries))
    if not report.sites:
        return row
    site = report.sites[-1]
    return dataclasses.replace(row, sites=len(report.sites), mask=shorter(site.mask), score=words(site.spec))


def words(spec: AttentionSpec) -> str:
    """The programs of a spec, in as few digits as they can be told apart by."""
    parts = [to_text(spec.score)]
    parts += [f"normaliser {spec.normaliser}"] if spec.normaliser != "softmax" else []
    parts += [f"{n} {to_text(p)}" for n, p in (("sink", spec.sink), ("factor", spec.factor)) if p is not None]
    return shorter("; ".join(parts))


def shorter(text: str) -> str:
    return re.sub(r"\d+\.\d{4,}(e[+-]?\d+)?", lambda m: f"{float(m.group()):.4g}", text)


def figures(row: Row, peer: str) -> str:
    """Milliseconds and extra MiB, "-" where the peer cannot or is wrong."""
    if peer not in row.ms:
        return "-"
    return f"{row.ms[peer]:.2f} ms, {row.bytes[peer] / 2**20:.0f} MiB"


def ratio(row: Row, peer: str) -> str:
    """How many times as fast as the peer."""
    return f"{row.ms[peer] / row.ms['flashfuse']:.2f}" if {peer, "flashfuse"} <= row.ms.keys() else "-"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


RATIOS = ("x flex", "x inductor")
HEADER = ("variant", "shape", "fused", "mask", "score", "error", "eager's", *PEERS, "block mask", *RATIOS)


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table, in the order of HEADER."""
    fused = f"{row.sites} sites" if row.sites > 1 else ("yes" if row.sites else "no")
    error = row.errors.get("flashfuse") if "flashfuse" in row.ms else None
    block_mask = "-" if row.mask_ms is None else f"{row.mask_ms:.1f} ms"
    return (
        *(row.name, row.shape, fused, row.mask, row.score, number(error), number(row.eager_error)),
        *(figures(row, peer) for peer in PEERS),
        *(block_mask, ratio(row, "flex"), ratio(row, "inductor")),
    )


def markdown(rows: list[Row]) -> str:
    return table_of("bf16 forward", HEADER, map(cells, rows))


def table_of(what: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, under the versions that its figures belong to and what they are of."""
    lines = [f"{versions()}, {what}", "", line(header), "| --- " * len(header) + "|", *map(line, rows)]
    return "\n".join(lines) + "\n"


def line(texts: Iterable[str]) -> str:
    """A line of a table in Markdown."""
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def show(row: Row) -> None:
    print(f"{row.name} ({row.shape})")
    for label, cell in list(zip(HEADER, cells(row), strict=True))[2:]:
        print(f"    {label:12}{cell}")
    for peer, note in row.notes.items():
        print(f"    {peer}: {note}")
