"""Prepare `hopper_dense` for a call: whether it takes it, and how its operands are described."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from flashfuse.kernels.backward_variants import slack_in
from flashfuse.kernels.call import AttentionCall
from flashfuse.kernels.captured_grad import PairTarget
from flashfuse.kernels.codegen_backward import BackwardProgram, Term
from flashfuse.kernels.codegen_hopper import load_hopper_forward, load_hopper_pairs, pair_read
from flashfuse.kernels.expr import free_symbols, loads
from flashfuse.kernels.hopper_pairs import of_pairs, own_axes, own_positions, pair_axes, slot_of
from flashfuse.kernels.launch import Device
from flashfuse.kernels.launch_hopper import BATCH_AXES, STRIDE_BYTES, has_gluon, has_map, is_hopper, is_read, tensor_map
from flashfuse.kernels.launch_hopper_backward import block_of, takes_program
from flashfuse.kernels.prepared import Buffer, KernelLaunch, loop_over, padded_axes, strides_of
from flashfuse.kernels.prepared_backward import HopperPairs, Launched
from flashfuse.kernels.spec import KV_IDX, Q_IDX, AttentionSpec

# Shared memory of the program with the most.
SHARED_BYTES = 226 * 1024
# By columns of a tile, and how many positions share an element: the tiles of keys and values of one position that are
# loaded ahead. What is not here does not fit.
STAGES = {(64, 1): 4, (64, 2): 4, (64, 3): 4, (64, 4): 4, (128, 1): 4, (128, 2): 2}
# How many queries and keys it takes to be faster than the plain kernel, whose programs are smaller.
LEAST_LENGTH = 1024


def takes(
    device: Device, call: AttentionCall, grad_out: torch.Tensor, program: BackwardProgram, target: PairTarget
) -> bool:
    """Whether the kernel writes the gradients of the read that a target is for."""
    pairs = of_pairs(call)
    return (
        is_hopper(device, SHARED_BYTES)
        and pairs is not None
        and len(program.pair_terms) == 1
        and takes_term(program.pair_terms[target.number])
        and (block_of(call.head_dim, call.value_dim), _shared_by(call, target)) in STAGES
        and min(call.q_len, call.kv_len) >= LEAST_LENGTH
        and len(call.batch) <= BATCH_AXES
        and takes_program(call.spec, program)
        and call.q.shape[:-2] == grad_out.shape[:-2] == torch.Size(call.batch)
        and all(x.dtype == call.spec.product_dtype for x in (call.q, call.k, call.v, grad_out))
        and all(map(is_read, (call.q, grad_out, *map(own_positions, (call.k, call.v, pairs)))))
        and target.view.dtype == pairs.dtype
        and has_map(Buffer.like(target.view))
        and target.view.storage_offset() * pairs.itemsize % STRIDE_BYTES == 0
    )


def takes_term(term: Term) -> bool:
    """Whether it is of a read at pairs, and says what that gets without another such read."""
    reads = [read for program in (term.masked, term.full) for read in loads(program)]
    return term.by_distance is None and not any({Q_IDX, KV_IDX} <= free_symbols(read) for read in reads)


def _shared_by(call: AttentionCall, target: PairTarget) -> int:
    """How many positions share an element."""
    return math.prod(loop_over(call.batch, tuple(target.view.shape[:-2])))


def dense_hopper_constants(
    spec: AttentionSpec,
    program: BackwardProgram,
    block: int,
    axes: tuple[tuple[bool, ...], ...],
    ranged: bool,
    fewer_queries: bool,
    shared_by: int,
) -> Mapping[str, Any]:
    """Compile-time arguments and options, for the only read at pairs.

    axes: of k, v and what is read for each pair, on which of three they have positions of their own.
    """
    from flashfuse.kernels.hopper_dense import MAX_REGISTERS

    (term,) = program.pair_terms
    functions = load_hopper_pairs(spec, term, ranged, fewer_queries)
    return {
        "PAIR_GRAD_MASKED": functions.pair_grad_masked,
        "PAIR_GRAD_FULL": functions.pair_grad_full,
        "PAIR_SCALE": term.scale,
        "GRADS_MASKED": functions.score_and_grad_masked,
        "GRADS_FULL": functions.score_and_grad_full,
        "KV_BOUNDS": load_hopper_forward(spec, ranged, fewer_queries).kv_bounds,
        "SCALE": program.derivatives.scale,
        "SLACK": slack_in(spec, program),
        "FILL_THRESHOLD": program.fill_threshold,
        "LONGEST_FIRST": program.forward.longest_first,
        "K_AXES": axes[0],
        "V_AXES": axes[1],
        "PAIRS_AT": functions.pairs_at,
        "PAIRS_AXES": axes[2],
        "SHARED_BY": shared_by,
        "SLOTS": 1 << (shared_by - 1).bit_length(),
        "BLOCK_D": block,
        "STAGES": STAGES[block, shared_by],
        "num_warps": 4,
        "maxnreg": MAX_REGISTERS,
    }


def prepare_hopper_pairs(
    device: Device, call: AttentionCall, grad_out: torch.Tensor, program: BackwardProgram, target: PairTarget
) -> HopperPairs | None:
    """What writes the gradients of the read that a target is for; None where another kernel does."""
    block = block_of(call.head_dim, call.value_dim)
    read, pairs = pair_read(call.spec), of_pairs(call)
    if not has_gluon() or block is None or read is None or pairs is None:
        return None
    if not takes(device, call, grad_out, program, target):
        return None
    # It takes Gluon, which the other kernels do without.
    from flashfuse.kernels.hopper_dense import BLOCK_KV, BLOCK_Q, GROUP_Q, attention_hopper_dense_backward_kernel

    owned = tuple(target.view.shape[:-2])
    k, v = own_positions(call.k), own_positions(call.v)
    axes = (own_axes(k, call.batch), own_axes(v, call.batch), pair_axes(pairs))
    ranged, fewer_queries = call.kv_ranges is not None, call.q_len <= call.kv_len
    variant = dense_hopper_constants(call.spec, program, block, axes, ranged, fewer_queries, _shared_by(call, target))
    of_ranges = (0,) * 6 if call.kv_ranges is None else strides_of(call.kv_ranges, call.batch)
    lengths = call.q_len, call.kv_len, call.program_sizes
    numbers = (of_ranges, *padded_axes(owned), *padded_axes(loop_over(call.batch, owned)), *lengths)
    queries, keys = GROUP_Q.value, BLOCK_KV.value
    operands = (
        tensor_map(Buffer.like(call.q), queries, block),
        *(tensor_map(Buffer.like(x), keys, block) for x in (k, v)),
        tensor_map(Buffer.like(grad_out), queries, block),
        tensor_map(Buffer.like(target.view), queries, keys),
        # Behind the last query and key it gives 0, whatever is there.
        tensor_map(Buffer.like(own_positions(pairs)), queries, keys),
    )
    programs = math.prod(owned) * -(-call.q_len // BLOCK_Q.value)
    launch = KernelLaunch(attention_hopper_dense_backward_kernel, programs, variant)
    return HopperPairs(operands, slot_of(read), Launched(launch, numbers, tuple(c.stride() for c in call.captured)))
