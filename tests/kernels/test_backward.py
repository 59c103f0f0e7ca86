"""Gradients of the operator: every kind of program against float64 autograd through the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from attention_cases import Call, make_call
from numerics import assert_close_to_exact
from torch.utils._python_dispatch import TorchDispatchMode

import flashfuse.kernels.ops  # noqa: F401
from flashfuse.kernels import flash_cpu, tiled
from flashfuse.kernels.backward_tiled import attention_backward_tiled
from flashfuse.kernels.reference import attention_reference

attention = torch.ops.flashfuse.attention
FP32_MIN = torch.finfo(torch.float32).min
CAUSAL = "where(kv_idx <= q_idx, qk * 0.3, -inf)"
B, H, SQ, SK = 2, 3, 21, 19
# A gradient that is few numbers says little with one gradient of the output.
DRAWS = 4


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny tiles, so that tiny tensors have many, and memory filled with NaN, so that an unwritten element fails."""
    monkeypatch.setattr(tiled, "BLOCK_Q", 8)
    monkeypatch.setattr(tiled, "BLOCK_KV", 8)
    monkeypatch.setattr(tiled, "WORKSPACE", 8 * 8 * 4)
    monkeypatch.setattr(flash_cpu, "MAX_BLOCK_Q", 8)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def keep(*shape: int) -> torch.Tensor:
    return noise(*shape, seed=2) < 0.5


# Score, captured tensors, and the spec's other fields.
PROGRAMS: dict[str, tuple[str, list[torch.Tensor], dict[str, str]]] = {
    "plain": ("qk", [], {}),
    "causal": (CAUSAL, [], {}),
    "window-min": (f"where((kv_idx <= q_idx) & (kv_idx > q_idx - 5), qk * 0.3, {FP32_MIN})", [], {}),
    "alibi": ("qk * 0.3 + to_float(kv_idx - q_idx) * t0[n1]", [noise(H)], {}),
    "softcap": ("where(kv_idx <= q_idx, tanh(qk * 0.1) * 5.0, -inf)", [], {}),
    "bias": ("qk * 0.3 + t0[n0, n1, q_idx, kv_idx]", [noise(B, H, SQ, SK)], {}),
    "shared-bias": ("where(kv_idx <= q_idx, qk * 0.3 + t0[n1, q_idx, kv_idx], -inf)", [noise(H, SQ, SK)], {}),
    "key-bias": ("qk * 0.3 + t0[n0, kv_idx] * 2.0", [noise(B, SK)], {}),
    "bias-table": ("qk + t0[q_idx - kv_idx + (kv_len - 1), n1]", [noise(SQ + SK, H)], {}),
    "diagonal-table": ("qk + t0[q_idx + kv_idx]", [noise(SQ + SK)], {}),
    "look-up": ("qk + t1[t0[q_idx, kv_idx], n1]", [(noise(SQ, SK) * 9).long() % 7, noise(7, H)], {}),
    "one-tensor-twice": ("qk + t0[n1, kv_idx] - t0[n1, q_idx] * qk", [noise(H, SQ + SK)], {}),
    "temperature": ("qk * t0[n1]", [noise(H).exp()], {}),
    "gated-bias": ("where(t0[q_idx, kv_idx], qk, t1[n1, q_idx] * 0.5)", [keep(SQ, SK), noise(H, SQ)], {}),
    "no-product": ("t0[q_idx, kv_idx]", [noise(SQ, SK)], {}),
    "padding": ("where(t0[n0, kv_idx], qk, -3.4028234663852886e+38)", [keep(B, SK)], {}),
    "sink": (CAUSAL, [noise(H)], {"sink": "t0[n1]"}),
    "sink-of-rows": ("qk", [noise(H, SQ)], {"sink": "t0[n1, q_idx] * 2.0"}),
    "softmax-plus-one": ("qk * 0.3", [], {"sink": "0.0"}),
    "head-mask": ("qk * 0.3", [noise(H)], {"factor": "t0[n1]"}),
    "factor": (CAUSAL, [noise(B, SK)], {"factor": "t0[n0, kv_idx] * 0.5"}),
    "kept-rows": (CAUSAL, [keep(B, SQ)], {"factor": "t0[n0, q_idx]"}),
    "sigmoid": ("sigmoid(qk + t0[n1])", [noise(H)], {"normaliser": "none"}),
    "relu": ("max(qk, 0.0) * 0.1", [], {"normaliser": "none"}),
    "weights-and-factor": ("sigmoid(qk)", [noise(H, SK)], {"normaliser": "none", "factor": "t0[n1, kv_idx]"}),
}  # fmt: skip


def program(name: str, dtype: torch.dtype = torch.float32, shape: Sequence[int] = (B, H, SQ, 8)) -> Call:
    score, captured, fields = PROGRAMS[name]
    typed = [c.to(dtype) if c.is_floating_point() else c for c in captured]
    return make_call(score, shape, SK, captured=typed, dtype=dtype, **fields)  # type: ignore[arg-type]


def leaves(call: Call, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """q, k, v and the captured tensors, the floating-point ones requiring gradients."""
    tensors = [x.detach() for x in (call.q, call.k, call.v, *call.captured)]
    return [x.to(dtype or x.dtype).requires_grad_() if x.is_floating_point() else x for x in tensors]


def gradients(out: torch.Tensor, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """[DRAWS, ..] of every input that requires one, for random gradients of the output."""
    wanted = [x for x in inputs if x.requires_grad]
    draws = []
    for seed in range(DRAWS):
        grad = noise(*out.shape, seed=seed).to(out.dtype)
        draws.append(torch.autograd.grad(out, wanted, grad, retain_graph=True, materialize_grads=True))
    return [torch.stack(grads) for grads in zip(*draws, strict=True)]


def check(call: Call, kv_ranges: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Hold every gradient to the accuracy rule; the gradients."""
    inputs, exact_inputs = leaves(call), leaves(call, torch.float64)
    arguments = (call.sizes, call.spec.to_text(), *(() if kv_ranges is None else (kv_ranges,)))
    found = gradients(attention(*inputs[:3], inputs[3:], *arguments)[0], inputs)
    eager = gradients(attention_reference(call.on(inputs))[0], inputs)
    out, _ = attention_reference(call.on(exact_inputs), torch.float64)
    for x, own, grad in zip(found, eager, gradients(out, exact_inputs), strict=True):
        assert x.dtype == own.dtype
        assert_close_to_exact(x, own, grad)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str, dtype: torch.dtype) -> None:
    check(program(name, dtype))


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradcheck(name: str) -> None:
    call = program(name, torch.float64, (B, H, SQ, 2))
    inputs = leaves(call)

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        return attention(*inputs[:3], list(inputs[3:]), call.sizes, call.spec.to_text())[0]

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("score", [CAUSAL, "tanh(qk) * t0[n1, n2, q_idx]"], ids=["causal", "tanh"])
@pytest.mark.parametrize(
    ("k_batch", "v_batch"),
    [
        ((2, 2, 1), None),
        ((1, 1, 1), None),
        ((1, 2, 3), None),
        ((2, 2, 1), (2, 2, 3)),
        ((2, 1, 3), (1, 2, 1)),
    ],
)
def test_shared_keys_and_values(score: str, k_batch: tuple, v_batch: tuple | None) -> None:
    captured = [noise(2, 3, 20)][: score.count("t0")]
    call = make_call(score, (2, 2, 3, 20, 8), 21, k_batch=k_batch, v_batch=v_batch, captured=captured, value_dim=5)
    check(call)


def test_shared_queries() -> None:
    call = make_call(CAUSAL, (2, 3, 20, 8))
    check(Call(call.spec, call.q[:1], call.k, call.v, [], call.sizes))


@pytest.mark.parametrize("shape", [(17, 8), (3, 17, 8), (2, 2, 1, 2, 17, 8)], ids=len)
def test_batch_axes(shape: tuple[int, ...]) -> None:
    check(make_call(CAUSAL, shape))


def test_operands_expanded_by_the_caller_have_a_gradient_at_every_position() -> None:
    call = make_call("qk", (2, 3, 20, 8))
    k, v = (x[:, :1].expand(2, 3, 20, 8) for x in (call.k, call.v))
    check(Call(call.spec, call.q, k, v, [], call.sizes))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3)])
def test_gradients_lie_as_their_operands_do(order: tuple[int, ...]) -> None:
    call = make_call(CAUSAL, (2, 3, 20, 8), out_order=order)
    inputs = [x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0).requires_grad_() for x in (call.q, call.k, call.v)]
    out, _ = attention(*inputs, [], call.sizes, call.spec.to_text())
    for x, grad in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert grad.stride() == x.stride()
    check(Call(call.spec, *inputs, [], call.sizes))


@pytest.mark.parametrize("empty_row", ["nan", "zero"])
@pytest.mark.parametrize("condition", ["t0[q_idx, kv_idx]", "(kv_idx <= q_idx - 3) & t0[q_idx, kv_idx]"])
@pytest.mark.parametrize("score", ["where({}, qk, -inf)", "qk + where({}, 0.0, -inf)"])
def test_empty_rows(score: str, condition: str, empty_row: str) -> None:
    """NaN where autograd gives NaN: in all values, and where an added mask lets it pass in all queries and keys."""
    mask = keep(33, 33)
    mask[[0, 7, 32]] = False
    _, dk, dv = check(make_call(score.format(condition), (2, 33, 8), captured=[mask], empty_row=empty_row))
    assert dv.isnan().all() if empty_row == "nan" else dv.isfinite().all()
    assert dk.isnan().all() if empty_row == "nan" and score.startswith("qk") else dk.isfinite().all()


@pytest.mark.parametrize("fill", [FP32_MIN, -1e30, -1e9, -1e4])
@pytest.mark.parametrize("score", ["where({}, qk * 0.3, {})", "tanh(qk) + where({}, 0.0, {})"])
@pytest.mark.parametrize("condition", ["t0[q_idx, kv_idx]", "(kv_idx <= q_idx - 13) & t0[q_idx, kv_idx]"])
def test_rows_masked_by_a_finite_fill_see_every_key(score: str, fill: float, condition: str) -> None:
    mask = keep(33, 33)
    mask[[0, 7, 32]] = False
    check(make_call(score.format(condition, fill), (2, 33, 8), captured=[mask]))


@pytest.mark.parametrize("fill", [FP32_MIN, -1e9])
def test_rows_masked_by_an_added_tensor(fill: float) -> None:
    """Their log-sum-exp in one number would have lost the number of keys, and every probability would be 1."""
    mask = torch.zeros(33, 33).masked_fill(~keep(33, 33), fill)
    mask[7] = fill
    _, _, dv, _ = check(make_call("qk * 0.3 + t0[q_idx, kv_idx]", (2, 33, 8), captured=[mask]))
    assert dv.abs().max() < 100


def test_a_row_that_sees_one_key() -> None:
    """Its probability is 1, and was off by the last digit of a large score, which another product rounds otherwise."""
    call = make_call(CAUSAL, (8, 3, 3, 7), kv_len=4)
    call = replace(call, q=call.q * 4, k=call.k * 4)
    grad = noise(8, 3, 3, 7)
    out, lse = tiled.attention_tiled(call)
    (dv,) = attention_backward_tiled(call, grad, out, lse * torch.tensor([1.0 + 2**-22, 1.0]), [False, False, True])

    def exact(dtype: torch.dtype) -> torch.Tensor:
        q, k, g = (x.to(dtype) for x in (call.q, call.k, grad))
        weights = (q @ k.mT * 0.3 + torch.full((3, 4), -math.inf, dtype=dtype).triu(1)).softmax(-1)
        return weights.mT @ g

    assert_close_to_exact(dv, exact(torch.float32), exact(torch.float64))


def test_few_keys_beside_a_sink() -> None:
    """Their row sums came from the output, which is rounded to its type: gradients were several times as far off.

    Gradients of queries and keys are small where scores are large, and what was left of the sums was not.
    """
    call = make_call("qk * t0[n1]", (8, H, 21, 2), kv_len=4, captured=[noise(H) + 3, noise(H)], sink="t1[n1]")
    call = replace(call, q=call.q.bfloat16(), k=(call.k * 4).bfloat16(), v=call.v.bfloat16())
    types = {"product_dtype": torch.bfloat16, "probs_dtype": torch.bfloat16, "out_dtype": torch.bfloat16}
    check(replace(call, spec=replace(call.spec, **types)))


def test_rows_of_few_keys_beside_a_sink() -> None:
    """A sink had their probabilities made from the saved log-sum-exp alone, which another product rounds otherwise."""
    call = make_call("qk", (8, 3, 9, 7), kv_len=4, captured=[noise(3)], sink="t0[n1]")
    call = replace(call, q=call.q * 4, k=call.k * 4)
    grad = noise(8, 3, 9, 7)
    out, lse = tiled.attention_tiled(call)
    found = attention_backward_tiled(call, grad, out, lse * torch.tensor([1.0 + 2**-22, 1.0]), [True] * 4)

    def exact(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        inputs = leaves(call, dtype)
        q, k, v, sink = inputs
        scores = torch.cat([q @ k.mT, sink.view(3, 1, 1).expand(8, 3, 9, 1)], -1)
        out = scores.softmax(-1)[..., :4] @ v
        return torch.autograd.grad(out, inputs, grad.to(dtype))

    for x, eager, wide in zip(found, exact(torch.float32), exact(torch.float64), strict=True):
        assert_close_to_exact(x, eager, wide)


def test_a_slope_that_float32_does_not_hold() -> None:
    """A mask's fill, added several times: the factors were multiplied to infinity before they met the gradient."""
    fill = "(1.0 - t0[n0, n1, q_idx, kv_idx]) * -1.2e+38"
    mask = keep(B, H, SQ, SK).float()
    call = make_call(f"exp(min(qk + {fill} + {fill} + {fill}, 0.0))", (B, H, SQ, 8), SK, captured=[mask])
    assert check(call)[3].isfinite().all()


def test_a_slope_that_is_infinite_where_a_gradient_is_0() -> None:
    """The square of a mask's number: the slope overflowed before it met a gradient of 0, and the mask's was NaN."""
    mask = keep(B, H, SQ, SK).float()
    score = "neg(pow(qk + (1.0 - t0[n0, n1, q_idx, kv_idx]) * -1e+30, 2.0))"
    call = make_call(score, (B, H, SQ, 8), SK, captured=[mask])
    assert check(call)[3].isfinite().all()


def test_dropped_rows_have_no_gradient() -> None:
    """Also where they have no key, so that their probabilities are NaN before they are dropped."""
    mask = keep(20, 20)
    mask[7] = False
    score = "where(t0[q_idx, kv_idx], qk, -inf)"
    rows = torch.arange(20) != 7
    found = check(make_call(score, (2, 20, 8), captured=[mask, rows], factor="t1[q_idx]"))
    assert all(x.isfinite().all() for x in found)
    assert (found[0][:, :, 7] == 0).all()


def test_discarded_branch_has_no_gradient() -> None:
    """sqrt has an infinite slope at 0, which autograd multiplies by 0 to NaN; see docs/numerics.md."""
    captured = [torch.zeros(20), torch.zeros(20, dtype=torch.bool)]
    call = make_call("where(t1[kv_idx], qk + sqrt(t0[kv_idx]), qk)", (2, 20, 8), captured=captured)
    inputs = leaves(call)
    out, _ = attention(*inputs[:3], inputs[3:], call.sizes, call.spec.to_text())
    assert (torch.autograd.grad(out.sum(), inputs[3])[0] == 0).all()


def test_ranges_leave_out_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one batch at a time: what a tile of several visits is what any of them needs."""
    monkeypatch.setattr(tiled, "WORKSPACE", 8 * 8)
    length = 300
    padding = torch.arange(length) < torch.tensor([[70], [300]])
    call = make_call("where(t0[n0, kv_idx], qk * 0.3, -inf)", (2, 2, length, 8), captured=[padding])
    predicate = "t0[n0, kv_idx]"
    kv_ranges = torch.ops.flashfuse.mask_ranges([padding], [2, 1], 2, length, length, predicate, predicate)
    call.k[0, :, 128:] = math.nan
    inputs = leaves(call)
    out, _ = attention(*inputs[:3], inputs[3:], call.sizes, call.spec.to_text(), kv_ranges)
    dq, dk, dv = torch.autograd.grad(out.square().sum(), inputs[:3])
    assert dq.isfinite().all()
    assert (dk[0, :, 70:] == 0).all()
    assert (dv[0, :, 70:] == 0).all()
    call.k[0, :, 128:] = 0
    check(call, kv_ranges)


@pytest.mark.parametrize(("shape", "kv_len"), [((0, 2, 5, 8), 5), ((2, 2, 0, 8), 5), ((2, 2, 5, 8), 0)])
def test_zero_sizes(shape: tuple[int, ...], kv_len: int) -> None:
    call = make_call("qk", shape, kv_len, captured=[noise(2)], sink="t0[n1]")
    inputs = leaves(call)
    out, _ = attention(*inputs[:3], inputs[3:], call.sizes, call.spec.to_text())
    for x, grad in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert grad.shape == x.shape
        assert (grad == 0).all()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("score", [CAUSAL, "tanh(qk)", "qk + t0[kv_idx] * t1[q_idx]", "qk + t0[q_idx - kv_idx + 1023]"])
def test_memory_is_linear_in_the_sequence(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("BLOCK_Q", 64), ("BLOCK_KV", 64), ("WORKSPACE", 64 * 64)):
        monkeypatch.setattr(tiled, name, size)
    largest = []
    for length in (256, 1024):
        captured = [noise(2048), noise(2048)][: ("t0" in score) + ("t1" in score)]
        call = make_call(score, (2, length, 8), captured=captured)
        out, lse = attention(*call.arguments)
        with LargestTensor() as seen:
            attention_backward_tiled(call, out, out, lse, [True] * len(call.operands))
        largest.append(seen.elements)
    assert largest[1] <= 4 * largest[0]
    assert largest[1] < 1024 * 1024 // 8


def test_only_what_is_needed_is_computed() -> None:
    call = program("alibi")
    all_of_them = check(call)
    inputs = leaves(call)
    for at, x in enumerate(inputs):
        alone = [y.detach() for y in inputs]
        alone[at].requires_grad_()
        out, _ = attention(*alone[:3], alone[3:], call.sizes, call.spec.to_text())
        torch.testing.assert_close(gradients(out, alone), [all_of_them[at]], rtol=0, atol=0)
        assert x.grad is None
