"""Which weights dropout keeps: a function of the seed and the position alone, whatever the tiles and the device.

Eight neighbouring keys share one call of Philox4x32 (Salmon et al., SC 2011, https://doi.org/10.1145/2063384.2063405)
with the counter (key // 8, query, batch position, 0) and the two halves of the seed as its key. Key % 8 = 2 w + h takes
half h (0 the lower) of word w, and is kept where that number of 16 bits is at least `threshold`. The batch position
counts the batch axes in row-major order. Seven rounds, the fewest that the paper found to pass every test of BigCrush.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

ROUNDS = 7
# Seeds are drawn below this: what an int64 without its sign holds.
SEEDS = 2**63 - 1
# Keys that share a counter.
GROUP = 8
_WORD = 0xFFFFFFFF
# The highest bit of each half word of an int64.
_SIGNS = 0x8000800080008000 - 2**64
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def threshold(p: float) -> int:
    """The numbers of 16 bits below this are dropped: p of them, to 2**-17, and neither none nor all."""
    return min(max(round(p * 2**16), 1), 2**16 - 1)


def keep_scale(p: float) -> float:
    """What a weight that is kept is multiplied by."""
    return 1.0 / (1.0 - p)


def philox(counter: Sequence[torch.Tensor], key: Sequence[torch.Tensor], rounds: int = ROUNDS) -> list[torch.Tensor]:
    """Four words of 32 random bits for each counter of four, int64 tensors that broadcast; key: two numbers."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(rounds):
        # Products wrap around, and so does what is left above a word: only a and c are multiplied and have to be exact.
        low, high = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = _mixed(high, b, k0), high, _mixed(low, d, k1), low
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return [a, b & _WORD, c, d & _WORD]


def _mixed(product: torch.Tensor, word: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The higher word of a product, xor a word, xor the key, in as few temporary tensors as their shapes allow."""
    upper = product >> 32
    whole = torch.broadcast_shapes(upper.shape, word.shape) == upper.shape
    return (upper.bitwise_xor_(word) if whole else upper ^ word).bitwise_xor_(key).bitwise_and_(_WORD)


def kept(
    seed: torch.Tensor, p: float, batch: torch.Tensor, queries: range, keys: range, dtype: torch.dtype
) -> torch.Tensor:
    """1 where a weight is kept and 0 where it is dropped, [N.., queries, keys] in `dtype`.

    seed: one int64. batch: the numbers [N..] of batch positions, int64.
    """
    first, device = keys.start // GROUP, batch.device
    groups = torch.arange(first, -(-keys.stop // GROUP), device=device)
    rows = torch.arange(queries.start, queries.stop, device=device)
    rank = batch.dim()
    counter = (groups.view(*(1,) * rank, 1, -1), rows.view(*(1,) * rank, -1, 1), batch[..., None, None])
    number = seed.reshape(())
    words = philox((*counter, torch.zeros_like(counter[2])), (number & _WORD, (number >> 32) & _WORD))
    found = torch.empty(*batch.shape, len(rows), len(groups), GROUP, dtype=dtype, device=device)
    pairs = torch.stack([words[0] | (words[1] << 32), words[2] | (words[3] << 32)], -1)
    # Numbers without a sign compare as signed ones do with their highest bits turned over.
    torch.ge(pairs.bitwise_xor_(_SIGNS).view(torch.int16), threshold(p) - 2**15, out=found)
    offset = keys.start - first * GROUP
    return found.flatten(-2)[..., offset : offset + len(keys)]
