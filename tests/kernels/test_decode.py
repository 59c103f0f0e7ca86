"""The flash-decoding kernels at small odd sizes: on a GPU where there is one, otherwise in Triton's interpreter.

The interpreter is chosen when triton is imported, so without a GPU these tests run in a process of their own, which
test_interpreter.py starts.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Call, make_call
from masked_programs import FP32_MIN, PROGRAMS, noise
from numerics import assert_close_to_exact, assert_lse_close_to_exact

triton = pytest.importorskip("triton")

from flashfuse.kernels import launch_decode, ops, plans  # noqa: E402, F401
from flashfuse.kernels.launch import Launch  # noqa: E402
from flashfuse.kernels.launch_decode import attention_decode, num_splits, packed_axes, prepare_any, takes  # noqa: E402
from flashfuse.kernels.ranges import mask_ranges, ranges_program  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1; test_interpreter.py runs them",
)
# Tiles so small that small tensors have many.
TILES = Launch(block_q=16, block_kv=16, num_warps=4, num_stages=2)
BOTTOM_RIGHT = "where(kv_idx <= q_idx + (kv_len - q_len), qk * 0.3, -inf)"


@pytest.fixture(autouse=True)
def _nan_filled_outputs() -> Iterator[None]:
    """An element that no kernel writes stays NaN, in the workspace too."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(call: Call, splits: int | None = 2, launch: Launch | None = TILES) -> tuple[torch.Tensor, torch.Tensor]:
    exact, eager = call.exact(), call.eager()
    out, lse = attention_decode(call.to(DEVICE), launch, splits)
    assert (out.dtype, lse.dtype) == (call.spec.out_dtype, call.spec.compute_dtype)
    assert_close_to_exact(out, eager[0], exact[0])
    assert_lse_close_to_exact(lse, eager[1], exact[1])
    return out, lse


def grouped(score: str, q_len: int, kv_len: int, groups: int = 3, **more: Any) -> Call:
    """Two key heads, each shared by `groups` query heads."""
    return make_call(score, (2, groups, q_len, 16), kv_len, k_batch=(2, 1), **more)


@pytest.mark.parametrize(
    ("groups", "q_len", "kv_len"),
    [(1, 1, 17), (1, 16, 40), (3, 1, 47), (4, 2, 37), (7, 1, 33), (7, 5, 33), (8, 2, 50), (12, 1, 19), (28, 1, 35),
     (3, 20, 47)],
)  # fmt: skip
def test_groups_and_lengths(groups: int, q_len: int, kv_len: int) -> None:
    """Whatever number of rows shares keys, in one tile of rows or several."""
    call = grouped(BOTTOM_RIGHT, q_len, kv_len, groups)
    assert packed_axes(call) == (False, groups > 1, False, False)
    check(call)


@pytest.mark.parametrize("splits", [1, 2, 5, 9])
def test_splits(splits: int) -> None:
    """Of 60 keys in tiles of 16: none of one split, two of some, none of some of nine."""
    check(grouped(BOTTOM_RIGHT, 5, 60), splits)


def shifted(name: str) -> tuple[str, list[torch.Tensor]]:
    """A program whose first query is number 30, as where a cache holds 30 keys."""
    score, captured = PROGRAMS[name]
    return score.replace("q_idx", "(q_idx + 30)"), captured


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str, splits: int) -> None:
    """Heads lie along rows here, so what a program reads by head differs from row to row."""
    score, captured = shifted(name)
    dtype = torch.float16 if splits == 1 else torch.float32
    check(
        make_call(score, (2, 3, 2, 20), 37, k_batch=(2, 1), value_dim=12, captured=captured, dtype=dtype), splits=splits
    )


@pytest.mark.parametrize("head", ["n1 == 2", "n1 < 2"])
def test_reads_guarded_by_rows(head: str) -> None:
    """A number and a row of keys that only some of a tile's rows may read."""
    score = f"qk + where({head}, t0[()] + t1[kv_idx], t2[n0])"
    check(make_call(score, (2, 3, 2, 16), 20, k_batch=(2, 1), captured=[torch.tensor(0.5), noise(20), noise(2)]))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("fill", ["-inf", repr(FP32_MIN), "-10000.0"])
@pytest.mark.parametrize("empty_row", ["nan", "zero"])
def test_rows_without_a_key(fill: str, empty_row: str, splits: int) -> None:
    """Queries 0 to 2 have none: -inf gives NaN or zeros, a finite fill the average over all keys, skipped ones too."""
    score = f"where((kv_idx <= q_idx + 17) & (kv_idx > q_idx + 17 - (q_idx // 3) * 8), qk * 0.1, {fill})"
    out, _ = check(grouped(score, 5, 50, 2, empty_row=empty_row), splits)
    if fill == "-inf":
        assert out[:, :, :3].isnan().all() if empty_row == "nan" else (out[:, :, :3] == 0).all()


FURTHER: dict[str, tuple[str, dict[str, Any], list[torch.Tensor]]] = {
    "sink": ("qk * 0.3", {"sink": "t0[n1]"}, [noise(3)]),
    "sink-masked": (f"where(kv_idx <= q_idx + 20, qk * 0.3, {FP32_MIN!r})", {"sink": "t0[n1, q_idx]"}, [noise(3, 2)]),
    "factor": ("qk * 0.3", {"factor": "t0[n1, kv_idx]"}, [noise(3, 37)]),
    "row-factor": (BOTTOM_RIGHT, {"factor": "t0[n1]"}, [noise(3)]),
    "kept": ("qk * 0.3", {"factor": "t0[n1, q_idx]"}, [noise(3, 2) < 0]),
    "sigmoid": (f"sigmoid({BOTTOM_RIGHT})", {"normaliser": "none"}, []),
    "dropout": (BOTTOM_RIGHT, {"dropout": 0.3}, []),
    "dropout-fill": (f"where(kv_idx < q_idx * 20, qk, {FP32_MIN!r})", {"dropout": 0.3}, []),
    "sigmoid-factor": ("sigmoid(qk)", {"normaliser": "none", "factor": "t0[n1]"}, [noise(3)]),
}


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", FURTHER)
def test_sinks_factors_weights_and_dropout(name: str, splits: int) -> None:
    score, more, captured = FURTHER[name]
    check(grouped(score, 2, 37, captured=captured, **more), splits)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("score", [f"qk * 7.0 + where(kv_idx <= q_idx + 20, 0.0, {FP32_MIN!r})", "qk * 20.0"])
def test_huge_and_large_scores(score: str, splits: int) -> None:
    """Splits meet at maxima whose base-2 logarithms overflow, or have lost digits of their sums."""
    check(grouped(score, 2, 50), splits)
    check(grouped(score.replace("+ 20", "- 30"), 2, 50), splits)


KEEP = torch.arange(200) < torch.tensor([[70], [200]])
EACH_HEAD = torch.arange(200) < torch.tensor([[90], [70], [200], [10]])
ADDED = torch.where(KEEP, 0.0, FP32_MIN).view(2, 1, 1, 200).expand(-1, -1, 2, -1)
RANGED = {
    "static-cache": ("where(kv_idx <= t0[q_idx], qk * 0.3, -inf)", [torch.tensor([80, 81])]),
    "left-padding": (f"where(t0[n0, kv_idx], qk * 0.3, {FP32_MIN!r})", [~KEEP]),
    "padding": (f"qk * 0.3 + where(t0[n0, kv_idx], 0.0, {FP32_MIN!r})", [KEEP]),
    "moderate": ("where(t0[n0, kv_idx], qk * 0.3, -10000.0)", [KEEP]),
    "documents": ("where(t0[q_idx + 100] == t0[kv_idx], qk * 0.3, -inf)", [torch.arange(200) // 70]),
    "additive": ("qk * 0.3 + t0[n0, 0, q_idx, kv_idx]", [ADDED]),
    "nothing": (f"where(t0[n0, kv_idx], qk * 0.3, {FP32_MIN!r})", [KEEP & torch.tensor([[True], [False]])]),
    "per-head": ("where(t0[n1, kv_idx], qk * 0.3, -inf)", [EACH_HEAD]),
}


def with_ranges(call: Call) -> Call:
    program = ranges_program(call.spec, call.batch, call.kv_len)
    assert program is not None
    batch = [size if axis in program.batch else 1 for axis, size in enumerate(call.batch)]
    captured = [call.captured[slot] for slot in program.captured]
    rank = call.spec.batch_axes
    return replace(
        call, kv_ranges=mask_ranges(captured, batch, rank, call.q_len, call.kv_len, program.needed, program.idle)
    )


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", RANGED)
def test_masks_of_data(name: str, splits: int) -> None:
    """Splits divide what the ranges leave; axes along which those differ are not packed."""
    score, captured = RANGED[name]
    call = with_ranges(make_call(score, (2, 4, 2, 16), 200, k_batch=(2, 1), captured=captured))
    assert packed_axes(call)[1] == (name != "per-head")
    check(call, splits, replace(TILES, block_kv=64))


def test_the_ranges_are_what_is_visited() -> None:
    """Keys outside the ranges are not read, by no split."""
    call = make_call("where(t0[n0, kv_idx], qk * 0.3, -inf)", (2, 1, 16), 200, captured=[KEEP])
    call.k[:, 128:], call.v[:, 128:] = torch.nan, torch.nan
    kv_ranges = torch.tensor([0, 64, 64, 128], dtype=torch.int32).view(1, 1, 4)
    out, _ = attention_decode(replace(call, kv_ranges=kv_ranges).to(DEVICE), TILES, 4)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("q_shape", "k_batch", "v_batch", "packed"),
    [
        ((1, 16), (), (), (False,) * 4),
        ((3, 2, 16), (1,), (3,), (False,) * 4),
        ((2, 3, 2, 1, 16), (1, 3, 1), (1, 1, 1), (True, False, True, False)),
        ((2, 2, 2, 3, 1, 16), (1, 2, 1, 3), (1, 1, 1, 3), (True, False, True, False)),
        ((1, 3, 2, 16), (1, 1), (1, 1), (False, True, False, False)),
    ],
)
def test_batch_axes(
    q_shape: tuple[int, ...], k_batch: tuple[int, ...], v_batch: tuple[int, ...], packed: tuple[bool, ...]
) -> None:
    call = make_call("qk * 0.3", q_shape, 33, k_batch=k_batch, v_batch=v_batch)
    assert packed_axes(call) == packed
    check(call)


def test_bounds_that_differ_along_an_axis_keep_it_apart() -> None:
    call = grouped("where(kv_idx < n1 * 20 + 5, qk, -inf)", 2, 50)
    assert packed_axes(call) == (False,) * 4
    check(call)


def test_expanded_strided_and_transposed() -> None:
    """Keys expanded to every head and stored transposed, values and the output with heads innermost: no copies."""
    call = make_call(BOTTOM_RIGHT, (2, 4, 3, 16), 37, k_batch=(2, 1), out_order=(0, 2, 1, 3))
    k = call.k.mT.contiguous().mT.expand(2, 4, -1, -1)
    v = torch.randn(2, 37, 4, 32).transpose(1, 2)[:, :1, :, ::2].expand(2, 4, -1, -1)
    strided = Call(call.spec, call.q, k, v, [], call.sizes)
    assert packed_axes(strided) == (False, True, False, False)
    out, _ = check(strided)
    assert out.transpose(1, 2).is_contiguous()


def test_sizes_reach_the_program_and_its_bounds() -> None:
    check(grouped("where(kv_idx < size0, qk, -inf)", 2, 40, sizes=[23]))


def test_offsets_past_32_bits() -> None:
    """The last of these keys and values lie more than 2**31 elements behind the first."""
    torch.use_deterministic_algorithms(False)
    bias = noise(4, 18, dtype=torch.float16)
    call = make_call("qk + t0[3, kv_idx]", (3, 1, 16), 18, k_batch=(1,), captured=[bias], dtype=torch.float16)
    # Memory that nobody touches is none.
    storage = torch.empty(20, 1 << 27, dtype=torch.float16, device=DEVICE)
    k, v = (storage[:18, at : at + 16].copy_(x[0])[None] for at, x in ((0, call.k), (16, call.v)))
    far = storage.view(-1)[64:].as_strided((4, 18), (3 << 28, 1)).copy_(bias)
    check(call.on([call.q.to(DEVICE), k, v, far]))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(8, 40), (80, 16)])
def test_head_dims(head_dim: int, value_dim: int) -> None:
    check(make_call("qk * 0.3", (3, 2, head_dim), 35, k_batch=(1,), value_dim=value_dim, dtype=torch.float16))


def test_same_bits_each_time() -> None:
    call = grouped(BOTTOM_RIGHT, 2, 90).to(DEVICE)
    for one, other in zip(attention_decode(call, TILES, 5), attention_decode(call, TILES, 5), strict=True):
        assert torch.equal(one, other)


def test_the_operator_takes_them() -> None:
    """By the table, in several splits, and again by a plan for another call."""
    plans.attention.plans.clear()
    call = grouped(BOTTOM_RIGHT, 2, 300, 4, dtype=torch.float16).to(DEVICE)
    prepared = prepare_any(call)
    assert prepared is not None
    assert len(prepared.launches) == 2
    expected = attention_decode(call)
    for _ in range(2):
        for one, other in zip(torch.ops.flashfuse.attention(*call.arguments), expected, strict=True):
            assert torch.equal(one, other)
    assert len(plans.attention.plans) == 1
    check(call, None, None)


def test_when_they_are_taken() -> None:
    """More than a few queries have many keys each, and rows that are few or would leave the device idle."""
    assert takes(grouped("qk", 16, 40))
    assert not takes(grouped("qk", 17, 17 * 32 - 1))
    assert takes(grouped("qk", 17, 17 * 32))
    # Six programs of the forward for the eight multiprocessors of the interpreter.
    assert takes(grouped("qk", 42, 42 * 32))
    assert not takes(grouped("qk", 43, 43 * 32))
    # Two of them.
    assert takes(grouped("qk", 64, 64 * 32, groups=1))
    assert not takes(grouped("qk", 65, 65 * 32, groups=1))


def test_number_of_splits() -> None:
    """One where the device is busy anyway or keys are few; shares of equal length that fill it where it is not."""
    assert num_splits(512, 128, 264, 2048, 0.25) == 1
    assert num_splits(8, 3, 264, 32, 0.25) == 1
    assert num_splits(8, 16, 264, 32, 0.25) == 16
    assert num_splits(8, 128, 264, 32, 0.25) == 32
    assert num_splits(64, 128, 264, 256, 0.25) == 4
    assert launch_decode.MAX_SPLITS // 2 < num_splits(1, 16384, 264, 4, 0.25) <= launch_decode.MAX_SPLITS
    # Shares that take turns pay for their parts, and many rows are long put together.
    assert num_splits(96, 8, 264, 96, 0.1) == 2
    assert num_splits(96, 8, 264, 1536, 0.5) == 1


@pytest.mark.parametrize("programs", [1, 3, 8, 30, 60, 100, 200])
def test_splits_pay(programs: int) -> None:
    """A split has its tiles, and the device is done earlier with them than without."""
    slots = 264
    for tiles in (1, 4, 16, 100, 513, 16384):
        splits = num_splits(programs, tiles, slots, 4 * programs, 0.25)
        assert splits <= tiles
        assert -(-programs * splits // slots) * -(-tiles // splits) <= tiles
