"""Pieces of the kernels for Hopper: tiles of rows by tensor maps, waits, branches that stay branches. In Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma_wait


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
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The stage after this one in a ring, and the parity of the phase that is waited for there."""
    last = (stage == STAGES - 1).to(gl.int32)
    return (stage + 1) * (1 - last), phase ^ last


@gluon.jit
def arrived(product, OUTSTANDING: gl.constexpr):
    """A product that was issued, when no more than OUTSTANDING later ones are under way."""
    return warpgroup_mma_wait(num_outstanding=OUTSTANDING, deps=(product,))


@gluon.jit
def opaque(x):
    """x, behind what looks like an effect: a branch around it stays one, where selects would be taken in every tile."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)
