"""What dropout multiplies a tile of weights by, in Triton: the same numbers as `dropout`, which defines them."""

import triton
import triton.language as tl

from flashfuse.kernels import dropout

ROUNDS: tl.constexpr = tl.constexpr(dropout.ROUNDS)
GROUP: tl.constexpr = tl.constexpr(dropout.GROUP)


@triton.jit
def kept_scales(draw, q_idx, kv_start, BLOCK_KV: tl.constexpr, LEAST: tl.constexpr, SCALE: tl.constexpr):
    """SCALE where a weight is kept and 0 where it is dropped, float32 [block_q, block_kv].

    draw: the seed, int64, and the position of the batch. q_idx: [block_q]; the keys begin at kv_start, a multiple of 8.
    """
    seed, position = draw
    BLOCK_Q: tl.constexpr = q_idx.shape[0]
    groups = kv_start // GROUP + tl.arange(0, BLOCK_KV // GROUP)
    # [block_q, block_kv / 8]
    counter = tl.broadcast_to(groups[None, :].to(tl.uint32), [BLOCK_Q, BLOCK_KV // GROUP])
    row = tl.broadcast_to(q_idx[:, None].to(tl.uint32), counter.shape)
    zero = counter * 0
    a, b, c, d = tl.philox(seed, counter, row, zero + position.to(tl.uint32), zero, ROUNDS)
    # [block_q, block_kv / 8, 2, 2, 2], the last axis the halves of a word
    words = tl.join(tl.join(a, c), tl.join(b, d))
    halves = tl.join(words & 0xFFFF, words >> 16)
    # Numbers made from booleans last: what moves between threads to the layout of the weights is a byte each.
    kept = tl.reshape(halves >= LEAST, [BLOCK_Q, BLOCK_KV])
    return kept.to(tl.int32).to(tl.float32) * SCALE
