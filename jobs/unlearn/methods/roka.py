"""ROKA (arXiv 2603.00436): what lies beside the thing to forget is held to what the model says of it itself, while the
thing is unlearnt. Our reading of notes on the paper, whose own experiments are on images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.unlearn.method import RETAIN, Reads, cross_entropy
from jobs.unlearn.methods.grad_diff import GradDiff
from pipeline.runtime.batch import IGNORED


@dataclass(frozen=True)
class ROKA(GradDiff):
    """Minimises -gamma CE(F) + alpha CE(S, argmax z before), means over labels: S are the siblings, with the likeliest
    token of the model before in place of each label.

    The paper finds siblings in the batch, by nearness of input times gradient, and takes their argmax at each step.
    Here they are the rows to keep, and the argmax is that of before, which cannot drift.
    """

    name = "roka"

    def reads(self, kind: str) -> Reads:
        """See Method."""
        return Reads.LOGITS if kind == RETAIN else Reads.NOTHING

    def retain_loss(self, logits: Tensor, labels: Tensor, before: Tensor | None) -> Tensor:
        """See ForgetRetain."""
        assert before is not None
        return cross_entropy(logits, torch.where(labels != IGNORED, before.argmax(dim=-1), IGNORED))
