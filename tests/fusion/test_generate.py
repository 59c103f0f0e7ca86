"""transformers' `generate`, unmodified, with the model's forward compiled: the tokens of eager code, float32.

Dynamo compiles the prompt, then one step, and with a cache that grows a step of symbolic length; never again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from decoders import PROMPT, WINDOW, attentions, decoder, prompt

import flashfuse

transformers = pytest.importorskip("transformers")

STEPS = 64


@dataclass(frozen=True)
class Case:
    """One way to generate. graphs: how many are compiled in all. length: of the prompt."""

    model: str
    attention: str
    cache: str
    batch: int
    graphs: int
    padded: bool = False
    sample: bool = False
    length: int = PROMPT

    def __str__(self) -> str:
        flags = [name for name in ("padded", "sample") if getattr(self, name)]
        return "-".join([self.model, self.attention, self.cache, str(self.batch), str(self.length), *flags])


CASES = (
    Case("llama", "sdpa", "dynamic", 8, 3, padded=True),
    Case("llama", "eager", "static", 1, 2, sample=True),
    Case("gpt2", "eager", "dynamic", 1, 3),
    Case("gpt2", "sdpa", "static", 8, 2, padded=True, sample=True),
    Case("bloom", "eager", "dynamic", 8, 3, padded=True),
    Case("mistral", "sdpa", "dynamic", 8, 3, padded=True, length=WINDOW // 2),
    Case("mistral", "eager", "static", 1, 2, length=WINDOW // 2),
    Case("gemma2", "eager", "static", 8, 2, padded=True, sample=True),
    Case("gemma3", "sdpa", "dynamic", 1, 3, sample=True),
    Case("gemma3", "eager", "static", 8, 2, padded=True),
    Case("gpt_oss", "eager", "dynamic", 8, 3, padded=True),
    Case("deepseek", "eager", "dynamic", 8, 3, padded=True),
    Case("t5", "eager", "dynamic", 8, 3, padded=True),
    Case("t5", "sdpa", "static", 8, 2, padded=True, sample=True),
    Case("whisper", "sdpa", "dynamic", 1, 3),
    Case("whisper", "eager", "static", 8, 2),
)


def generate(model: Any, case: Case) -> torch.Tensor:
    torch.manual_seed(0)
    settings = {"cache_implementation": "static"} if case.cache == "static" else {}
    inputs = prompt(case.model, case.batch, case.length, case.padded)
    lengths = {"min_new_tokens": STEPS, "max_new_tokens": STEPS}
    return model.generate(**inputs, **lengths, do_sample=case.sample, **settings)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_are_those_of_eager_code(case: Case) -> None:
    model = decoder(transformers, case.model, case.attention)
    eager = generate(model, case)
    options = {"flashfuse.inner": "eager", "flashfuse.strict": True}
    model.forward = torch.compile(model.forward, backend="flashfuse", options=options)
    fused = generate(model, case)
    assert torch.equal(fused, eager)
    assert eager.shape[1] >= STEPS
    reports = flashfuse.reports()
    assert len(reports) == case.graphs
    for step in reports[1:]:
        step.assert_fused(sites=attentions(case.model))
