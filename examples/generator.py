"""One way to generate: a Llama from a configuration, its forward compiled or not, and how long its tokens take."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import flashfuse

VOCABULARY = 1000


@dataclass(frozen=True)
class Setup:
    """What all ways have in common: sizes as in the presets of generate.py.

    cache: "dynamic" or "static", as transformers names them; mode: torch.compile's.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    batch: int
    prompt: int
    tokens: int
    cache: str
    sample: bool
    mode: str | None
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Run:
    """The new tokens [batch, tokens], flashfuse's reports, and seconds.

    first: of the first call, which compiles. prompt, step: of a second call, until the first token and, as the median,
    from each to the next.
    """

    tokens: torch.Tensor
    first: float
    prompt: float
    step: float
    reports: tuple[flashfuse.Report, ...]


def run(setup: Setup, attention: str, backend: str | None, told: Callable[[], None]) -> Run:
    """Generate twice, with attention as `attention` has the library write it; `told` is called for every token."""
    torch._dynamo.reset()
    flashfuse.reset()
    model = _model(setup, attention)
    if backend is not None:
        model.forward = torch.compile(model.forward, backend=backend, mode=setup.mode)
    _, first = _generated(model, setup, told)
    tokens, times = _generated(model, setup, told)
    steps = [after - before for before, after in itertools.pairwise(times)]
    return Run(tokens, first[-1], times[0], statistics.median(steps), flashfuse.reports())


def common(tokens: torch.Tensor, others: torch.Tensor) -> int:
    """How many tokens every row of [batch, tokens] has in common with the other's before the first that differs."""
    return int((tokens == others).all(0).long().cumprod(0).sum())


def _model(setup: Setup, attention: str) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=setup.width,
        intermediate_size=2 * setup.width,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.heads,
        num_key_value_heads=setup.kv_heads,
        max_position_embeddings=setup.prompt + setup.tokens,
        pad_token_id=0,
        eos_token_id=None,
        attn_implementation=attention,
        # Wide enough that attention is far from uniform: a wrong mask changes the tokens.
        initializer_range=setup.width**-0.5,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(setup.device, setup.dtype).eval()


def _generated(model: Any, setup: Setup, told: Callable[[], None]) -> tuple[torch.Tensor, list[float]]:
    """What `generate` adds to the prompts, one of them shorter than the others, and when each token was there."""
    torch.manual_seed(1)
    prompts = torch.randint(1, VOCABULARY, (setup.batch, setup.prompt), device=setup.device)
    mask = torch.ones_like(prompts)
    mask[0, : setup.prompt // 4] = 0
    times: list[float] = []

    def heard(ids: torch.Tensor, _: object, **__: object) -> torch.Tensor:
        if ids.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        told()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    start = time.perf_counter()
    made = model.generate(
        prompts * mask,
        attention_mask=mask,
        max_new_tokens=setup.tokens,
        do_sample=setup.sample,
        stopping_criteria=[heard],
        # On a GPU transformers would have Inductor compile what is left eager here.
        disable_compile=True,
        **({"cache_implementation": "static"} if setup.cache == "static" else {}),
    )
    return made[:, setup.prompt :].cpu(), times
