"""Sums over the rows of a tile that matrix instructions have made, of each warp and then of all: PTX, and Gluon.

A warp has 16 rows of 64 columns: a thread 2 columns of each 8, of the row lane / 4 and the 8th after that. Of what is
left when the two are added, a thread keeps half of the columns and passes the others on, three times, to threads that
hold other rows: 14 exchanges in the place of 48, and in the end thread by thread the columns lie next to each other.
"""

from __future__ import annotations

from collections.abc import Iterator

from triton.experimental import gluon
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


@gluon.jit
def warp_sums(x):
    """[4, 64]: the sums of x [64, 64] over the 16 rows of each warp."""
    found = gl.inline_asm_elementwise(FOLDED, FOLDED_OPERANDS, [x], dtype=gl.float32, is_pure=True, pack=32)
    # Of a thread's elements in 8 groups of columns and 2 of rows, the first of each.
    found = found.reshape([4, 2, 8, 2, 2, 2, 4, 2]).permute((0, 2, 6, 7, 1, 3, 4, 5))
    for _ in gl.static_range(4):
        found, _rest = gl.split(found)
    return found.reshape([4, 64])


@gluon.jit
def group_sums(left_s, first, LAYOUT: gl.constexpr):
    """[64]: the sums of what the 8 warps of both groups have summed, always in one order."""
    first_4 = gl.sum(left_s.index(first).load(LAYOUT), 0)
    return first_4 + gl.sum(left_s.index(first + 1).load(LAYOUT), 0)


@gluon.jit
def clear(ptr, start, end):
    """Make numbers 0, 64 at a time."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for at in range(start, end, 64):
        gl.store(ptr + at + gl.arange(0, 64, LAYOUT), gl.zeros([64], gl.float32, LAYOUT))
