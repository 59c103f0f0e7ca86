"""`mode="max-autotune"`: whose operators ask for a search, and on a GPU what comes of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import assert_close_to_exact
from torch._inductor import config as inductor_config

import flashfuse
from flashfuse.backend import asks_to_tune


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) * 0.5, dim=-1) @ v


def twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Two attentions whose outputs are added before they meet the values."""
    scores = q @ k.transpose(-2, -1)
    return (torch.softmax(scores * 0.5, dim=-1) - 0.3 * torch.softmax(scores * 0.1, dim=-1)) @ v


def asked() -> list[str]:
    """What each operator of the last graph says of tuning."""
    return re.findall(r"'tuned': (\w+)", flashfuse.reports()[-1].after)


@pytest.mark.parametrize(
    ("mode", "options", "tuned"),
    [
        (None, {}, False),
        ("default", {}, False),
        ("reduce-overhead", {}, False),
        ("max-autotune", {}, True),
        ("max-autotune-no-cudagraphs", {}, True),
        (None, {"max_autotune": True}, True),
        (None, {"max-autotune": True}, True),
        (None, {"max_autotune": False}, False),
        (None, {"max_autotune_gemm": True}, False),
    ],
)
def test_who_asks(mode: str | None, options: dict[str, Any], tuned: bool) -> None:
    assert asks_to_tune(mode, options) == tuned


def test_inductors_own_setting_asks() -> None:
    with inductor_config.patch(max_autotune=True):
        assert asks_to_tune(None, {})
        assert not asks_to_tune(None, {"max_autotune": False})


@pytest.mark.parametrize("function", [attention, twice])
def test_one_compiled_function_does_not_ask_for_another(function: Any) -> None:
    q, k, v = torch.randn(2, 3, 16, 8), torch.randn(2, 3, 24, 8), torch.randn(2, 3, 24, 8)
    plain = {"flashfuse.inner": "eager"}
    for options, expected in ((plain, "false"), ({**plain, "max_autotune": True}, "true"), (plain, "false")):
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="flashfuse", options=options)
        torch.testing.assert_close(compiled(q, k, v), function(q, k, v))
        found = asked()
        assert found
        assert set(found) == {expected}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("q_len", [1, 600])
def test_it_is_right_and_times_once(q_len: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashfuse.kernels import plans, tuning

    timed: list[float] = []
    measure = tuning.time_of

    def time_of(run: Any) -> float:
        timed.append(measure(run))
        return timed[-1]

    monkeypatch.setenv("FLASHFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "time_of", time_of)
    shapes = ((2, 4, q_len, 64), (2, 4, 600, 64), (2, 4, 600, 64))
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    exact = attention(q.double(), k.double(), v.double())
    counts = []
    for mode in (None, "max-autotune-no-cudagraphs", "max-autotune"):
        torch._dynamo.reset()
        # As another process begins.
        plans.attention.plans.clear()
        compiled = torch.compile(attention, backend="flashfuse", mode=mode)
        for _ in range(3):
            assert_close_to_exact(compiled(q, k, v), attention(q, k, v), exact)
        counts.append(len(timed))
    assert counts[0] == 0
    assert counts[1] == counts[2] > 1
    assert len(list((tmp_path / "tuned").iterdir())) == 1
