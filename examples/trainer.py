"""One training run of a GPT-2 from its configuration, library code unmodified: losses, times, memory, fused sites."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import measure
import torch
from stdlib_text import Text, batch
from transformers import GPT2Config, GPT2LMHeadModel

import flashfuse

VOCABULARY = 256
VALIDATION_BATCHES = 4
WARMUP = 20


@dataclass(frozen=True)
class Setup:
    """The model, how it is trained, and on what.

    attention: transformers' `attn_implementation`; attention_dropout: None for the configuration's default.
    autocast: the type that matrix products run in, None for the weights' own.
    """

    layers: int
    width: int
    heads: int
    tokens: int
    rows: int
    steps: int
    rate: float
    attention: str
    attention_dropout: float | None
    device: torch.device
    autocast: torch.dtype | None

    def model(self) -> GPT2LMHeadModel:
        """GPT-2 over bytes with random weights; dropout as its configuration has it."""
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=self.tokens,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.heads,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation=self.attention,
            **({} if self.attention_dropout is None else {"attn_pdrop": self.attention_dropout}),
        )
        return GPT2LMHeadModel(config).to(self.device).train()


@dataclass(frozen=True)
class Run:
    """What a training run gave.

    losses: of each step, on its batch. validation: at the end, without dropout, by eager code. first: seconds of the
    first step, which compiles; step: median seconds of the others. peak: bytes held during a step above those before.
    """

    losses: tuple[float, ...]
    validation: float
    first: float
    step: float
    peak: int
    reports: tuple[flashfuse.Report, ...]


def train(setup: Setup, text: Text, backend: str, seed: int, told: Callable[[float], None]) -> Run:
    """Train from `seed`, which decides weights, batches and dropout; `told` gets the loss of every step."""
    torch._dynamo.reset()
    flashfuse.reset()
    torch.manual_seed(seed)
    model = setup.model()
    run = model if backend == "eager" else torch.compile(model, backend=backend, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), setup.rate, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: min(1.0, (at + 1) / WARMUP))
    order = torch.Generator().manual_seed(seed)

    def step() -> torch.Tensor:
        loss = _loss(setup, run, batch(text.train, setup.rows, setup.tokens, order))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        return loss

    losses, seconds = [], []
    for _ in range(setup.steps):
        start = time.perf_counter()
        losses.append(step().item())
        seconds.append(time.perf_counter() - start)
        told(losses[-1])
    peak = measure.peak_bytes(step, setup.device)
    # Eager code, so that the runs differ in nothing but how they were trained.
    validation = _validation(setup, model, text.validation)
    median = statistics.median(seconds[1:])
    return Run(tuple(losses), validation, seconds[0], median, peak, flashfuse.reports())


def _loss(setup: Setup, run: Callable[..., object], tokens: torch.Tensor) -> torch.Tensor:
    tokens = tokens.to(setup.device)
    with torch.autocast(setup.device.type, dtype=setup.autocast, enabled=setup.autocast is not None):
        return run(input_ids=tokens, labels=tokens, use_cache=False).loss  # type: ignore[attr-defined]


@torch.no_grad()
def _validation(setup: Setup, model: GPT2LMHeadModel, text: torch.Tensor) -> float:
    model.eval()
    order = torch.Generator().manual_seed(0)
    batches = [batch(text, setup.rows, setup.tokens, order) for _ in range(VALIDATION_BATCHES)]
    return statistics.fmean(_loss(setup, model, tokens).item() for tokens in batches)
