"""`make generate`: transformers' generate(), unmodified, by eager code, SDPA, Inductor and flashfuse, side by side.

    python examples/generate.py [--preset gpu] [--cache dynamic] [--sample] [--mode max-autotune] [--batch 1]

The model is a Llama with grouped-query attention from a configuration, its weights random; the prompts are random
tokens, one of them shorter and padded on the left. Only `model.forward` is compiled. In float32 every way must give the
tokens of the library's eager code, and every attention must be fused; exits with 1 where that is not so.
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

import torch
from generator import Run, Setup, common, run
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

import flashfuse

EAGER = "eager"
# How the library writes attention, and who compiles its forward.
WAYS = {
    EAGER: ("eager", None),
    "SDPA": ("sdpa", None),
    "eager, inductor": ("eager", "inductor"),
    "SDPA, inductor": ("sdpa", "inductor"),
    "eager, flashfuse": ("eager", "flashfuse"),
    "SDPA, flashfuse": ("sdpa", "flashfuse"),
}


@dataclass(frozen=True)
class Preset:
    """Sizes of a model and of what it generates; every one of them is an option too."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    batch: int
    prompt: int
    tokens: int


PRESETS = {
    "cpu": Preset(layers=2, width=256, heads=8, kv_heads=2, batch=4, prompt=1024, tokens=64),
    "gpu": Preset(layers=8, width=2048, heads=32, kv_heads=8, batch=4, prompt=4096, tokens=128),
}


def main(arguments: list[str] | None = None) -> int:
    """Generate every way, print the table and the verdict, and return the exit status."""
    setup = _setup(_parser().parse_args(arguments))
    console = Console()
    console.print(_heading(setup), highlight=False)
    runs = _generate(console, setup)
    console.print(_table(setup, runs))
    console.print(
        "first s: the first call, which compiles; of a second one the time for the prompts, and tokens/s of all"
    )
    console.print(
        "rows at the median step; as eager: how many tokens are eager attention's before the first that is not"
    )
    problems = _problems(setup, runs)
    for problem in problems:
        console.print(problem, style="red", markup=False, highlight=False)
    if not problems:
        same = "the tokens are the same and " if setup.dtype == torch.float32 else ""
        console.print(f"[green]{same}every attention is fused[/green]")
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="sizes; by default those for the device that is there")
    for name, default in vars(PRESETS["cpu"]).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"instead of the preset's (cpu: {default})")
    parser.add_argument("--cache", choices=("dynamic", "static"), default="static", help="as transformers names them")
    parser.add_argument("--sample", action="store_true", help="draw tokens, from one seed, instead of taking the best")
    parser.add_argument("--mode", help="torch.compile's, for Inductor and flashfuse")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="by default float32, on a GPU bfloat16"
    )
    return parser


def _setup(chosen: argparse.Namespace) -> Setup:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    preset = PRESETS[chosen.preset or ("gpu" if on_gpu else "cpu")]
    sizes = {
        name: default if getattr(chosen, name) is None else getattr(chosen, name)
        for name, default in vars(preset).items()
    }
    dtype = getattr(torch, chosen.dtype or ("bfloat16" if on_gpu else "float32"))
    return Setup(**sizes, cache=chosen.cache, sample=chosen.sample, mode=chosen.mode, device=device, dtype=dtype)


def _heading(setup: Setup) -> str:
    device = torch.cuda.get_device_name() if setup.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"torch {torch.__version__}, {device}, {str(setup.dtype).removeprefix('torch.')}\n"
        f"Llama, {setup.layers} layers, width {setup.width}, {setup.heads} heads on {setup.kv_heads};"
        f" {setup.cache} cache, {setup.batch} prompts of up to {setup.prompt} tokens, {setup.tokens} more of each"
    )


def _generate(console: Console, setup: Setup) -> dict[str, Run]:
    """Every way, one after the other, each with its progress bar over the tokens of both calls."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks = {name: progress.add_task(name, total=2 * setup.tokens, start=False) for name in WAYS}
        runs = {}
        for name, (attention, backend) in WAYS.items():
            progress.start_task(tasks[name])
            runs[name] = run(setup, attention, backend, lambda task=tasks[name]: progress.update(task, advance=1))
    return runs


def _table(setup: Setup, runs: Mapping[str, Run]) -> Table:
    table = Table(Column(no_wrap=True), "first s", "prompt s", "tokens/s", "as eager")
    for name, way in runs.items():
        same = common(way.tokens, runs[EAGER].tokens)
        times = f"{way.first:.1f}", f"{way.prompt:.2f}", f"{setup.batch / way.step:.0f}"
        table.add_row(name, *times, f"{same}/{setup.tokens}")
    return table


def _problems(setup: Setup, runs: Mapping[str, Run]) -> list[str]:
    """Other tokens than eager attention's, where rounding cannot be the reason, and steps with an attention left."""
    problems = []
    for name, (_, backend) in WAYS.items():
        same = common(runs[name].tokens, runs[EAGER].tokens)
        if setup.dtype == torch.float32 and same < setup.tokens:
            problems.append(f"{name}: token {same} is another one than eager attention gives")
        if backend == "flashfuse":
            problems += [p for report in runs[name].reports if (p := _unfused(name, report, setup.layers))]
    return problems


def _unfused(name: str, report: flashfuse.Report, layers: int) -> str | None:
    try:
        report.assert_fused(sites=layers)
    except AssertionError as error:
        return f"{name}: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main())
