"""The loss that negative preference optimization and its kin share: it fades as the margin grows, so that what has been
forgotten is pushed no further."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor


def preference(margin: Tensor, counts: Tensor, beta: float) -> Tensor:
    """-(2 / beta) log sigmoid(beta * margin), summed over the rows where `counts`; both [batch]. A scalar."""
    kept = torch.where(counts, margin, 0.0)  # before, too: no gradient comes of what is no number
    return torch.where(counts, -2 / beta * functional.logsigmoid(beta * kept), 0.0).sum()
