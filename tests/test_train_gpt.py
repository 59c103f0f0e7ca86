"""The training example: its text, its verdict on loss curves, and the whole of it at a size for a test."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

# Only while importing: the example's modules have plain names.
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
try:
    import train_gpt
    import trainer
    from curves import gaps, smoothed, within_noise
    from stdlib_text import Text, batch, stdlib_text
finally:
    sys.path.pop(0)

FALLING = [5.0 - 0.01 * step for step in range(100)]


def shifted(by: float) -> list[float]:
    return [loss + by for loss in FALLING]


def test_text_is_the_same_every_time() -> None:
    one, other = stdlib_text(), stdlib_text()
    assert torch.equal(one.train, other.train)
    assert torch.equal(one.validation, other.validation)


def test_validation_files_are_not_trained_on() -> None:
    text = stdlib_text()
    train = bytes(text.train.numpy())
    held_back = bytes(text.validation.numpy()).split(b"\0")
    assert b"def dataclass(" in train + bytes(text.validation.numpy())
    # Some files of a library are copies of each other or next to empty; long ones are not.
    assert not any(file in train for file in held_back if len(file) > 10_000)


def test_batches_are_pieces_of_the_text() -> None:
    text = torch.arange(100, dtype=torch.uint8)
    tokens = batch(text, 50, 8, torch.Generator().manual_seed(0))
    assert tokens.shape == (50, 8)
    assert tokens.dtype == torch.int64
    assert (tokens.diff(dim=1) == 1).all()
    assert len(tokens[:, 0].unique()) > 10


def test_smoothing_averages_a_tenth() -> None:
    assert smoothed(FALLING) == pytest.approx([sum(FALLING[at : at + 10]) / 10 for at in range(91)])


def test_single_batches_are_no_gap() -> None:
    """Noise that alternates from step to step averages out; a shift does not."""
    noisy = [loss + (-1) ** step for step, loss in enumerate(FALLING)]
    assert max(gaps(noisy, FALLING)) < 1e-9
    assert max(gaps(shifted(0.5), FALLING)) == pytest.approx(0.5)


@pytest.mark.parametrize(("gap", "within"), [(0.1, True), (-0.1, True), (0.3, False), (-0.3, False)])
def test_verdict(gap: float, within: bool) -> None:
    assert within_noise(shifted(gap), FALLING, shifted(-0.2)) is within


def test_a_passing_deviation_counts() -> None:
    """The furthest gap decides: a curve that left and came back is not within the noise."""
    strayed = [loss + (1.0 if 40 <= step < 60 else 0.0) for step, loss in enumerate(FALLING)]
    assert not within_noise(strayed, FALLING, shifted(0.2))


@pytest.mark.parametrize("at", [0, 50, 99])
def test_a_curve_with_nan_is_outside(at: int) -> None:
    assert not within_noise([*FALLING[:at], math.nan, *FALLING[at + 1 :]], FALLING, shifted(0.2))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers that only trace: what they do with a graph is tested elsewhere, and takes its time."""
    real = torch.compile
    stands_for: dict[str, dict[str, Any]] = {
        "inductor": {"backend": "eager"},
        "flashfuse": {"backend": "flashfuse", "options": {"flashfuse.inner": "eager", "flashfuse.strict": True}},
    }
    monkeypatch.setattr(
        trainer.torch, "compile", lambda model, backend, dynamic: real(model, dynamic=dynamic, **stands_for[backend])
    )
    text = Text(torch.arange(4000, dtype=torch.uint8) % 7, torch.arange(400, dtype=torch.uint8) % 7)
    monkeypatch.setattr(train_gpt, "stdlib_text", lambda: text)


def tiny(plot: Path) -> list[str]:
    sizes = {"layers": 1, "width": 16, "heads": 2, "tokens": 16, "rows": 2, "steps": 12, "rate": 1e-2}
    options = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    return ["--preset", "cpu", "--attention-dropout", "0", "--plot", str(plot), *options]


@pytest.mark.usefixtures("quick")
def test_the_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "loss.png"
    assert train_gpt.main(tiny(image)) == 0
    printed = capsys.readouterr().out
    assert "1 of 1 attention sites fused" in printed
    assert "within the noise of two eager seeds" in printed
    assert image.read_bytes().startswith(b"\x89PNG")


def test_the_verdict_is_of_the_right_curves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gaps are from the eager run of the same seed, and each compiled run is judged."""
    noise = {("eager", 0): 0.0, ("eager", 1): 0.2, ("inductor", 0): 0.1, ("flashfuse", 0): -0.3}

    def canned(setup: Any, text: Any, backend: str, seed: int, told: Any) -> trainer.Run:
        return trainer.Run(tuple(shifted(noise[backend, seed])), 1.0, 1.0, 1.0, 1, ())

    monkeypatch.setattr(train_gpt, "train", canned)
    assert train_gpt.main(tiny(tmp_path / "loss.png")) == 1
    assert "flashfuse\": 0.300 from eager's curve, where another eager seed is 0.200" in " ".join(
        capsys.readouterr().out.split()
    )
    noise["flashfuse", 0] = 0.05
    assert train_gpt.main(tiny(tmp_path / "loss.png")) == 0
