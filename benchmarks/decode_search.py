"""Searching for the flash-decoding kernels' tiles and splits, to fill `launch_decode.TABLE` from.

First every tile that fits in shared memory, with the splits that `num_splits` gives it; then the best of them with
other numbers of splits. What the table chooses is timed beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from benchmarks.decode_cases import FULL, TINY, Operands, Plan, Point
from benchmarks.decode_peers import call_at, plain
from benchmarks.measure import graphed, measure_cold, why
from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.launch import Launch, device_index, device_of, shape_of
from flashfuse.kernels.launch_decode import prepare_decode
from flashfuse.kernels.prepared import Prepared
from tests.forms import exact
from tests.numerics import assert_close_to_exact

THREADS = 16
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# More programs of the split kernel than any device has places for.
MOST_PROGRAMS = 2048
# How many tiles are tried with other numbers of splits, and how many choices are timed again and shown.
TILES, SHOWN = 3, 5
POINTS = tuple(
    Point(batch, heads, kv_heads, 1024 * length, dim)
    for heads, kv_heads, dim, sizes in (
        (32, 8, 128, ((1, 1), (1, 8), (1, 32), (8, 8), (64, 1), (64, 8))),
        (32, 8, 64, ((1, 8), (8, 8))),
        (32, 8, 256, ((1, 8), (8, 8))),
    )
    for batch, length in sizes
)
TILES_TRIED = tuple(
    Launch(16, block_kv, warps, stages)
    for block_kv, depths in ((32, (3, 4, 5)), (64, (2, 3, 4, 5)), (128, (2, 3)))
    for warps, stages in itertools.product((2, 4, 8), depths)
)
TINY_POINTS: tuple[Point, ...] = (Point(1, 2, 1, 40, 16),)
TINY_TILES: tuple[Launch, ...] = (Launch(16, 16, 4, 2), Launch(16, 32, 4, 2))


class Choice(NamedTuple):
    """splits: None for what `num_splits` gives."""

    launch: Launch
    splits: int | None

    @property
    def tiles(self) -> str:
        return str((self.launch.block_q, self.launch.block_kv, self.launch.num_warps, self.launch.num_stages))

    def __str__(self) -> str:
        return f"{self.tiles} x {self.splits}"


def chosen(prepared: Prepared) -> Choice:
    """The tiles and splits of a prepared call."""
    variant = prepared.launches[0].variant
    tiles = Launch(*(variant[name] for name in ("BLOCK_Q", "BLOCK_KV", "num_warps", "num_stages")))
    return Choice(tiles, prepared.numbers[-2])


# --------------------------------------------------------------------------------------------------------------------
# One point


@dataclasses.dataclass(frozen=True, eq=False)
class Searched:
    """A point's calls, one a set, and what their outputs are to be."""

    x: Operands
    calls: tuple[AttentionCall, ...]
    eager: torch.Tensor
    precise: torch.Tensor

    @staticmethod
    def make(point: Point, plan: Plan, device: str) -> Searched:
        x = Operands.make(point, plan, device)
        sample = x.sample()
        calls = tuple(call_at(point, *tensors) for tensors in x.sets)
        return Searched(x, calls, plain(*sample), exact(plain, sample))

    def prepared(self, choice: Choice | None) -> Prepared:
        """None is what the table chooses."""
        prepared = prepare_decode(self.calls[0], *(choice or (None, None)))
        assert prepared is not None, "no kernel takes the call"
        return prepared

    def sweep(self, choice: Choice | None, pool: object) -> Callable[[], list[torch.Tensor]]:
        """One call for each set, in a CUDA graph where there is a GPU. Raises AssertionError where it is wrong."""
        prepared, shape = self.prepared(choice), self.x.sets[0][0].shape

        def run() -> list[torch.Tensor]:
            return [prepared.run(call)[0].view(shape) for call in self.calls]

        graph = graphed(run, pool) if self.calls[0].q.is_cuda else run
        assert_close_to_exact(self.x.sampled(graph()), self.eager, self.precise)
        return graph


def candidates(call: AttentionCall, tiles: tuple[Launch, ...]) -> list[Launch]:
    """The tiles that fit in the device's shared memory."""
    shape = shape_of(call.spec, call.q_len, call.head_dim, call.value_dim)
    limit = device_of(device_index(call)).shared_bytes
    return [launch for launch in tiles if launch.shared_bytes(shape) <= limit]


def other_splits(point: Point, launch: Launch) -> list[int]:
    """Numbers of splits that leave every share a tile, and that give the device no more programs than it could want."""
    programs = point.batch * point.kv_heads
    most = min(point.kv_len // launch.block_kv, max(1, MOST_PROGRAMS // programs))
    return [splits for splits in SPLITS if splits <= most]


def search(
    point: Point, plan: Plan, device: str, tiles: tuple[Launch, ...]
) -> tuple[Choice, dict[Choice, float], dict[str, str]]:
    """What the table chooses, the microseconds of every choice, and why the others have none."""
    at = Searched.make(point, plan, device)
    own, launches = chosen(at.prepared(None)), candidates(at.calls[0], tiles)
    compile_all(at, [Choice(launch, None) for launch in launches])
    notes: dict[str, str] = {}

    def timed(choices: list[Choice], rounds: int) -> dict[Choice, float]:
        sweeps, pool = {}, torch.cuda.graph_pool_handle() if device == "cuda" else None
        for choice in dict.fromkeys(choices):
            try:
                sweeps[choice] = at.sweep(choice, pool)
            except Exception as reason:  # too much shared memory, or a wrong result
                notes[str(choice)] = why(reason)
        return {c: 1e3 * statistics.median(t) / len(at.calls) for c, t in measure_cold(sweeps, rounds, device).items()}

    times = timed([own, *(chosen(at.prepared(Choice(launch, None))) for launch in launches)], rounds=1)
    best = list(dict.fromkeys(choice.launch for choice in ranked(times)))[:TILES]
    times |= timed([Choice(launch, n) for launch in best for n in other_splits(point, launch)], rounds=1)
    times |= timed([own, *ranked(times)[:SHOWN]], rounds=3)
    return own, times, notes


def ranked(times: Mapping[Choice, float]) -> list[Choice]:
    return sorted(times, key=lambda choice: times[choice])


def compile_all(at: Searched, choices: list[Choice]) -> None:
    """Run every choice once, in threads: the compiler releases the interpreter lock for part of its time."""
    if not at.calls[0].q.is_cuda:
        return

    def attempt(choice: Choice) -> None:
        try:
            at.prepared(choice).run(at.calls[0])
        except Exception:  # told when it is timed
            return

    attempt(choices[0])  # makes what all share
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(attempt, choices[1:]))
    torch.cuda.synchronize()


# --------------------------------------------------------------------------------------------------------------------
# All points


def shown(point: Point, own: Choice, times: Mapping[Choice, float], rate: Callable[[float], str]) -> str:
    """One line: the table's choice, and the best."""
    best = ranked(times)[:SHOWN]
    table = f"{times[own]:.1f} us, {times[own] / times[best[0]]:.2f} x best" if own in times else "failed"
    further = ", ".join(f"{choice} {times[choice]:.1f}" for choice in best[1:])
    first = f"{best[0]} {times[best[0]]:.1f} us ({rate(times[best[0]])})"
    return f"{point!s:24}table {own} {table}; best {first}; then {further}"


def losses(results: Mapping[Point, Mapping[Choice, float]]) -> dict[Launch, float]:
    """By which factor each tile at its best is slower than the best of its points, in the geometric mean."""
    factors: dict[Launch, list[float]] = {}
    for times in results.values():
        best: dict[Launch, float] = {}
        for choice, us in times.items():
            best[choice.launch] = min(us, best.get(choice.launch, math.inf))
        for launch, us in best.items():
            factors.setdefault(launch, []).append(us / min(times.values()))
    whole = {launch: f for launch, f in factors.items() if len(f) == len(results)}
    return {launch: math.exp(statistics.fmean(map(math.log, f))) for launch, f in whole.items()}


def run(arguments: argparse.Namespace, best_read: float) -> None:
    """Search at every chosen point, and print what is best at each and over all of a head dim."""
    started = time.perf_counter()
    if arguments.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("--search on a CPU needs TRITON_INTERPRET=1")
    if arguments.tiny:
        plan, points, tiles = dataclasses.replace(TINY, max_sets=1), TINY_POINTS, TINY_TILES
    else:
        plan, points, tiles = dataclasses.replace(FULL, rotated_bytes=2**29, max_sets=32), POINTS, TILES_TRIED
    results: dict[Point, dict[Choice, float]] = {}
    entries = []
    for point in (p for p in points if any(text in str(p) for text in arguments.only)):
        kv_bytes = point.kv_bytes(plan.dtype)

        def rate(us: float, kv_bytes: int = kv_bytes) -> str:
            return f"{1e-3 * kv_bytes / us:.0f} GB/s, {100e6 * kv_bytes / us / best_read:.0f} %"

        own, times, notes = search(point, plan, arguments.device, tiles)
        if not times:
            print(f"{point!s:24}nothing could be timed")
        else:
            results[point] = times
            print(shown(point, own, times, rate), flush=True)
        for note, names in by_note(notes).items():
            print(f"    {len(names)} choices, such as {names[0]}: {note}")
        us = {str(choice): times[choice] for choice in ranked(times)}
        entries.append({"point": str(point), "table": str(own), "us": us, "notes": notes})
        if arguments.json:
            arguments.json.write_text(json.dumps(entries, indent=1))
    for dim in dict.fromkeys(point.dim for point in results):
        loss = losses({point: times for point, times in results.items() if point.dim == dim})
        best = sorted(loss, key=lambda launch: loss[launch])[:SHOWN]
        print(f"D{dim}, all points: " + ", ".join(f"{Choice(r, None).tiles} {loss[r]:.3f}" for r in best))
    print(f"{len(results)} points in {time.perf_counter() - started:.0f} s")


def by_note(notes: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, note in notes.items():
        found.setdefault(note, []).append(name)
    return found
