"""Gradients of captured tensors whose elements several pairs of queries and keys share; see `triton_backward`."""

import math
from collections.abc import Iterator

import pytest
import torch
from attention_cases import make_call
from gradient_cases import differentiable, grad_out
from numerics import assert_close_to_exact

pytest.importorskip("triton")

from triton_backward import DEVICE, RUNS, TILES, backward, check, check_ranged, noise

from flashfuse.kernels import captured_grad, launch_backward, launch_buckets
from flashfuse.kernels.buckets import BucketSums
from flashfuse.kernels.prepared import empty_on, start

pytestmark = RUNS


@pytest.fixture(autouse=True)
def _nan_filled_outputs() -> Iterator[None]:
    """An element that no kernel writes stays NaN; an operator that is not deterministic raises."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


B, H, S, KV_LEN = 2, 2, 28, 21
AT = torch.arange(S)[:, None] * 7 + torch.arange(KV_LEN) * 3
SHARED = {
    "sums": ("qk + t0[q_idx + kv_idx]", [noise(S + KV_LEN - 1)]),
    "halved": ("qk + t0[q_idx // 2, n1, kv_idx]", [noise(14, H, KV_LEN)]),
    "backwards": ("qk + t0[n0, 27 - q_idx, kv_idx]", [noise(B, S, KV_LEN)]),
    "decomposed": (
        "qk + t0[n1 + 2 * n0, q_idx // 4, q_idx % 4, kv_idx // 7] + t1[n1 + 2 * n0, q_idx // 4, q_idx % 4, kv_idx % 7]",
        [noise(B * H, 7, 4, 3), noise(B * H, 7, 4, 7)],
    ),
    "of-rows": ("where(kv_idx <= q_idx, qk + t0[n1, q_idx, min(q_idx - kv_idx, 9)], -inf)", [noise(H, S, 10)]),
    "of-keys": ("(qk + t0[n1 + 2 * n0, kv_idx, min(abs(q_idx - kv_idx), 8)]) * 0.3", [noise(B * H, KV_LEN, 9)]),
    "looked-up": ("qk * 0.3 + t0[t1[q_idx, kv_idx], n1]", [noise(11, H), AT % 11]),
    "looked-up-by-batch": ("qk + t0[t1[n0, q_idx, kv_idx] + q_idx]", [noise(50), torch.stack([AT % 11, AT % 13])]),
    "one-tensor-twice": ("qk + t0[t1[q_idx, kv_idx]] * 2.0 + t0[q_idx + kv_idx]", [noise(50), AT % 5]),
    "discarded": ("qk + where(kv_idx < 9, t0[q_idx + kv_idx], t0[kv_idx - 9])", [noise(40)]),
    "with-an-owner": ("tanh(qk + t0[q_idx, kv_idx // 2]) + t1[q_idx, kv_idx]", [noise(S, 11), noise(S, KV_LEN)]),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_pairs_that_share_elements(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole backward was left to torch. A few queries at a time; all of them in the tests of forms."""
    score, captured = SHARED[name]
    for setting in ("WORKSPACE", "ENOUGH_PROGRAMS"):
        monkeypatch.setattr(captured_grad, setting, 1)
    monkeypatch.setattr(launch_backward, "attention_backward_tiled", None)
    dropout = 0.2 if name == "of-keys" else 0.0
    call = make_call(score, (B, H, S, 16), KV_LEN, captured=captured, dropout=dropout)
    check(call, [3 + slot for slot, c in enumerate(captured) if c.is_floating_point()])


@pytest.mark.parametrize("batch", [2, 5])
def test_parts_of_pairs(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some queries at a time, and some keys a program, by rows and, where many positions share them, by tiles of pairs.

    Tiles before and behind those that the mask leaves are 0."""
    seen, read = "(kv_idx <= q_idx + 90) & (kv_idx > q_idx + 40)", "t0[q_idx, kv_idx] + t1[q_idx // 2, kv_idx]"
    score = f"where({seen}, qk * 0.3 + {read}, -10000.0)"
    captured = [noise(S, 150), noise(S // 2, 150)]
    call = make_call(score, (batch, S, 16), 150, captured=captured)
    monkeypatch.setattr(captured_grad, "ENOUGH_PROGRAMS", 1)
    together = check(call, [3, 4])
    monkeypatch.setattr(captured_grad, "WORKSPACE", 1)
    monkeypatch.setattr(launch_backward, "ROWS_TILES", 1)
    for mine, other in zip(backward(call, grad_out(call), [3, 4]), together, strict=True):
        assert torch.equal(mine, other)


OWNERS = {"rows": "npb", "keys": "nqb", "pairs": "nb"}


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize(("rows", "keys", "buckets"), [(1, 3, 1), (9, 70, 40), (14, 65, 5)])
def test_sums_of_buckets(owner: str, rows: int, keys: int, buckets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of values that lie apart, in buckets that are told by distances; those outside are the first and the last."""
    monkeypatch.setattr(launch_buckets, "ENOUGH_PROGRAMS", 6)
    values = noise(2, rows + 2, keys)[:, 1 : rows + 1].to(DEVICE)
    told = (torch.arange(rows + keys - 1) * 7 % (buckets + 2) - 1).to(DEVICE)
    at = BucketSums(values, told[rows - 1 :], (-1, 1), buckets, owner)
    found = launch_buckets.sum_buckets(empty_on(values.device), start, at)
    distances = torch.arange(keys) - torch.arange(rows)[:, None] + rows - 1
    one_hot = torch.nn.functional.one_hot(told.cpu()[distances].clamp(0, buckets - 1), buckets).double()
    exact = torch.einsum(f"npq,pqb->{OWNERS[owner]}", values.cpu().double(), one_hot)
    eager = torch.einsum(f"npq,pqb->{OWNERS[owner]}", values.cpu(), one_hot.float())
    assert_close_to_exact(found.sum(1) if owner == "pairs" else found, eager, exact)


@pytest.mark.parametrize(("name", "reads"), [("decomposed", 2), ("looked-up", 1)])
def test_rows_of_pairs_take_bounded_memory(name: str, reads: int) -> None:
    """However many queries there are; of reads with one slope they are made once."""
    score, captured = SHARED[name]
    call = make_call(score, (B, H, 6000, 16), 4000, captured=captured).to(DEVICE)
    out, lse = (torch.empty(B, H, 6000, width, device=DEVICE) for width in (16, 2))
    prepared = launch_backward.prepare_backward(call, out, out, lse, [True] * len(differentiable(call)), TILES)
    assert prepared is not None
    (target,), (launches,) = prepared.targets, prepared.pairs
    assert len(target.reads) == reads
    assert 4 * math.prod(target.whole.size) <= captured_grad.WORKSPACE
    assert len(launches) == len(target.parts) > 1
    assert [i for part in target.parts for i in captured_grad.queries_of(part)] == list(range(6000))


def test_pairs_that_share_elements_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges are found by the place of a query among all, not among those that are added up at a time."""
    monkeypatch.setattr(captured_grad, "WORKSPACE", 1)
    score = "where((t0[q_idx] == t0[kv_idx]) & (kv_idx <= q_idx), qk * 0.3 + t1[q_idx, min(q_idx - kv_idx, 9)], -inf)"
    check_ranged(make_call(score, (1, 150, 16), 200, captured=[torch.arange(200) // 70, noise(150, 10)]), [4])
