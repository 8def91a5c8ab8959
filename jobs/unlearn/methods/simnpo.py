"""SimNPO (Fan et al., arXiv 2410.07163): negative preference optimization by the mean over a row's labels,
without anything of the model before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from jobs.unlearn.method import has_labels, row_nll, rows
from jobs.unlearn.methods.forget_retain import BETA, WEIGHT, ForgetRetain
from jobs.unlearn.methods.preference import preference
from pipeline.runtime.batch import IGNORED
from pipeline.settings import Within


@dataclass(frozen=True)
class SimNPO(ForgetRetain):
    """Minimises -gamma (2 / beta) mean log sigmoid(beta (nll / labels - delta))(F) + alpha CE(R). Defaults are those of
    OpenUnlearning for TOFU, as is delta inside of beta: the paper's gamma is beta delta."""

    name = "simnpo"
    goal = "untraining"

    gamma: Annotated[float, WEIGHT] = 0.125
    """Weight of the term that forgets."""
    beta: Annotated[float, BETA] = 4.5
    """The larger, the earlier a row counts as forgotten."""
    delta: Annotated[float, Within(-1000, 1000)] = 0.0
    """The nats per label from which on a row counts as forgotten."""

    def forget_count(self, labels: Tensor) -> int:
        """See ForgetRetain."""
        return rows(labels)

    def forget_loss(self, logits: Tensor, labels: Tensor, before: Tensor | None) -> Tensor:
        """See ForgetRetain."""
        lengths = (labels != IGNORED).sum(dim=1).clamp(min=1)
        return preference(row_nll(logits, labels) / lengths - self.delta, has_labels(labels), self.beta)
