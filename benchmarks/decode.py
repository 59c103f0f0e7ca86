"""Decode steps on one GPU: one query and many keys, against SDPA, FlexAttention and eager code under Inductor.

    python -m benchmarks.decode [--json FILE] [--markdown FILE] [--only TEXT ..]
    python -m benchmarks.decode --quick     # the main points and peers, only in CUDA graphs
    python -m benchmarks.decode --search    # the kernels' own tiles and splits, shape by shape
    python -m benchmarks.decode --device cpu --tiny   # the same code at sizes for a CPU, whose times mean nothing

flashfuse compiles eager code as models write it (repeat_kv, matmul, softmax, matmul), and so does Inductor; "operator"
is flashfuse's operator called alone. Sets of keys and values take turns, so that none is in a cache when it is read.
Calls are timed in a CUDA graph and launched one by one, peers in shuffled rounds, medians. A figure is printed only
when the first and the last head of the first and the last set are right against float64: flashfuse's by the contract of
docs/numerics.md, a peer's when its error is at most twice eager's. Bytes are those of keys and values; the best read is
measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

import flashfuse
from benchmarks import decode_search
from benchmarks.bandwidth import best_read
from benchmarks.decode_cases import FULL, QUICK, TINY, Operands, Plan, Point
from benchmarks.decode_peers import PEERS, QUICK_PEERS, Code, Peer, call_at
from benchmarks.decode_search import chosen
from benchmarks.decode_table import DecodeRow, markdown, show
from benchmarks.measure import graphed, measure_cold, require_cuda, versions, why
from benchmarks.table import allowed_error, relative_error
from flashfuse.kernels.launch_decode import prepare_decode, takes
from tests.forms import exact
from tests.numerics import assert_close_to_exact

ROUNDS = 3
# The share of the device's memory that keys and values may take.
MEMORY = 0.6
# Sizes differ from point to point, and every rival is compiled for each.
RECOMPILES = 256

Sweep = Callable[[], list[torch.Tensor]]


# --------------------------------------------------------------------------------------------------------------------
# Checking


class Truth:
    """What a point's peers are to compute of the sampled heads."""

    def __init__(self, x: Operands) -> None:
        self.x = x
        self._of_code: dict[Code, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, peer: Peer) -> tuple[torch.Tensor, torch.Tensor]:
        """The result of the peer's code, in its own type and in float64."""
        if peer.code not in self._of_code:
            inputs = (*self.x.sample(), *peer.extras(self.x))
            self._of_code[peer.code] = peer.code(*inputs), exact(peer.code, inputs)
        return self._of_code[peer.code]

    def mistake(self, row: DecodeRow, name: str, peer: Peer, outputs: list[torch.Tensor]) -> str | None:
        """What is wrong with a peer's outputs, one a set; None where nothing is. The error is noted in the row."""
        eager, precise = self.of(peer)
        found = self.x.sampled(outputs)
        row.errors[name] = relative_error(found, precise)
        if not peer.own:
            allowed = allowed_error(relative_error(eager, precise), eager.dtype)
            wrong = row.errors[name] > allowed
            return f"wrong: relative error {row.errors[name]:.1e}, allowed {allowed:.1e}" if wrong else None
        try:
            assert_close_to_exact(found, eager, precise)
        except AssertionError as problem:
            return f"wrong: {problem}"
        return None


def sweep_of(peer: Peer, x: Operands) -> Sweep:
    """One call for each set."""
    function = peer.make(x)
    return lambda: [function(*tensors) for tensors in x.sets]


def checked(row: DecodeRow, peers: Mapping[str, Peer], truth: Truth) -> dict[str, Sweep]:
    """The sweeps whose results are right; errors and what went wrong are noted in the row."""
    right: dict[str, Sweep] = {}
    for name, peer in peers.items():
        before = len(flashfuse.reports())
        try:
            sweep = sweep_of(peer, truth.x)
            problem = truth.mistake(row, name, peer, sweep())
            for report in flashfuse.reports()[before:]:
                report.assert_fused(sites=1)
        except Exception as error:
            problem = why(error)
        row.read[name] = peer.read
        if problem:
            row.notes[name] = problem
            free(truth.x.device.type)
        else:
            right[name] = sweep
    return right


def captured(row: DecodeRow, sweeps: Mapping[str, Sweep], peers: Mapping[str, Peer], truth: Truth) -> dict[str, Sweep]:
    """The sweeps as CUDA graphs that are right when replayed; on a CPU as they are."""
    on_gpu = truth.x.device.type == "cuda"
    pool = torch.cuda.graph_pool_handle() if on_gpu else None
    graphs: dict[str, Sweep] = {}
    for name, sweep in sweeps.items():
        try:
            graph = graphed(sweep, pool) if on_gpu else sweep
            problem = truth.mistake(row, name, peers[name], graph())
        except Exception as error:
            problem = why(error)
        if problem:
            row.notes[f"{name}, in a graph"] = problem
        else:
            graphs[name] = graph
    return graphs


# --------------------------------------------------------------------------------------------------------------------
# One point


def compare(
    point: Point, plan: Plan, peers: Mapping[str, Peer], device: str, best: float = 0.0, launched: bool = True
) -> DecodeRow:
    """Compile, check and time every peer at a point. best: bytes a second that the device reads."""
    kv_bytes, sets = point.kv_bytes(plan.dtype), plan.sets(point)
    row = DecodeRow(str(point), str(point), kv_bytes=kv_bytes, sets=sets, best_read=best)
    if not fits(kv_bytes * sets, device):
        row.notes["all"] = "its keys and values do not fit the device"
        return row
    x = Operands.make(point, plan, device)
    truth = Truth(x)
    right = checked(row, peers, truth)
    ms = medians(captured(row, right, peers, truth), sets, device)
    free(device)
    launched_ms = medians(right, sets, device) if launched else {}
    return DecodeRow(**{**vars(row), "ms": ms, "launched_ms": launched_ms, "splits": splits_at(x)})


def medians(sweeps: Mapping[str, Sweep], calls: int, device: str) -> dict[str, float]:
    """Milliseconds of a call."""
    times = measure_cold(sweeps, ROUNDS, device)
    return {name: statistics.median(times[name]) / calls for name in times}


def splits_at(x: Operands) -> int | None:
    """Into how many shares the operator's keys go; None where the flash-decoding kernels do not take it."""
    call = call_at(x.point, *x.sets[0])
    prepared = prepare_decode(call) if takes(call) else None
    return None if prepared is None else chosen(prepared)[1]


def fits(size: int, device: str) -> bool:
    return device == "cpu" or size <= MEMORY * torch.cuda.get_device_properties(device).total_memory


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def rows(chosen: argparse.Namespace, best: float) -> Iterator[DecodeRow]:
    """Measure every chosen point."""
    plan = TINY if chosen.tiny else QUICK if chosen.quick else FULL
    family = None
    for point in plan.points:
        if not any(text in str(point) for text in chosen.only):
            continue
        if point.family != family:
            torch._dynamo.reset()
            flashfuse.reset()
            family = point.family
        names = [n for n in (QUICK_PEERS if chosen.quick else PEERS) if point in plan.everything or PEERS[n].everywhere]
        row = compare(point, plan, {n: PEERS[n] for n in names}, chosen.device, best, launched=not chosen.quick)
        if any(PEERS[name].own for name in names if name in row.notes):
            family = None  # what was not fused is compiled and told again, and not found compiled
        yield row
        free(chosen.device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--only", nargs="*", default=[""], help="only points whose name holds one of these texts")
    parser.add_argument("--quick", action="store_true", help="only the main points and peers, in CUDA graphs")
    parser.add_argument("--search", action="store_true", help="sweep the kernels' tiles and splits instead")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda":
        require_cuda("benchmarks.decode")
    started = time.perf_counter()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=RECOMPILES):
        best, reader = best_read((TINY if chosen.tiny else FULL).read_bytes, chosen.device)
        print(f"{versions()}, one query, reads {best / 1e9:.0f} GB/s at best ({reader})", flush=True)
        if chosen.search:
            decode_search.run(chosen, best)
            return
        found: list[DecodeRow] = []
        for row in rows(chosen, best):
            found.append(row)
            show(row)
            if chosen.json:
                chosen.json.write_text(json.dumps([r.to_json() for r in found], indent=1))
            if chosen.markdown:
                chosen.markdown.write_text(markdown(found))
    print(f"{len(found)} points in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
