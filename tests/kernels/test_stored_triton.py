"""Programs of stored keys and values in the forward and flash-decoding kernels, as `test_decode` runs those."""

import os
from collections.abc import Iterator

import pytest
import torch
from attention_cases import Call, make_call
from masked_programs import FP32_MIN
from numerics import assert_close_to_exact, assert_lse_close_to_exact
from stored_cases import BF16, CACHES, FP16

triton = pytest.importorskip("triton")

from flashfuse.kernels.launch import Launch, attention_forward  # noqa: E402
from flashfuse.kernels.launch_decode import attention_decode, packed_axes  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1; test_interpreter.py runs them",
)
TILES = Launch(block_q=16, block_kv=16, num_warps=4, num_stages=2)
MASKED = "where(kv_idx <= q_idx + (kv_len - q_len), {}, -inf)"
DTYPES = [FP16, torch.float32, *([BF16] if DEVICE == "cuda" else [])]


@pytest.fixture(autouse=True)
def _nan_filled_outputs() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(call: Call, splits: int | None) -> None:
    """By the flash-decoding kernels in so many splits, or by the forward kernel."""
    exact, eager = call.exact(), call.eager()
    moved = call.to(DEVICE)
    out, lse = attention_forward(moved, TILES) if splits is None else attention_decode(moved, TILES, splits)
    assert_close_to_exact(out, eager[0], exact[0])
    assert_lse_close_to_exact(lse, eager[1], exact[1])


@pytest.mark.parametrize(
    ("name", "splits", "dtype"),
    [
        (name, splits, DTYPES[(i + j) % len(DTYPES)])
        for i, name in enumerate(CACHES)
        for j, splits in enumerate([None, 3])
    ],
)
def test_caches(name: str, splits: int | None, dtype: torch.dtype) -> None:
    """Each cache in another type by each kernel.

    37 keys in tiles of 16, whose last is cut off; 12 columns of values in 16.
    """
    cache = CACHES[name]
    check(cache.call(dtype, 19 if splits is None else 2, MASKED.format(cache.score)), splits)


@pytest.mark.parametrize("splits", [None, 1, 3])
def test_conversion_to_float16(splits: int | None) -> None:
    """bfloat16 under float16: a number beyond float16's becomes infinite, one below it 0, as where the source converts.

    In the interpreter too: bfloat16 is not multiplied there.
    """
    program = {"key": "to_float16(x)", "value": "to_float16(x)"}
    call = make_call("qk * 0.3", (2, 3, 2, 16), 37, k_batch=(2, 1), dtype=FP16, stored=BF16, **program)
    call.k[0, 0, 3] *= 1e-8
    call.v[1, 0, 5, 2] = 1e5
    check(call, splits)


@pytest.mark.parametrize("splits", [None, 1, 3])
def test_rows_that_see_nothing_but_a_fill(splits: int | None) -> None:
    """They visit every key, so what a mask skips is read there, too."""
    cache = CACHES["int8-by-token"]
    check(cache.call(FP16, 2, f"where((kv_idx <= q_idx * 40) & (kv_idx > 2), qk, {FP32_MIN!r})"), splits)


def test_axes_along_which_scales_differ_are_not_packed() -> None:
    assert packed_axes(CACHES["int8-by-head"].call(FP16, 1)) == (False, False, True, False)
    assert packed_axes(CACHES["by-query-head"].call(FP16, 1)) == (False,) * 4
