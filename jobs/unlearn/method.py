"""What a method of unlearning is: signed terms over kinds of microbatches, and what it reads of the model before.

A method says what is minimised, and nothing of how it is run: microbatches, pipelines, sums and commits are the
engine's. Each term is a sum over what counts for it, divided by its own count over the whole step, so its value does
not depend on how rows are dealt to microbatches or workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Literal

import torch
import torch.nn.functional as functional
from torch import Tensor

from pipeline.runtime.batch import IGNORED
from pipeline.runtime.procedure import Oracle, Vector

FORGET, RETAIN, PAIR, TRACE, ANCHOR = "forget", "retain", "pair", "trace", "anchor"
POISON, ROLLOUT = "poison", "rollout"
"""Kinds of microbatches. A PAIR has rows to forget in its first half and, in the same order, the same questions with
answers that say nothing in its second; a POISON has rows to forget with answers that leave out what they are about; a
ROLLOUT has the questions of rows to forget, with the model's own answers."""

Goal = Literal["untraining", "concept removal", "suppression"]
State = Mapping[str, float]
"""What a method carries from step to step beside the weights: dual variables and the like."""


class Reads(Enum):
    """What a method reads of the model as it was before the first step, for each row of a kind."""

    NOTHING = "nothing"
    SCORE = "score"
    """The sum of -log p over the row's labels: [batch]."""
    LOGITS = "logits"
    """[batch, sequence, vocabulary]."""
    HIDDEN = "hidden"
    """The output of the method's layer: [batch, sequence, hidden]."""


@dataclass(frozen=True)
class Method:
    """Base of all methods. The fields of a method are its settings; `name` is what a user calls it."""

    name: ClassVar[str]
    goal: ClassVar[Goal]
    kinds: ClassVar[tuple[str, ...]]
    """The kinds of microbatches that a step has, as many of each."""
    is_procedure: ClassVar[bool] = False
    """Whether a step is what `direction` says, and not the gradient of the terms."""
    optimizer: ClassVar[str] = "adamw"
    """What it is run with unless the user says otherwise."""
    rate: ClassVar[float | None] = None
    """Its learning rate unless the user says otherwise; None for that of most."""
    by_differences: ClassVar[bool] = False
    """Whether it takes differences of gradients that lie close to each other."""
    few_steps: ClassVar[int | None] = None
    """How many steps it takes unless the user says otherwise; None for as many as the epochs take."""

    def reads(self, kind: str) -> Reads:
        """What of the model before it wants for the rows of a kind."""
        return Reads.NOTHING

    @property
    def depth(self) -> int | None:
        """How many decoder blocks it computes; None for the whole model. Below, `output` is then the hidden state."""
        return None

    def start(self) -> State:
        """What is carried before the first step."""
        return {}

    def advance(self, state: State, means: Mapping[str, float], step: int) -> State:
        """What is carried after a committed step (from 0), whose terms had these means."""
        return state

    def terms(self, state: State) -> Mapping[str, float]:
        """Term -> its signed weight in what is minimised. The names are always the same."""
        raise NotImplementedError

    def direction(self, oracle: Oracle) -> Vector:
        """Of a procedure: what, times the learning rate, a step takes from the weights."""
        raise NotImplementedError

    def counts(self, kind: str, labels: Tensor) -> Mapping[str, int]:
        """Term -> what of a microbatch counts for it; labels [batch, sequence]. A row without labels counts for
        nothing: it has been forgotten before."""
        raise NotImplementedError

    def loss(self, kind: str, output: Tensor, labels: Tensor, before: Tensor | None) -> Mapping[str, Tensor]:
        """Term -> its sum (not mean) over what counts. `output` are logits [batch, sequence, vocabulary], aligned
        with `labels` [batch, sequence], or hidden states; `before` is what `reads` asks for. Keys as in `counts`."""
        raise NotImplementedError


def tokens(labels: Tensor) -> int:
    """How many labels count."""
    return int((labels != IGNORED).sum())


def rows(labels: Tensor) -> int:
    """How many rows have labels that count."""
    return int((labels != IGNORED).any(dim=1).sum())


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of each label [batch, sequence], fp32, 0 where it is IGNORED."""
    flat = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(labels.shape)


def row_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of -log p over each row's labels [batch], fp32."""
    return token_nll(logits, labels).sum(dim=1)


def has_labels(labels: Tensor) -> Tensor:
    """Which rows count [batch], bool."""
    return (labels != IGNORED).any(dim=1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p summed over all labels that count, a scalar."""
    return token_nll(logits, labels).sum()


def of_rows(values: Tensor, labels: Tensor) -> Tensor:
    """Values [batch] summed over the rows that count."""
    return torch.where(has_labels(labels), values, 0.0).sum()
