"""The sums over rows that PTX forms: its text, carried out for a warp."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from flashfuse.kernels.hopper_sums import ADD_SUMS, ADD_SUMS_OPERANDS

LANES = torch.arange(32)
Registers = dict[str, torch.Tensor]


def carried_out(text: str, registers: Registers, memory: torch.Tensor) -> None:
    """Statements for 32 lanes: a register is a tensor of theirs."""

    def value(name: str) -> torch.Tensor:
        return registers[name] if name in registers else torch.tensor(int(name)).expand(32)

    for line in text.strip("{}\n").split(";"):
        operation, _, rest = line.strip().partition(" ")
        to, *names = [name.strip("[]{} ") for name in rest.split(",")]
        match operation.split("."):
            case ["red", *_]:
                for place, name in enumerate(names):
                    memory.index_add_(0, value(to) // 4 + place, value(name))
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
            case ["mad", *_]:
                registers[to] = value(names[0]) * value(names[1]) + value(names[2])
            case ["", "reg", *_] | [""]:
                pass
            case _:
                raise AssertionError(f"no meaning for {line}")


def test_sums_over_rows() -> None:
    """Of 16 rows and 64 columns, as matrix instructions lay them out: see PTX, wgmma, accumulator fragments."""
    tile = torch.randint(-1000, 1000, (16, 64)).float()
    operands = ADD_SUMS_OPERANDS.value.split(",")
    results, elements = operands.count("=r"), operands.count("f")
    registers = {f"${results + elements}": torch.full((32,), 4 * 5)}
    for element in range(elements):
        row, column = LANES // 4 + element // 2 % 2 * 8, element // 4 * 8 + LANES % 4 * 2 + element % 2
        registers[f"${results + element}"] = tile[row, column]
    memory = torch.ones(80)
    carried_out(ADD_SUMS.value, registers, memory)
    expected = torch.ones(80)
    expected[5:69] += tile.sum(0)
    assert torch.equal(memory, expected)
    assert all(f"${result}" in registers for result in range(results))
