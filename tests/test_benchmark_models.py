"""The benchmark of whole models, at sizes for a CPU: it compares like with like and believes no wrong result."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("triton")

# Only while importing: the folders beside the benchmarks share names with other packages.
sys.path.insert(0, str(Path(__file__).parents[1]))
try:
    from benchmarks import model_cases, models
    from benchmarks.model_cases import EAGER, SDPA, Model
finally:
    sys.path.pop(0)

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}


@pytest.fixture
def bert() -> Model:
    build = model_cases._of_transformers("BertModel", vocab_size=30000, **SMALL)
    return Model("BERT", build, lambda _: model_cases._padded(4, 64))


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "BACKENDS", ("flashfuse", "eager"))


def test_a_step_is_compared(bert: Model) -> None:
    """Fused in every layer, right, and timed, whichever way its attention is written."""
    found = models.compare(bert, "cpu", rounds=1)
    assert found.fused == {EAGER: 2, SDPA: 2}
    assert set(found.row.ms) == {f"{backend}, {setting}" for backend in models.BACKENDS for setting in (EAGER, SDPA)}
    assert not found.row.notes
    assert [len(line) for line in models.lines(found)] == [len(models.header())] * 2


def test_a_training_step_is_checked_by_a_gradient() -> None:
    build = model_cases._of_transformers("GPT2Model", n_layer=2, n_embd=64, n_head=4, **model_cases.NO_DROPOUT)
    gpt = Model("GPT-2", build, lambda _: {"input_ids": model_cases._tokens(2, 64)}, (EAGER,), trains=True)
    found = models.compare(gpt, "cpu", rounds=1)
    assert found.fused == {EAGER: 2}
    assert not found.row.notes
    assert torch.tensor([*found.row.errors.values()]).gt(0).all()
    # So little that a gradient of something else is not within twice it.
    assert found.row.eager_error is not None
    assert found.row.eager_error < 0.05


def test_a_wrong_result_has_no_time(bert: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "allowed_error", lambda *_: -1.0)
    monkeypatch.setattr(models, "BACKENDS", ("eager",))
    found = models.compare(bert, "cpu", rounds=1)
    assert not found.row.ms
    assert "wrong" in found.row.notes[f"eager, {SDPA}"]
