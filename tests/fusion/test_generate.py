"""transformers' `generate`, unmodified, with the model's forward compiled: the tokens of eager code, in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from decoders import PROMPT, WINDOW, attentions, decoder, prompt
from torch._dynamo.testing import CompileCounter

import flashfuse

transformers = pytest.importorskip("transformers")

STEPS = 20


@dataclass(frozen=True)
class Case:
    """One way to generate. padded: one prompt is shorter than the others. length: of the prompts."""

    model: str
    attention: str
    cache: str
    batch: int
    padded: bool = False
    sample: bool = False
    length: int = PROMPT

    def __str__(self) -> str:
        flags = [name for name in ("padded", "sample") if getattr(self, name)]
        return "-".join([self.model, self.attention, self.cache, str(self.batch), str(self.length), *flags])


CASES = (
    Case("llama", "sdpa", "dynamic", 8, padded=True),
    Case("llama", "eager", "static", 1, sample=True),
    Case("gpt2", "sdpa", "static", 8, padded=True, sample=True),
    Case("bloom", "eager", "dynamic", 8, padded=True),
    Case("mistral", "sdpa", "dynamic", 8, padded=True, length=WINDOW // 2),
    Case("gemma2", "eager", "static", 8, padded=True, sample=True),
    Case("gemma3", "sdpa", "dynamic", 1, sample=True),
    Case("gpt_oss", "eager", "dynamic", 8, padded=True),
    Case("deepseek", "eager", "dynamic", 8, padded=True),
    Case("t5", "eager", "dynamic", 8, padded=True),
    Case("whisper", "eager", "static", 8),
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
    steps = flashfuse.reports()[1:]
    assert steps
    for step in steps:
        step.assert_fused(sites=attentions(case.model))


def test_a_growing_cache_compiles_what_dynamo_asks_for() -> None:
    """No size of a cache is pinned by the rewrite: as many graphs as with a backend that does nothing."""
    case = Case("llama", "eager", "dynamic", 1)
    counter = CompileCounter()
    for backend in (counter, "flashfuse"):
        torch._dynamo.reset()
        model = decoder(transformers, case.model, case.attention)
        options = {"flashfuse.inner": "eager"} if backend == "flashfuse" else None
        model.forward = torch.compile(model.forward, backend=backend, options=options)
        generate(model, case)
    assert len(flashfuse.reports()) == counter.frame_count
