"""Forward and backward on one GPU: dense shapes and variants against FlexAttention, SDPA and Inductor.

    python -m benchmarks.training [--json FILE] [--markdown FILE] [--only TEXT ..] [--graph] [--autotune]
    python -m benchmarks.training --memory [FOLDER]   # peak memory of a step from 1k to 64k tokens, into docs/
    python -m benchmarks.training --device cpu --tiny # the same code at sizes for a CPU, whose times mean nothing

flashfuse compiles eager code as models write it, and so does Inductor; "operator" is flashfuse's operator called alone.
FlexAttention is compiled with its default tiles, `--autotune` adds its own search. Rows are printed as they come, and
kept in the JSON file, so that a later call with `--only` adds or replaces some. A figure is printed only when output
and gradients are right, on one head, against float64: flashfuse's by the contract of docs/numerics.md, a peer's when
its errors are at most twice eager's.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import flashfuse
from benchmarks import training_memory
from benchmarks.measure import Run, require_cuda, versions, why
from benchmarks.steps import Step, Tensors, measure_graphed, measure_steps, peak_bytes, repeats_itself
from benchmarks.table import allowed_error, recovered, relative_error
from benchmarks.training_cases import FULL, TINY, Compile, TrainingCase, training_cases
from benchmarks.training_table import OWN, PEERS, TrainingRow, markdown, show
from tests.forms import exact
from tests.numerics import assert_close_to_exact

ROUNDS = 3
THREADS = 8
COMPILERS: Mapping[str, Compile] = {
    name: functools.partial(torch.compile, backend=name, fullgraph=True, dynamic=False)
    for name in ("flashfuse", "inductor")
}


# --------------------------------------------------------------------------------------------------------------------
# Checking


def exact_results(case: TrainingCase) -> Tensors:
    """(output, *gradients) of the part looked at, in float64; one query head after the other, to spare memory."""
    leaves = _leaves(case, torch.float64)
    grad_out = case.grad_out[case.out_cut].double()
    outputs = []
    for head in range(grad_out.shape[1]):
        at = slice(head, head + 1)
        out = exact(case.code, (leaves[0][:, at], *leaves[1:]))
        out.backward(grad_out[:, at])
        outputs.append(out.detach())
    return torch.cat(outputs, 1), *_gradients(case, leaves)


def eager_results(case: TrainingCase) -> Tensors:
    """The same by the eager code in its own type."""
    leaves = _leaves(case, None)
    out = case.code(*leaves)
    out.backward(case.grad_out[case.out_cut])
    return out.detach(), *_gradients(case, leaves)


def _leaves(case: TrainingCase, dtype: torch.dtype | None) -> Tensors:
    parts = [x.detach()[cut] for x, cut in zip(case.inputs, case.cuts, strict=True)]
    typed = (x.to(dtype) if dtype and x.is_floating_point() else x.clone() for x in parts)
    return tuple(x.requires_grad_(like.requires_grad) for x, like in zip(typed, case.inputs, strict=True))


def _gradients(case: TrainingCase, leaves: Tensors) -> Tensors:
    found = [leaves[at].grad for at in case.wanted]
    assert all(grad is not None for grad in found), f"{case.name}: an input has no gradient"
    return tuple(grad for grad in found if grad is not None)


def mistake(peer: str, found: Tensors, eager: Tensors, precise: Tensors) -> str | None:
    """What is wrong with (output, *gradients); None where nothing is."""
    for at, (mine, theirs, truth) in enumerate(zip(found, eager, precise, strict=True)):
        what = "output" if at == 0 else f"gradient {at}"
        if peer not in OWN:
            error, allowed = relative_error(mine, truth), allowed_error(relative_error(theirs, truth), theirs.dtype)
            if error > allowed:
                return f"wrong {what}: relative error {error:.1e}, allowed {allowed:.1e}"
            continue
        try:
            assert_close_to_exact(mine, theirs, truth)
        except AssertionError as problem:
            return f"wrong {what}: {problem}"
    return None


def checked(
    row: TrainingRow, case: TrainingCase, makers: Mapping[str, Callable[[], Run]], eager: Tensors, precise: Tensors
) -> dict[str, Step]:
    """The steps whose results are right; errors, memory, repeatability and what went wrong are noted in the row."""
    right: dict[str, Step] = {}
    for name in (peer for peer in PEERS if peer in makers):
        try:
            step = case.step(makers[name]())
            found = case.part(step.whole())
            row.errors[name] = max(map(relative_error, found, precise))
            problem = mistake(name, found, eager, precise)
            row.deterministic[name] = repeats_itself(step)
            row.bytes[name] = peak_bytes(step)
        except Exception as error:
            problem = why(error)
        if problem:
            row.notes[name] = problem
        else:
            right[name] = step
    return right


# --------------------------------------------------------------------------------------------------------------------
# One case


def compare(case: TrainingCase, compilers: Mapping[str, Compile], graph: bool = False) -> TrainingRow:
    """Compile, check and time every peer of a case."""
    torch._dynamo.reset()
    flashfuse.reset()
    precise, eager = exact_results(case), eager_results(case)
    eager_error = max(map(relative_error, eager, precise))
    row = TrainingRow(case.name, case.shape, eager_error=eager_error, target=case.target)
    makers = {name: functools.partial(case.compiled, compile) for name, compile in compilers.items()}
    right = checked(row, case, {**makers, **case.makers}, eager, precise)
    row = recovered(row)
    if not row.sites and "flashfuse" in right:
        del right["flashfuse"]
        row.notes["flashfuse"] = "not fused, so it has no figures"
    measured = measure_graphed(right, ROUNDS, row.notes) if graph else measure_steps(right, ROUNDS)
    for name, times in measured.items():
        row.backward_ms[name] = times.backward
        row.ms[name] = times.forward + times.backward
    return row


def warm_up(makers: Sequence[Callable[[], TrainingCase]]) -> None:
    """Run the operator of every case once, in threads: Triton's compiler takes most of the time, and holds no lock."""

    def attempt(make: Callable[[], TrainingCase]) -> None:
        case = make()
        with contextlib.suppress(Exception):  # told when the case is checked
            if "operator" in case.makers:
                case.step(case.makers["operator"]()).whole()

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(attempt, makers))


def rows(chosen: argparse.Namespace) -> Iterator[TrainingRow]:
    """Measure every chosen case."""
    sizes = TINY if chosen.tiny else FULL
    makers = list(training_cases(chosen.only, sizes, chosen.device, chosen.autotune).values())
    warm_up(makers)
    for make in makers:
        yield compare(make(), COMPILERS, chosen.graph)
        gc.collect()
        if chosen.device == "cuda":
            torch.cuda.empty_cache()


def kept(path: Path | None) -> dict[str, TrainingRow]:
    """The rows of earlier calls."""
    if path is None or not path.exists():
        return {}
    return {entry["name"]: TrainingRow.from_json(entry) for entry in json.loads(path.read_text())}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="add the measurements to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--only", nargs="*", default=[""], help="only cases whose name holds one of these texts")
    parser.add_argument("--graph", action="store_true", help="time launches captured in a CUDA graph")
    parser.add_argument("--autotune", action="store_true", help="FlexAttention with its search for tiles too (slow)")
    parser.add_argument(
        "--memory", type=Path, nargs="?", const=Path("docs"), help="peak memory by length, into a folder"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda":
        require_cuda("benchmarks.training")
    started = time.perf_counter()
    print(f"{versions()}, bf16")
    if chosen.memory:
        training_memory.measure(chosen.memory, chosen.device, chosen.tiny)
        return
    found = kept(chosen.json)
    for row in rows(chosen):
        found[row.name] = row
        show(row)
        print(f"    {time.perf_counter() - started:.0f} s since the start", flush=True)
        if chosen.json:
            chosen.json.write_text(json.dumps([row.to_json() for row in found.values()], indent=1))
        if chosen.markdown:
            chosen.markdown.write_text(markdown(list(found.values())))


if __name__ == "__main__":
    main()
