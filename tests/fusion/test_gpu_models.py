"""Unmodified transformers models on the GPU in bf16, through Inductor: every attention fused, the error rule held."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from numerics import assert_close_to_exact

import flashfuse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYERS = 2


def llama(transformers: Any) -> tuple[Any, Any]:
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    return transformers.LlamaModel, config


def gpt2(transformers: Any) -> tuple[Any, Any]:
    return transformers.GPT2Model, transformers.GPT2Config(
        vocab_size=512, n_embd=512, n_layer=LAYERS, n_head=8, n_positions=2048
    )


def bert(transformers: Any) -> tuple[Any, Any]:
    config = transformers.BertConfig(
        vocab_size=512, hidden_size=384, num_hidden_layers=LAYERS, num_attention_heads=12, intermediate_size=1024,
        max_position_embeddings=2048,
    )  # fmt: skip
    return transformers.BertModel, config


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that attention is far from uniform, so that a wrong mask or scale would show."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() >= 2:
            p.data.copy_(torch.randn(p.shape, generator=generator) * (1.4 / max(p.shape) ** 0.5))
    return model


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("build", [llama, gpt2, bert], ids=lambda f: f.__name__)
def test_every_attention_is_fused_and_right(
    build: Any, attention: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    cls, config = build(transformers)
    config.use_cache = False
    torch.manual_seed(0)
    model = spread(cls._from_config(config, attn_implementation=attention).eval())
    # float32 is exact beside bf16; in float64 the library's own float32 softmax turns its smallest number into -inf.
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    exact = copy.deepcopy(model).cuda()
    model = model.to("cuda", torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(0, 512, (2, 777), device="cuda")
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 500:] = 0
        mask[1, :100] = 0
    with torch.no_grad():
        eager = model(ids, attention_mask=mask).last_hidden_state
        compiled = torch.compile(model, backend="flashfuse", options={"flashfuse.strict": True})
        fused = compiled(ids, attention_mask=mask).last_hidden_state
        reference = exact(ids, attention_mask=mask).last_hidden_state
    sites = [s for report in flashfuse.reports() for s in report.sites]
    assert len(sites) == LAYERS, [str(r) for report in flashfuse.reports() for r in report.refusals]
    assert_close_to_exact(fused, eager, reference)
