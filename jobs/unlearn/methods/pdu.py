"""Primal-dual unlearning (PDU; Entesari et al., arXiv 2506.05314): logits of what is to be forgotten become flat, under
the constraint that the loss on the rest stays below a goal; the constraint's price is learnt beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from jobs.unlearn.method import FORGET, RETAIN, State
from jobs.unlearn.methods.forget_retain import WEIGHT, ForgetRetain
from pipeline.runtime.batch import IGNORED
from pipeline.settings import MOST_STEPS, Within

DUAL = "dual"


@dataclass(frozen=True)
class PDU(ForgetRetain):
    """Minimises gamma mean((max z - mean z)^2)(F) + lambda CE(R), a mean over labels, where lambda is `alpha` at first
    and max(0, lambda + dual_step (CE(R) - retain_goal)) after each step from step `dual_warmup` on.

    z are the logits that predict each label; OpenUnlearning takes those one to the right. It moves lambda with each
    microbatch, and warms up for 5 epochs: here 65 steps, which those are of TOFU's forget10 in batches of 32.
    """

    name = "pdu"
    goal = "untraining"

    dual_step: Annotated[float, WEIGHT] = 1.0
    """How far lambda moves for each nat that the loss on the rest is off its goal."""
    retain_goal: Annotated[float, Within(0, 1000)] = 0.0
    """The loss per label on the rest that is good enough."""
    dual_warmup: Annotated[int, Within(0, MOST_STEPS)] = 65
    """Steps before lambda moves."""

    def start(self) -> State:
        """See Method."""
        return {DUAL: self.alpha}

    def advance(self, state: State, means: Mapping[str, float], step: int) -> State:
        """See Method."""
        if step < self.dual_warmup:
            return state
        return {DUAL: max(0.0, state[DUAL] + self.dual_step * (means[RETAIN] - self.retain_goal))}

    def terms(self, state: State) -> Mapping[str, float]:
        """See Method."""
        return {FORGET: self.gamma, RETAIN: state[DUAL]}

    def forget_loss(self, logits: Tensor, labels: Tensor, before: Tensor | None) -> Tensor:
        """See ForgetRetain."""
        found = logits[labels != IGNORED].float()  # [labels, vocabulary]
        return (torch.max(found, dim=-1).values - found.mean(dim=-1)).square().sum()
