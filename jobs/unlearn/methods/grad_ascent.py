"""Gradient ascent on what is to be forgotten (Jang et al., arXiv 2210.01504): nothing holds the rest in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from jobs.unlearn.method import FORGET, Method, State, cross_entropy, tokens


@dataclass(frozen=True)
class GradAscent(Method):
    """Minimises -CE(F), CE a mean over labels. It has no bound below: the model is lost in the end."""

    name = "grad_ascent"
    goal = "untraining"
    kinds = (FORGET,)

    def terms(self, state: State) -> Mapping[str, float]:
        """See Method."""
        return {FORGET: -1.0}

    def counts(self, kind: str, labels: Tensor) -> Mapping[str, int]:
        """See Method."""
        return {FORGET: tokens(labels)}

    def loss(self, kind: str, output: Tensor, labels: Tensor, before: Tensor | None) -> Mapping[str, Tensor]:
        """See Method."""
        return {FORGET: cross_entropy(output, labels)}
