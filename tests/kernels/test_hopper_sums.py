"""The sums over rows that PTX forms: its text, carried out for a warp."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from flashfuse.kernels.hopper_sums import FOLDED, FOLDED_OPERANDS

LANES = torch.arange(32)
Registers = dict[str, torch.Tensor]


def carried_out(text: str, registers: Registers) -> None:
    """Statements for 32 lanes: a register is a tensor of theirs."""

    def value(name: str) -> torch.Tensor:
        return registers[name] if name in registers else torch.tensor(int(name)).expand(32)

    for line in text.strip("{}\n").split(";"):
        operation, _, rest = line.strip().partition(" ")
        to, *names = [name.strip("[]{} ") for name in rest.split(",")]
        match operation.split("."):
            case ["mov", "u32"] if names == ["%laneid"]:
                registers[to] = LANES
            case ["mov", *_]:
                registers[to] = value(names[0])
            case ["add", *_]:
                registers[to] = value(names[0]) + value(names[1])
            case ["and", *_]:
                registers[to] = value(names[0]) & value(names[1])
            case ["setp", "ne", *_]:
                registers[to] = value(names[0]) != value(names[1])
            case ["selp", *_]:
                registers[to] = torch.where(value(names[2]), value(names[0]), value(names[1]))
            case ["shfl", "sync", "bfly", *_]:
                registers[to] = value(names[0])[LANES ^ value(names[1])]
            case ["", "reg", *_] | [""]:
                pass
            case _:
                raise AssertionError(f"no meaning for {line}")


def test_sums_over_rows() -> None:
    """Of 16 rows and 64 columns, as matrix instructions lay them out: see PTX, wgmma, accumulator fragments."""
    tile = torch.randint(-1000, 1000, (16, 64)).float()
    operands = FOLDED_OPERANDS.value.split(",")
    results, elements = operands.count("=f"), operands.count("f")
    registers = {}
    for element in range(elements):
        row, column = LANES // 4 + element // 2 % 2 * 8, element // 4 * 8 + LANES % 4 * 2 + element % 2
        registers[f"${results + element}"] = tile[row, column]
    carried_out(FOLDED.value, registers)
    assert torch.equal(torch.stack([registers["$0"], registers["$1"]], 1).flatten(), tile.sum(0))
    assert all(f"${result}" in registers for result in range(results))
