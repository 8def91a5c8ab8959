"""Weighted gradient ascent (WGA; Wang et al., "Rethinking LLM Unlearning Objectives", arXiv 2502.19301): ascent on each
label by how likely it still is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from jobs.unlearn.method import token_nll
from jobs.unlearn.methods.forget_retain import POWER, ForgetRetain


@dataclass(frozen=True)
class WGA(ForgetRetain):
    """Minimises -gamma mean(p^weight_power nll)(F) + alpha CE(R), a mean over labels; no gradient goes through p, the
    label's probability now."""

    name = "wga"
    goal = "untraining"
    sign = -1.0

    weight_power: Annotated[float, POWER] = 1.0
    """The larger, the less is done to labels that are unlikely already; 0 is plain ascent."""

    def forget_loss(self, logits: Tensor, labels: Tensor, before: Tensor | None) -> Tensor:
        """See ForgetRetain."""
        nll = token_nll(logits, labels)
        return ((-nll.detach()).exp() ** self.weight_power * nll).sum()
