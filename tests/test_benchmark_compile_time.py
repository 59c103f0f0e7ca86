"""The benchmark of compile time: each compile is cold and then warm in one folder; figures are of what was timed."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

# Only while importing: the folders beside the benchmarks share names with other packages.
sys.path.insert(0, str(Path(__file__).parents[1]))
try:
    from benchmarks import compile_time
    from benchmarks.compile_time import HEADER, Case, Row, cells, clocked
finally:
    sys.path.pop(0)

CASE = Case("flashfuse", 4, "eager", False, "cpu")


def test_figures() -> None:
    shown = dict(zip(HEADER[:7], cells(Row(CASE, "cold", 20.0, 0.5, 0.01)), strict=False))
    assert shown["compile"] == "20.0 s"
    assert (shown["flashfuse"], shown["matching"], shown["a layer"]) == ("0.50 s", "10 ms", "2.5 ms")
    assert cells(Row(CASE, "cold", 20.0, 0.5, 0.01))[4::3] == ("2.5%", "0.05%")


def test_what_was_not_done_has_no_figures() -> None:
    """A warm Inductor reads what it made of the graph, and looks for nothing."""
    assert cells(Row(CASE, "warm", 20.0, 0.0, 0.0))[3:] == ("-",) * 5


def test_cold_comes_before_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []

    def apart(case: Case, folder: Path) -> dict[str, float]:
        folders.append(folder)
        return {"compile": 1.0}

    monkeypatch.setattr(compile_time, "apart", apart)
    assert [row.caches for row in compile_time.rows([CASE, CASE])] == ["cold", "warm"] * 2
    assert folders[0] == folders[1] != folders[2] == folders[3]


def test_a_clock_is_taken_off() -> None:
    owner: Any = SimpleNamespace(work=lambda: sum(range(10**6)))
    seconds: Counter[str] = Counter()
    work = owner.work
    with clocked(seconds, "work", owner, "work"):
        assert owner.work() == work()
    assert owner.work is work
    assert 0 < seconds["work"] < 10
