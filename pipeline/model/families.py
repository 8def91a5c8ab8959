"""The families of models: where the parts of each are in its causal LM, and the modules of its two ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.model.weights import ModelError


@dataclass(frozen=True)
class Family:
    """Where a family's parts are in its causal LM, and which of its blocks see a sliding window only."""

    tokens: str = "model.embed_tokens"
    positions: str | None = None
    dropout: str | None = None
    blocks: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str | None = "model.rotary_emb"
    window: Literal["never", "if set", "by layer"] = "never"
    rotary_by_type: bool = False
    attentions: tuple[str, ...] = ("sdpa", "eager")
    into_neurons: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """What of a block computes the neurons of its MLP, one output each, and what reads them, one input each."""
    out_of_neurons: str = "mlp.down_proj"
    out_of_attention: str | None = "self_attn.o_proj"
    """What gives the other thing that a block adds; None where what these two give is normalised before it is added."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "qwen2": Family(window="by layer"),
    "qwen3": Family(window="by layer"),
    "mistral": Family(window="if set"),
    "gpt2": Family(
        tokens="transformer.wte", positions="transformer.wpe", dropout="transformer.drop", blocks="transformer.h",
        norm="transformer.ln_f", rotary=None, into_neurons=("mlp.c_fc",), out_of_neurons="mlp.c_proj",
        out_of_attention="attn.c_proj",
    ),
    "gemma": Family(),
    "gemma2": Family(window="by layer", attentions=("eager",), out_of_attention=None),
    "gemma3_text": Family(window="by layer", rotary_by_type=True, out_of_attention=None),
}  # fmt: skip
"""Supported families by `model_type`."""

DROPOUTS = ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")
FULL_ATTENTION, SLIDING = "full_attention", "sliding_attention"


class Embedding(nn.Module):
    """Layer 0: ids [batch, sequence] -> hidden [batch, sequence, hidden]."""

    def __init__(self, tokens: nn.Module, positions: nn.Embedding | None = None, dropout: nn.Module | None = None):
        super().__init__()
        self.tokens, self.positions, self.dropout = tokens, positions, dropout

    def forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.tokens(ids)
        if self.positions is not None:
            if ids.shape[1] > (limit := self.positions.num_embeddings):
                raise ModelError(f"a sequence has {ids.shape[1]} tokens; this model allows up to {limit}")
            hidden = hidden + self.positions(position_ids)
        return hidden if self.dropout is None else self.dropout(hidden)


class Head(nn.Module):
    """The last layer: hidden [batch, sequence, hidden] -> logits [batch, sequence, vocabulary]."""

    def __init__(self, norm: nn.Module, head: nn.Module, cap: float | None = None):
        super().__init__()
        self.norm, self.head, self.cap = norm, head, cap

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.head(self.norm(hidden))
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap
