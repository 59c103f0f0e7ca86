"""`make train`: a GPT-2 trained from scratch by eager code, Inductor and flashfuse, side by side from the same seed.

    python examples/train_gpt.py [--preset gpu] [--attention sdpa] [--attention-dropout 0] [--steps 500] [--plot FILE]

The model is transformers' own from a configuration, dropout as that has it; the text is Python's standard library, byte
by byte. A second eager seed shows how far apart two runs are anyway, and a compiled run may be no further. Exits with 1
when one is, or when nothing was learned.
"""

from __future__ import annotations

import os
import sys

# Quiet libraries that would print over the progress line; read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from curves import gaps, plot, smoothed, within_noise
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from stdlib_text import Text, stdlib_text
from trainer import Run, Setup, train

import flashfuse

SEED = 0
EAGER, SECOND, INDUCTOR, FLASHFUSE = "eager", "eager, another seed", 'backend="inductor"', 'backend="flashfuse"'
# Backend and seed of every run.
RUNS = {
    EAGER: ("eager", SEED),
    SECOND: ("eager", SEED + 1),
    INDUCTOR: ("inductor", SEED),
    FLASHFUSE: ("flashfuse", SEED),
}


@dataclass(frozen=True)
class Preset:
    """Sizes of a model and its training; every one of them is an option too."""

    layers: int
    width: int
    heads: int
    tokens: int
    rows: int
    steps: int
    rate: float


PRESETS = {
    "cpu": Preset(layers=2, width=128, heads=4, tokens=512, rows=2, steps=300, rate=2e-3),
    "gpu": Preset(layers=12, width=768, heads=12, tokens=2048, rows=4, steps=300, rate=6e-4),
}


def main(arguments: list[str] | None = None) -> int:
    """Train, print the table and the verdict, write the plot, and return the exit status."""
    chosen = _parser().parse_args(arguments)
    setup = _setup(chosen)
    console = Console()
    text = stdlib_text()
    console.print(_heading(setup, text), highlight=False)
    runs = _train(console, setup, text)
    console.print(_table(runs))
    console.print("times: of the first step, which compiles, and the median of the others; loss: at the end, averaged;")
    console.print("gap: the largest from eager's smoothed curve; validation: without dropout, by eager code")
    console.print(_fused(runs[FLASHFUSE].reports, setup.layers), markup=False, highlight=False)
    title = f"GPT-2, {setup.layers} layers, width {setup.width}, {setup.tokens} tokens, {setup.attention} attention"
    plot(chosen.plot, title, {name: run.losses for name, run in runs.items()}, EAGER)
    console.print(f"loss curves: {chosen.plot}", highlight=False)
    problems = [problem for name in (INDUCTOR, FLASHFUSE) if (problem := _problem(name, runs))]
    for problem in problems:
        console.print(problem, style="red", markup=False, highlight=False)
    if not problems:
        console.print("[green]the curves lie on each other, within the noise of two eager seeds[/green]")
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="sizes; by default those for the device that is there")
    for name, default in vars(PRESETS["cpu"]).items():
        parser.add_argument(f"--{name}", type=type(default), help=f"instead of the preset's (cpu: {default})")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager", help="as transformers calls it")
    parser.add_argument("--attention-dropout", type=float, help="instead of the configuration's 0.1")
    parser.add_argument("--plot", type=Path, default=Path("train_gpt.png"), help="where the loss curves go, as PNG")
    return parser


def _setup(chosen: argparse.Namespace) -> Setup:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset = PRESETS[chosen.preset or ("gpu" if device.type == "cuda" else "cpu")]
    sizes: dict[str, Any] = {
        name: default if getattr(chosen, name) is None else getattr(chosen, name)
        for name, default in vars(preset).items()
    }
    return Setup(
        **sizes,
        attention=chosen.attention,
        attention_dropout=chosen.attention_dropout,
        device=device,
        autocast=torch.bfloat16 if device.type == "cuda" else None,
    )


def _heading(setup: Setup, text: Text) -> str:
    on_gpu = setup.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"torch {torch.__version__}, {device}, {'bfloat16 autocast' if on_gpu else 'float32'}\n"
        f"{len(text.train):,} bytes to train on, {len(text.validation):,} to validate with,"
        f" {setup.rows} x {setup.tokens} a step"
    )


def _train(console: Console, setup: Setup, text: Text) -> dict[str, Run]:
    """Every run, one after the other, each with its progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=console) as progress:
        tasks = {name: progress.add_task(name, total=setup.steps, loss="", start=False) for name in RUNS}
        runs = {}
        for name, (backend, seed) in RUNS.items():
            progress.start_task(tasks[name])

            def told(loss: float, task: Any = tasks[name]) -> None:
                progress.update(task, advance=1, loss=f"loss {loss:.3f}")

            runs[name] = train(setup, text, backend, seed, told)
    return runs


def _table(runs: Mapping[str, Run]) -> Table:
    table = Table(Column(no_wrap=True), "first step s", "ms", "peak MiB", "loss", "validation", "gap")
    for name, run in runs.items():
        gap = max(gaps(run.losses, runs[EAGER].losses))
        times = (f"{run.first:.1f}", f"{1e3 * run.step:.1f}", f"{run.peak / 2**20:.1f}")
        table.add_row(name, *times, f"{smoothed(run.losses)[-1]:.3f}", f"{run.validation:.3f}", f"{gap:.3f}")
    return table


def _fused(reports: tuple[flashfuse.Report, ...], layers: int) -> str:
    """How many attentions were fused, and where one is missing, what stood in the way."""
    fused = sum(site.status == "fused" for report in reports for site in report.sites)
    lines = [f"{fused} of {layers} attention sites fused"]
    if fused < layers:
        lines += [f"  refused {refusal}" for report in reports for refusal in report.refusals]
        lines += [f"  failed {failure}" for report in reports for failure in report.failures]
    return "\n".join(lines)


def _problem(name: str, runs: Mapping[str, Run]) -> str | None:
    """What is wrong with a compiled run's curve."""
    eager, second, curve = (runs[n].losses for n in (EAGER, SECOND, name))
    if not within_noise(curve, eager, second):
        noise, gap = max(gaps(second, eager)), max(gaps(curve, eager))
        return f"{name}: {gap:.3f} from eager's curve, where another eager seed is {noise:.3f} from it"
    if not smoothed(curve)[-1] < smoothed(curve)[0]:
        return f"{name}: the loss did not fall"
    return None


if __name__ == "__main__":
    sys.exit(main())
