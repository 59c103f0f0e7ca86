"""What is read for the columns of a tile alone: a kernel for Hopper makes these reads once for each tile.

There a thread has sixteen columns of a tile or more, and two rows: a read at a column where a score needs it is made by
every thread for each of those, one at a row is not worth the trouble.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch

from flashfuse.kernels.expr import Expr, Gather, Load, Loaded, Pointwise, free_symbols, loads, walk
from flashfuse.kernels.modules import finished
from flashfuse.kernels.source import is_needed_everywhere, reads_body
from flashfuse.kernels.spec import KV_IDX, Q_IDX, to_text

# Bytes that there are for each column, with those of a coded row: what tiles of pairs leave.
COLUMN_BYTES = 8
# What elements are kept as, where it is not their own type.
_KEPT_AS = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.bool: torch.int8}

_SOURCE = '''"""Reads of {reads}, for each position."""

IMPORTS

@triton.jit
def {name}_HASH(n0, n1, n2, n3, {position}, q_len, kv_len, sizes, captured, strides):
{body}
'''


@dataclass(frozen=True)
class Columns:
    """Reads of a program at one position of a tile alone.

    position: that of a column.
    coded: reads of 64-bit integers, one of columns and one of rows, that are only asked whether they are equal: 32 bits
        that are equal where they are take half of the registers.
    """

    position: sympy.Symbol
    reads: tuple[Load, ...]
    coded: tuple[Load, ...]

    @classmethod
    def of(cls, program: Expr, position: sympy.Symbol) -> Columns:
        """As many as there is room for, what is coded first."""
        found = cls(position, (), _asked_whether_equal(program, position))
        room = COLUMN_BYTES - (torch.int32.itemsize if found.coded else 0)
        for read in sorted(dict.fromkeys(loads(program)), key=lambda read: read not in found.coded):
            if isinstance(read, Load) and _at(read) == {position} and is_needed_everywhere(program, read):
                more = replace(found, reads=(*found.reads, read))
                found = more if sum(dtype.itemsize for dtype in more.types) <= room else found
        return found

    @property
    def types(self) -> tuple[torch.dtype, ...]:
        """How what is read is kept."""
        kept = (_KEPT_AS.get(read.dtype, read.dtype) for read in self.reads)
        return tuple(torch.int32 if read in self.coded else k for read, k in zip(self.reads, kept, strict=True))

    @property
    def code_of(self) -> int | None:
        """Which of the reads is coded."""
        return next((i for i, read in enumerate(self.reads) if read in self.coded), None)

    @property
    def made(self) -> dict[Expr, Expr]:
        """What reads are in a program that is given `columns`: those at columns in their order, then the coded row."""
        given = (*self.reads, *(read for read in self.coded if read not in self.reads))
        types = {read: torch.int32 for read in self.coded}
        return {
            read: Loaded(types.get(read, read.dtype), read.tensor, read.indices, f"columns[{i}]")
            for i, read in enumerate(given)
        }

    def sources(self) -> Mapping[str, tuple[str, str]]:
        """(hash, source text) of the modules with functions of these names, where there is anything for them to do.

        columns: position -> what is read there, a tuple. coded_rows: position -> the coded read of rows.
        """
        rows = [read for read in self.coded if read not in self.reads]
        row = Q_IDX if self.position == KV_IDX else KV_IDX
        found = {"columns": (self.position, self.reads), "coded_rows": (row, rows)}
        return {name: _module_source(name, *of) for name, of in found.items() if of[1]}


def _module_source(name: str, position: sympy.Symbol, reads: Sequence[Load]) -> tuple[str, str]:
    text = ", ".join(map(to_text, reads))
    kept = [_KEPT_AS.get(read.dtype, read.dtype) for read in reads]
    source = _SOURCE.format(name=name, reads=text, position=position.name, body=reads_body(reads, kept))
    return finished(source, reads[0].dtype)


def _at(read: Expr) -> frozenset[sympy.Symbol]:
    return free_symbols(read) & {Q_IDX, KV_IDX}


def _asked_whether_equal(program: Expr, column: sympy.Symbol) -> tuple[Load, ...]:
    """The reads of 64-bit integers, if they are one of a column and one of a row, compared and nothing else."""
    reads = Counter(e for e in walk(program) if isinstance(e, (Load, Gather)) and e.dtype == torch.int64)
    comparisons = [e.args for e in walk(program) if isinstance(e, Pointwise) and e.op in ("eq", "ne")]
    compared = Counter(e for args in comparisons if set(args) == set(reads) for e in args)
    found = tuple(read for read in reads if isinstance(read, Load) and is_needed_everywhere(program, read))
    row = Q_IDX if column == KV_IDX else KV_IDX
    is_pair = len(reads) == 2 and sorted(map(_at, found), key=str) == sorted(({column}, {row}), key=str)
    return found if is_pair and compared == reads else ()
