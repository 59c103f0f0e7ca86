"""Part 2: prefill of a small Llama (grouped-query attention) and GPT-2, built from their configurations."""

from __future__ import annotations

from typing import Any

import torch
from peers import compare, expect_fused
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

LAYERS = 2
VOCABULARY = 1000
SHAPE = (2, 384)


def prefill(console: Console, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Random weights, both ways the library writes attention. Returns what disagrees with the unmodified models."""
    problems: list[str] = []
    for build in (_llama, _gpt2):
        for attention in ("eager", "sdpa"):
            model = build(attention).to(device, dtype).eval()
            title = f"{type(model).__name__}, attn_implementation={attention!r}, prefill {SHAPE[0]} x {SHAPE[1]}"
            tokens = torch.randint(VOCABULARY, SHAPE, device=device)
            result, wrong = compare(console, title, model, [tokens], _logits, dynamic=False)
            problems += wrong + expect_fused(title, result.reports[0], LAYERS)
            console.print(result.reports[0].to_text(console.width), markup=False, highlight=False)
    return problems


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, use_cache=False).logits


def _llama(attention: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config)


def _gpt2(attention: str) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=256,
        n_layer=LAYERS,
        n_head=8,
        n_positions=4096,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
    )
    return GPT2LMHeadModel(config)
