"""`flashfuse.explain` and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashfuse
from flashfuse.__main__ import main

MODULE = """
import torch

def attention(q, k, v, scale=1.0):
    return torch.softmax(q @ k.transpose(-2, -1) * scale, dim=-1) @ v

def inputs():
    return tuple(torch.randn(2, 8, 4) for _ in range(3))

def two():
    return attention, inputs()

def three():
    return attention, inputs(), {"scale": 0.5}

def one_tensor():
    return torch.nn.Linear(4, 4), torch.randn(2, 4)

def nothing():
    return attention

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "to_explain.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.delitem(sys.modules, "to_explain", raising=False)
    return tmp_path


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-2, -1), dim=-1) @ v


def test_graph_breaks_are_reported_and_graphs_merged() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        y = attention(x, x, x)
        torch._dynamo.graph_break()
        return attention(y, x, x)

    report = flashfuse.explain(model)(torch.randn(2, 8, 4))
    report.assert_fused(sites=2)
    assert report.graphs == 2
    (graph_break,) = report.graph_breaks
    assert graph_break.location.file == __file__
    assert "graph breaks" in report.to_text()


def test_an_attention_that_a_graph_break_divides_is_told_with_the_breaks_reason() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        scores = x @ x.transpose(-2, -1)
        if scores.mean() > 1e9:
            scores = scores + 1
        return scores.softmax(-1) @ x

    (refused,) = flashfuse.explain(model)(torch.randn(2, 8, 4)).refusals
    assert refused.code == "graph-break"
    assert "a branch depends on the values of a tensor" in refused.reason
    line = int(refused.reason.rpartition(":")[2].rstrip("]"))
    assert "if scores.mean() > 1e9" in Path(__file__).read_text().splitlines()[line - 1]
    assert refused.location.code == "scores = x @ x.transpose(-2, -1)"


def test_a_graph_break_elsewhere_divides_no_attention() -> None:
    def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = attention(x, x, x)
        torch._dynamo.graph_break()
        y = torch.relu(y @ weight)
        torch._dynamo.graph_break()
        return y * 2

    report = flashfuse.explain(model)(torch.randn(2, 8, 4), torch.randn(4, 4))
    report.assert_fused(sites=1)
    assert len(report.graph_breaks) == 2
    assert report.refusals == ()


def test_explain_runs_no_kernel_and_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    flashfuse.explain(attention)(*[torch.randn(2, 8, 4)] * 3)
    assert flashfuse.reports() == ()


def test_explain_takes_a_compiled_model() -> None:
    model = torch.compile(torch.nn.Linear(4, 4), backend="eager")
    assert flashfuse.explain(model)(torch.randn(2, 4)).graph == "Linear"


def test_explain_refuses_what_cannot_be_called() -> None:
    with pytest.raises(TypeError, match="takes a module or a function, got int"):
        flashfuse.explain(3)  # type: ignore[arg-type]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("name", "sites"), [("two", 1), ("three", 1), ("one_tensor", 0)])
def test_command_line(name: str, sites: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"to_explain:{name}", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["sites"]) == sites


@pytest.mark.usefixtures("folder")
def test_command_line_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "to_explain:two"]) == 0
    assert "1 attention sites fused" in capsys.readouterr().out


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("to_explain", "expected module:callable, got 'to_explain'"),
        ("no_such_module:f", "no module named 'no_such_module'"),
        ("to_explain:missing", "has no 'missing'; it has attention, inputs, two"),
        ("to_explain:number", "is a int, not a callable"),
        ("to_explain:nothing", "returned a function, expected (model, args) or (model, args, kwargs)"),
    ],
)
def test_command_line_mistakes(target: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", target]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "flashfuse", "explain", "to_explain:two"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "1 attention sites fused" in result.stdout


def test_torch_logs_knows_flashfuse() -> None:
    options = "options={'flashfuse.inner': 'eager'}"
    code = f"import torch; torch.compile(torch.sin, backend='flashfuse', {options})(torch.ones(1))"
    environment = {**os.environ, "TORCH_LOGS": "+flashfuse"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "0 sites fused" in result.stderr, result.stderr
