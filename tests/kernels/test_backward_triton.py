"""The Triton backward kernels at small odd sizes, see `triton_backward`."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from attention_cases import make_call
from gradient_cases import Gradients, grad_out, reference_gradients
from numerics import assert_close_to_exact

pytest.importorskip("triton")

from triton_backward import RUNS, backward, check, check_ranged, noise

pytestmark = RUNS

FP32_MIN = torch.finfo(torch.float32).min
CAUSAL = "where(kv_idx <= q_idx, qk * 0.3, -inf)"


@pytest.fixture(autouse=True)
def _nan_filled_outputs() -> Iterator[None]:
    """An element that no kernel writes stays NaN; an operator that is not deterministic raises."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


B, H, S, KV_LEN = 2, 2, 41, 35

PROGRAMS = {
    "plain": ("qk", []),
    "scaled": ("qk * 0.3", []),
    "causal": (CAUSAL, []),
    "bottom-right": ("where(kv_idx <= q_idx + (kv_len - q_len), qk, -inf)", []),
    "window": ("where((kv_idx <= q_idx) & (kv_idx > q_idx - 9), qk * 0.3, -inf)", []),
    "symmetric": ("where(abs(kv_idx - q_idx) < 5, qk * 0.3, -inf)", []),
    "dilated": ("where((q_idx - kv_idx) % 3 == 0, qk, -inf)", []),
    "chunked": ("where((kv_idx <= q_idx) & (kv_idx // 8 == q_idx // 8), qk, -inf)", []),
    "softcap": ("where(kv_idx <= q_idx, tanh(qk * 0.1) * 5.0, -inf)", []),
    "scalar": ("qk * t0[()]", [torch.tensor(0.1)]),
    "alibi": ("qk * 0.3 + to_float(kv_idx - q_idx) * t0[n1]", [noise(H)]),
    "temperature": ("where(kv_idx <= q_idx, qk / exp(t0[n1]), -inf)", [noise(H)]),
    "bias": ("qk * 0.3 + t0[n0, n1, q_idx, kv_idx]", [noise(B, H, S, KV_LEN)]),
    "causal-bias": ("where(kv_idx <= q_idx, qk + t0[0, n1, q_idx, kv_idx], -inf)", [noise(1, H, S, KV_LEN)]),
    "shared-bias": ("where(kv_idx <= q_idx, (qk + t0[q_idx, kv_idx]) * 0.3, -inf)", [noise(S, KV_LEN)]),
    "wide-bias": ("qk + t0[n0, q_idx + 3, kv_idx + 2]", [noise(B, 50, 60)]),
    "transposed-bias": ("qk + t0[kv_idx, q_idx]", [noise(KV_LEN, S)]),
    "shifted": ("qk * 0.3 + t0[n1, q_idx, kv_idx - q_idx + 40]", [noise(H, S, S + KV_LEN - 1)]),
    "sheared": ("qk * 0.3 + t0[q_idx + kv_idx, kv_idx]", [noise(S + KV_LEN - 1, KV_LEN)]),
    "head-innermost": ("qk + t0[q_idx, kv_idx, n1]", [noise(S, KV_LEN, H)]),
    "two-biases": ("qk + t0[n1, q_idx, kv_idx] + t1[n0, q_idx, kv_idx]", [noise(H, S, KV_LEN), noise(B, S, KV_LEN)]),
    "bias-twice": ("qk + t0[n1, q_idx, kv_idx] * t0[n1, 0, 0]", [noise(H, S, KV_LEN)]),
    "key-bias": ("qk * 0.3 + t0[n0, kv_idx]", [noise(B, KV_LEN)]),
    "query-scale": ("qk * t0[n0, n1, q_idx]", [noise(B, H, S)]),
    "row-look-up": ("qk * t0[t1[q_idx], n1]", [noise(5, H), torch.arange(S) % 4]),
    "key-look-up": ("qk + t0[t1[n0, kv_idx]]", [noise(5), torch.arange(B * KV_LEN).view(B, KV_LEN) % 4]),
    "concatenated": ("qk + where(kv_idx < 20, t0[kv_idx], t1[kv_idx - 20])", [noise(20), noise(KV_LEN - 20)]),
    "padding": (f"where(t0[n0, kv_idx], qk * 0.3, {FP32_MIN!r})", [noise(B, KV_LEN) < 0.5]),
    "constant": ("0.5", []),
    "no-product": ("t0[kv_idx]", [noise(KV_LEN)]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str) -> None:
    score, captured = PROGRAMS[name]
    check(make_call(score, (B, H, S, 20), KV_LEN, value_dim=12, captured=captured))


@pytest.mark.parametrize("name", ["causal", "softcap", "temperature", "alibi", "bias", "key-bias"])
def test_half_precision(name: str) -> None:
    """Rounding the output leaves more in delta than the sums of a slope or a temperature may lose."""
    score, captured = PROGRAMS[name]
    check(make_call(score, (B, H, S, 20), KV_LEN, value_dim=12, captured=captured, dtype=torch.float16))


def test_rows_of_a_bias_in_half_precision() -> None:
    """A bias is looked up in fewer buckets before the attention, so its gradient is summed up over many keys.

    It held what rounding the output leaves in delta, the same for all keys of a row.
    """
    call = make_call("qk * 0.3 + t0[q_idx, kv_idx]", (2, S, 32), 2 * S, captured=[noise(S, 2 * S)], dtype=torch.float16)

    def rows(gradients: Gradients) -> torch.Tensor:
        return gradients[0].sum(-1)

    grad = grad_out(call)
    exact, eager = (rows(reference_gradients(call, [grad], [3], dtype)) for dtype in (torch.float64, None))
    assert_close_to_exact(rows(backward(call, grad, [3]))[None], eager, exact)


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_positions_that_share_a_bias(batch: int) -> None:
    """By rows of pairs, and where more share it than those can hold, by tiles of pairs.

    Summed before they are rounded, never in another order; added to what was stored they were rounded each time."""
    call = make_call(
        "where(kv_idx <= q_idx, qk * 0.3 + t0[q_idx, kv_idx], -inf)", (batch, 37, 16), 45, captured=[noise(37, 45)],
        dtype=torch.float16,
    )  # fmt: skip
    for one, other in zip(check(call), backward(call, grad_out(call), range(4)), strict=True):
        assert torch.equal(one, other)


def test_rows_of_a_bias_without_a_key() -> None:
    """All keys of rows that see nothing above an added fill have gradients, behind tiles that hold none."""
    score = "qk * 0.3 + t0[n1, q_idx, kv_idx] + where(kv_idx <= q_idx - 9, 0.0, -10000.0)"
    call = make_call(score, (B, H, S, 16), KV_LEN, captured=[noise(H, S, KV_LEN)])
    of_bias = check(call)[3]
    assert (of_bias[:, 0, -1] != 0).all()
    assert (of_bias[:, 20, 16:] == 0).all()


@pytest.mark.parametrize("fill", ["-inf", repr(FP32_MIN), "-1e31", "-10000.0"])
@pytest.mark.parametrize("empty_row", ["nan", "zero"])
def test_rows_without_a_key(fill: str, empty_row: str) -> None:
    """A finite fill has gradients through all keys, those of skipped tiles included; NaN rows make all values NaN."""
    score = f"where((kv_idx <= q_idx - 20) & (kv_idx > q_idx - 30), qk * 0.1, {fill})"
    _, _, dv = check(make_call(score, (1, 2, 70, 16), 50, empty_row=empty_row))
    assert dv.isnan().all() == (fill == "-inf" and empty_row == "nan")


@pytest.mark.parametrize("scale", [0.125, 0.1])
@pytest.mark.parametrize("fill", [-1e4, -1e6, -1e8, -1e9, -3e10, -1e20])
def test_fills_of_any_size(fill: float, scale: float) -> None:
    """A row's largest score comes back to the digit: a unit in its last place may be hundreds."""
    keep = noise(40, 50) < 0.5
    keep[3] = False
    keep[5, :40] = False
    for score in ("where(t0[q_idx, kv_idx], qk * {1}, {0})", "qk * {1} + where(t0[q_idx, kv_idx], 0.0, {0})"):
        check(make_call(score.format(fill, scale), (1, 2, 40, 16), 50, captured=[keep]))


@pytest.mark.parametrize("scale", [0.01, 1.0, 7.0])
def test_additive_minimum(scale: float) -> None:
    check(make_call(f"qk * {scale} + where(kv_idx <= q_idx - 20, 0.0, {FP32_MIN!r})", (1, 1, 40, 16), 33))


@pytest.mark.parametrize("kind", ["additive", "filled", "bias"])
def test_minimum_from_a_captured_tensor(kind: str) -> None:
    keep = noise(40, 33) < -1.0
    keep[3] = False
    bias = torch.where(keep, 0.0, FP32_MIN)
    score = {"additive": f"qk + where(t0[q_idx, kv_idx], 0.0, {FP32_MIN!r})", "bias": "qk + t0[q_idx, kv_idx]"}
    text = score.get(kind, f"where(t0[q_idx, kv_idx], qk * 0.1, {FP32_MIN!r})")
    check(make_call(text, (1, 1, 40, 16), 33, captured=[bias if kind == "bias" else keep]))


@pytest.mark.parametrize(
    ("q_shape", "kv_len", "k_batch", "v_batch"),
    [
        ((17, 16), 9, (), ()),
        ((3, 17, 16), 9, (1,), (3,)),
        ((2, 2, 3, 17, 16), 9, (2, 2, 1), (2, 2, 1)),
        ((2, 2, 3, 17, 16), 40, (2, 1, 1), (2, 1, 1)),
        ((2, 3, 17, 16), 9, (1, 3), (1, 3)),
        ((2, 1, 2, 3, 17, 16), 9, (1, 1, 2, 3), (2, 1, 1, 1)),
        ((2, 3, 1, 16), 40, None, None),
        ((2, 3, 40, 16), 1, None, None),
    ],
)
def test_shapes(q_shape: tuple[int, ...], kv_len: int, k_batch: tuple | None, v_batch: tuple | None) -> None:
    """Keys and values shared over any batch axes, together or not."""
    check(make_call(CAUSAL, q_shape, kv_len, k_batch=k_batch, v_batch=v_batch, sink="0.5"))


def test_queries_shared_over_the_batch() -> None:
    call = make_call("qk * 0.3 + t0[n0, kv_idx]", (1, 3, 20, 16), 24, k_batch=(4, 3), captured=[noise(4, 24)])
    check(replace(call, sizes=[4, 3]))


@pytest.mark.parametrize("name", ["key-bias", "shared-bias", "alibi"])
def test_grouped_heads_and_captured_tensors(name: str) -> None:
    score, captured = PROGRAMS[name]
    check(make_call(score, (B, H, 2, S, 16), KV_LEN, k_batch=(B, H, 1), captured=captured))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 3), (40, 16), (16, 72), (33, 33)])
def test_head_dims(head_dim: int, value_dim: int) -> None:
    check(make_call(CAUSAL, (2, 40, head_dim), 33, value_dim=value_dim))


def test_strided_layouts() -> None:
    """Operands in any layout; gradients in the memory order of those that are dense."""
    call = make_call(CAUSAL, (2, 3, 40, 16), out_order=(0, 2, 1, 3))
    q = torch.cat([call.q, call.q], dim=-1)[..., 16:]
    k, v = call.k.mT.contiguous().mT, call.v.transpose(1, 2).contiguous().transpose(1, 2)
    _, dk, dv = check(replace(call, q=q, k=k, v=v))
    assert (dk.stride(), dv.stride()) == (k.stride(), v.stride())


def test_expanded_gradient() -> None:
    """What `out.sum().backward()` passes on has stride 0."""
    call = make_call(CAUSAL, (2, 40, 16))
    one = torch.ones(()).expand(2, 40, 16)
    for mine, other in zip(backward(call, one, [0, 1]), backward(call, one.contiguous(), [0, 1]), strict=True):
        assert torch.equal(mine, other)


SINKS = {"per-head": ("t0[n1]", (H,)), "per-row": ("t0[n0, q_idx] * 3.0", (B, S)), "one": ("0.0", ())}


@pytest.mark.parametrize("score", [CAUSAL, f"where(kv_idx <= q_idx - 9, qk * 0.3, {FP32_MIN!r})"])
@pytest.mark.parametrize("sink", SINKS)
def test_sinks(sink: str, score: str) -> None:
    text, shape = SINKS[sink]
    captured = [noise(*shape)] if shape else []
    check(make_call(score, (B, H, S, 20), KV_LEN, sink=text, captured=captured, empty_row="zero"))


@pytest.mark.parametrize("empty_row", ["nan", "zero"])
@pytest.mark.parametrize("fill", ["-inf", repr(FP32_MIN), "-10000.0"])
def test_sinks_of_rows_without_a_key(fill: str, empty_row: str) -> None:
    score = f"where((kv_idx <= q_idx - 20) & (kv_idx > q_idx - 30), qk * 0.1, {fill})"
    call = make_call(score, (1, 2, 70, 16), 50, sink="t0[n1]", captured=[noise(2)], empty_row=empty_row)
    is_nan = fill == "-inf" and empty_row == "nan"
    check(call, [0, 1, 2] if is_nan else None)
    if is_nan:
        assert backward(call, grad_out(call), [3])[0].isnan().all()


@pytest.mark.parametrize("fill", [FP32_MIN, -1e31, -10000.0])
def test_sink_as_low_as_the_fill(fill: float) -> None:
    score = f"where((kv_idx <= q_idx - 20) & (kv_idx > q_idx - 30), qk, {fill!r})"
    check(make_call(score, (1, 2, 70, 16), 50, sink="t0[0]", captured=[torch.tensor([fill])]))


FACTORS = {
    "per-head": ("t0[n1]", noise(H)),
    "per-row": ("t0[n0, q_idx] * 2.0", noise(B, S)),
    "per-key": ("t0[kv_idx]", noise(KV_LEN)),
    "matrix": ("t0[n0, 0, q_idx, kv_idx]", noise(B, 1, S, KV_LEN)),
    "kept": ("where(t0[n0, kv_idx], 1.0, 0.0)", noise(B, KV_LEN) < 0.5),
    "inverse": ("1.0 / t0[kv_idx]", noise(KV_LEN).abs() + 0.5),
    "of-products": ("sigmoid(qk) * t0[n1]", noise(H)),
}


@pytest.mark.parametrize("normaliser", ["softmax", "none"])
@pytest.mark.parametrize("name", [name for name in FACTORS if name != "of-products"])
def test_factors(name: str, normaliser: str) -> None:
    factor, captured = FACTORS[name]
    score = CAUSAL if normaliser == "softmax" else "sigmoid(qk * 0.3)"
    check(make_call(score, (B, H, S, 20), KV_LEN, factor=factor, captured=[captured], normaliser=normaliser))


def test_one_tensor_in_score_sink_and_factor() -> None:
    call = make_call("qk * t0[n1]", (B, H, S, 20), sink="t0[n1]", factor="t0[n1] * 2.0", captured=[noise(H)])
    check(call)


@pytest.mark.parametrize("fill", ["-inf", repr(FP32_MIN)])
@pytest.mark.parametrize("normaliser", ["softmax", "none"])
def test_rows_that_become_zero(normaliser: str, fill: str) -> None:
    """They have no gradient, whatever they were."""
    kept = torch.arange(S) % 2 == 0
    kept[:20] = False
    score = f"where(kv_idx <= q_idx - 20, qk, {fill})"
    score = score if normaliser == "softmax" else f"sigmoid({score})"
    check(make_call(score, (2, S, 16), factor="t0[q_idx]", captured=[kept], normaliser=normaliser))


UNNORMALISED = {
    "sigmoid": "sigmoid(qk * 0.3 + -3.0)",
    "causal": "sigmoid(where(kv_idx <= q_idx, qk * 0.3, -inf))",
    "relu": "max(qk, 0.0) / to_float(kv_len)",
    "scaled": "where(kv_idx <= q_idx, sigmoid(qk) * 0.5, 0.0)",
    "biased": "sigmoid(qk + t0[n1, q_idx, kv_idx])",
}


@pytest.mark.parametrize("name", UNNORMALISED)
def test_scores_as_weights(name: str) -> None:
    captured = [noise(H, S, KV_LEN)] if name == "biased" else []
    check(make_call(UNNORMALISED[name], (B, H, S, 20), KV_LEN, normaliser="none", captured=captured))


TQ, TKV = 150, 200
LENGTHS = torch.tensor([60, TKV])
KEEP = torch.arange(TKV) < LENGTHS[:, None]
DENSE = (torch.arange(TKV) <= torch.arange(TQ)[:, None]).expand(B, 1, TQ, TKV)
RANGED = {
    "padding": (f"where(t0[n0, kv_idx], qk * 0.3, {FP32_MIN!r})", [KEEP]),
    "left-padding": (f"qk * 0.3 + where(t0[n0, kv_idx] & (kv_idx <= q_idx), 0.0, {FP32_MIN!r})", [KEEP.flip(1)]),
    "documents": ("where((t0[q_idx] == t0[kv_idx]) & (kv_idx <= q_idx), qk * 0.3, -inf)", [torch.arange(TKV) // 70]),
    "nothing": ("where(t0[n0, kv_idx], qk * 0.3, -10000.0)", [KEEP & torch.tensor([[True], [False]])]),
    "added": ("qk * 0.3 + t0[n0, 0, q_idx, kv_idx]", [torch.zeros(DENSE.shape).masked_fill(~DENSE, FP32_MIN)]),
}


@pytest.mark.parametrize("name", RANGED)
def test_ranges(name: str) -> None:
    """A mask that depends on data skips tiles; the gradient of an added one is not 0 where it is."""
    score, captured = RANGED[name]
    ranges = check_ranged(make_call(score, (B, 4 if name == "added" else 1, TQ, 16), TKV, captured=captured))
    assert (ranges[..., 3] < TKV).any() or (ranges[..., 0] > 0).any(), "nothing is skipped"


def test_gradients_that_are_no_numbers_stay_in_their_document() -> None:
    """A row's NaN reaches the keys it sees, and none that a mask of data keeps from it in the same tile."""
    score, captured = RANGED["documents"]
    call = make_call(score, (1, 1, TQ, 16), TKV, captured=captured)
    grad = grad_out(call)
    grad[..., 100, :] = torch.nan
    _, dk, _ = backward(call, grad, range(3))
    assert dk[..., 70:101, :].isnan().all()
    assert dk[..., :70, :].isfinite().all()
    assert dk[..., 101:, :].isfinite().all()


@pytest.mark.parametrize("ranged", [False, True])
def test_rows_without_a_key_under_a_mask_of_data(ranged: bool) -> None:
    """They are NaN, and so are the gradients of values; queries and keys get none, for the mask selects."""
    keep = torch.arange(TQ) >= 23
    call = make_call("where((kv_idx <= q_idx) & t0[kv_idx], qk * 0.25, -inf)", (1, 1, TQ, 16), captured=[keep])
    (check_ranged if ranged else check)(call, [0, 1])


@pytest.mark.parametrize("mask", ["kv_idx <= q_idx", "(kv_idx <= q_idx) & (t0[q_idx] == t0[kv_idx])"])
def test_a_score_that_is_no_number_stays_in_its_row(mask: str) -> None:
    bias = noise(S)
    bias[30] = torch.nan
    captured = [torch.arange(S) // 17, bias]
    call = make_call(f"where({mask}, qk * 0.25 + t1[q_idx], -inf)", (1, 1, S, 16), captured=captured)
    _, dk, _ = backward(call, grad_out(call), range(3))
    assert dk[..., 31:, :].isfinite().all()
    assert dk[..., 17:31, :].isnan().all()


def test_what_is_wanted_alone() -> None:
    """Each gradient by itself is the one that comes with all others."""
    score = "qk * t0[n1] + t1[kv_idx] + t2[q_idx, kv_idx]"
    call = make_call(score, (B, H, S, 16), KV_LEN, captured=[noise(H), noise(KV_LEN), noise(S, KV_LEN)])
    together = check(call)
    for at, expected in enumerate(together):
        (alone,) = backward(call, grad_out(call), [at])
        assert torch.equal(alone, expected)


def test_gradients_of_scores_that_no_exponent_tells_apart() -> None:
    """Of products of 16 bits; where their rounding times log2(e) is larger than exponents are, some were numbers."""
    call = make_call("qk * 3e8", (2, 2, 37, 16), 45, dtype=torch.float16)
    assert all(grad.isnan().all() for grad in backward(call, grad_out(call), range(3)))
