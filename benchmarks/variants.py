"""Every attention variant on one GPU: what flashfuse recovers from eager code, its error, time and memory beside peers.

    python -m benchmarks.variants [--json FILE] [--markdown FILE] [--only TEXT ..] [--graph]

Peers are the same eager code under backend="inductor", and FlexAttention with the variant written by hand where it can
be; building its block mask is timed apart and not counted. B2 H16 S8192 D128, bf16, forward; variants without such a
twin are taken from tests/forms at a length whose score matrix fits. Peers take turns in shuffled rounds. A figure is
printed only when the result is right: its error against float64, on the last head of the last batch row, is at most
twice eager's.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import BlockMask

import flashfuse
from benchmarks import prefill
from benchmarks.measure import Run, require_cuda, versions
from benchmarks.table import Row, allowed_error, checked, markdown, recovered, relative_error, show, timed
from benchmarks.variant_cases import VARIANTS, Shape, Variant
from tests.forms import FORMS, Form, Sizes, exact, module

ROUNDS = 3
SHAPE = Shape()
# Forms without a twin: eager code stores every score of these lengths.
SMALLER = Sizes(batch=2, heads=4, q_len=4096, kv_len=4096, dim=128, value_dim=128, window=512, chunk=256, buckets=32)
OTHERS = (
    "window-both-sides", "dilated", "block-causal", "global-tokens", "left-padding", "prefix-lengths", "dense",
    "bucketed-distances", "shifted-windows", "pair-bias", "decomposed-positions", "relative-shift", "disentangled",
    "clamp", "cosine", "latent-sum", "differential-probabilities", "softmax-plus-one", "sigmoid-causal", "head-mask",
    "zeroed-probabilities",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Case:
    """A variant with its tensors.

    sampled: the inputs of the part of the output that `sample` cuts out, on which errors are measured. flex: given a
    block mask, FlexAttention's run; None where there is no twin.
    """

    name: str
    code: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
    sampled: tuple[torch.Tensor, ...]
    sample: Callable[[torch.Tensor], torch.Tensor]
    block_mask: Callable[[], BlockMask | None] | None = None
    flex: Callable[..., torch.Tensor] | None = None


def twin_case(variant: Variant, shape: Shape, dtype: torch.dtype, device: str) -> Case:
    inputs = variant.make(shape, dtype, device)
    return Case(
        name=variant.name,
        code=functools.partial(variant.eager, shape),
        inputs=inputs,
        sampled=variant.last_head(inputs),
        sample=lambda out: out[-1:, -1:],
        block_mask=lambda: variant.block_mask(shape, inputs),
        flex=variant.twin(shape, inputs[3:]),
    )


def form_case(form: Form, sizes: Sizes, dtype: torch.dtype, device: str) -> Case:
    sizes = form.sizes(sizes)
    inputs = form.make(sizes, dtype, device)
    built = module(form.spellings[0], sizes).to(device)
    return Case(form.name, built, inputs, inputs, lambda out: out)


def cases(only: list[str]) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Shape and maker of every case whose name holds one of the texts."""
    shape = f"B{SHAPE.batch} H{SHAPE.heads} S{SHAPE.length} D{SHAPE.dim}"
    smaller = f"B{SMALLER.batch} H{SMALLER.heads} S{SMALLER.q_len} D{SMALLER.dim}"
    chosen = [v for v in VARIANTS if any(text in v.name for text in only)]
    yield from ((shape, functools.partial(twin_case, v, SHAPE, torch.bfloat16, "cuda")) for v in chosen)
    forms = {form.name: form for form in FORMS}
    others = [forms[name] for name in OTHERS if any(text in name for text in only)]
    yield from ((smaller, functools.partial(form_case, f, SMALLER, torch.bfloat16, "cuda")) for f in others)


# --------------------------------------------------------------------------------------------------------------------
# One case


def runs_of(case: Case, mask: BlockMask | None) -> dict[str, Run]:
    """A run for each peer that can; each compiles at its first call."""

    def compiled(backend: str) -> Run:
        run = torch.compile(case.code, backend=backend, fullgraph=True, dynamic=False)
        return lambda: run(*case.inputs)

    runs = {"flashfuse": compiled("flashfuse"), "inductor": compiled("inductor")}
    if case.flex is not None:
        flex = torch.compile(case.flex, fullgraph=True, dynamic=False)
        runs["flex"] = lambda: flex(*case.inputs[:3], mask)
    return runs


def build_mask(case: Case) -> tuple[BlockMask | None, float | None]:
    """FlexAttention's block mask, and the milliseconds that building it takes a second time."""
    if case.block_mask is None or case.block_mask() is None:
        return None, None
    torch.cuda.synchronize()
    start = time.perf_counter()
    mask = case.block_mask()
    torch.cuda.synchronize()
    return mask, 1e3 * (time.perf_counter() - start)


def compare(case: Case, shape: str, graph: bool, rounds: int = ROUNDS) -> Row:
    """Compile, check and time every peer of a case."""
    torch._dynamo.reset()
    flashfuse.reset()
    precise = exact(case.code, case.sampled)
    eager_error = relative_error(case.code(*case.sampled), precise)
    allowed = allowed_error(eager_error, case.inputs[0].dtype)
    mask, mask_ms = build_mask(case)
    row = Row(case.name, shape, eager_error=eager_error, mask_ms=mask_ms)
    right = checked(row, runs_of(case, mask), lambda out: relative_error(case.sample(out), precise), allowed)
    return recovered(timed(row, right, graph, rounds))


def table(only: list[str], graph: bool) -> Iterator[Row]:
    """Measure every chosen variant, and the model whose name is chosen."""
    for shape, make in cases(only):
        yield compare(make(), shape, graph)
        gc.collect()
        torch.cuda.empty_cache()
    if any(text in prefill.NAME for text in only):
        yield prefill.compare(graph)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--only", nargs="*", default=[""], help="only variants whose name holds one of these texts")
    parser.add_argument("--graph", action="store_true", help="time launches captured in a CUDA graph")
    arguments = parser.parse_args()
    require_cuda("benchmarks.variants")
    started = time.perf_counter()
    print(f"{versions()}, bf16 forward")
    rows: list[Row] = []
    with torch.no_grad():
        for measured in table(arguments.only, arguments.graph):
            rows.append(measured)
            show(measured)
            if arguments.json:
                arguments.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
            if arguments.markdown:
                arguments.markdown.write_text(markdown(rows))
    print(f"{len(rows)} variants in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
