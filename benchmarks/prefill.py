"""A row of its own: prefill of an unmodified Llama, whose mask the library builds in the graph when it is compiled."""

from __future__ import annotations

import re

import torch

import flashfuse
from benchmarks.measure import Run
from benchmarks.table import Row, allowed_error, checked, recovered, relative_error, timed

NAME = "Llama prefill"
TOKENS = 16384
# Positions of a causal model do not depend on later ones, so the first can be checked alone.
CHECKED = 2048
LAYERS = 8
ROUNDS = 3


def build(
    dtype: torch.dtype, device: str, layers: int = LAYERS, hidden: int = 2048, attention: str = "sdpa"
) -> torch.nn.Module:
    """transformers' LlamaModel with random weights, 32 heads and 8 key/value heads, calling torch's attention."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=TOKENS, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaModel._from_config(config, attn_implementation=attention)
    return model.eval().to(dtype)


def compare(graph: bool) -> Row:
    """Compile under flashfuse and Inductor, check against float32, and time."""
    model = build(torch.bfloat16, "cuda")
    ids = torch.randint(0, 32000, (1, TOKENS), device="cuda")
    eager = model(ids).last_hidden_state
    precise = build(torch.bfloat16, "cuda").float()(ids[:, :CHECKED]).last_hidden_state.double()
    eager_error = relative_error(eager[:, :CHECKED], precise)

    def error_of(out: torch.Tensor) -> float:
        """On the first positions the error itself; on the last ones what it is at least, eager's own being known."""
        tail = relative_error(out[:, -CHECKED:], eager[:, -CHECKED:].double()) - eager_error
        return max(relative_error(out[:, :CHECKED], precise), tail)

    def compiled(backend: str) -> Run:
        run = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
        return lambda: run(ids).last_hidden_state

    row = Row(f"{NAME}, {LAYERS} layers", f"B1 S{TOKENS}, hidden 2048, 32 / 8 heads", eager_error=eager_error)
    torch._dynamo.reset()
    flashfuse.reset()
    runs = {name: compiled(name) for name in ("flashfuse", "inductor")}
    right = checked(row, runs, error_of, allowed_error(eager_error, eager.dtype))
    row.notes["mask"] = dense_masks(TOKENS)
    return recovered(timed(row, right, graph, ROUNDS))


def dense_masks(tokens: int) -> str:
    """How many values of tokens x tokens elements the compiled graph had, and has after the rewrite."""
    reports = flashfuse.reports()
    if not reports:
        return "no graph was compiled"
    square = re.compile(rf"\[[^\]]*\b{tokens}, {tokens}\]")
    before, after = (len(square.findall(code)) for code in (reports[-1].before, reports[-1].after))
    return f"{before} values of {tokens} x {tokens} in the graph, {after} after the rewrite"
