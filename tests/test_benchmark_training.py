"""The benchmark of training: it compares like with like, and believes no time of a wrong gradient."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flashfuse

pytest.importorskip("triton")
pytest.importorskip("matplotlib")

# Only while importing: the folders beside the benchmarks share names with other packages.
sys.path.insert(0, str(Path(__file__).parents[1]))
try:
    from benchmarks import dense, steps, training, training_memory
    from benchmarks.training_cases import TINY, TrainingCase, training_cases
    from benchmarks.training_memory import Point, growth
    from benchmarks.training_table import HEADER, TrainingRow, cells
finally:
    sys.path.pop(0)

CASES = training_cases([""], TINY, "cpu")
GROUPED, BIAS = "B2H4/2S64D16c", "dense bias (1, H, S, S)"
Code = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    flashfuse.reset()
    yield
    torch._dynamo.reset()


def fused(code: Code) -> Code:
    """The rewrite without Inductor, to be quick."""
    options = {"flashfuse.inner": "eager", "flashfuse.strict": True}
    return torch.compile(code, backend="flashfuse", fullgraph=True, dynamic=False, options=options)


def unchanged(code: Code) -> Code:
    return code


def wrong_output(code: Code) -> Code:
    return lambda *inputs: 1.1 * code(*inputs)


def wrong_gradient(code: Code) -> Code:
    """The right output with gradients of 1.1 times their size."""

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        out = code(*inputs)
        return out.detach() + 1.1 * (out - out.detach())

    return run


def shown(row: TrainingRow) -> dict[str, str]:
    return dict(zip(HEADER, cells(row), strict=True))


@pytest.mark.parametrize("case", TINY.dense, ids=str)
def test_the_operator_runs_what_the_backend_recovers(case: dense.Case) -> None:
    """Called alone and from a graph the operator has one spec, so the two are the same kernels."""
    built = CASES[str(case)]()
    (site,) = flashfuse.explain(built.code)(*built.inputs).sites
    assert site.spec == dense.spec_of(case)


@pytest.mark.parametrize("name", CASES)
def test_a_part_has_the_gradients_of_the_whole(name: str) -> None:
    """Nothing outside the part that is looked at adds to its gradients, and nothing inside is left out."""
    case = CASES[name]()
    whole = case.part(case.step(case.compiled(unchanged)).whole())
    assert [x.shape for x in whole] == [x.shape for x in training.exact_results(case)]
    assert training.mistake("flashfuse", whole, training.eager_results(case), training.exact_results(case)) is None


@pytest.mark.parametrize("name", [GROUPED, BIAS])
def test_a_case_is_measured(name: str) -> None:
    row = training.compare(CASES[name](), {"flashfuse": fused, "inductor": unchanged})
    assert row.sites == 1
    assert {"flashfuse", "inductor"} <= row.ms.keys()
    assert ("operator" in row.ms) == (name == GROUPED)
    assert row.deterministic["flashfuse"]
    assert all(0 < row.backward_ms[peer] < row.ms[peer] and row.bytes[peer] > 0 for peer in row.ms)
    assert "flex" not in row.ms
    assert "flex" in row.notes, "FlexAttention has no backward pass on a CPU"


@pytest.mark.parametrize(("spoil", "what"), [(wrong_output, "output"), (wrong_gradient, "gradient 1")])
@pytest.mark.parametrize("peer", ["inductor", "flashfuse"])
def test_a_wrong_result_has_no_figures(spoil: Callable[[Code], Code], what: str, peer: str) -> None:
    row = training.compare(CASES[BIAS](), {peer: lambda code: spoil(fused(code))})
    assert row.notes[peer].startswith(f"wrong {what}: ")
    assert shown(row)[peer] == "-"


def test_what_is_not_fused_has_no_figures() -> None:
    row = training.compare(CASES[BIAS](), {"flashfuse": unchanged})
    assert shown(row)["flashfuse"] == shown(row)["error"] == "-"
    assert row.notes["flashfuse"].startswith("not fused")


def test_gradients_that_vary_are_told() -> None:
    """Sums by atomics come out in another order, as here in another size."""
    calls = iter(range(100))
    case = CASES[BIAS]()
    step = case.step(lambda: case.code(*case.inputs) * (1 + next(calls) / 64))
    assert not steps.repeats_itself(step)
    assert steps.repeats_itself(case.step(case.compiled(unchanged)))


def test_ratios_are_of_the_backward_pass() -> None:
    row = TrainingRow(
        "v", "s", sites=1, target=1.5, ms={"flashfuse": 3.0, "flex": 4.0}, backward_ms={"flashfuse": 2.0, "flex": 3.0},
        bytes={"flashfuse": 2**20, "flex": 2**21}, errors={"flashfuse": 1e-3, "flex": 1e-3},
    )  # fmt: skip
    assert shown(row)["x flex"] == "1.50"
    assert shown(row)["target"] == "1.5 met"
    assert shown(row)["flashfuse"] == "2.00 / 3.00 ms, 1 MiB"
    row.backward_ms["flex"] = 2.9
    assert shown(row)["target"] == "1.5 missed"


def test_rows_of_earlier_calls_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training, "COMPILERS", {"flashfuse": fused})
    monkeypatch.setattr(steps, "PAUSE_SECONDS", 0.0)
    found, table = tmp_path / "rows.json", tmp_path / "rows.md"
    for name in ("window", "B2H2S64D16c"):
        training.main(["--device", "cpu", "--tiny", "--json", str(found), "--markdown", str(table), "--only", name])
    names = [entry["name"] for entry in json.loads(found.read_text())]
    assert names == ["window 1024, causal", "B2H2S64D16c"]
    assert [row.to_json() for row in training.kept(found).values()] == json.loads(found.read_text())
    assert all(name in table.read_text() for name in names)


# --------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers that only trace."""
    real = torch.compile
    stands_for: dict[str, dict[str, Any]] = {
        "inductor": {"backend": "eager"},
        "flashfuse": {"backend": "flashfuse", "options": {"flashfuse.inner": "eager", "flashfuse.strict": True}},
    }
    monkeypatch.setattr(
        training_memory.torch, "compile", lambda fn, backend, **others: real(fn, **others, **stands_for[backend])
    )


@pytest.mark.usefixtures("quick")
def test_memory_by_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training_memory.measure(tmp_path, "cpu", tiny=True)
    points = [Point(**entry) for entry in json.loads((tmp_path / "training_memory.json").read_text())["points"]]
    assert [p.length for p in points if p.peer == "flashfuse" and p.bytes] == list(training_memory.TINY_LENGTHS)
    assert [(p.length, p.bytes) for p in points if p.peer == "flex"] == [(training_memory.TINY_LENGTHS[0], None)]
    assert (tmp_path / "training_memory.png").read_bytes().startswith(b"\x89PNG")
    assert "grows as length^" in capsys.readouterr().out


@pytest.mark.parametrize(("spoil", "wrong"), [(unchanged, False), (wrong_output, True), (wrong_gradient, True)])
def test_a_wrong_layer_has_no_memory(spoil: Callable[[Code], Code], wrong: bool) -> None:
    torch.manual_seed(0)
    layer = training_memory.Layer(training_memory.causal_attention).to(torch.bfloat16)
    step = training_memory.step_of("inductor", layer, spoil(layer), 32)
    assert (training_memory.mistake(layer, step, step.whole()) is not None) == wrong


def test_growth_is_the_exponent_at_the_end() -> None:
    points = [
        Point("a", 1, 5),
        Point("a", 2, 10),
        Point("a", 4, 40),
        Point("b", 4, 1),
        Point("a", 8, None, "out of memory"),
    ]
    assert growth(points, "a") == pytest.approx(2.0)
    assert growth(points, "b") is None


def test_every_target_has_a_case() -> None:
    cases: dict[str, TrainingCase] = {name: make() for name, make in CASES.items()}
    assert {name: case.target for name, case in cases.items() if case.target != 1.1} == {
        "softcap, causal": 1.2, "ALiBi, causal": 1.2, "window 1024, causal": 1.2, "documents of 1000, causal": 1.2,
        BIAS: 1.5,
    }  # fmt: skip
    assert [name for name, case in cases.items() if len(case.wanted) == 4] == [BIAS]
