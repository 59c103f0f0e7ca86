"""One step of whole models, unmodified, under eager, Inductor and flashfuse, with either way to write their attention.

    python -m benchmarks.models [--json FILE] [--markdown FILE] [--only TEXT ..] [--graph]
    python -m benchmarks.models --device cpu --only BERT    # the same code on a CPU, whose times mean nothing

Peers take turns in shuffled rounds of one process. A figure is printed only when the result is right: its error against
the same model in float32 is at most twice that of the eager model. A training step is checked by the gradient that
reaches the first layer. `x best` is of the fastest peer, whichever way its attention is written.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import gc
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import flashfuse
from benchmarks.measure import Run, graphed, measure, measure_cold, require_cuda, versions
from benchmarks.model_cases import MODELS, Model, gradient_of, output_of
from benchmarks.table import Row, allowed_error, checked, relative_error, table_of

ROUNDS = 3
BACKENDS = ("flashfuse", "inductor", "eager")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Measured:
    """A model under every peer, named "backend, setting"; `fused` says how many sites the settings had."""

    row: Row
    fused: dict[str, int] = field(default_factory=dict)

    def best(self, backends: tuple[str, ...]) -> float:
        """Milliseconds of the fastest of these that is right; infinite where none is."""
        return min((ms for name, ms in self.row.ms.items() if name.split(", ")[0] in backends), default=float("inf"))


class GroupsExpanded(TorchFunctionMode):
    """Query heads that share keys get their own copies: only so has float32 a kernel without a score matrix."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and kwargs.pop("enable_gqa", False):
            q, k, v, *others = args
            groups = q.shape[-3] // k.shape[-3]
            args = (q, *(x.repeat_interleave(groups, -3) for x in (k, v)), *others)
        return func(*args, **kwargs)


def step_of(model: Model, module: torch.nn.Module, backend: str, inputs: dict[str, torch.Tensor]) -> Run:
    """A step; it compiles at its first call."""
    run: Callable[..., object] = module if backend == "eager" else torch.compile(module, backend=backend, dynamic=False)
    if model.trains:
        return functools.partial(gradient_of, module, run, inputs)
    return functools.partial(output_of, run, inputs)


def compare(model: Model, device: str, graph: bool = False, rounds: int = ROUNDS) -> Measured:
    """Compile under every peer, check and time."""
    with torch.device(device):
        torch.manual_seed(0)
        first = model.build(model.settings[-1]).train(model.trains)
        inputs, precise_inputs = model.inputs(DTYPE), model.inputs(torch.float32)
    # Weights that bfloat16 holds, so that both models are the same.
    first.to(DTYPE).float()
    weights = copy.deepcopy(first.state_dict())
    with torch.set_grad_enabled(model.trains):
        with GroupsExpanded():
            precise = step_of(model, first, "eager", precise_inputs)().double()
        eager_error = relative_error(step_of(model, first.to(DTYPE), "eager", inputs)(), precise)
        del first
        row = Row(model.name, "", eager_error=eager_error)
        steps: dict[str, Run] = {}
        fused: dict[str, int] = {}
        torch._dynamo.reset()
        for setting in model.settings:
            with torch.device(device):
                module = model.build(setting).train(model.trains)
            module.load_state_dict(weights)
            module.to(DTYPE)
            for backend in BACKENDS:
                flashfuse.reset()
                run = {f"{backend}, {setting}": step_of(model, module, backend, inputs)}
                allowed = allowed_error(eager_error, DTYPE)
                steps |= checked(row, run, functools.partial(relative_error, precise=precise), allowed, device)
                if backend == "flashfuse":
                    fused[setting] = sum(len(report.sites) for report in flashfuse.reports())
        del precise
        if device == "cpu":
            times = measure_cold(steps, rounds, device)
        else:
            times = measure({name: graphed(step) if graph else step for name, step in steps.items()}, rounds)
    return Measured(dataclasses.replace(row, ms={name: statistics.median(t) for name, t in times.items()}), fused)


def header() -> tuple[str, ...]:
    return "model", "attention", "fused", *BACKENDS, "x best"


def lines(found: Measured) -> Iterator[tuple[str, ...]]:
    """For each way to write the attention a line of the table, in the order of `header`."""
    row = found.row
    for setting, sites in found.fused.items():
        figures = [_figures(row, f"{backend}, {setting}") for backend in BACKENDS]
        ours = row.ms.get(f"flashfuse, {setting}")
        ratio = "-" if ours is None else f"{found.best(BACKENDS[1:]) / ours:.2f}"
        yield row.name, setting, f"{sites} sites", *figures, ratio


def _figures(row: Row, peer: str) -> str:
    return f"{row.ms[peer]:.2f} ms, {row.bytes[peer] / 2**30:.2f} GiB" if peer in row.ms else "-"


def markdown(found: list[Measured]) -> str:
    rows = (row for measured in found for row in lines(measured))
    return table_of("bf16, ms a step and extra peak memory", header(), rows)


def show(found: Measured) -> None:
    for line in lines(found):
        print(", ".join(f"{label} {cell}" for label, cell in zip(header(), line, strict=True)), flush=True)
    for peer, note in found.row.notes.items():
        print(f"    {peer}: {note}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--only", nargs="*", default=[""], help="only models whose name holds one of these texts")
    parser.add_argument("--graph", action="store_true", help="time launches captured in a CUDA graph")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda":
        require_cuda("benchmarks.models")
    print(versions())
    found: list[Measured] = []
    for model in MODELS:
        if not any(text in model.name for text in chosen.only):
            continue
        found.append(compare(model, chosen.device, chosen.graph))
        show(found[-1])
        gc.collect()
        if chosen.json:
            chosen.json.write_text(json.dumps([dataclasses.asdict(measured) for measured in found], indent=1))
        if chosen.markdown:
            chosen.markdown.write_text(markdown(found))


if __name__ == "__main__":
    main()
