"""A report as plain text, laid out by rich."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from flashfuse.report import Report, Site


def render(report: Report, width: int) -> str:
    """The report as text without colour or control codes, `width` columns wide."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False, color_system=None)
    for part in _parts(report):
        console.print(part)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def _parts(report: Report) -> Iterator[RenderableType]:
    yield Text(_headline(report))
    for number, group in enumerate(_alike(report.sites)):
        yield _site_table(number, group)
    if report.refusals:
        refusals = [(r.code, r.reason, str(r.location)) for r in report.refusals]
        yield _table("left alone", ("code", "reason", "where"), refusals)
    if report.failures:
        yield _table("failures", ("stage", "error"), [(f.stage, f.error) for f in report.failures])
    if report.graph_breaks:
        breaks = [(b.reason.partition("\n")[0], str(b.location)) for b in report.graph_breaks]
        yield _table("graph breaks", ("reason", "where"), breaks)


def _headline(report: Report) -> str:
    graphs = f"{report.graphs} graphs" if report.graphs != 1 else "1 graph"
    routed = f"{n} routed to torch's kernels, " if (n := report.count("routed")) else ""
    counts = f"{report.count('fused')} attention sites fused, {routed}{len(report.refusals)} left alone"
    failures = f", {len(report.failures)} failures" if report.failures else ""
    return f"flashfuse {report.graph}: {graphs}, {counts}{failures}"


def _alike(sites: tuple[Site, ...]) -> list[list[Site]]:
    """Sites of one spec, shape and source line, as the layers of a model are, belong in one table."""
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        key = (site.spec, site.shape, site.kernel, site.location.file, site.location.line)
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def _site_table(number: int, group: list[Site]) -> Table:
    first = group[0]
    table = Table(
        box=box.ROUNDED, show_header=False, title=f"attention {number + 1}", title_justify="left", expand=True
    )
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold", ratio=1)
    modules = [site.location.module for site in group if site.location.module]
    where = f"{first.location.file}:{first.location.line}" if first.location.file else "unknown source"
    rows = {
        "sites": f"{len(group)} {first.status}",
        "modules": ", ".join(dict.fromkeys(modules)),
        "source": where,
        "line": first.location.code,
        "attention": first.math,
        "mask structure": first.mask,
        "heads": first.heads,
        "[.., Tq, Tkv, D, Dv]": first.shape,
        "dtypes": first.dtypes,
        "kernel": first.kernel,
        "not stored": f"{_size(first.bytes_saved)} a site and call",
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    return table


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    """Rows that repeat, as those of equal layers do, are shown once with their number."""
    table = Table(box=box.ROUNDED, title=title, title_justify="left", expand=True)
    for column in (*columns, "times"):
        table.add_column(column, overflow="fold")
    for row in dict.fromkeys(rows):
        table.add_row(*(Text(cell) for cell in row), str(rows.count(row)))
    return table


def _size(count: int | str) -> str:
    if isinstance(count, str):
        return f"{count} bytes"
    size = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
