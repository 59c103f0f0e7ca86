"""The generation example: how tokens are compared, its verdict, and the whole of it at a size for a test."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

# Only while importing: the example's modules have plain names.
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
try:
    import generate
    import generator
    from generator import common
finally:
    sys.path.pop(0)

SIZES = {"layers": 1, "width": 32, "heads": 4, "kv-heads": 2, "batch": 2, "prompt": 24, "tokens": 6}
ARGUMENTS = ["--preset", "cpu", "--dtype", "float32", *(t for name, n in SIZES.items() for t in (f"--{name}", str(n)))]


@pytest.mark.parametrize(
    ("row", "expected"), [([1, 2, 3], 3), ([1, 0, 3], 1), ([0, 2, 3], 0)], ids=["same", "second", "first"]
)
def test_tokens_in_common(row: list[int], expected: int) -> None:
    """The first difference in any row ends what is counted."""
    assert common(torch.tensor([[1, 2, 3], row]), torch.tensor([[1, 2, 3], [1, 2, 3]])) == expected


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers that only trace: what they do with a graph is tested elsewhere, and takes its time."""
    real = torch.compile
    stands_for: dict[str, dict[str, Any]] = {
        "inductor": {"backend": "eager"},
        "flashfuse": {"backend": "flashfuse", "options": {"flashfuse.inner": "eager", "flashfuse.strict": True}},
    }
    monkeypatch.setattr(generator.torch, "compile", lambda model, backend, mode: real(model, **stands_for[backend]))


@pytest.mark.usefixtures("quick")
def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main([*ARGUMENTS, "--sample"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("6/6") == len(generate.WAYS)
    assert "the tokens are the same and every attention is fused" in printed


def test_the_verdict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Another token fails the run in float32 and not in a narrower type; an attention left in a step always does."""
    right = generator.Run(torch.zeros(2, 6, dtype=torch.int64), 1.0, 1.0, 1.0, ())
    other = dataclasses.replace(right, tokens=torch.eye(2, 6, dtype=torch.int64))
    runs = {"inductor": other}
    monkeypatch.setattr(generate, "run", lambda setup, attention, backend, told: runs.get(backend, right))
    assert generate.main(ARGUMENTS) == 1
    assert "inductor: token 0 is another one" in capsys.readouterr().out
    assert generate.main([*ARGUMENTS, "--dtype", "bfloat16"]) == 0
    runs["flashfuse"] = dataclasses.replace(right, reports=(generate.flashfuse.Report(graph="0/0"),))
    assert generate.main([*ARGUMENTS, "--dtype", "bfloat16"]) == 1
