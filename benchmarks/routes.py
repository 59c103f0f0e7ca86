"""Where torch's own kernels are faster than flashfuse's at plain attention: the search that `fusion/routes.py` records.

    python -m benchmarks.routes [--json FILE] [--dims 64 128 ..] [--lengths 512 ..]

Tensors are [batch, length, heads, head dim] in memory, as models have them; times are of launches in a CUDA graph, of a
forward pass, and of a forward and a backward pass together. Peers take turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import flashfuse.kernels.ops  # noqa: F401  (registers the operator)
from benchmarks.dense import Case, spec_of
from benchmarks.measure import graphed, measure, require_cuda, versions, why
from flashfuse.routes import OPERATORS

DIMS = (64, 72, 96, 128, 256)
LENGTHS = (128, 197, 256, 384, 512, 768, 1024, 2048)
# Rows of queries over all heads and batches: what fills the device many times, and what does so a few times.
ROWS = (2**19, 2**16)
HEADS = 16
ROUNDS = 2
PAUSE_SECONDS = 0.02
# From here on a kernel counts as faster.
WORTH = 1.03
# Relative RMS difference of two bf16 results.
ALLOWED_DIFFERENCE = 1e-2

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def kernels(case: Case) -> dict[str, Attend]:
    """By name, what computes a case from q, k, v [B, H, T, D]."""
    spec, scale = spec_of(case).to_text(), case.dim**-0.5

    def own(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.flashfuse.attention(q, k, v, [], list(q.shape[:-2]), spec)[0]

    def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        kept = torch.is_grad_enabled()
        return OPERATORS["cudnn"](q, k, v, None, kept, 0.0, case.causal, False, scale=scale)[0]

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return OPERATORS["flash"](q, k, v, 0.0, case.causal, False, scale=scale)[0]

    return {"flashfuse": own, "cudnn": cudnn, "flash": flash}


def step(attend: Attend, operands: list[torch.Tensor], upstream: torch.Tensor | None) -> Callable[[], torch.Tensor]:
    """A forward pass, or with a gradient of the output a forward and a backward one, which gives q's gradient."""
    if upstream is None:
        return lambda: attend(*operands)
    return lambda: torch.autograd.grad(attend(*operands), operands, upstream)[0]


def compare(case: Case, trains: bool) -> dict[str, object]:
    """Milliseconds of every kernel that agrees with flashfuse's."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = case.batch, case.length, case.heads, case.dim
    leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(4)]
    *operands, upstream = (x.transpose(1, 2).requires_grad_(trains) for x in leaves)
    runs: dict[str, Callable[[], object]] = {}
    notes: dict[str, str] = {}
    expected = None
    for name, attend in kernels(case).items():
        run = step(attend, operands, upstream.detach() if trains else None)
        try:
            out = run().detach().float()
            expected = out if expected is None else expected
            difference = ((out - expected).norm() / expected.norm()).item()
            if not difference <= ALLOWED_DIFFERENCE:
                notes[name] = f"wrong: {difference:.1e} from flashfuse's"
                continue
            runs[name] = graphed(run)
        except Exception as error:
            notes[name] = why(error)
    times = {name: statistics.median(found) for name, found in measure(runs, ROUNDS, PAUSE_SECONDS).items()}
    return {"case": str(case), "trains": trains, "ms": times, "notes": notes}


def cases(dims: list[int], lengths: list[int]) -> Iterator[Case]:
    for dim, length, rows, causal in itertools.product(dims, lengths, ROWS, (False, True)):
        yield Case(max(rows // (HEADS * length), 1), HEADS, HEADS, length, dim, causal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--dims", type=int, nargs="*", default=DIMS)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    arguments = parser.parse_args()
    require_cuda("benchmarks.routes")
    print(f"{versions()}, bf16, us in a CUDA graph; * where a kernel of torch is worth a route")
    entries = []
    for case in cases(arguments.dims, arguments.lengths):
        cells = []
        for trains in (False, True):
            with torch.set_grad_enabled(trains):
                entries.append(compare(case, trains))
            ms = dict(entries[-1]["ms"])
            own, best = ms.pop("flashfuse"), min(ms, key=ms.get, default=None)
            ratio = ms[best] / own if best else float("inf")
            mark = "*" if WORTH * ratio < 1 else " "
            others = " ".join(f"{name} {1e3 * t:.1f}" for name, t in ms.items())
            cells.append(f"{1e3 * own:8.1f} ({others}) {ratio:.2f}{mark}")
        print(f"{case!s:22} forward {cells[0]:48} with backward {cells[1]}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(entries, indent=1))


if __name__ == "__main__":
    main()
