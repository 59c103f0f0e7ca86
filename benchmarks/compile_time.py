"""What compiling a Llama costs, and what of it finding attention does: flashfuse against Inductor, cold and warm.

    python -m benchmarks.compile_time [--layers 32] [--attention eager|sdpa] [--train] [--device cpu] [--json FILE]

Every compile is the first call of transformers' Llama, unmodified and of a tiny hidden size, in a process of its own: a
cold one with empty cache folders, a warm one with what the cold one left there. Times are of the processor, those of
C++ compilers among them, so that other work on the machine counts less. "matching" is flashfuse's lifting and matching,
and Inductor's own pass with its patterns of attention; "flashfuse" is all that happens to the graph before Inductor.
A result that is wrong, or an attention that is not fused, has no figures.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.measure import versions
from benchmarks.table import allowed_error, line, relative_error

BACKENDS = ("inductor", "flashfuse")
HEADER = ("backend", "caches", "compile", "flashfuse", "share", "matching", "a layer", "share")


@dataclass(frozen=True)
class Case:
    """One compile: whose, of how many layers, how their attention is written, whether with gradients, where."""

    backend: str
    layers: int
    attention: str
    train: bool
    device: str


@dataclass(frozen=True)
class Row:
    """Processor seconds of a first call: whole, in flashfuse before Inductor, and in looking for attention."""

    case: Case
    caches: str
    compile: float
    flashfuse: float
    matching: float


# --------------------------------------------------------------------------------------------------------------------
# In a process of its own


def compiled(case: Case) -> dict[str, float]:
    """The seconds of the first call by what they are spent on. Raises AssertionError for a wrong result."""
    model, tokens = llama(case)
    call = functools.partial(model, tokens)
    with torch.set_grad_enabled(case.train):
        eager = call().logits.detach()
        exact = model.double()(tokens).logits.detach()
        model.float()
        model.compile(backend=case.backend)
        seconds: Counter[str] = Counter()
        with clocks(seconds, case.backend), clock(seconds, "compile"):
            logits = call().logits
            if case.train:
                logits.sum().backward()
    error, allowed = relative_error(logits.detach(), exact), allowed_error(relative_error(eager, exact), logits.dtype)
    assert error <= allowed, f"relative error {error:.1e}, allowed {allowed:.1e}"
    if case.backend == "flashfuse":
        import flashfuse

        (report,) = flashfuse.reports()
        report.assert_fused(sites=case.layers)
    return dict(seconds)


def llama(case: Case) -> tuple[torch.nn.Module, torch.Tensor]:
    """transformers' Llama of a tiny hidden size, and tokens for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **sizes, vocab_size=128, num_hidden_layers=case.layers, attn_implementation=case.attention,
        use_cache=not case.train,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(case.device).train(case.train)
    return model, torch.randint(0, 128, (2, 32), device=case.device)


@contextlib.contextmanager
def clocks(seconds: Counter[str], backend: str) -> Iterator[None]:
    """Clocks around what looks for attention.

    What sympy imports at its first sum, in Inductor if not before, is imported already.
    """
    importlib.import_module("sympy.tensor.tensor")
    with contextlib.ExitStack() as stack:
        if backend == "flashfuse":
            import flashfuse.backend
            import flashfuse.patterns.match

            stack.enter_context(clocked(seconds, "flashfuse", flashfuse.backend, "transform"))
            stack.enter_context(clocked(seconds, "matching", flashfuse.patterns.match, "find_attention"))
        else:
            from torch._inductor.fx_passes import joint_graph

            stack.enter_context(clocked(seconds, "matching", joint_graph.patterns, "apply"))
        yield


@contextlib.contextmanager
def clocked(seconds: Counter[str], name: str, owner: Any, attribute: str) -> Iterator[None]:
    function: Callable[..., Any] = getattr(owner, attribute)

    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock(seconds, name):
            return function(*args, **kwargs)

    with patch.object(owner, attribute, timed):
        yield


@contextlib.contextmanager
def clock(seconds: Counter[str], name: str) -> Iterator[None]:
    """Adds the processor time of this process and of its children."""
    start = _processor_seconds()
    yield
    seconds[name] += _processor_seconds() - start


def _processor_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


# --------------------------------------------------------------------------------------------------------------------
# All of them


def rows(cases: list[Case]) -> Iterator[Row]:
    """Each case cold and then warm."""
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            for caches in ("cold", "warm"):
                seconds = apart(case, Path(folder))
                yield Row(case, caches, *(seconds.get(name, 0.0) for name in ("compile", "flashfuse", "matching")))


def apart(case: Case, folder: Path) -> dict[str, float]:
    """`compiled` in a process with its caches in a folder; one that compiles what it needs itself."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    settings = {**os.environ, **caches, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    settings.pop("TORCHINDUCTOR_FORCE_DISABLE_CACHES", None)
    command = [sys.executable, "-m", "benchmarks.compile_time", "--one", json.dumps(dataclasses.asdict(case))]
    told = subprocess.run(command, env=settings, stdout=subprocess.PIPE, text=True, check=True).stdout
    seconds: dict[str, float] = json.loads(told.splitlines()[-1])
    return seconds


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table, in the order of HEADER."""
    own = (f"{row.flashfuse:.2f} s", f"{row.flashfuse / row.compile:.1%}") if row.flashfuse else ("-", "-")
    matching = "-", "-", "-"
    if row.matching:
        each = 1e3 * row.matching / row.case.layers
        matching = f"{1e3 * row.matching:.0f} ms", f"{each:.1f} ms", f"{row.matching / row.compile:.2%}"
    return row.case.backend, row.caches, f"{row.compile:.1f} s", *own, *matching


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager")
    parser.add_argument("--train", action="store_true", help="with the backward pass")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.one:
        print(json.dumps(compiled(Case(**json.loads(chosen.one)))))
        return
    cases = [Case(backend, chosen.layers, chosen.attention, chosen.train, chosen.device) for backend in BACKENDS]
    what = "forward and backward" if chosen.train else "forward"
    print(f"{versions()}: a Llama of {chosen.layers} layers, {chosen.attention} attention, {what}\n", flush=True)
    print(line(HEADER), line(("---",) * len(HEADER)), sep="\n", flush=True)
    found = []
    for row in rows(cases):
        found.append(row)
        print(line(cells(row)), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps([dataclasses.asdict(row) for row in found], indent=1))


if __name__ == "__main__":
    main()
