"""Plain training on answers that say nothing: the "IDK" baseline of TOFU (arXiv 2401.06121)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.unlearn.method import PAIR, RETAIN, cross_entropy, has_labels, tokens
from jobs.unlearn.methods.forget_retain import ForgetRetain
from pipeline.runtime.batch import IGNORED


@dataclass(frozen=True)
class IDK(ForgetRetain):
    """Minimises gamma CE(idk) + alpha CE(R). Of a pair only the second row is learnt, and only while the first has
    labels."""

    name = "idk"
    goal = "suppression"
    kinds = (PAIR, RETAIN)

    def forget_count(self, labels: Tensor) -> int:
        """See ForgetRetain."""
        return tokens(_learnt(labels))

    def forget_loss(self, logits: Tensor, labels: Tensor, before: Tensor | None) -> Tensor:
        """See ForgetRetain."""
        return cross_entropy(logits.chunk(2)[1], _learnt(labels))


def _learnt(labels: Tensor) -> Tensor:
    """The labels of the second rows [batch / 2, sequence], IGNORED where there is nothing to forget any more."""
    forget, idk = labels.chunk(2)
    return torch.where(has_labels(forget)[:, None], idk, IGNORED)
