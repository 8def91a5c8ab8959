"""How far a distribution over the next token has gone from the one before."""

from __future__ import annotations

import torch.nn.functional as functional
from torch import Tensor


def divergence(before: Tensor, logits: Tensor, where: Tensor) -> Tensor:
    """KL(before || now) in nats, summed over the positions `where` [batch, sequence]; both logits [batch, sequence,
    vocabulary]. fp32, a scalar."""
    wanted = functional.log_softmax(before.detach()[where].float(), dim=-1)
    found = functional.log_softmax(logits[where].float(), dim=-1)
    return functional.kl_div(found, wanted, reduction="sum", log_target=True)
