"""Prepare the one pass of `hopper_backward` for a call: whether it takes it, and how its operands are described."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flashfuse.kernels.backward_rows import ROWS_BLOCK, scaled_rows_kernel
from flashfuse.kernels.backward_variants import slack_in
from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.codegen_backward import BackwardProgram
from flashfuse.kernels.codegen_hopper import load_hopper_backward, pair_read
from flashfuse.kernels.hopper_pairs import of_pairs, own_positions, pair_axes, sharing, slot_of
from flashfuse.kernels.launch import Device, padded, shape_of
from flashfuse.kernels.launch_hopper import (
    BATCH_AXES,
    MAX_SPREAD,
    SPECIAL,
    blocks_of,
    depth_of,
    has_gluon,
    has_map,
    is_computed_by,
    is_hopper,
    is_read,
    read_constants,
    tensor_map,
)
from flashfuse.kernels.launch_ranges import query_ranges
from flashfuse.kernels.prepared import Buffer, KernelLaunch, loop_over, padded_axes, strides_of
from flashfuse.kernels.prepared_backward import Gradient, Launched, OnePass
from flashfuse.kernels.spec import AttentionSpec

# Shared memory of the program with the most.
SHARED_BYTES = 227 * 1024
# Columns of a tile, and the queries beside them: what registers and shared memory hold.
BLOCK_Q = {64: 128, 128: 64}
# The same, and from how many queries on it is faster than the plain passes.
LEAST_QUERIES = {64: 2048, 128: 256}
# Elements of dq that one program multiplies by the slope.
SCALED_ELEMENTS = 8192


def takes(
    device: Device,
    call: AttentionCall,
    grad_out: torch.Tensor,
    program: BackwardProgram,
    wanted: Sequence[int],
    gradients: Sequence[Gradient | None],
    deterministic: bool,
) -> bool:
    """Whether the one pass computes this: the gradients of q, k and v, and sums for one of pairs.

    gradients: of q, k and v. deterministic: whether results have to be the same from run to run, as its dq is not.
    """
    pairs = of_pairs(call)
    found = [gradient for gradient in gradients if gradient is not None]
    operands = (call.q, call.k, call.v, grad_out)
    return (
        is_hopper(device, SHARED_BYTES)
        and not deterministic
        and _takes_wanted(call.spec, program, wanted)
        and all(gradient.own is gradient.written for gradient in found)
        and len(call.batch) <= BATCH_AXES
        and takes_program(call.spec, program)
        and _is_long_enough(call)
        # The sums of dq have rows of this many float32.
        and call.head_dim % 4 == 0
        and call.q.shape[:-2] == grad_out.shape[:-2] == torch.Size(call.batch)
        and all(x.dtype == call.spec.product_dtype for x in operands)
        and all(map(is_read, operands))
        and (pairs is None or is_read(own_positions(pairs)))
        and all(has_map(own) for own, _ in found)
    )


def takes_program(spec: AttentionSpec, program: BackwardProgram) -> bool:
    """Whether its numbers are those that the kernel reads, and of pairs are none or one tensor's tiles."""
    shape = shape_of(spec, 1, 1, 1)
    return (
        spec.product_dtype in (torch.float16, torch.bfloat16)
        and spec.probs_dtype == spec.product_dtype
        and spec.normaliser == "softmax"
        and spec.key is None
        and spec.value is None
        and not spec.dropout
        and ((shape.captured_bytes, shape.looked_up) == (0, False) or pair_read(spec) is not None)
        and program.forward.factor_masked is None
        and program.forward.row_factor is None
        and program.derivatives.masked_where != "product"
        # Of these, only what a soft cap takes leaves it registers for its sums.
        and not is_computed_by(spec.score, SPECIAL - {"tanh"})
    )


def _takes_wanted(spec: AttentionSpec, program: BackwardProgram, wanted: Sequence[int]) -> bool:
    """Whether those are the gradients of q, k and v, and at most that of what is read for each pair.

    The latter waits for sums of the scores' gradients, which the kernel forms where a slope is 0 or 1.
    """
    if tuple(wanted) == (0, 1, 2):
        return True
    read = pair_read(spec)
    terms = (*program.row_terms, *program.key_terms, *program.pair_terms)
    return (
        read is not None
        and tuple(wanted) == (0, 1, 2, 3 + slot_of(read))
        and len(terms) == len(program.pair_terms) == len(program.corrected) == 1
        and program.derivatives.is_flat
    )


def _is_long_enough(call: AttentionCall) -> bool:
    block = block_of(call.head_dim, call.value_dim)
    return block is not None and call.q_len >= LEAST_QUERIES[block]


def block_of(head_dim: int, value_dim: int) -> int | None:
    """The columns of a tile, None where there is no such tile, or less than half of it would be in use."""
    blocks = blocks_of(head_dim, value_dim)
    return None if blocks is None or max(blocks) not in BLOCK_Q else max(blocks)


def backward_constants(
    spec: AttentionSpec,
    program: BackwardProgram,
    head_dim: int,
    value_dim: int,
    axes: tuple[bool, ...],
    ranged: bool,
    fewer_queries: bool,
    owned: tuple[int, ...],
) -> Mapping[str, Any]:
    """Compile-time arguments and options.

    axes: on which of three what is read for each pair has positions of its own. owned: the positions that own keys.
    """
    from flashfuse.kernels.hopper_backward import MAX_REGISTERS

    functions = load_hopper_backward(spec, ranged, fewer_queries)
    block = max(padded(head_dim), padded(value_dim))
    shared_batch = program.forward.shared_batch
    # Tiles of as much work, and those that read the same pairs, at one time.
    together = math.prod(owned) if program.forward.longest_first else sharing(pair_read(spec), owned, shared_batch)
    return {
        "GRADS_MASKED": functions.score_and_grad_masked,
        "GRADS_FULL": functions.score_and_grad_full,
        "QUERY_BOUNDS": functions.query_bounds,
        "SCALE": program.derivatives.scale,
        "SLOPE": program.derivatives.slope,
        "SLACK": slack_in(spec, program),
        "FULL_MASKED": program.derivatives.full_where is not None,
        **read_constants(functions),
        "PAIRS_AXES": axes,
        "SHARED_BATCH": shared_batch,
        "DEPTH": depth_of(head_dim),
        "DEPTH_V": depth_of(value_dim),
        "BLOCK_D": block,
        "BLOCK_Q": BLOCK_Q[block],
        "SPREAD": math.gcd(MAX_SPREAD, together),
        "num_warps": 4,
        "maxnreg": MAX_REGISTERS,
        "launch_pdl": True,
    }


def prepare_one_pass(
    device: Device,
    call: AttentionCall,
    grad_out: torch.Tensor,
    program: BackwardProgram,
    wanted: Sequence[int],
    gradients: tuple[Gradient | None, Gradient | None, Gradient | None],
) -> OnePass | None:
    """What computes the gradients of q, k and v; None where the plain passes do. `gradients`: where those go."""
    dq, dk, dv = gradients
    if not has_gluon():
        return None
    deterministic = torch.are_deterministic_algorithms_enabled()
    if not takes(device, call, grad_out, program, wanted, gradients, deterministic):
        return None
    block = block_of(call.head_dim, call.value_dim)
    if block is None or dq is None or dk is None or dv is None:
        return None
    # It takes Gluon, which the other kernels do without.
    from flashfuse.kernels.hopper_backward import HALF, attention_hopper_backward_kernel
    from flashfuse.kernels.hopper_query_visits import BLOCK_KV, GROUP_KV

    owned = tuple(dk.own.size[:-2])
    rows = BLOCK_Q[block]
    positions, kv_tiles = math.prod(call.batch), -(-call.kv_len // BLOCK_KV.value)
    sums = Buffer.contiguous((positions, call.q_len, call.head_dim), torch.float32)
    rows_len = -(-call.q_len // ROWS_BLOCK.value) * ROWS_BLOCK.value
    left = Buffer.contiguous((positions, kv_tiles, rows_len), torch.float32) if program.corrected else None
    ranges, ranged, fewer_queries = None, call.kv_ranges is not None, call.q_len <= call.kv_len
    if call.kv_ranges is not None:
        ranges = query_ranges(call.kv_ranges, call.q_len, call.kv_len, BLOCK_KV.value)
    of_ranges = (0,) * 6 if ranges is None else strides_of(torch.empty(ranges.buffer.size, device="meta"), call.batch)
    read, pairs = pair_read(call.spec), of_pairs(call)
    variant = backward_constants(
        call.spec, program, call.head_dim, call.value_dim, pair_axes(pairs), ranged, fewer_queries, owned
    )
    programs = math.prod(owned) * kv_tiles
    loop = loop_over(call.batch, owned)
    numbers = (of_ranges, *padded_axes(owned), *padded_axes(loop), call.q_len, call.kv_len, call.program_sizes)
    strides = tuple(c.stride() for c in call.captured)
    operands = (
        *(tensor_map(Buffer.like(x), rows, block) for x in (call.q,)),
        *(tensor_map(Buffer.like(x), GROUP_KV.value, block) for x in (call.k, call.v)),
        tensor_map(Buffer.like(grad_out), rows, block),
        *(tensor_map(x.own, GROUP_KV.value, block) for x in (dk, dv)),
        tensor_map(sums, 64, 64, batch_axes=1),
        # Behind the last query and key it gives 0, whatever is there.
        None if pairs is None else tensor_map(Buffer.like(own_positions(pairs)), HALF.value, GROUP_KV.value),
    )
    return OnePass(
        sums=sums,
        left=left,
        operands=operands,
        pairs=None if read is None else slot_of(read),
        ranges=ranges,
        one_pass=Launched(KernelLaunch(attention_hopper_backward_kernel, programs, variant), numbers, strides),
        scaled=_scaled(call, program, dq, kv_tiles),
    )


def _scaled(call: AttentionCall, program: BackwardProgram, dq: Gradient, kv_tiles: int) -> Launched:
    """The kernel that makes the gradient of q of its sums, and right deltas of those of the scores' gradients."""
    block = padded(call.head_dim)
    rows = SCALED_ELEMENTS // block
    variant = {
        "SLOPE": program.derivatives.slope,
        "WITH_SINK": call.spec.sink is not None,
        "HEAD_DIM": call.head_dim,
        "BLOCK_D": block,
        "BLOCK_Q": rows,
        "launch_pdl": True,
    }
    strides = strides_of(dq.own.without_memory, call.batch)
    programs = math.prod(call.batch) * -(-call.q_len // rows)
    launch = KernelLaunch(scaled_rows_kernel, programs, variant).of((strides,))
    return Launched(launch, (strides, *padded_axes(call.batch), call.q_len, kv_tiles))
