"""Gradient difference (Liu et al., arXiv 2203.12817; named so in TOFU, arXiv 2401.06121): ascent on what is to be
forgotten, descent on the rest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from jobs.unlearn.method import cross_entropy
from jobs.unlearn.methods.forget_retain import ForgetRetain


@dataclass(frozen=True)
class GradDiff(ForgetRetain):
    """Minimises -gamma CE(F) + alpha CE(R)."""

    name = "grad_diff"
    goal = "untraining"
    sign = -1.0

    def forget_loss(self, logits: Tensor, labels: Tensor, before: Tensor | None) -> Tensor:
        """See ForgetRetain."""
        return cross_entropy(logits, labels)
