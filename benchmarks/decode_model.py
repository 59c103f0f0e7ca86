"""A decode step of an unmodified Llama with a static cache, compiled by Inductor and by flashfuse, on one GPU.

    python -m benchmarks.decode_model [--json FILE] [--only TEXT ..]
    python -m benchmarks.decode_model --device cpu --tiny   # the same code at sizes for a CPU, whose times mean nothing

transformers' LlamaModel, 8 layers, hidden 2048, 32 heads and 8 key/value heads, bf16, its cache of 16384 slots full but
for the tokens to come, or one sixteenth of it; one new token a row and step. Written eagerly or calling SDPA, under two
of torch.compile's modes. Peers take turns in shuffled rounds; a figure is printed only when the result is right: its
error against float32 is at most twice eager's.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import gc
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import flashfuse
from benchmarks import prefill
from benchmarks.measure import Run, measure_cold, require_cuda, versions
from benchmarks.table import Row, allowed_error, checked, recovered, relative_error

ROUNDS = 5
BACKENDS = ("flashfuse", "inductor")
FILLED_PARTS = (1, 16)
# Steps that a cache has room for, when it is full: more than are timed.
STEPS = 512
# Calls until a CUDA graph has been recorded.
WARM_UP = 3


@dataclass(frozen=True)
class Sizes:
    batches: tuple[int, ...]
    slots: int
    layers: int
    hidden: int
    dtype: torch.dtype


FULL = Sizes((1, 8), 16384, prefill.LAYERS, 2048, torch.bfloat16)
TINY = Sizes((2,), 1024, 2, 512, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    batch: int
    attention: str
    mode: str

    def __str__(self) -> str:
        return f"Llama decode step, {self.attention}, B{self.batch}, {self.mode}"


def cases(sizes: Sizes, only: list[str]) -> Iterator[Case]:
    """Those whose name holds one of the texts."""
    for chosen in itertools.product(sizes.batches, ("eager", "sdpa"), ("default", "reduce-overhead")):
        case = Case(*chosen)
        if any(text in str(case) for text in only):
            yield case


class Decoder:
    """A model, and a cache that is full of random keys and values."""

    def __init__(self, model: Any, sizes: Sizes, batch: int, device: str) -> None:
        from transformers import StaticCache

        self.model = model
        generator = torch.Generator(device).manual_seed(0)
        self.cache = StaticCache(config=model.config, max_cache_len=sizes.slots)
        self.token = torch.randint(0, model.config.vocab_size, (batch, 1), device=device, generator=generator)
        self.filled = {part: max(sizes.slots // part - STEPS, 1) for part in FILLED_PARTS}
        positions = {part: torch.tensor([filled], device=device) for part, filled in self.filled.items()}
        self.places = {
            part: {"position_ids": at.expand(batch, 1), "cache_position": at} for part, at in positions.items()
        }
        self.step(model, 1)  # makes the cache's tensors
        for layer in self.cache.layers:
            layer.keys.normal_(generator=generator)
            layer.values.normal_(generator=generator)

    def step(self, run: Callable[..., Any], part: int) -> torch.Tensor:
        """The last hidden state [batch, 1, hidden] of a first new token."""
        self.rewind(part)
        return self.next(run, part)

    def next(self, run: Callable[..., Any], part: int) -> torch.Tensor:
        """That of the token behind the last, where the cache itself counts them."""
        return run(self.token, past_key_values=self.cache, use_cache=True, **self.places[part]).last_hidden_state

    def rewind(self, part: int) -> None:
        """Newer releases of transformers count the tokens in the cache, older ones are told the position."""
        for layer in self.cache.layers:
            if isinstance(getattr(layer, "cumulative_length", None), torch.Tensor):
                layer.cumulative_length.fill_(self.filled[part])

    def in_float32(self) -> Decoder:
        """The same in float32."""
        made = copy.copy(self)
        made.model, made.cache = copy.deepcopy(self.model).float(), copy.deepcopy(self.cache)
        for layer in made.cache.layers:
            layer.keys, layer.values = layer.keys.float(), layer.values.float()
        return made


def compare(case: Case, sizes: Sizes, device: str) -> list[Row]:
    """A row for each part of the cache that is filled. Compiles once for all."""
    model = prefill.build(sizes.dtype, device, sizes.layers, sizes.hidden, case.attention)
    decoder = Decoder(model, sizes, case.batch, device)
    exact = decoder.in_float32()
    torch._dynamo.reset()
    flashfuse.reset()
    compiled = {name: torch.compile(model, backend=name, mode=case.mode) for name in BACKENDS}
    return [one_row(case, decoder, exact, compiled, part, device) for part in FILLED_PARTS]


def one_row(
    case: Case, decoder: Decoder, exact: Decoder, compiled: dict[str, Callable[..., Any]], part: int, device: str
) -> Row:
    precise = exact.step(exact.model, part).double()
    eager = decoder.step(decoder.model, part)
    row = Row(str(case), f"{decoder.filled[part] + 1} tokens", eager_error=relative_error(eager, precise))
    # What a CUDA graph gives is overwritten by its next replay.
    firsts: dict[str, Run] = {name: lambda run=run: decoder.step(run, part).clone() for name, run in compiled.items()}
    for first in firsts.values():
        for _ in range(WARM_UP):
            first()
    allowed = allowed_error(relative_error(eager, precise), eager.dtype)
    right = checked(row, firsts, lambda out: relative_error(out, precise), allowed, device)
    decoder.rewind(part)
    nexts = {name: functools.partial(decoder.next, compiled[name], part) for name in right}
    times = measure_cold(nexts, ROUNDS, device)
    return recovered(dataclasses.replace(row, ms={name: statistics.median(t) for name, t in times.items()}))


def show(row: Row) -> None:
    figures = ", ".join(f"{name} {ms:.3f} ms" for name, ms in row.ms.items())
    faster = row.ms["inductor"] / row.ms["flashfuse"] if len(row.ms) == len(BACKENDS) else float("nan")
    print(f"{row.name}, {row.shape}: {figures}; {faster:.2f} x, {row.sites} sites, mask {row.mask}", flush=True)
    for what, note in row.notes.items():
        print(f"    {what}: {note}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--only", nargs="*", default=[""], help="only cases whose name holds one of these texts")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda":
        require_cuda("benchmarks.decode_model")
    print(versions())
    sizes, found = TINY if chosen.tiny else FULL, []
    with torch.no_grad():
        for case in cases(sizes, chosen.only):
            for row in compare(case, sizes, chosen.device):
                found.append(row)
                show(row)
            gc.collect()
            if chosen.json:
                chosen.json.write_text(json.dumps([dataclasses.asdict(row) for row in found], indent=1))


if __name__ == "__main__":
    main()
