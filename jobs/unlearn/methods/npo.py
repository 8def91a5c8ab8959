"""Negative preference optimization (Zhang et al., arXiv 2404.05868): DPO with nothing to prefer, which ends where
gradient ascent would go on without end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from jobs.unlearn.method import FORGET, Reads, has_labels, row_nll, rows
from jobs.unlearn.methods.forget_retain import BETA, ForgetRetain
from jobs.unlearn.methods.preference import preference


@dataclass(frozen=True)
class NPO(ForgetRetain):
    """Minimises -gamma (2 / beta) mean log sigmoid(beta (nll - nll before))(F) + alpha CE(R). nll is a row's sum, so
    long answers are pushed harder."""

    name = "npo"
    goal = "untraining"

    beta: Annotated[float, BETA] = 0.1
    """The larger, the earlier a row counts as forgotten."""

    def reads(self, kind: str) -> Reads:
        """See Method."""
        return Reads.SCORE if kind == FORGET else Reads.NOTHING

    def forget_count(self, labels: Tensor) -> int:
        """See ForgetRetain."""
        return rows(labels)

    def forget_loss(self, logits: Tensor, labels: Tensor, before: Tensor | None) -> Tensor:
        """See ForgetRetain."""
        assert before is not None
        return preference(row_nll(logits, labels) - before.detach().float(), has_labels(labels), self.beta)
