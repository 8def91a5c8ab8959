"""The form of most methods: a term that forgets and a term that keeps the rest as it is, each with its weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from jobs.unlearn.method import FORGET, RETAIN, Method, State, cross_entropy, tokens
from pipeline.settings import Within

WEIGHT = Within(0, 1_000_000)
"""Of a term."""
BETA = Within(1e-6, 1000)
"""Of a log sigmoid."""
POWER = Within(0, 1000)
"""Of a probability."""


@dataclass(frozen=True)
class ForgetRetain(Method):
    """Minimises sign gamma L_F + alpha L_R, where L_R is the cross entropy per label of rows to keep unless a method
    says otherwise. A term has the name of its kind, and all terms are means."""

    kinds = (FORGET, RETAIN)
    sign: ClassVar[float] = 1.0
    """-1 where L_F is climbed."""

    gamma: Annotated[float, WEIGHT] = 1.0
    """Weight of the term that forgets."""
    alpha: Annotated[float, WEIGHT] = 1.0
    """Weight of the term that keeps the rest."""

    def terms(self, state: State) -> Mapping[str, float]:
        """See Method."""
        forget, retain = self.kinds
        return {forget: self.sign * self.gamma, retain: self.alpha}

    def counts(self, kind: str, labels: Tensor) -> Mapping[str, int]:
        """See Method."""
        return {kind: self.retain_count(labels) if kind == RETAIN else self.forget_count(labels)}

    def loss(self, kind: str, output: Tensor, labels: Tensor, before: Tensor | None) -> Mapping[str, Tensor]:
        """See Method."""
        term = self.retain_loss if kind == RETAIN else self.forget_loss
        return {kind: term(output, labels, before)}

    def forget_count(self, labels: Tensor) -> int:
        """What L_F is a mean over: labels, unless a method says otherwise."""
        return tokens(labels)

    def forget_loss(self, logits: Tensor, labels: Tensor, before: Tensor | None) -> Tensor:
        """The sum whose mean is L_F."""
        raise NotImplementedError

    def retain_count(self, labels: Tensor) -> int:
        """What L_R is a mean over."""
        return tokens(labels)

    def retain_loss(self, logits: Tensor, labels: Tensor, before: Tensor | None) -> Tensor:
        """The sum whose mean is L_R."""
        return cross_entropy(logits, labels)
