"""Tiny decoders of transformers with random weights, library code unmodified, and what they generate from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

HIDDEN, VOCABULARY, PROMPT, WINDOW = 64, 128, 20, 16

_DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
_GPT = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 1, "n_head": 4, "n_positions": 256}
_WINDOWS = {
    "head_dim": 16, "sliding_window": WINDOW, "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_LATENT = {
    "num_key_value_heads": 4, "moe_intermediate_size": 64, "n_routed_experts": 2, "n_shared_experts": 1, "n_group": 1,
    "num_experts_per_tok": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 24, "first_k_dense_replace": 0,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_decoder_layers": 1,
    "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 32,
}  # fmt: skip
_WHISPER = {
    "vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 16,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
    "max_source_positions": 48, "max_target_positions": 128, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip

# Model class, configuration class, and the configuration.
DECODERS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "bloom": ("BloomForCausalLM", "BloomConfig", _GPT | {"hidden_size": HIDDEN}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _DECODER | {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _DECODER | _WINDOWS | {"query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _DECODER | _WINDOWS | {"query_pre_attn_scalar": 16}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", _DECODER | _WINDOWS | _EXPERTS),
    "deepseek": ("DeepseekV3ForCausalLM", "DeepseekV3Config", _DECODER | _LATENT),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
}
_ENCODERS = ("t5", "whisper")


def attentions(name: str) -> int:
    """How many attentions one step of the decoder has: its layer's, beside an encoder two, or two layers'."""
    return 2 if name in _ENCODERS or "layer_types" in DECODERS[name][2] else 1


def decoder(transformers: Any, name: str, attention: str) -> Any:
    """The model in float32, with weights large enough that attention is far from uniform; it never ends by itself."""
    model_class, config_class, settings = DECODERS[name]
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1}
    config = getattr(transformers, config_class)(**settings, **tokens)
    model = getattr(transformers, model_class)._from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() >= 2:
            p.data.copy_(torch.randn(p.shape, generator=generator) * (1.4 / max(p.shape) ** 0.5))
    return model


def prompt(name: str, batch: int, length: int = PROMPT, padded: bool = False) -> dict[str, torch.Tensor]:
    """What `generate` takes; padded: the first row is shorter, on the side where the decoder or encoder wants it."""
    generator = torch.Generator().manual_seed(1)
    if name == "whisper":
        return {"input_features": torch.randn(batch, _WHISPER["num_mel_bins"], 96, generator=generator)}  # type: ignore[call-overload]
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        hidden = slice(-length // 4, None) if name in _ENCODERS else slice(0, length // 4)
        mask[0, hidden] = ids[0, hidden] = 0
    return {"input_ids": ids, "attention_mask": mask}
