"""Poisoned answers: the model learns its own answers with the words in which the concept lies struck out. Class
unlearning by concepts and poisoning; as in the authors' code, by integrated gradients (`jobs.unlearn.concepts`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from jobs.unlearn.method import POISON, RETAIN, cross_entropy
from jobs.unlearn.methods.forget_retain import ForgetRetain
from pipeline.settings import Within


@dataclass(frozen=True)
class Concept(ForgetRetain):
    """Minimises gamma CE(P) + alpha CE(R), means over labels: P are the rows to forget with poisoned answers. The model
    is taught to say something else, so this is suppression: nothing makes it lose what it says no more."""

    name = "concept"
    goal = "suppression"
    kinds = (POISON, RETAIN)

    concept_words: Annotated[int, Within(1, 10_000)] = 5
    """Words that are struck out, for each group of rows to forget."""
    group_by: str = ""
    """The field that makes rows a group, whose value is struck out too. Unset, it is that by which the rows to forget
    were selected; where they were not, each row is a group of its own."""

    def forget_loss(self, logits: Tensor, labels: Tensor, before: Tensor | None) -> Tensor:
        """See ForgetRetain."""
        return cross_entropy(logits, labels)
