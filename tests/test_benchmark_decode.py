"""The benchmark of decode steps: it compares like with like, and believes no time of a wrong result."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forms import exact
from numerics import assert_close_to_exact

import flashfuse
from flashfuse.kernels.tiled import attention_tiled

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
# Only while importing: the folders beside the benchmarks share names with other packages.
sys.path.insert(0, str(ROOT))
try:
    from benchmarks import bandwidth, decode, decode_peers, decode_search
    from benchmarks.decode_cases import FULL, QUICK, TINY, Operands, Point
    from benchmarks.decode_peers import BASELINE, PEERS, Code, Peer, plain
    from benchmarks.decode_search import Choice, Launch
    from benchmarks.decode_table import PEER_HEADER, DecodeRow, cells, markdown
finally:
    sys.path.pop(0)

GROUPED, SINGLE = Point(2, 4, 2, 160, 16), Point(2, 2, 2, 48, 16)
CODES = {peer.code: peer for peer in PEERS.values()}
COMPILED = ("flex", "inductor")
GB = 10**9
CARD, CACHE = 80 * GB, 50 * 2**20


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    flashfuse.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewrite without Inductor."""
    monkeypatch.setattr(decode_peers, "by_flashfuse", by_flashfuse)


def by_flashfuse(code: Code) -> Code:
    options = {"flashfuse.inner": "eager", "flashfuse.strict": True}
    return torch.compile(code, backend="flashfuse", fullgraph=True, options=options)


def compare(peers: dict[str, Peer], point: Point = GROUPED, **more: Any) -> DecodeRow:
    return decode.compare(point, TINY, peers, "cpu", **more)


def shown(row: DecodeRow, peer: str) -> dict[str, str]:
    return dict(zip(PEER_HEADER, cells(row, peer), strict=True))


# --------------------------------------------------------------------------------------------------------------------
# Peers


@pytest.mark.parametrize("point", [GROUPED, SINGLE], ids=str)
def test_the_operator_runs_what_the_backend_recovers(point: Point) -> None:
    q, k, v = Operands.make(point, TINY, "cpu").sets[0]
    (site,) = flashfuse.explain(plain)(q, k, v).sites
    assert site.spec == decode_peers.spec_at(point, TINY.dtype)


@pytest.mark.parametrize("name", [name for name in PEERS if name not in COMPILED])
@pytest.mark.parametrize("point", [GROUPED, SINGLE], ids=str)
def test_a_peer_computes_its_code(name: str, point: Point) -> None:
    row = compare({name: PEERS[name]}, point)
    assert not row.notes
    assert row.ms[name] > 0
    assert row.launched_ms[name] > 0


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.__name__)
@pytest.mark.parametrize("point", [GROUPED, SINGLE], ids=str)
def test_a_sample_is_part_of_the_output(code: Code, point: Point) -> None:
    """What errors are measured on is the first and the last head of the first and the last set, computed alone."""
    x = Operands.make(point, TINY, "cpu")
    extras = CODES[code].extras(x)
    outputs = [code(*tensors, *extras) for tensors in x.sets]
    torch.testing.assert_close(code(*x.sample(), *extras), x.sampled(outputs))
    assert not torch.equal(*x.sampled(outputs)[::3])


def test_masks_are_those_of_a_decode_step() -> None:
    """The last query sees every key; a window sees half of them, and a soft cap is a function of its own."""
    x = Operands.make(GROUPED, TINY, "cpu")
    q, k, v = x.sets[0]
    every = plain(q, k, v)
    torch.testing.assert_close(decode_peers.causal(q, k, v), every)
    torch.testing.assert_close(decode_peers.cache_position(q, k, v, *decode_peers.last_position(x)), every)
    half = GROUPED.kv_len // 2
    torch.testing.assert_close(decode_peers.window(q, k, v), plain(q, k[:, :, half:], v[:, :, half:]))
    assert not torch.allclose(decode_peers.softcap(10 * q, k, v), plain(10 * q, k, v))


def test_the_masked_operator_reads_its_mask_and_its_ranges() -> None:
    x = Operands.make(GROUPED, TINY, "cpu")
    q, k, v = x.sets[0]
    call = decode_peers.masked_call(decode_peers.call_at(GROUPED, q, k, v))
    assert call.kv_ranges is not None
    call.check()
    call.check_sizes()
    call.captured[0][0, 17:] = True
    out, _ = torch.ops.flashfuse.attention(call.q, call.k, call.v, call.captured, call.sizes, call.spec.to_text())
    seen = q, k[:, :, :17], v[:, :, :17]
    assert_close_to_exact(out.view(q.shape), plain(*seen), exact(plain, seen))


def test_points_fit_a_card_and_no_cache() -> None:
    names = [str(point) for point in FULL.points]
    assert len(names) == len(set(names))
    for point in FULL.points:
        rotated = FULL.sets(point) * point.kv_bytes(FULL.dtype)
        assert 2 * CACHE < rotated < decode.MEMORY * CARD
    assert set(QUICK.points) <= set(FULL.points)


def test_points_of_a_family_follow_each_other() -> None:
    families = [point.family for point in FULL.points]
    changes = sum(one != other for one, other in itertools.pairwise(families))
    assert changes == len(set(families)) - 1


# --------------------------------------------------------------------------------------------------------------------
# Checking


def spoilt(factor: float, own: bool) -> Peer:
    return Peer(lambda x: lambda q, k, v: factor * plain(q, k, v), own=own)


@pytest.mark.parametrize("own", [False, True])
def test_a_wrong_result_has_no_figures(own: bool) -> None:
    row = compare({BASELINE: PEERS[BASELINE], "spoilt": spoilt(1.1, own), "right": spoilt(1.0, own)})
    assert row.notes["spoilt"].startswith("wrong: ")
    assert row.ms.keys() == row.launched_ms.keys() == {BASELINE, "right"}
    assert shown(row, "spoilt")["us"] == shown(row, "spoilt")["GB/s"] == "-"


def test_a_wrong_last_set_has_no_figures() -> None:
    """A captured graph whose sets have been mixed up, say."""

    def make(x: Operands) -> Code:
        return lambda q, k, v: plain(*x.sets[0])

    row = compare({"mixed": Peer(make)}, SINGLE)
    assert row.sets > 1
    assert row.notes["mixed"].startswith("wrong: ")
    assert not row.ms


def test_a_wrong_replay_has_no_figures() -> None:
    """Right where it is launched, wrong once captured."""

    def make(x: Operands) -> Code:
        factors = iter([1.0] * len(x.sets) + [1.1] * 1000)
        return lambda q, k, v: next(factors) * plain(q, k, v)

    row = compare({"changing": Peer(make)}, launched=False)
    assert row.notes["changing, in a graph"].startswith("wrong: ")
    assert not row.ms


def sorted_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same by a way that is not fused."""
    s, order = decode_peers.scores(q, k).float().sort(-1)
    v = decode_peers.repeat_kv(v, q.shape[1] // v.shape[1])
    return s.softmax(-1).to(v.dtype) @ v.gather(2, order.mT.expand(v.shape))


def test_what_is_not_fused_has_no_figures() -> None:
    row = compare({"sorted": Peer(lambda x: by_flashfuse(sorted_keys), own=True)})
    assert "expected 1 fused" in row.notes["sorted"]
    assert not row.ms
    # The same code counts where it is no claim of flashfuse's.
    assert compare({"sorted": Peer(lambda x: sorted_keys, own=True)}).ms


def test_what_is_not_fused_has_none_at_the_next_point_either(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The third length finds compiled code, of which no new report tells that it is not fused."""
    peers = {"flashfuse": Peer(lambda x: by_flashfuse(sorted_keys), own=True), BASELINE: PEERS[BASELINE]}
    monkeypatch.setattr(decode, "PEERS", peers)
    points = tuple(dataclasses.replace(GROUPED, kv_len=n) for n in (48, 64, 80))
    monkeypatch.setattr(decode, "TINY", dataclasses.replace(TINY, everything=points, some=()))
    decode.main(["--device", "cpu", "--tiny", "--json", str(tmp_path / "rows.json")])
    entries = json.loads((tmp_path / "rows.json").read_text())
    assert [list(entry["ms"]) for entry in entries] == [[BASELINE]] * 3


def test_a_peer_that_raises_is_noted() -> None:
    def make(x: Operands) -> Code:
        raise RuntimeError("no such kernel")

    row = compare({"broken": Peer(make), BASELINE: PEERS[BASELINE]}, launched=False)
    assert row.notes["broken"] == "RuntimeError: no such kernel"
    assert row.ms.keys() == {BASELINE}
    assert not row.launched_ms


def test_what_does_not_fit_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "fits", lambda size, device: False)
    row = compare({BASELINE: PEERS[BASELINE]})
    assert "do not fit" in row.notes["all"]
    assert not row.ms


# --------------------------------------------------------------------------------------------------------------------
# The table


def test_figures_of_a_row() -> None:
    row = DecodeRow(
        "p", "p", ms={BASELINE: 0.02, "flashfuse window": 0.01}, launched_ms={BASELINE: 0.03, "flashfuse window": 0.06},
        read={BASELINE: 1.0, "flashfuse window": 0.5}, kv_bytes=40_000_000, sets=3, splits=7, best_read=4e12,
        errors={"flashfuse window": 1e-3},
    )  # fmt: skip
    assert cells(row, "flashfuse window") == ("10.0", "60.0", "2000", "50 %", "2.00", "0.50", "1.0e-03")
    assert cells(row, BASELINE)[:5] == ("20.0", "30.0", "2000", "50 %", "1.00")
    text = markdown([row])
    assert "| p | 40.0 | 3 | 7 | flashfuse window | 10.0 |" in text
    assert "reads 4000 GB/s at best" in text


def test_the_best_reader_is_found() -> None:
    rate, name = bandwidth.best_read(TINY.read_bytes, "cpu")
    assert rate > 0
    assert name in ("torch.sum", "copy")


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(decode, "PEERS", {n: p for n, p in PEERS.items() if n not in COMPILED})
    found, table = tmp_path / "rows.json", tmp_path / "rows.md"
    chosen = [
        "--device",
        "cpu",
        "--tiny",
        "--json",
        str(found),
        "--markdown",
        str(table),
        "--only",
        "B2 H4/2 KV48",
        "H2/2",
    ]
    decode.main(chosen)
    entries = json.loads(found.read_text())
    assert [entry["name"] for entry in entries] == ["B2 H4/2 KV48 D16", "B2 H2/2 KV48 D16"]
    assert all(not entry["notes"] for entry in entries)
    everywhere = {name for name, peer in PEERS.items() if peer.everywhere}
    assert [entry["ms"].keys() == everywhere for entry in entries] == [False, True]
    assert table.read_text().count("| flashfuse |") == len(entries)
    assert "2 points in" in capsys.readouterr().out
    decode.main([*chosen, "--quick"])
    assert all(entry["launched_ms"] == {} for entry in json.loads(found.read_text()))
    assert {name for entry in json.loads(found.read_text()) for name in entry["ms"]} == set(decode_peers.QUICK_PEERS)


# --------------------------------------------------------------------------------------------------------------------
# The search


ONE, TWO = Launch(16, 32, 4, 2), Launch(16, 64, 8, 3)


def test_splits_leave_every_share_a_tile() -> None:
    few = Point(1, 32, 8, 1024, 128)
    assert decode_search.other_splits(few, TWO) == [1, 2, 3, 4, 6, 8, 12, 16]
    many = dataclasses.replace(few, batch=64, kv_len=8192)
    assert decode_search.other_splits(many, TWO) == [1, 2, 3, 4]
    assert decode_search.other_splits(dataclasses.replace(many, batch=1024), TWO) == [1]


def test_tiles_are_compared_over_points() -> None:
    """Each at its best number of splits, as a factor of the best of the point; only those timed at every point."""
    one, other = Point(1, 4, 2, 64, 16), Point(2, 4, 2, 64, 16)
    results = {
        one: {Choice(ONE, 1): 10.0, Choice(ONE, 2): 8.0, Choice(TWO, 1): 4.0},
        other: {Choice(ONE, 1): 5.0, Choice(TWO, 1): 10.0, Choice(Launch(16, 16, 4, 2), 1): 5.0},
    }
    losses = decode_search.losses(results)
    assert losses.keys() == {ONE, TWO}
    assert losses[ONE] == losses[TWO] == pytest.approx(math.sqrt(2))


def test_a_line_of_the_search() -> None:
    line = decode_search.shown(
        GROUPED, Choice(ONE, 4), {Choice(ONE, 4): 12.0, Choice(TWO, 2): 10.0}, "{:.0f} GB/s".format
    )
    assert "table (16, 32, 4, 2) x 4 12.0 us, 1.20 x best; best (16, 64, 8, 3) x 2 10.0 us (10 GB/s)" in line
    failed = decode_search.shown(GROUPED, Choice(ONE, 4), {Choice(TWO, 2): 10.0}, str)
    assert "table (16, 32, 4, 2) x 4 failed" in failed


def test_tiles_larger_than_shared_memory_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    call = decode_peers.call_at(GROUPED, *Operands.make(GROUPED, TINY, "cpu").sets[0])
    tiles = (ONE, TWO)
    assert decode_search.candidates(call, tiles) == [ONE, TWO]
    small = dataclasses.replace(decode_search.device_of(None), shared_bytes=6000)
    monkeypatch.setattr(decode_search, "device_of", lambda index: small)
    assert decode_search.candidates(call, tiles) == [ONE]


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_a_wrong_choice_is_not_timed(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    at = decode_search.Searched.make(GROUPED, TINY, "cpu")
    wrong = SimpleNamespace(run=lambda call: (factor * attention_tiled(call)[0], None))
    monkeypatch.setattr(decode_search.Searched, "prepared", lambda self, choice: wrong)
    if factor == 1.0:
        at.sweep(Choice(ONE, 1), None)
        return
    with pytest.raises(AssertionError, match="error"):
        at.sweep(Choice(ONE, 1), None)


def test_a_cpu_search_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="TRITON_INTERPRET"):
        decode.main(["--device", "cpu", "--tiny", "--search"])


def test_the_search_in_the_interpreter(tmp_path: Path) -> None:
    """The kernels run with every choice; in a process of their own, as the interpreter is chosen by an import."""
    found = tmp_path / "search.json"
    command = [sys.executable, "-m", "benchmarks.decode", "--device", "cpu", "--tiny", "--search", "--json", str(found)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    (entry,) = json.loads(found.read_text())
    assert entry["notes"] == {}
    assert {"(16, 16, 4, 2) x 1", "(16, 16, 4, 2) x 2", "(16, 32, 4, 2) x 1", entry["table"]} <= entry["us"].keys()
    assert all(us > 0 for us in entry["us"].values())
    assert "D16, all points: " in run.stdout
