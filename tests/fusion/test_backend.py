"""The backend: what it hands on, what it does with failures, and that mode and options act as Inductor's do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering

import flashfuse
from flashfuse import backend, fingerprint, kernels


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) * 0.5, dim=-1) @ v


def plain(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def compiled(fn: Any, **options: Any) -> Any:
    chosen = {"flashfuse." + name: value for name, value in {"inner": "eager", **options}.items()}
    return torch.compile(fn, backend="flashfuse", options=chosen)


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 16, 8), torch.randn(2, 3, 24, 8), torch.randn(2, 3, 24, 8)


@pytest.fixture
def broken_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gm: torch.fx.GraphModule) -> None:
        raise RuntimeError("the search is broken")

    monkeypatch.setattr("flashfuse.patterns.match.find_attention", fail)


def test_found_by_name_without_import() -> None:
    options = "options={'flashfuse.inner': 'eager'}"
    code = f"import torch; print(torch.compile(torch.sin, backend='flashfuse', {options})(torch.zeros(1)).item())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "0.0", result.stderr


@pytest.mark.parametrize("inner", ["inductor", "aot_eager", "eager"])
def test_attention_is_fused_under_every_inner_compiler(inner: str, qkv: tuple[torch.Tensor, ...]) -> None:
    run = compiled(attention, inner=inner, strict=True)
    torch.testing.assert_close(run(*qkv), attention(*qkv))
    (report,) = flashfuse.reports()
    report.assert_fused(sites=1)


@pytest.mark.parametrize("dynamic", [None, True])
def test_dynamic_shapes(dynamic: bool | None) -> None:
    options = {"flashfuse.inner": "eager", "flashfuse.strict": True}
    run = torch.compile(attention, backend="flashfuse", options=options, dynamic=dynamic, fullgraph=True)
    for length in (12, 14, 16, 40):
        x = torch.randn(2, 3, length, 8)
        torch.testing.assert_close(run(x, x, x), attention(x, x, x))
    assert len(flashfuse.reports()) == (1 if dynamic else 2)
    for report in flashfuse.reports():
        report.assert_fused(sites=1)


def test_graph_without_attention_goes_on_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.fx.GraphModule] = []

    def inner(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(gm)
        return gm.forward

    monkeypatch.setattr(backend, "_inner_compiler", lambda *_: inner)
    given: list[tuple[torch.fx.GraphModule, str]] = []

    def outer(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        given.append((gm, gm.code))
        return backend.flashfuse(gm, inputs)

    torch.compile(plain, backend=outer)(torch.ones(3))
    assert seen[0] is given[0][0]
    assert seen[0].code == given[0][1]
    assert flashfuse.reports()[0].before == flashfuse.reports()[0].after


@pytest.mark.usefixtures("broken_search")
def test_failure_becomes_a_warning_and_the_model_compiles(qkv: tuple[torch.Tensor, ...]) -> None:
    with pytest.warns(RuntimeWarning, match="find failed, compiling without the rewrite: RuntimeError: the search is"):
        out = compiled(attention)(*qkv)
    torch.testing.assert_close(out, attention(*qkv))
    (failure,) = flashfuse.reports()[0].failures
    assert failure.stage == "find"
    assert "the search is broken" in failure.traceback


@pytest.mark.usefixtures("broken_search")
def test_strict_makes_a_failure_an_error(qkv: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(Exception, match="the search is broken"):
        compiled(attention, strict=True)(*qkv)


def test_failing_rewrite_leaves_the_graph(monkeypatch: pytest.MonkeyPatch, qkv: tuple[torch.Tensor, ...]) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("cannot rewrite")

    monkeypatch.setattr("flashfuse.rewrite.rewrite", fail)
    with pytest.warns(RuntimeWarning, match="cannot rewrite"):
        compiled(attention)(*qkv)
    (report,) = flashfuse.reports()
    assert [f.stage for f in report.failures] == ["rewrite"]
    assert report.sites == ()


@pytest.fixture
def refuses_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    def inner(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        if "flashfuse" in gm.code:
            raise RuntimeError("no lowering for flashfuse::attention")
        return gm.forward

    monkeypatch.setattr(backend, "_inner_compiler", lambda *_: inner)


@pytest.mark.usefixtures("refuses_rewritten")
def test_rewritten_graph_that_does_not_compile_is_given_up(qkv: tuple[torch.Tensor, ...]) -> None:
    with pytest.warns(RuntimeWarning, match="no lowering"):
        out = compiled(attention)(*qkv)
    torch.testing.assert_close(out, attention(*qkv))
    (report,) = flashfuse.reports()
    assert [f.stage for f in report.failures] == ["compile"]
    assert report.sites == ()
    assert report.after == report.before


@pytest.mark.usefixtures("refuses_rewritten")
def test_strict_raises_what_the_inner_compiler_raised(qkv: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(Exception, match="no lowering"):
        compiled(attention, strict=True)(*qkv)


@pytest.fixture
def inductor_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The configuration Inductor is called with, instead of compiling."""
    from torch._inductor import compile_fx

    calls: list[dict[str, Any]] = []

    def record(gm: torch.fx.GraphModule, inputs: list[Any], *, config_patches: dict[str, Any], **_: Any) -> Any:
        calls.append(dict(config_patches))
        return gm.forward

    monkeypatch.setattr(compile_fx, "compile_fx", record)
    return calls


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"mode": "default"},
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune"},
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"max_autotune": True, "triton.cudagraphs": False}},
    ],
)
def test_mode_and_options_reach_inductor_as_they_are(
    arguments: dict[str, Any], inductor_calls: list[dict[str, Any]]
) -> None:
    torch.compile(plain, backend="inductor", **arguments)(torch.ones(3))
    torch._dynamo.reset()
    torch.compile(plain, backend="flashfuse", **arguments)(torch.ones(3))
    of_inductor, of_flashfuse = inductor_calls
    assert of_flashfuse == of_inductor


def test_flashfuse_options_do_not_reach_inductor(inductor_calls: list[dict[str, Any]]) -> None:
    options = {"flashfuse.strict": True, "epilogue_fusion": False}
    torch.compile(plain, backend="flashfuse", options=options)(torch.ones(3))
    assert inductor_calls == [{"epilogue_fusion": False}]


def test_unknown_mode_and_option_get_inductors_error() -> None:
    with pytest.raises(Exception, match="Unrecognized mode=fastest"):
        torch.compile(plain, backend="flashfuse", mode="fastest")(torch.ones(3))
    with pytest.raises(Exception, match="Unexpected optimization option nonsense"):
        torch.compile(plain, backend="flashfuse", options={"nonsense": 1})(torch.ones(3))


def test_misspelt_flashfuse_option_gets_a_hint() -> None:
    with pytest.raises(Exception, match=r"did you mean 'flashfuse.verify'"):
        torch.compile(plain, backend="flashfuse", options={"flashfuze.verify": True})(torch.ones(3))
    with pytest.raises(Exception, match=r"did you mean 'flashfuse.inner'"):
        compiled(plain, iner="eager")(torch.ones(3))


def test_dynamo_reset_reaches_cuda_graph_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cudagraph_trees

    calls: list[bool] = []
    monkeypatch.setattr(cudagraph_trees, "reset_cudagraph_trees", lambda: calls.append(True))
    compiled(plain)(torch.ones(3))
    torch._dynamo.reset()
    assert calls


def test_inductor_config_is_left_alone() -> None:
    before = inductor_config.get_config_copy()
    torch.compile(plain, backend="flashfuse", mode="max-autotune-no-cudagraphs")(torch.ones(3))
    assert inductor_config.get_config_copy() == before


def test_sub_graphs_of_higher_order_operators_are_rewritten(qkv: tuple[torch.Tensor, ...]) -> None:
    from torch.utils.checkpoint import checkpoint

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return checkpoint(attention, q, k, v, use_reentrant=False) + 1

    run = compiled(model, strict=True)
    torch.testing.assert_close(run(*qkv), attention(*qkv) + 1)
    flashfuse.reports()[0].assert_fused(sites=1)


def test_autocast(qkv: tuple[torch.Tensor, ...]) -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attention(q, k, v)

    out = compiled(model, strict=True)(*qkv)
    expected = model(*qkv)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    flashfuse.reports()[0].assert_fused(sites=1)


def test_caches_know_whose_operators_a_graph_calls(
    monkeypatch: pytest.MonkeyPatch, qkv: tuple[torch.Tensor, ...]
) -> None:
    """A graph compiled before an operator's meaning changed was found in Inductor's cache, and called the new one.

    So was the backward of one where it is compiled when it is called.
    """
    known = []
    lower = GraphLowering.run

    def noting(self: GraphLowering, *args: Any) -> Any:
        known.append((self.is_backward, dict(inductor_config.aot_inductor.metadata)))
        return lower(self, *args)

    monkeypatch.setattr(GraphLowering, "run", noting)
    options = {"aot_inductor.metadata": {"mine": "1"}}
    run = torch.compile(attention, backend="flashfuse", options=options)
    with torch.enable_grad():
        run(*(x.requires_grad_() for x in qkv)).sum().backward()
    torch.compile(plain, backend="flashfuse", options=options)(torch.zeros(3))
    ours = {"mine": "1", "flashfuse": fingerprint.sources()}
    assert known == [(False, ours), (True, ours), (False, {"mine": "1"})]


def test_metadata_may_be_none(qkv: tuple[torch.Tensor, ...]) -> None:
    """Inductor takes it; flashfuse gave up the rewrite."""
    options = {"aot_inductor.metadata": None, "flashfuse.strict": True}
    torch.compile(attention, backend="flashfuse", options=options)(*qkv)
    flashfuse.reports()[0].assert_fused(sites=1)


def test_fingerprint_is_of_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint.sources()
    (tmp_path / "changed.py").write_text("x = 1")
    monkeypatch.setattr("flashfuse.kernels.__path__", [*kernels.__path__, str(tmp_path)])
    assert fingerprint.sources.__wrapped__() != before
