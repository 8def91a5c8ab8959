"""Two blocks of a tiny model, and what goes in and comes out of them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Gemma2Config, GPT2Config, LlamaConfig, PreTrainedConfig

from pipeline.model.layered import LayeredModel
from pipeline.model.passed import Passed
from pipeline.model.span_module import SpanModule

LLAMA = LlamaConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=64, tie_word_embeddings=False,
)  # fmt: skip
GPT2 = GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=64, n_positions=32)
GEMMA2 = Gemma2Config(
    hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=64, head_dim=8,
)  # fmt: skip


def blocks(config: PreTrainedConfig, seed: int, scale: float = 1.0) -> SpanModule:
    """Two blocks, whose matrices are larger the larger `scale` is, so that they do something."""
    torch.manual_seed(seed)
    module = LayeredModel(config).build((2, 4), seed=seed).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape) * scale / parameter.shape[-1] ** 0.5)
    return module


@torch.no_grad()
def pairs_of(teacher: SpanModule, count: int, seed: int = 0, mask: Tensor | None = None) -> list[Passed]:
    draw = torch.Generator().manual_seed(seed)
    xs = [torch.randn(2, 8, 16, generator=draw) for _ in range(count)]
    return [Passed(x, teacher(x, attention_mask=mask), mask) for x in xs]
