"""The benchmark of whole decode steps, at sizes for a CPU."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("triton")

# Only while importing: the folders beside the benchmarks share names with other packages.
sys.path.insert(0, str(Path(__file__).parents[1]))
try:
    from benchmarks import decode_model
    from benchmarks.decode_model import FILLED_PARTS, TINY, Case, compare
finally:
    sys.path.pop(0)

CASE = Case(1, "sdpa", "default")


@torch.no_grad()
def test_a_step_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused in every layer, right, and timed beside the other compiler, whatever part of the cache is full."""
    monkeypatch.setattr(decode_model, "BACKENDS", ("flashfuse", "eager"))
    rows = compare(CASE, TINY, "cpu")
    assert len(rows) == len(FILLED_PARTS)
    for row in rows:
        assert set(row.ms) == {"flashfuse", "eager"}
        assert row.sites == TINY.layers
        assert not row.notes


@torch.no_grad()
def test_a_wrong_result_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_model, "allowed_error", lambda *_: -1.0)
    monkeypatch.setattr(decode_model, "BACKENDS", ("eager",))
    for row in compare(CASE, TINY, "cpu"):
        assert not row.ms
        assert "wrong" in row.notes["eager"]
