"""One model compiled by flashfuse and by Inductor, measured beside the unmodified model in the same run."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import measure
import torch
from rich.console import Console
from rich.table import Table

import flashfuse

# A batch is what the model is called with; `read` turns the model and a batch into the tensor to compare.
Batch = Any
Read = Callable[[Any, Batch], torch.Tensor]

NAMES = {"eager": "unmodified, eager", "inductor": 'backend="inductor"', "flashfuse": 'backend="flashfuse"'}


@dataclass(frozen=True)
class Result:
    """Outputs per batch of every way to run the model, in float64 as "exact"; and flashfuse's reports."""

    outputs: dict[str, list[torch.Tensor]]
    reports: tuple[flashfuse.Report, ...]


def compare(
    console: Console, title: str, model: torch.nn.Module, batches: Sequence[Batch], read: Read, dynamic: bool
) -> tuple[Result, list[str]]:
    """Run, compile and measure `model` on every batch; prints a table. Returns the outputs and what went wrong."""
    device = next(model.parameters()).device
    exact = copy.deepcopy(model).double()
    outputs = {"exact": [read(exact, batch) for batch in batches]}
    del exact
    table = Table("", "compile s", "ms", "peak MiB", "largest error", title=title, title_justify="left")
    flashfuse.reset()
    for name, label in NAMES.items():
        run, spent = model, 0.0
        if name != "eager":
            torch._dynamo.reset()
            run = torch.compile(model, backend=name, dynamic=dynamic)
            with console.status(f"{title}: compiling with {name}"):
                start = time.perf_counter()
                for batch in batches:
                    read(run, batch)
                spent = time.perf_counter() - start
        with console.status(f"{title}: measuring {name}"):
            outputs[name] = [read(run, batch) for batch in batches]
            took = measure.seconds(lambda: [read(run, batch) for batch in batches], device)  # noqa: B023
            peak = measure.peak_bytes(lambda: read(run, batches[-1]), device)  # noqa: B023
        error = max(_error(a, e) for a, e in zip(outputs[name], outputs["exact"], strict=True))
        table.add_row(label, f"{spent:.1f}", f"{1e3 * took:.1f}", f"{peak / 2**20:.1f}", f"{error:.2e}")
    console.print(table)
    problems = [
        f"{title}, batch {number}: {problem}"
        for number, values in enumerate(zip(*(outputs[n] for n in ("flashfuse", "eager", "exact")), strict=True))
        if (problem := measure.disagreement(*values))
    ]
    return Result(outputs, flashfuse.reports()), problems


def expect_fused(title: str, report: flashfuse.Report, sites: int) -> list[str]:
    """The report's own complaint when it does not have `sites` fused sites."""
    try:
        report.assert_fused(sites=sites)
    except AssertionError as error:
        return [f"{title}: {error}"]
    return []


def _error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return (actual.double() - exact).abs().max().item()
