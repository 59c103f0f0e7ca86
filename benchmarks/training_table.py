"""One row of the table of training: what was recovered and measured, beside the targets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from benchmarks.table import Row, number, table_of

OWN = ("flashfuse", "operator")
PEERS = (*OWN, "flex", "flex tuned", "sdpa flash", "sdpa cudnn", "inductor")
# The last is as far as the target goes.
RIVALS = ("inductor", "sdpa flash", "sdpa cudnn", "flex tuned", "flex")


@dataclass(frozen=True)
class TrainingRow(Row):
    """ms: of forward and backward; bytes: of both; errors: the largest of the output and all gradients.

    target: how many times as fast as FlexAttention's the backward pass is to be. backward_ms: its part of ms.
    deterministic: whether a peer's gradients were the same twice, bit by bit.
    """

    target: float = 1.0
    backward_ms: dict[str, float] = field(default_factory=dict)
    deterministic: dict[str, bool] = field(default_factory=dict)

    @staticmethod
    def from_json(entry: dict[str, object]) -> TrainingRow:
        return TrainingRow(**entry)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


HEADER = (
    *("case", "shape", "fused", "mask", "score", "error", "eager's"),
    *PEERS,
    *("deterministic", "operator x flex", *(f"x {rival}" for rival in RIVALS), "target"),
)


def cells(row: TrainingRow) -> tuple[str, ...]:
    """A row of the table, in the order of HEADER; ratios are of the backward pass."""
    error = max((row.errors[name] for name in OWN if name in row.ms), default=None)
    steady = [f"{name} {'yes' if same else 'no'}" for name, same in row.deterministic.items()]
    return (
        *(row.name, row.shape, "yes" if row.sites else "no", row.mask, row.score),
        *(number(error), number(row.eager_error)),
        *(figures(row, peer) for peer in PEERS),
        *(", ".join(steady) or "-", ratio(row, "operator", "flex")),
        *(ratio(row, "flashfuse", rival) for rival in RIVALS),
        target(row),
    )


def figures(row: TrainingRow, peer: str) -> str:
    """Milliseconds backward and of the whole step, extra MiB; "-" where the peer cannot or is wrong."""
    if peer not in row.ms:
        return "-"
    return f"{row.backward_ms[peer]:.2f} / {row.ms[peer]:.2f} ms, {row.bytes[peer] / 2**20:.0f} MiB"


def ratio(row: TrainingRow, own: str, rival: str) -> str:
    """How many times as fast backward as the rival."""
    times = row.backward_ms
    return f"{times[rival] / times[own]:.2f}" if {own, rival} <= times.keys() else "-"


def target(row: TrainingRow) -> str:
    """What x flex is to be, and whether it is."""
    reached = ratio(row, "flashfuse", "flex")
    if reached == "-":
        return f"{row.target}"
    return f"{row.target} {'met' if float(reached) >= row.target else 'missed'}"


def markdown(rows: list[TrainingRow]) -> str:
    return table_of("bf16, backward / forward and backward", HEADER, map(cells, rows))


def show(row: TrainingRow) -> None:
    print(f"{row.name} ({row.shape})")
    for label, cell in list(zip(HEADER, cells(row), strict=True))[2:]:
        if cell != "-":
            print(f"    {label:16}{cell}")
    for peer, note in row.notes.items():
        print(f"    {peer}: {note}", flush=True)
