"""KL minimisation (TOFU, Maini et al., arXiv 2401.06121): gradient ascent, while on the rest the
distributions over the next token stay as they were."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from jobs.unlearn.method import RETAIN, Reads
from jobs.unlearn.methods.divergence import divergence
from jobs.unlearn.methods.grad_diff import GradDiff
from jobs.unlearn.methods.positions import Positions, counted


@dataclass(frozen=True)
class KLMin(GradDiff):
    """Minimises -gamma CE(F) + alpha KL(before || now)(R), the KL a mean over `positions`. OpenUnlearning takes all;
    the answer alone, our default, is not diluted by padding."""

    name = "kl_min"

    positions: Positions = "answer"
    """Where distributions are compared."""

    def reads(self, kind: str) -> Reads:
        """See Method."""
        return Reads.LOGITS if kind == RETAIN else Reads.NOTHING

    def retain_count(self, labels: Tensor) -> int:
        """See ForgetRetain."""
        return int(counted(labels, self.positions).sum())

    def retain_loss(self, logits: Tensor, labels: Tensor, before: Tensor | None) -> Tensor:
        """See ForgetRetain."""
        assert before is not None
        return divergence(before, logits, counted(labels, self.positions))
