"""Pieces of the kernels for Hopper: tiles of rows by tensor maps, waits, branches that stay branches. In Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashfuse.kernels.backward_rows import batch_position

# Rows of a tile of scores, half of them of each group of warps.
ROWS: gl.constexpr = gl.constexpr(128)
# The least of 64-bit integers.
MINUS: gl.constexpr = gl.constexpr(-(2**63))


@gluon.jit
def tile_and_position(
    number, tiles, batch_0, batch_1, batch_2, batch_3, SHARED_BATCH: gl.constexpr, SPREAD: gl.constexpr
):  # fmt: skip
    """(tile, n0, n1, n2, n3): one of `tiles` at each position, in the order in which programs take them.

    SPREAD positions take a tile before the next is begun. SHARED_BATCH: whether those next to each other are of the
    first axis.
    """
    round_of = number // (tiles * SPREAD)
    rest = number % (tiles * SPREAD)
    position = round_of * SPREAD + rest % SPREAD
    if SHARED_BATCH:
        n0 = position % batch_0
        _, n1, n2, n3 = batch_position(position // batch_0, 1, batch_1, batch_2, batch_3)
    else:
        n0, n1, n2, n3 = batch_position(position, batch_0, batch_1, batch_2, batch_3)
    return rest // SPREAD, n0, n1, n2, n3


@gluon.jit
def load_rows(desc, n0, n1, n2, row, barrier, slot, column=0):
    """Rows from `row` on of [n0, n1, n2, T, D] into shared memory; the barrier hears of their bytes."""
    tma.async_copy_global_to_shared(
        desc, [n0, n1, n2, row, column], barrier, slot._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)
    )


@gluon.jit
def load_own(desc, n0, n1, n2, row, barrier, slot, AXES: gl.constexpr, column=0):
    """Rows of an operand; on axes where it has one position for all, that."""
    load_rows(
        desc, n0 if AXES[0] else 0, n1 if AXES[1] else 0, n2 if AXES[2] else 0, row, barrier, slot, column
    )  # fmt: skip


@gluon.jit
def store_rows(desc, n0, n1, n2, row, slot, x, column=0):
    """Store rows by way of shared memory; rows and columns that do not exist are left out."""
    slot.store(x)
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(
        desc, [n0, n1, n2, row, column], slot._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)
    )


@gluon.jit
def halves(x):
    """The left and the right columns of a tile."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit
def column_buffers(TYPES: gl.constexpr, CODE_OF: gl.constexpr, SLOTS: gl.constexpr, COLUMNS: gl.constexpr):
    """Shared memory for what is read for the columns of tiles [ROWS, COLUMNS], of some types, and of coded rows."""
    NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    found = ()
    for i in gl.static_range(len(TYPES)):
        found = found + (gl.allocate_shared_memory(TYPES[i], [SLOTS, COLUMNS], NUMBERS),)  # type: ignore[assignment]  # noqa: RUF005
    if CODE_OF is not None:
        found = found + (gl.allocate_shared_memory(gl.int32, [SLOTS, ROWS], NUMBERS),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@gluon.jit
def read_columns(
    at, idx, row_idx, captured, captured_strides, READ: gl.constexpr, CODED_ROWS: gl.constexpr, CODE_OF: gl.constexpr
):  # fmt: skip
    """What `column_buffers` are for, for the columns at idx and rows at row_idx."""
    if READ is None:
        return ()
    else:
        n0, n1, n2, n3, q_len, kv_len, sizes = at
        values = READ(n0, n1, n2, n3, idx, q_len, kv_len, sizes, captured, captured_strides)
        if CODE_OF is None:
            return values
        else:
            rows = CODED_ROWS(n0, n1, n2, n3, row_idx, q_len, kv_len, sizes, captured, captured_strides)[0]
            columns = values[CODE_OF]
            fits = gl.minimum(_fits(columns), _fits(rows))
            column_codes, row_codes = columns.to(gl.int32), rows.to(gl.int32)
            if fits == 0:
                # Rare. The code is the last column that holds the same; of rows that no column equals it is -1.
                row_codes = row_codes * 0 - 1
                for column in range(idx.shape[0]):
                    this = gl.max(gl.where(gl.arange(0, idx.shape[0], idx.type.layout) == column, columns, MINUS), 0)
                    column_codes = gl.where(columns == this, column, column_codes)
                    row_codes = gl.where(rows == this, column, row_codes)
            found = ()
            for i in gl.static_range(len(values)):
                found = found + (column_codes if i == CODE_OF else values[i],)  # type: ignore[assignment]  # noqa: RUF005
            return found + (row_codes,)  # noqa: RUF005


@gluon.jit
def _fits(integers):
    """Whether all fit in 32 bits, 1 or 0."""
    return gl.min((integers == integers.to(gl.int32)).to(gl.int32), 0)


@gluon.jit
def store_columns(buffers, slot, values):
    """What `read_columns` gives, into a slot."""
    for i in gl.static_range(len(buffers)):
        buffers[i].index(slot).store(values[i])


@gluon.jit
def load_columns(at, LAYOUT: gl.constexpr):
    """What a slot holds for the rows of a group, [1, COLUMNS] or [ROWS / 2, 1] beside tiles of a layout.

    at: (`column_buffers`, the slot, the group, which of the columns is coded).
    """
    buffers, slot, GROUP, CODE_OF = at
    NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    OF_COLUMNS: gl.constexpr = len(buffers) if CODE_OF is None else len(buffers) - 1
    found = ()
    for i in gl.static_range(OF_COLUMNS):
        found = found + (buffers[i].index(slot).load(gl.SliceLayout(0, LAYOUT))[None, :],)  # type: ignore[assignment]  # noqa: RUF005
    if CODE_OF is not None:
        rows = buffers[OF_COLUMNS]
        rows = rows._reinterpret(gl.int32, [2 * rows.shape[0], ROWS // 2], NUMBERS).index(2 * slot + GROUP)
        found = found + (rows.load(gl.SliceLayout(1, LAYOUT))[:, None],)  # type: ignore[assignment]  # noqa: RUF005
    return found


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The stage after this one in a ring, and the parity of the phase that is waited for there."""
    last = (stage == STAGES - 1).to(gl.int32)
    return (stage + 1) * (1 - last), phase ^ last


@gluon.jit
def issued(rows, columns, zeros, DEPTH: gl.constexpr):
    """rows columns^T of two tiles in shared memory, under way, of whose columns those from DEPTH on are 0.

    DEPTH: a multiple of 16. The product is taken in powers of two, the largest first: 96 = 64 + 32.
    """
    if rows.shape[1] == DEPTH:
        return warpgroup_mma(rows, columns.permute((1, 0)), zeros, use_acc=False, is_async=True)
    else:
        product = zeros
        for i in gl.static_range(4):
            product = _with_part(rows, columns, product, DEPTH, 128 >> i)
        return product


@gluon.constexpr_function
def parts_of(depth):
    """How many products `issued` issues."""
    return depth.bit_count()


@gluon.jit
def _with_part(rows, columns, product, DEPTH: gl.constexpr, PART: gl.constexpr):
    """The part of `issued` that is PART columns deep, behind those of larger ones, if there is such."""
    START: gl.constexpr = DEPTH // (2 * PART) * (2 * PART)
    if DEPTH // PART % 2 == 0:
        return product
    else:
        return warpgroup_mma(
            rows.slice(START, PART, 1), columns.slice(START, PART, 1).permute((1, 0)), product,
            use_acc=START > 0, is_async=True,
        )  # fmt: skip


@gluon.jit
def arrived(product, OUTSTANDING: gl.constexpr):
    """A product that was issued, when no more than OUTSTANDING later ones are under way."""
    return warpgroup_mma_wait(num_outstanding=OUTSTANDING, deps=(product,))


@gluon.jit
def opaque(x):
    """x, behind what looks like an effect: a branch around it stays one, where selects would be taken in every tile."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def in_words(x, dtype: gl.constexpr):
    """Numbers [ROWS, COLUMNS] in a type of 16 bits, neighbours of a row in one integer: [ROWS, COLUMNS / 2].

    What a loop carries as 16-bit numbers the assembler puts together anew in every pass.
    """
    low, high = x.reshape([x.shape[0], x.shape[1] // 2, 2]).split()
    PACK: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(PACK, "=r,f,f", [low, high], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def out_of_words(words, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """What `in_words` was given, in a layout."""
    both = gl.join((words & 0xFFFF).to(gl.uint16), (words >> 16).to(gl.uint16))
    return gl.convert_layout(both.reshape([words.shape[0], words.shape[1] * 2]).to(dtype, bitcast=True), LAYOUT)
