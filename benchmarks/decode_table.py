"""One decode step of the table: each peer's time, the keys and values it reads a second, and what that is beside."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from benchmarks.decode_peers import BASELINE, PEERS
from benchmarks.table import Row, number, table_of


@dataclass(frozen=True)
class DecodeRow(Row):
    """ms, launched_ms: of a call in a CUDA graph and launched one by one.

    read: the share of the keys that a peer has to read. kv_bytes: of all keys and values. sets: how many take
    turns. splits: of the keys, in flash-decoding kernels. best_read: bytes a second that the device reads at best.
    """

    launched_ms: dict[str, float] = field(default_factory=dict)
    read: dict[str, float] = field(default_factory=dict)
    kv_bytes: int = 0
    sets: int = 0
    splits: int | None = None
    best_read: float = 0.0

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


PEER_HEADER = ("us", "us launched", "GB/s", "of best read", f"x {BASELINE}", "launched", "error")
HEADER = ("point", "MB", "sets", "splits", "peer", *PEER_HEADER)


def cells(row: DecodeRow, peer: str) -> tuple[str, ...]:
    """A peer's figures in the order of PEER_HEADER; ratios are how many times as fast as the baseline."""
    ms = row.ms.get(peer)
    rate = None if ms is None else row.kv_bytes * row.read[peer] / (1e-3 * ms)
    return (
        *(microseconds(times.get(peer)) for times in (row.ms, row.launched_ms)),
        "-" if rate is None else f"{rate / 1e9:.0f}",
        "-" if rate is None or not row.best_read else f"{100 * rate / row.best_read:.0f} %",
        *(ratio(times, peer) for times in (row.ms, row.launched_ms)),
        number(row.errors.get(peer)),
    )


def microseconds(ms: float | None) -> str:
    return "-" if ms is None else f"{1e3 * ms:.1f}"


def ratio(times: dict[str, float], peer: str) -> str:
    return f"{times[BASELINE] / times[peer]:.2f}" if {peer, BASELINE} <= times.keys() else "-"


def measured(row: DecodeRow) -> list[str]:
    """The peers that have a time."""
    return [peer for peer in PEERS if peer in row.ms or peer in row.launched_ms]


def markdown(rows: list[DecodeRow]) -> str:
    best = max((row.best_read for row in rows), default=0.0)
    lines: list[tuple[str, ...]] = []
    for row in rows:
        sizes = (row.name, f"{row.kv_bytes / 1e6:.1f}", str(row.sets), str(row.splits or "-"))
        lines += [(*sizes, peer, *cells(row, peer)) for peer in measured(row)]
    return table_of(f"one query, reads {best / 1e9:.0f} GB/s at best", HEADER, lines)


def show(row: DecodeRow) -> None:
    print(f"{row.name}: {row.kv_bytes / 1e6:.1f} MB, {row.sets} sets, splits {row.splits or '-'}")
    print(" " * 28 + "".join(f"{label:>14}" for label in PEER_HEADER))
    for peer in measured(row):
        print(f"    {peer:24}" + "".join(f"{cell:>14}" for cell in cells(row, peer)))
    for peer, note in row.notes.items():
        print(f"    {peer}: {note}", flush=True)
