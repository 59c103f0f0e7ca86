"""The models of `benchmarks.models`: code of transformers, timm and diffusers as it is, with random weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import prefill

EAGER, SDPA = "eager", "sdpa"


@dataclass(frozen=True)
class Model:
    """A model with its input.

    build: the module, in float32 on the current default device, for one of `settings`: how its attention is written.
    inputs: its keyword arguments, whose floating-point tensors are of a type. trains: whether a step goes back to
    gradients.
    """

    name: str
    build: Callable[[str], torch.nn.Module]
    inputs: Callable[[torch.dtype], dict[str, torch.Tensor]]
    settings: tuple[str, ...] = (EAGER, SDPA)
    trains: bool = False


def output_of(model: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first tensor of what a forward pass gives."""
    out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out[0]


def gradient_of(module: torch.nn.Module, model: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The gradient that a training step gives the first layer's first matrix: all of the model lies behind it."""
    for parameter in module.parameters():
        parameter.grad = None
    out = output_of(model, inputs)
    out.backward(_upstream(out.shape, out.dtype, out.device))
    layers = (p.grad for name, p in module.named_parameters() if ".0." in name and p.dim() == 2)
    first = next(grad for grad in layers if grad is not None)
    return first.clone()


@functools.lru_cache(maxsize=2)
def _upstream(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A gradient of the output, in numbers of bfloat16; a last normalisation takes that of a mean square away."""
    noise = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)
    return noise.bfloat16().to(dtype)


def _tokens(batch: int, length: int, vocabulary: int = 30000) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(0)


def _noise(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=_generator()).to(dtype)


def _llama(setting: str) -> torch.nn.Module:
    return prefill.build(torch.float32, str(torch.get_default_device()), attention=setting)


def _of_transformers(model: str, **settings: Any) -> Callable[[str], torch.nn.Module]:
    def build(setting: str) -> torch.nn.Module:
        import transformers

        kind = getattr(transformers, model)
        config = kind.config_class(**settings, use_cache=False)
        return kind._from_config(config, attn_implementation=setting)

    return build


def _whisper_encoder(setting: str) -> torch.nn.Module:
    whole: Any = _of_transformers("WhisperModel", d_model=768, encoder_layers=12, encoder_attention_heads=12,
                                  encoder_ffn_dim=3072, decoder_layers=1, dropout=0.0)(setting)  # fmt: skip
    return whole.encoder


def _vit(setting: str) -> torch.nn.Module:
    import timm

    timm.layers.set_fused_attn(setting == SDPA)
    return timm.create_model("vit_large_patch16_224", depth=12)


def _diffusion_transformer(setting: str) -> torch.nn.Module:
    from diffusers import DiTTransformer2DModel
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    model = DiTTransformer2DModel(num_layers=12, sample_size=64, num_embeds_ada_norm=1000)
    processor = AttnProcessor() if setting == EAGER else AttnProcessor2_0()
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(processor)
    return model


def _padded(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Sentences of a quarter to all of the length."""
    lengths = torch.linspace(length // 4, length, batch).long()
    return {"input_ids": _tokens(batch, length), "attention_mask": (torch.arange(length) < lengths[:, None]).long()}


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

MODELS = (
    Model("Llama prefill 1 x 4096", _llama, lambda _: {"input_ids": _tokens(1, 4096)}),
    Model("Llama prefill 1 x 16384", _llama, lambda _: {"input_ids": _tokens(1, 16384)}, (SDPA,)),
    Model("Llama prefill 1 x 65536", _llama, lambda _: {"input_ids": _tokens(1, 65536)}, (SDPA,)),
    Model("Llama training 1 x 8192", _llama, lambda _: {"input_ids": _tokens(1, 8192)}, (SDPA,), trains=True),
    Model(
        "GPT-2 training 4 x 2048",
        _of_transformers("GPT2Model", n_positions=2048, **NO_DROPOUT),
        lambda _: {"input_ids": _tokens(4, 2048)},
        trains=True,
    ),
    Model("BERT-base 32 x 512, padded", _of_transformers("BertModel"), lambda _: _padded(32, 512)),
    Model("ViT-L, 12 layers, 64 images", _vit, lambda dtype: {"x": _noise(dtype, 64, 3, 224, 224)}),
    Model(
        "T5 encoder 8 x 2048",
        _of_transformers("T5EncoderModel", d_model=768, d_ff=3072, num_layers=12, num_heads=12),
        lambda _: {"input_ids": _tokens(8, 2048)},
        (EAGER,),
    ),
    Model(
        "Gemma 2, 8 layers, 1 x 8192",
        _of_transformers("Gemma2Model", num_hidden_layers=8, vocab_size=32000),
        lambda _: {"input_ids": _tokens(1, 8192)},
        (EAGER,),
    ),
    Model("Whisper encoder 8 x 1500", _whisper_encoder, lambda dtype: {"input_features": _noise(dtype, 8, 80, 3000)}),
    Model(
        "DiT, 12 layers, 8 x 1024",
        _diffusion_transformer,
        lambda dtype: {
            "hidden_states": _noise(dtype, 8, 4, 64, 64),
            "timestep": torch.full((8,), 500),
            "class_labels": torch.arange(8),
        },
    ),
)
