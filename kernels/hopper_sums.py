"""Sums over the rows of a tile that matrix instructions have made, warp by warp: PTX for Gluon.

A warp has 16 rows of 64 columns: a thread 2 columns of each 8, of the row lane / 4 and the 8th after that. Of what is
left when the two are added, a thread keeps half of the columns and passes the others on, three times, to threads that
hold other rows: 14 exchanges in the place of 48, and in the end thread by thread the columns lie next to each other.
"""

from __future__ import annotations

from collections.abc import Iterator

from triton.experimental.gluon import language as gl

# Elements of a thread; of as many results the first two are sums.
_ELEMENTS = 32


def _folded() -> str:
    """The text: operands are results and elements."""
    return "\n".join(["{", *_statements(), "}"])


def _statements() -> Iterator[str]:
    yield ".reg .f32 s<16>, kept, passed;"
    yield ".reg .b32 lane, bit;"
    yield ".reg .pred upper;"
    yield "mov.u32 lane, %laneid;"
    for column in range(16):
        first = _ELEMENTS + column // 2 * 4 + column % 2
        yield f"add.f32 s{column}, ${first}, ${first + 2};"
    for lanes, columns in ((16, 8), (8, 4), (4, 2)):
        yield f"and.b32 bit, lane, {lanes};"
        yield "setp.ne.b32 upper, bit, 0;"
        for column in range(columns):
            yield f"selp.f32 kept, s{column + columns}, s{column}, upper;"
            yield f"selp.f32 passed, s{column}, s{column + columns}, upper;"
            yield f"shfl.sync.bfly.b32 passed, passed, {lanes}, 31, -1;"
            yield f"add.f32 s{column}, kept, passed;"
    for result in range(_ELEMENTS):
        yield f"mov.b32 ${result}, {f's{result}' if result < 2 else 0};"


FOLDED: gl.constexpr = gl.constexpr(_folded())
FOLDED_OPERANDS: gl.constexpr = gl.constexpr(",".join([*("=f",) * _ELEMENTS, *("f",) * _ELEMENTS]))
