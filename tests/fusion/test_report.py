"""Reports: assertions with reasons, text, JSON, and that a report keeps no graph alive."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from torch import nn

import flashfuse


class Attention(nn.Module):
    """Causal attention with grouped heads: q [B, 4, T, 8] over k, v [B, 2, T, 8]."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        scores = q @ k.transpose(-2, -1) * 0.25
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.attention(q, k, v)


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, 16, 8), torch.randn(2, 2, 16, 8), torch.randn(2, 2, 16, 8)


def _over_the_wrong_axis(q: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ q.mT, dim=-2) @ q


def test_site_says_where_and_what() -> None:
    report = flashfuse.explain(Block())(*_inputs())
    report.assert_fused(sites=1)
    (site,) = report.sites
    assert site.status == "fused"
    assert site.location.module.endswith("attention")
    assert site.location.file == __file__
    assert "qk" in site.math
    assert site.mask == "causal"
    assert "k and v shared over" in site.heads
    assert site.dtypes == "product float32, probs float32, out float32"
    assert site.bytes_saved == 2 * 4 * 16 * 16 * (4 + 4)
    assert "torch.ops.flashfuse.attention" in report.after
    assert ".softmax(-1);" in report.before
    assert ".softmax(-1);" not in report.after


def test_assert_fused_shows_the_refusals() -> None:
    report = flashfuse.explain(_over_the_wrong_axis)(torch.randn(2, 8, 8))
    report.assert_fused(sites=0)
    (refusal,) = report.refusals
    assert refusal.location.file == __file__
    with pytest.raises(AssertionError, match="expected 1 fused attention sites") as caught:
        report.assert_fused(sites=1)
    assert f"refused {refusal.code}: {refusal.reason}" in str(caught.value)


def test_text_shows_every_part() -> None:
    report = flashfuse.explain(Block())(*_inputs())
    text = report.to_text(width=100)
    (site,) = report.sites
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    for part in (site.location.module, f"{site.location.line}", "causal", "flashfuse::attention", "KiB"):
        assert part in text


def test_json_round_trips() -> None:
    report = flashfuse.explain(Block())(*_inputs())
    data = json.loads(report.to_json())
    assert data["sites"][0]["status"] == "fused"
    assert data["sites"][0]["spec"] == report.sites[0].spec.fields()
    assert data["sites"][0]["location"]["file"] == __file__


def test_report_keeps_no_model_alive() -> None:
    model = Block()
    torch.compile(model, backend="flashfuse", options={"flashfuse.inner": "eager"})(*_inputs())
    alive = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert alive() is None
    assert len(flashfuse.reports()) == 1


def test_reset_forgets() -> None:
    torch.compile(torch.sin, backend="flashfuse", options={"flashfuse.inner": "eager"})(torch.ones(2))
    assert len(flashfuse.reports()) == 1
    flashfuse.reset()
    assert flashfuse.reports() == ()
