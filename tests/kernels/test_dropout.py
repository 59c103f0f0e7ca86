"""Dropout: what is dropped, its statistics, and the operator with it against the reference that is given the mask."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from attention_cases import Call, make_call
from dropout_cases import PROGRAMS, program
from gradient_cases import Gradients, check_gradients
from numerics import assert_close_to_exact, assert_lse_close_to_exact

import flashfuse.kernels.ops  # noqa: F401
from flashfuse.kernels import tiled
from flashfuse.kernels.dropout import ROUNDS, kept, philox, threshold

attention = torch.ops.flashfuse.attention
ONES = 0xFFFFFFFF

# Counter, key, and what they give, of Random123's own test vectors for philox4x32.
VECTORS = {
    7: (
        ((0,) * 4, (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((ONES,) * 4, (ONES,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ),
    10: (
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ),
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiled, "BLOCK_Q", 8)
    monkeypatch.setattr(tiled, "BLOCK_KV", 12)
    monkeypatch.setattr(tiled, "WORKSPACE", 8 * 12 * 4)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def mask(p: float, *sizes: int, seed: int = 7) -> torch.Tensor:
    """What is kept, 1 or 0, of batch positions, queries and keys."""
    batch, queries, keys = sizes
    return kept(torch.tensor(seed), p, torch.arange(batch), range(queries), range(keys), torch.float64)


# --------------------------------------------------------------------------------------------------------------------
# The numbers


@pytest.mark.parametrize("rounds", VECTORS)
def test_known_answers(rounds: int) -> None:
    for counter, key, words in VECTORS[rounds]:
        found = philox([*map(torch.tensor, counter)], [*map(torch.tensor, key)], rounds)
        assert tuple(map(int, found)) == words


@pytest.mark.parametrize("seed", [0, 1, 0x123456789ABCDEF, 2**63 - 1, -1, -(2**63)])
def test_the_definition(seed: int) -> None:
    """Word by word, as the module states it."""
    p, batch, query = 0.3, 5, 1234567
    found = kept(torch.tensor([seed]), p, torch.tensor([batch]), range(query, query + 1), range(3, 30), torch.bool)
    for key in range(3, 30):
        counter = [torch.tensor(n) for n in (key // 8, query, batch, 0)]
        words = philox(counter, [torch.tensor(seed % 2**32), torch.tensor(seed // 2**32 % 2**32)], ROUNDS)
        number = int(words[key % 8 // 2]) >> (16 * (key % 2)) & 0xFFFF
        assert bool(found[0, 0, key - 3]) == (number >= round(p * 65536))


def test_tiles_are_parts_of_one_mask() -> None:
    whole = mask(0.4, 6, 40, 64)
    part = kept(torch.tensor(7), 0.4, torch.tensor([[1, 2], [4, 5]]), range(7, 20), range(13, 50), torch.float64)
    assert torch.equal(part, whole.view(2, 3, 40, 64)[:, 1:, 7:20, 13:50])


def test_probabilities_never_drop_none_or_all() -> None:
    assert [threshold(p) for p in (1e-9, 0.1, 0.5, 1 - 1e-9)] == [1, 6554, 32768, 65535]


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_fraction_that_is_kept(p: float) -> None:
    """Within five standard deviations of a binomial, over all and along every axis."""
    found, rate = mask(p, 16, 128, 256), 1 - threshold(p) / 2**16
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        average, count = found.mean(others), found.numel() / found.shape[axis]
        assert ((average - rate).abs() <= 5 * math.sqrt(rate * (1 - rate) / count)).all()
    assert abs(found.mean().item() - rate) <= 5 * math.sqrt(rate * (1 - rate) / found.numel())


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_independent(p: float) -> None:
    """Correlations along batch, queries and keys, near and far, and of two seeds, are those of chance."""
    found, other = mask(p, 16, 128, 256), mask(p, 16, 128, 256, seed=8)
    pairs = [(found, other)]
    for axis in range(3):
        size = found.shape[axis]
        pairs += [(found.narrow(axis, 0, size - n), found.narrow(axis, n, size - n)) for n in (1, 2, 3, 4, 7, 8, 9)]
    # Neighbours of counters on two axes at once.
    pairs += [
        (found[:-1, 1:], found[1:, :-1]),
        (found[:, 8:, :-1], found[:, :-8, 1:]),
        (found[:, 1:, :-8], found[:, :-1, 8:]),
    ]
    rate = 1 - threshold(p) / 2**16
    for a, b in pairs:
        correlation = ((a - rate) * (b - rate)).mean().item() / (rate * (1 - rate))
        assert abs(correlation) <= 5 / math.sqrt(a.numel())


def test_same_seed_same_mask() -> None:
    assert torch.equal(mask(0.3, 2, 9, 33), mask(0.3, 2, 9, 33))
    assert not torch.equal(mask(0.3, 2, 9, 33), mask(0.3, 2, 9, 33, seed=7 + 2**32))


# --------------------------------------------------------------------------------------------------------------------
# The operator


def backward(call: Call, grad: torch.Tensor, wanted: Sequence[int]) -> Gradients:
    """Through the operator's autograd."""
    operands = [x.detach().requires_grad_(at in wanted) for at, x in enumerate(call.operands)]
    out, _ = attention(*call.on(operands).arguments)
    return list(torch.autograd.grad(out, [operands[at] for at in wanted], grad))


@pytest.mark.parametrize(("p", "dtype"), [(0.6, torch.float32), (0.1, torch.bfloat16), (0.6, torch.float16)], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_forward_and_backward_drop_the_same(name: str, p: float, dtype: torch.dtype) -> None:
    call = program(name, p, dtype)
    out, lse = attention(*call.arguments)
    assert_close_to_exact(out, call.eager()[0], call.exact()[0])
    assert_lse_close_to_exact(lse, call.eager()[1], call.exact()[1])
    check_gradients(call, backward, draws=4)


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "empty-rows"])
def test_gradcheck(name: str) -> None:
    call = program(name, 0.3, torch.float64, dim=2)
    operands = [x.requires_grad_() if x.is_floating_point() else x for x in call.operands]
    torch.autograd.gradcheck(lambda *x: attention(*call.on(x).arguments)[0], operands, fast_mode=True)


def test_grouped_heads_draw_apart() -> None:
    """Keys that heads share are dropped for each head by itself, in the order of the batch axes."""
    call = make_call("qk", (2, 2, 3, 17, 8), 19, k_batch=(2, 2, 1), dropout=0.4)
    assert_close_to_exact(attention(*call.arguments)[0], call.eager()[0], call.exact()[0])
    check_gradients(call, backward)
    call = make_call("qk", (2, 3, 17, 8), 19, k_batch=(1, 3), dropout=0.4)
    assert_close_to_exact(attention(*call.arguments)[0], call.eager()[0], call.exact()[0])
    check_gradients(call, backward)


def test_a_number_that_is_no_number_stays_one() -> None:
    """Eager code multiplies by 0, which leaves NaN: in rows without a key, and where a weight overflows."""
    call = make_call("where(kv_idx < 0, qk, -inf)", (2, 5, 8), dropout=0.9)
    assert attention(*call.arguments)[0].isnan().all()
    call = make_call("qk * inf", (2, 5, 8), dropout=0.9, normaliser="none")
    assert attention(*call.arguments)[0].isnan().any()


def test_opcheck() -> None:
    call = program("bias", 0.3)
    operands = [x.requires_grad_() for x in call.operands]
    torch.library.opcheck(attention.default, call.on(operands).arguments)


def test_seed_and_dropout_belong_together() -> None:
    with_seed, without = program("plain", 0.3).arguments, program("plain", 0.0).arguments
    with pytest.raises(RuntimeError, match=r"dropout is 0\.3, and there is no seed"):
        attention(*with_seed[:-1])
    with pytest.raises(RuntimeError, match=r"dropout is 0\.0, and there is a seed"):
        attention(*without[:-1], with_seed[-1])
    for seed in (torch.tensor(1, dtype=torch.int32), torch.tensor([1, 2])):
        with pytest.raises(RuntimeError, match="seed must be one int64"):
            attention(*with_seed[:-1], seed)
    assert attention(*with_seed[:-1], with_seed[-1].reshape(1))[0].isfinite().all()
