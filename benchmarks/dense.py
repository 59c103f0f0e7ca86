"""Forward TFLOP/s of dense and causal attention against PyTorch's kernels, on one GPU.

    python -m benchmarks.dense [--json FILE] [--search] [--cases 4096D128 ...]

Causal counts half the operations. Peers take turns, several rounds, after a pause each, so that clocks and power treat
all alike. A figure is printed only when its result agrees with float32 arithmetic; `--search` sweeps flashfuse's tiles.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import flashfuse.kernels.ops  # noqa: F401  (registers the operator)
from benchmarks.measure import Run, measure, require_cuda, versions, why
from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.launch import Launch, attention_forward, device_of
from flashfuse.kernels.spec import AttentionSpec, parse

# Relative RMS error of a bf16 result: rounding of probabilities and output gives about 2.5e-3.
ALLOWED_ERROR = 6e-3


@dataclass(frozen=True)
class Case:
    """One shape: queries [batch, heads, length, dim], keys and values with kv_heads heads."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    dim: int
    causal: bool

    def __str__(self) -> str:
        heads = f"H{self.heads}" if self.heads == self.kv_heads else f"H{self.heads}/{self.kv_heads}"
        return f"B{self.batch}{heads}S{self.length}D{self.dim}{'c' if self.causal else ''}"

    @property
    def operations(self) -> float:
        return 4 * self.batch * self.heads * self.length**2 * self.dim * (0.5 if self.causal else 1.0)


SHAPES = [
    (4, 32, 32, 4096, 64),
    (4, 16, 16, 4096, 128),
    (1, 32, 8, 16384, 128),
    (2, 8, 8, 8192, 256),
    (64, 12, 12, 512, 64),
]
CASES = [Case(*shape, causal) for shape in SHAPES for causal in (False, True)]


@dataclass(frozen=True, eq=False)
class Operands:
    """The tensors of a case."""

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @staticmethod
    def make(case: Case, device: str = "cuda") -> Operands:
        generator = torch.Generator(device).manual_seed(0)
        heads = (case.heads, case.kv_heads, case.kv_heads)
        q, k, v = (
            torch.randn(case.batch, h, case.length, case.dim, device=device, dtype=torch.bfloat16, generator=generator)
            for h in heads
        )
        return Operands(case, q, k, v)

    def grouped(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [B, Hkv, G, T, D], k and v [B, Hkv, 1, T, D]; as they are where no heads are shared."""
        if self.case.heads == self.case.kv_heads:
            return self.q, self.k, self.v
        return self.q.unflatten(1, (self.case.kv_heads, -1)), self.k.unsqueeze(2), self.v.unsqueeze(2)


def spec_of(case: Case) -> AttentionSpec:
    """What the backend recovers from eager code of the case, so that both run the same kernels."""
    scaled = f"qk * {case.dim**-0.5!r}"
    score = parse(f"where(kv_idx > q_idx, -inf, {scaled})" if case.causal else scaled)
    axes = 2 if case.heads == case.kv_heads else 3
    bf16 = torch.bfloat16
    return AttentionSpec(axes, score, (), 0, bf16, bf16, bf16, "nan", tuple(range(axes + 2)))


# --------------------------------------------------------------------------------------------------------------------
# Peers


def flashfuse_operator(x: Operands) -> Run:
    q, k, v = x.grouped()
    text, sizes = spec_of(x.case).to_text(), list(q.shape[:-2])
    return lambda: torch.ops.flashfuse.attention(q, k, v, [], sizes, text)[0].view(x.q.shape)


def sdpa(backend: SDPBackend) -> Callable[[Operands], Run]:
    def make(x: Operands) -> Run:
        def run() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    x.q, x.k, x.v, is_causal=x.case.causal, enable_gqa=x.case.heads != x.case.kv_heads
                )

        return run

    return make


def flex(x: Operands, mode: str | None = None) -> Run:
    compiled = torch.compile(flex_attention, dynamic=False, mode=mode)
    length = x.case.length
    mask = None
    if x.case.causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=x.q.device.type)
    return lambda: compiled(x.q, x.k, x.v, block_mask=mask, enable_gqa=x.case.heads != x.case.kv_heads)


def flash_attention_3(x: Operands) -> Run:
    """The wheel, under either name it goes by; it takes [B, T, H, D]."""
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError:
        from flash_attn_interface import flash_attn_func
    q, k, v = (t.transpose(1, 2).contiguous() for t in (x.q, x.k, x.v))

    def run() -> torch.Tensor:
        out = flash_attn_func(q, k, v, causal=x.case.causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


PEERS: Mapping[str, Callable[[Operands], Run]] = {
    "flashfuse": flashfuse_operator,
    "flex": flex,
    "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "fa3": flash_attention_3,
}


# --------------------------------------------------------------------------------------------------------------------
# Checking and timing


def exact_rows(x: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """(row numbers, output) of a sample of query rows of the first and last head in float64, [2, rows, D]."""
    rows = torch.linspace(0, x.case.length - 1, 256, device="cuda").long()
    results = []
    for b, h in ((0, 0), (x.case.batch - 1, x.case.heads - 1)):
        kv_head = h * x.case.kv_heads // x.case.heads
        q, k, v = x.q[b, h, rows].double(), x.k[b, kv_head].double(), x.v[b, kv_head].double()
        scores = q @ k.mT / math.sqrt(x.case.dim)
        if x.case.causal:
            scores.masked_fill_(torch.arange(x.case.length, device="cuda") > rows[:, None], -math.inf)
        results.append(scores.softmax(-1) @ v)
    return rows, torch.stack(results)


def relative_error(out: torch.Tensor, rows: torch.Tensor, exact: torch.Tensor) -> float:
    sample = torch.stack([out[0, 0, rows], out[-1, -1, rows]]).double()
    return ((sample - exact).norm() / exact.norm()).item()


def checked(x: Operands, makers: Mapping[str, Callable[[Operands], Run]]) -> tuple[dict[str, Run], dict[str, str]]:
    """The runs whose results are right, and why the others are left out."""
    rows, exact = exact_rows(x)
    runs: dict[str, Run] = {}
    failures: dict[str, str] = {}
    for name, make in makers.items():
        try:
            run = make(x)
            error = relative_error(run(), rows, exact)
        except Exception as reason:
            failures[name] = why(reason)
            continue
        if error <= ALLOWED_ERROR:
            runs[name] = run
        else:
            failures[name] = f"wrong: relative error {error:.1e}"
    return runs, failures


def compare(cases: list[Case]) -> Iterator[dict[str, object]]:
    """Measure every peer on every case; print a table and yield its entries."""
    print(f"{'TFLOP/s (spread %)':24}" + "".join(f"{name:>16}" for name in PEERS))
    for case in cases:
        torch._dynamo.reset()
        x = Operands.make(case)
        runs, failures = checked(x, PEERS)
        cells = dict.fromkeys(PEERS, "-")
        for name, times in measure(runs).items():
            tflops = sorted(case.operations / t / 1e9 for t in times)
            spread = 100 * (tflops[-1] - tflops[0]) / tflops[0]
            cells[name] = f"{statistics.median(tflops):.0f} ({spread:.0f})"
            yield {"case": str(case), "peer": name, "tflops": round(statistics.median(tflops), 1), "ms": times}
        print(f"{case!s:24}" + "".join(f"{cell:>16}" for cell in cells.values()), flush=True)
        for name, reason in failures.items():
            yield {"case": str(case), "peer": name, "failure": reason}
            print(f"    {name}: {reason}")


# --------------------------------------------------------------------------------------------------------------------
# Searching for tiles


def candidates(case: Case) -> list[Launch]:
    """Tiles worth trying: 16 to 64 query rows a warp, and what shared memory may hold."""
    limit = device_of(torch.cuda.current_device()).shared_bytes
    found = []
    for block_q, block_kv, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4)):
        shared = 2 * case.dim * (block_q + 2 * stages * block_kv)
        accumulator = block_q * (case.dim + block_kv) / (32 * warps)
        if shared <= limit and accumulator <= 256 and (block_q, warps) != (64, 8):
            found.append(Launch(block_q, block_kv, warps, stages))
    return found


def search(cases: list[Case]) -> Iterator[dict[str, object]]:
    """Time flashfuse with every candidate and print the best five of each case."""
    for case in cases:
        x = Operands.make(case)
        (q, k, v), spec = x.grouped(), spec_of(case)
        sizes = list(q.shape[:-2])

        def maker(
            launch: Launch, q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v,
            spec: AttentionSpec = spec, sizes: list[int] = sizes,
        ) -> Callable[[Operands], Run]:  # fmt: skip
            return lambda y: (
                lambda: attention_forward(AttentionCall(spec, q, k, v, [], sizes), launch)[0].view(y.q.shape)
            )

        makers = {str((r.block_q, r.block_kv, r.num_warps, r.num_stages)): maker(r) for r in candidates(case)}
        _compile_all(x, makers)
        runs, failures = checked(x, makers)
        first = measure(runs, rounds=1)
        best = sorted(first, key=lambda name: first[name][0])[:5]
        times = measure({name: runs[name] for name in best}, rounds=3)
        ranked = sorted(times, key=lambda name: statistics.median(times[name]))
        rates = {name: case.operations / statistics.median(times[name]) / 1e9 for name in ranked}
        print(f"{case!s:24}" + "  ".join(f"{name}: {rate:.0f}" for name, rate in rates.items()), flush=True)
        wrong = [name for name, reason in failures.items() if reason.startswith("wrong")]
        if wrong:
            print(f"    wrong results: {', '.join(wrong)}")
        yield {"case": str(case), "launches": rates, "failures": failures}


def _compile_all(x: Operands, makers: Mapping[str, Callable[[Operands], Run]]) -> None:
    """Run every candidate once, in threads: the compiler releases the interpreter lock for most of its time."""

    def attempt(make: Callable[[Operands], Run]) -> None:
        try:
            make(x)()
        except Exception:  # what does not compile or does not fit is reported by `checked`
            return

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(attempt, makers.values()))
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--search", action="store_true", help="sweep flashfuse's tiles instead of comparing peers")
    parser.add_argument("--cases", nargs="*", default=[""], help="only cases whose name holds one of these texts")
    arguments = parser.parse_args()
    require_cuda("benchmarks.dense")
    print(f"{versions()}, bf16 forward")
    cases = [case for case in CASES if any(text in str(case) for text in arguments.cases)]
    entries = []
    with torch.no_grad():
        for entry in (search if arguments.search else compare)(cases):
            entries.append(entry)
            if arguments.json:
                arguments.json.write_text(json.dumps(entries, indent=1))


if __name__ == "__main__":
    main()
