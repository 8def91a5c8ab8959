"""Oracle matching: the model learns the logits of one that never saw what is to be forgotten (the fine-tuning of DMM,
"Attribute-to-Delete", arXiv 2410.23232). Our reading of notes on the paper, which predicts these logits by datamodels;
here a model gives them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from jobs.unlearn.method import Reads
from jobs.unlearn.methods.divergence import divergence
from jobs.unlearn.methods.forget_retain import ForgetRetain
from jobs.unlearn.methods.positions import Positions, counted


@dataclass(frozen=True)
class OracleMatching(ForgetRetain):
    """Minimises gamma KL(oracle || now)(F) + alpha KL(oracle || now)(R), means over `positions`. What it reads is of
    the oracle, not of the model before."""

    name = "oracle_matching"
    goal = "untraining"

    positions: Positions = "answer"
    """Where distributions are compared."""

    def reads(self, kind: str) -> Reads:
        """See Method."""
        return Reads.LOGITS

    def forget_count(self, labels: Tensor) -> int:
        """See ForgetRetain."""
        return int(counted(labels, self.positions).sum())

    def forget_loss(self, logits: Tensor, labels: Tensor, before: Tensor | None) -> Tensor:
        """See ForgetRetain."""
        assert before is not None
        return divergence(before, logits, counted(labels, self.positions))

    retain_count, retain_loss = forget_count, forget_loss
