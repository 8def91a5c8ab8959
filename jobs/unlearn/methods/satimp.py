"""SatImp (Yang et al., "Exploring Criteria of Loss Reweighting", arXiv 2505.11953): ascent on each label, weighted by
saturation (how likely it still is) and importance (how much there is to lose)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from jobs.unlearn.method import token_nll
from jobs.unlearn.methods.forget_retain import POWER, WEIGHT, ForgetRetain


@dataclass(frozen=True)
class SatImp(ForgetRetain):
    """Minimises -gamma mean(p^saturation_power (1 - p)^importance_power nll)(F) + alpha CE(R), a mean over labels; no
    gradient goes through p, the label's probability now. Defaults are those of OpenUnlearning's configuration: its
    class has gamma and alpha the other way about."""

    name = "satimp"
    goal = "untraining"
    sign = -1.0

    gamma: Annotated[float, WEIGHT] = 0.1
    """Weight of the term that forgets."""
    saturation_power: Annotated[float, POWER] = 5.0
    """The larger, the less is done to labels that are unlikely already."""
    importance_power: Annotated[float, POWER] = 1.0
    """The larger, the less is done to labels that are nearly certain."""

    def forget_loss(self, logits: Tensor, labels: Tensor, before: Tensor | None) -> Tensor:
        """See ForgetRetain."""
        nll = token_nll(logits, labels)
        p = (-nll.detach()).exp()
        return (p**self.saturation_power * (1 - p).clamp(min=0) ** self.importance_power * nll).sum()
