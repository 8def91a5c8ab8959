"""UNDIAL (Dong et al., arXiv 2402.10052): the model is its own teacher, whose logit of each token to forget
has been lowered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as functional
from torch import Tensor

from jobs.unlearn.method import FORGET, Reads
from jobs.unlearn.methods.forget_retain import WEIGHT, ForgetRetain
from jobs.unlearn.methods.positions import Positions, counted
from pipeline.runtime.batch import IGNORED


@dataclass(frozen=True)
class Undial(ForgetRetain):
    """Minimises gamma CE(softmax(z before - demotion onehot(y)), softmax z)(F) + alpha CE(R), means over `positions`.

    OpenUnlearning takes all positions, and lowers entry V - 100 where there is no label (its label there is -100).
    Here nothing is lowered where there is none.
    """

    name = "undial"
    goal = "untraining"

    alpha: Annotated[float, WEIGHT] = 0.0
    """Weight of the term that keeps the rest."""
    demotion: Annotated[float, WEIGHT] = 10.0
    """How far the logit of a token to forget is lowered."""
    positions: Positions = "answer"
    """Where distributions are compared."""

    def reads(self, kind: str) -> Reads:
        """See Method."""
        return Reads.LOGITS if kind == FORGET else Reads.NOTHING

    def forget_count(self, labels: Tensor) -> int:
        """See ForgetRetain."""
        return int(counted(labels, self.positions).sum())

    def forget_loss(self, logits: Tensor, labels: Tensor, before: Tensor | None) -> Tensor:
        """See ForgetRetain."""
        assert before is not None
        where = counted(labels, self.positions)
        found = labels[where][:, None]  # [positions, 1]
        lowered = -self.demotion * (found != IGNORED).float()
        teacher = before.detach()[where].float().scatter_add(-1, found.clamp(min=0), lowered)
        return functional.cross_entropy(logits[where].float(), teacher.softmax(dim=-1), reduction="sum")
