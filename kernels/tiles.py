"""Loading parts of operands: what every kernel says about tiles, batch positions and stored ranges."""

import triton
import triton.language as tl

from flashfuse.kernels import mask

# Queries that share a row of `ranges_ptr`.
MASK_BLOCK: tl.constexpr = tl.constexpr(mask.MASK_BLOCK)


@triton.jit
def range_pointers(ptr, strides, q_start, q_len, BLOCK_Q: tl.constexpr):
    """Pointers [blocks] to the stored ranges of BLOCK_Q queries."""
    BLOCKS: tl.constexpr = (BLOCK_Q + MASK_BLOCK - 1) // MASK_BLOCK
    block = tl.minimum(q_start // MASK_BLOCK + tl.arange(0, BLOCKS), (q_len - 1) // MASK_BLOCK)
    return ptr + block.to(tl.int64) * strides[4]


@triton.jit
def narrowed(start, full_start, full_end, end, ptrs, stride):
    """A range of keys, and the full range in it, within those stored at `ptrs` [blocks].

    Positions tell the one and data the other; a key is visited for all blocks, and full where it is for each of them.
    """
    end = tl.minimum(end, tl.max(tl.load(ptrs + 3 * stride), 0))
    start = tl.minimum(tl.maximum(start, tl.min(tl.load(ptrs), 0)), end)
    full_start = tl.minimum(tl.maximum(tl.maximum(start, full_start), tl.max(tl.load(ptrs + stride), 0)), end)
    last = tl.minimum(full_end, tl.min(tl.load(ptrs + 2 * stride), 0))
    full_end = tl.maximum(tl.minimum(end, last), full_start)
    return start, full_start, full_end, end


@triton.jit
def in_units(strides, UNIT: tl.constexpr):
    """Strides of which all but the last are multiples of UNIT, as a compiler can tell.

    It knows of multiples of 16 by itself. Rows of 72 numbers of two bytes would else be loaded number by number.
    """
    RANK: tl.constexpr = len(strides)
    # Sums of tuples lose what the compiler knows of the last in later releases of Triton.
    if UNIT == 1:
        return strides
    elif RANK == 2:
        return (strides[0] // UNIT * UNIT, strides[1])
    elif RANK == 3:
        return (strides[0] // UNIT * UNIT, strides[1] // UNIT * UNIT, strides[2])
    elif RANK == 4:
        return (strides[0] // UNIT * UNIT, strides[1] // UNIT * UNIT, strides[2] // UNIT * UNIT, strides[3])
    elif RANK == 5:
        return (
            strides[0] // UNIT * UNIT,
            strides[1] // UNIT * UNIT,
            strides[2] // UNIT * UNIT,
            strides[3] // UNIT * UNIT,
            strides[4],
        )
    else:
        tl.static_assert(RANK == 6)
        return (
            strides[0] // UNIT * UNIT, strides[1] // UNIT * UNIT, strides[2] // UNIT * UNIT,
            strides[3] // UNIT * UNIT, strides[4] // UNIT * UNIT, strides[5],
        )  # fmt: skip


@triton.jit
def all_in_units(strides, UNITS: tl.constexpr):
    """`in_units` of those of several tensors."""
    found = ()
    for i in tl.static_range(len(strides)):
        found = found + (in_units(strides[i], tl.constexpr(UNITS[i])),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def batch_pointer(ptr, strides, n0, n1, n2, n3):
    """The start of the operand's matrix at one batch position."""
    ptr += n0.to(tl.int64) * strides[0] + n1.to(tl.int64) * strides[1]
    return ptr + n2.to(tl.int64) * strides[2] + n3.to(tl.int64) * strides[3]


@triton.jit
def tile_pointers(ptr, rows, columns, strides):
    """[rows, columns] pointers into a matrix."""
    return ptr + rows.to(tl.int64)[:, None] * strides[4] + columns.to(tl.int64)[None, :] * strides[5]


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a b of [m, k] and [k, n], in float32, as a sum of its own.

    A number added to a product would become the start of its sum, and one of -1e4 take the digits of every step; the
    last option, which else concerns fp8 alone, forbids that.
    """
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32, max_num_imprecise_acc=a.shape[1])


@triton.jit
def from_stored(
    x, n0, n1, n2, n3, kv_idx, q_len, kv_len, sizes, captured, captured_strides,
    PROGRAM: tl.constexpr, KEYS_END: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Keys or values [block_kv, block] of a tile of stored ones, with zeros behind the last column and key.

    Positions there repeat the last, so that no load of the program has to be masked for them.
    """
    BLOCK: tl.constexpr = x.shape[1]
    columns = tl.arange(0, BLOCK)
    d_idx = columns if COLUMNS == BLOCK else tl.minimum(columns, COLUMNS - 1)
    key = tl.minimum(kv_idx, kv_len - 1) if KEYS_END else kv_idx
    x = PROGRAM(
        x.to(tl.float32), n0, n1, n2, n3, key[:, None], d_idx[None, :], q_len, kv_len, sizes, captured, captured_strides
    )  # fmt: skip
    if COLUMNS != BLOCK:
        x = tl.where(columns[None, :] < COLUMNS, x, 0.0)
    if KEYS_END:
        x = tl.where(kv_idx[:, None] < kv_len, x, 0.0)
    return x


@triton.jit
def load_columns(ptrs, columns, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Load a tile whose rows all exist, with zeros behind the last column."""
    if COLUMNS == BLOCK:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=columns < COLUMNS, other=0.0)


@triton.jit
def load_keys(ptrs, kv_idx, kv_len, KEYS_END: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Load a key or value tile, with zeros behind the last column and, where KEYS_END says so, behind the last key."""
    columns = tl.arange(0, BLOCK)[None, :]
    if not KEYS_END:
        return load_columns(ptrs, columns, COLUMNS, BLOCK)
    elif COLUMNS == BLOCK:
        return tl.load(ptrs, mask=kv_idx[:, None] < kv_len, other=0.0)
    else:
        return tl.load(ptrs, mask=(kv_idx[:, None] < kv_len) & (columns < COLUMNS), other=0.0)


@triton.jit
def load_along(pointers, mask, positions):
    """A tile of elements, 0 where not `mask`, by threads of which neighbours take neighbouring `positions`.

    positions: [rows, 1] or [1, columns], of those of the tile that lie close together in memory.
    """
    if positions.shape[1] != 1:
        return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0)
    pointers = tl.trans(pointers)
    if mask is None:
        return tl.trans(tl.load(pointers))
    else:
        mask = tl.trans(tl.full(pointers.shape[::-1], True, tl.int1) & mask)
        return tl.trans(tl.load(pointers, mask=mask, other=0))
