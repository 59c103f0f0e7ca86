"""The search of kernels and tiles, with a timer that is told what to say; on a GPU the search itself."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import Call, make_call
from numerics import assert_close_to_exact

triton = pytest.importorskip("triton")

from compile_targets import DEVICES  # noqa: E402

from flashfuse.kernels import launch, launch_decode, tuning  # noqa: E402
from flashfuse.kernels.launch import Launch, Shape, choose_launch  # noqa: E402
from flashfuse.kernels.tuning import TABLE, Choice, candidates, fits, prepare_tuned  # noqa: E402

BF16 = torch.bfloat16


def tuned(shape: tuple[int, ...] = (2, 3, 300, 64), kv_len: int = 300, **changes: Any) -> Call:
    call = make_call("where(kv_idx <= q_idx, qk * 0.125, -inf)", shape, kv_len, **{"dtype": BF16, **changes})
    return replace(call, spec=replace(call.spec, tuned=True))


class Timer:
    """Stands for the device: `milliseconds` of a choice, which gives what `result` says of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.milliseconds: Callable[[Choice], float] = lambda choice: 1.0
        self.wrong: Callable[[Choice], bool] = lambda choice: False
        self.timed: list[Choice] = []
        monkeypatch.setattr(tuning, "is_searched", lambda call: True)
        monkeypatch.setattr(tuning, "device_of", lambda index: DEVICES["sm90"][0])
        monkeypatch.setattr(tuning, "planned", self.planned)
        monkeypatch.setattr(tuning, "time_of", lambda run: run())
        monkeypatch.setattr(Choice, "prepare", lambda choice, call: choice)

    def planned(self, choice: Any, tensors: Any) -> tuple[tuple[torch.Tensor, torch.Tensor], Callable[..., float]]:
        def plan(*_: Any) -> float:
            self.timed.append(choice)
            return self.milliseconds(choice)

        out = torch.full((4, 8), 1.5 if self.wrong(choice) else 1.0)
        return (out, torch.ones(4, 2)), plan


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHFUSE_CACHE_DIR", str(tmp_path))
    return tmp_path / "tuned"


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Timer:
    return Timer(monkeypatch)


@pytest.mark.parametrize("name", ["sm80", "sm86", "sm89", "sm90", "sm100", "sm120"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("dim", [16, 64, 128, 256, 512])
@pytest.mark.parametrize("q_len", [1, 300])
def test_whatever_is_tried_fits_the_device(name: str, dtype: torch.dtype, dim: int, q_len: int) -> None:
    device = DEVICES[name][0]
    call = tuned((1, 1, q_len, dim), 300, dtype=dtype)
    found = candidates(call, device)
    assert found[0] == TABLE
    assert len(found) == len(set(found)) <= 16
    shape = launch.shape_of(call.spec, q_len, dim, dim)
    launches = [choice.launch for choice in found if choice.launch is not None]
    assert launches
    for near in launches:
        assert near.shared_bytes(shape) <= device.shared_bytes
        assert fits(device, shape, near), near


@pytest.mark.parametrize("name", [name for name in DEVICES if name.startswith("sm")])
def test_the_rule_for_registers_is_true_of_every_launch_of_the_tables(name: str) -> None:
    device = DEVICES[name][0]
    for table in (launch.TABLE, launch_decode.TABLE):
        for dim in (16, 64, 128, 256, 512):
            for size in (2, 4):
                shape = Shape(128, dim, dim, size, 0)
                chosen = choose_launch(device, shape, table)
                assert chosen is not None
                assert fits(device, shape, chosen), (dim, size, chosen)


def test_the_fastest_is_taken_and_written(timer: Timer, folder: Path) -> None:
    best = Choice("plain", Launch(64, 64, 4, 3))
    timer.milliseconds = lambda choice: 0.5 if choice == best else 1.0
    call = tuned()
    assert prepare_tuned(call) == best
    (file,) = folder.iterdir()
    written = json.loads(file.read_text())
    assert written["kernel"] == "plain"
    assert written["launch"]["block_q"] == 64
    assert {TABLE.kernel, "hopper", "plain"} == {time["kernel"] for time in written["times"]}


def test_calls_alike_are_timed_once(timer: Timer) -> None:
    prepare_tuned(tuned())
    first = len(timer.timed)
    assert first > 3
    prepare_tuned(tuned())
    prepare_tuned(tuned((2, 3, 290, 64), 290))
    assert len(timer.timed) == first
    prepare_tuned(tuned((2, 3, 600, 64), 600))
    prepare_tuned(tuned(dtype=torch.float16))
    assert len(timer.timed) == 3 * first


def test_another_order_in_memory_is_another_call(timer: Timer) -> None:
    call = tuned()
    prepare_tuned(call)
    before = len(timer.timed)
    prepare_tuned(replace(call, q=call.q.transpose(1, 2).contiguous().transpose(1, 2)))
    assert len(timer.timed) > before


def test_few_queries_try_splits(timer: Timer) -> None:
    best = {"kernel": "decode", "share": 2.0}
    timer.milliseconds = lambda choice: 0.5 if (choice.kernel, choice.share) == tuple(best.values()) else 1.0
    choice: Any = prepare_tuned(tuned((2, 3, 1, 64), 4000))
    assert (choice.kernel, choice.share) == tuple(best.values())


def test_one_that_is_wrong_or_fails_is_left_out(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    timer.wrong = lambda choice: choice.kernel == "plain"

    def milliseconds(choice: Choice) -> float:
        if choice.kernel == "hopper":
            raise RuntimeError("out of resource: shared memory")
        return 1.0 if choice == TABLE else 0.1

    timer.milliseconds = milliseconds
    assert prepare_tuned(tuned()) == TABLE


def test_where_nothing_can_be_timed_nothing_is_written(timer: Timer, folder: Path) -> None:
    def milliseconds(choice: Choice) -> float:
        raise torch.OutOfMemoryError("no memory")

    timer.milliseconds = milliseconds
    assert prepare_tuned(tuned()) == TABLE
    assert not folder.exists()


def test_nothing_is_timed_while_a_graph_is_captured(
    timer: Timer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert prepare_tuned(tuned()) == TABLE
    assert not timer.timed
    assert not folder.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"key": 1}', "null", "\x00"])
def test_a_broken_file_is_written_again(timer: Timer, folder: Path, text: str) -> None:
    prepare_tuned(tuned())
    (file,) = folder.iterdir()
    whole, timed = file.read_text(), len(timer.timed)
    file.write_text(text)
    prepare_tuned(tuned())
    assert len(timer.timed) == 2 * timed
    assert file.read_text() == whole


def test_the_setting_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, and where sums have to be in the same order each time, tables decide."""
    call = tuned()
    assert not tuning.is_searched(call)
    plain = replace(call.spec, tuned=False)
    assert plain == call.spec
    assert hash(plain) == hash(call.spec)
    assert plain.to_text() != call.spec.to_text()
    assert type(plain).from_text(call.spec.to_text()).tuned


OTHER_PROCESS = """
import sys
sys.path[:0] = {path}
import pytest
from test_tuning import Timer, tuned, prepare_tuned
with pytest.MonkeyPatch.context() as patch:
    timer = Timer(patch)
    found = prepare_tuned(tuned())
print(found.kernel, found.launch.num_warps, len(timer.timed))
"""


def test_another_process_reads_it(timer: Timer) -> None:
    timer.milliseconds = lambda choice: 0.5 if choice.launch == Launch(64, 64, 4, 3) else 1.0
    prepare_tuned(tuned())
    code = OTHER_PROCESS.format(path=[str(Path(__file__).parent), *sys.path])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert run.stdout.split() == ["plain", "4", "0"], run.stderr


@pytest.mark.parametrize("change", [0.0, 1e-3, 0.5, float("nan"), float("inf")])
def test_what_agrees(change: float) -> None:
    call = tuned()
    out, lse = torch.randn(3, 8), torch.ones(3, 2)
    other = out.clone()
    other[1, 1] += change
    assert tuning.agrees(call.spec, (other, lse), (out, lse)) == (change < 0.1)
    assert tuning.agrees(call.spec, (out * float("nan"), lse), (out * float("nan"), lse))
    assert not tuning.agrees(call.spec, (out, lse * 2), (out, lse))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("shape", "kv_len"), [((2, 4, 700, 64), 700), ((2, 4, 1, 128), 3000)])
def test_every_choice_is_right(shape: tuple[int, ...], kv_len: int) -> None:
    call = tuned(shape, kv_len).to("cuda")
    for choice in candidates(call, launch.device_of(0)):
        prepared = choice.prepare(call)
        if prepared is not None:
            assert_close_to_exact(prepared.run(call)[0], call.eager()[0], call.exact()[0])
