"""Gradients of tables of distances in the Triton backward kernels, see `triton_backward`."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

import pytest
import torch
from attention_cases import Call, make_call
from forms import FORMS, Sizes, module
from gradient_cases import check_gradients, grad_out, reference_gradients
from numerics import assert_close_to_exact
from recorded import operator_calls

pytest.importorskip("triton")

from triton_backward import RUNS, SMALL, TALL, TILES, WIDE, backward, check, check_ranged, noise

from flashfuse.kernels import captured_grad, launch_backward
from flashfuse.kernels.launch import Launch
from flashfuse.kernels.spec import AttentionSpec

pytestmark = RUNS

FP32_MIN = torch.finfo(torch.float32).min
CAUSAL = "where(kv_idx <= q_idx, qk * 0.3, -inf)"
B, H, S, KV_LEN = 2, 2, 41, 35


def _refused(*_: Any) -> NoReturn:
    raise AssertionError("the gradients are left to torch")


@pytest.fixture(autouse=True)
def _no_torch_and_nan_filled_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Batch positions are looped over, however few programs that leaves."""
    monkeypatch.setattr(launch_backward, "attention_backward_tiled", _refused)
    monkeypatch.setattr(captured_grad, "ENOUGH_PROGRAMS", 1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


BUCKET = "where(abs(kv_idx - q_idx) < 4, abs(kv_idx - q_idx), where(abs(kv_idx - q_idx) < 12, 4, 5))"
BUCKETED = f"t0[{BUCKET} + where(kv_idx < q_idx, 6, 0), n1]"
SPAN = S + KV_LEN - 1
TABLE = noise(H, SPAN)
BUCKETS = noise(12, H)
APART = f"kv_idx - q_idx + {S - 1}"
BACK = f"q_idx - kv_idx + {KV_LEN - 1}"
PROGRAMS = {
    "heads": (f"qk * 0.3 + t0[n1, {APART}]", [TABLE]),
    "one": (f"qk * 0.3 + t0[{APART}]", [TABLE[0]]),
    "batch": (f"qk * 0.3 + t0[n0, n1, {APART}]", [noise(B, H, SPAN)]),
    "backwards": (f"qk * 0.3 + t0[{BACK}, n1]", [TABLE.T.contiguous()]),
    "scaled": (f"(qk + t0[n1, {APART}]) * 0.3", [TABLE]),
    "factors": (f"qk * exp(t0[n1, {APART}] * 0.5)", [TABLE]),
    "clipped": ("qk + t0[n1, min(max(kv_idx - q_idx, -6), 9) + 6]", [noise(H, 16)]),
    "bucketed": (f"qk * 0.3 + {BUCKETED}", [BUCKETS]),
    "look-up": (f"qk * 0.3 + t0[t1[{APART}], n1]", [noise(5, H), torch.arange(SPAN) % 4]),
    "two-reads": (f"qk + t0[n1, {APART}] * t0[n1, {BACK}]", [TABLE]),
    "table-and-bias": (f"qk + t0[n1, {APART}] + t1[q_idx, kv_idx]", [TABLE, noise(S, KV_LEN)]),
    "causal": (f"where(kv_idx <= q_idx, qk * 0.3 + t0[n1, {APART}], -inf)", [TABLE]),
    "causal-bucketed": (f"where(kv_idx <= q_idx, qk * 0.3 + {BUCKETED}, -inf)", [BUCKETS]),
    "window": (f"where((kv_idx <= q_idx) & (kv_idx > q_idx - 9), qk * 0.3 + t0[n1, {APART}], -inf)", [TABLE]),
    "ahead": (f"where(kv_idx >= q_idx + 3, qk * 0.3 + t0[n1, {APART}], {FP32_MIN!r})", [TABLE]),
    "one-sided": ("where(kv_idx <= q_idx, qk * 0.3 + t0[n1, q_idx - kv_idx], -inf)", [noise(H, S)]),
    "softcap": (f"tanh((qk + t0[n1, {APART}]) * 0.1) * 5.0", [TABLE]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str) -> None:
    """Pairs that are equally far apart share an element; such gradients used to be left to torch."""
    score, captured = PROGRAMS[name]
    check(make_call(score, (B, H, S, 20), KV_LEN, value_dim=12, captured=captured))


@pytest.mark.parametrize("name", ["causal", "bucketed"])
def test_half_precision(name: str) -> None:
    score, captured = PROGRAMS[name]
    check(make_call(score, (B, H, S, 20), KV_LEN, value_dim=12, captured=captured, dtype=torch.float16))


@pytest.mark.parametrize("read", ["t0[min(q_idx - kv_idx, 2), n0]", "t0[where(kv_idx < q_idx - 9, 1, 0), n0]"])
def test_few_buckets_in_half_precision(read: str) -> None:
    """What rounding the output leaves in delta is the same for all keys of a row: a bucket of most keys got all of it.

    The error was three times eager's.
    """
    score = f"where(kv_idx <= q_idx, qk * 0.2 + {read}, -inf)"
    call = make_call(score, (1, 2 * S, 32), captured=[noise(3, 1)], dtype=torch.float16)
    grads = [grad_out(call, draw) for draw in range(4)]
    exact, eager = (reference_gradients(call, grads, [3], dtype)[0] for dtype in (torch.float64, None))
    assert_close_to_exact(torch.stack([backward(call, grad, [3])[0] for grad in grads]), eager, exact)


LENGTHS = [(1, 40), (40, 1), (16, 16), (33, 7), (31, 70)]
BOTTOM_RIGHT = "kv_idx <= q_idx + (kv_len - q_len)"


@pytest.mark.parametrize(
    ("mask", "tiles", "q_len", "kv_len"),
    [(*run, *lengths) for run in (("True", SMALL), (BOTTOM_RIGHT, TALL)) for lengths in LENGTHS]
    + [("True", WIDE, 1, 40), (BOTTOM_RIGHT, WIDE, 16, 50)],
)
def test_lengths(mask: str, tiles: Launch, q_len: int, kv_len: int) -> None:
    """Also tiles with fewer keys than queries, as many programs for a query tile, and with more keys than queries."""
    score = f"where({mask}, qk * 0.3 + t0[n1, kv_idx - q_idx + (q_len - 1)], -inf)"
    call = make_call(score, (B, H, q_len, 16), kv_len, captured=[noise(H, q_len + kv_len - 1)], sink="0.5")
    few = call.captured[0].numel()
    check_gradients(call, functools.partial(backward, tiles=replace(TILES, pairs=tiles)), draws=3, few=few)


@pytest.mark.parametrize("enough", [1, 20, 1000])
def test_owners_of_batch_positions(enough: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are few distances, programs own batch positions too, from the last axis on."""
    monkeypatch.setattr(captured_grad, "ENOUGH_PROGRAMS", enough)
    sizes = []
    zeros = captured_grad.DistanceSums.zeros
    monkeypatch.setattr(captured_grad.DistanceSums, "zeros", lambda o, *rest: sizes.append(tuple(o)) or zeros(o, *rest))
    score = "qk * 0.3 + t0[n1, kv_idx - q_idx + 19] + t0[n1, min(abs(kv_idx - q_idx), 5)]"
    check(make_call(score, (B, H, 3, 20, 16), 18, k_batch=(B, H, 1), captured=[noise(H, 37)]))
    assert sizes == [{1: (1, H, 1), 20: (1, H, 3), 1000: (B, H, 3)}[enough]] * 2


def test_grouped_heads() -> None:
    score = f"qk * 0.3 + t0[n1 * 2 + n2, {APART}]"
    check(make_call(score, (B, H, 2, S, 16), KV_LEN, k_batch=(B, H, 1), captured=[noise(2 * H, SPAN)]))


@pytest.mark.parametrize(
    ("fill", "empty_row"), [("-inf", "nan"), ("-inf", "zero"), (repr(FP32_MIN), "nan"), ("-10000.0", "nan")]
)
def test_rows_without_a_key(fill: str, empty_row: str) -> None:
    """A finite fill has gradients through all keys, those of skipped tiles included."""
    score = f"where((kv_idx <= q_idx - 20) & (kv_idx > q_idx - 30), qk * 0.1, {fill}) + t0[kv_idx - q_idx + 59]"
    check(make_call(score, (1, 1, 60, 16), 40, captured=[noise(99)], empty_row=empty_row))


@pytest.mark.parametrize("name", ["heads", "causal-bucketed"])
def test_dropout(name: str) -> None:
    score, captured = PROGRAMS[name]
    check(make_call(score, (B, H, S, 20), KV_LEN, captured=captured, dropout=0.2))


@pytest.mark.parametrize("normaliser", ["softmax", "none"])
def test_factors(normaliser: str) -> None:
    score = CAUSAL if normaliser == "softmax" else "sigmoid(qk * 0.3)"
    factor = f"t0[n1, {APART}]"
    check(make_call(score, (B, H, S, 20), KV_LEN, factor=factor, captured=[TABLE], normaliser=normaliser))


def test_beside_a_sink() -> None:
    score = f"where(kv_idx <= q_idx, qk * 0.3 + t0[n1, {APART}], -inf)"
    check(
        make_call(score, (B, H, S, 20), KV_LEN, sink="t1[n1, q_idx]", captured=[TABLE, noise(H, S)], empty_row="zero")
    )


def test_ranges() -> None:
    """A mask that depends on data leaves out tiles at any distance."""
    keep = torch.arange(200) < torch.tensor([[60], [200]])
    score = f"where(t0[n0, kv_idx], qk * 0.3 + t1[kv_idx - q_idx + 149], {FP32_MIN!r})"
    ranges = check_ranged(make_call(score, (2, 1, 150, 16), 200, captured=[keep, noise(349)]))
    assert (ranges[..., 3] < 200).any()


# Read at distances alone, or at rows and distances.
TRAINED = ("bucketed-distances", "bucketed-offset", "clipped-bias", "relative-shift", "relative-shift-even")


@pytest.mark.parametrize("name", TRAINED)
def test_forms(name: str) -> None:
    """What matching makes of models that train such tables."""
    form = next(form for form in FORMS if form.name == name)
    sizes = form.sizes(Sizes(heads=2, q_len=20, kv_len=20))
    with torch.no_grad():
        recorded = operator_calls(module(form.spellings[0], sizes), form.make(sizes))
    for q, k, v, captured, shape, text, *rest in recorded[torch.ops.flashfuse.attention.default]:
        assert not any(x is not None for x in rest)
        check(Call(AttentionSpec.from_text(text), q, k, v, captured, shape))
