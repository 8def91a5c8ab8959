"""On-policy unlearning (GRPO of "Unlearn-and-Reinvent"; the objective is that of DeepSeekMath, arXiv 2402.03300): the
model answers the questions to forget, a judge rewards answers that tell nothing, and what was rewarded more than the
other answers to the same question becomes likelier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from jobs.unlearn.method import RETAIN, ROLLOUT, State, has_labels, of_rows, row_nll, rows, tokens
from jobs.unlearn.methods.forget_retain import ForgetRetain
from pipeline.settings import MOST_STEPS, Within

REWARD = "reward"
"""The term that is the mean reward of a step's answers. Its weight is 0: it is told, and not minimised."""


def advantages(rewards: Sequence[float], group: int) -> list[float]:
    """(reward - mean) / standard deviation within each `group` of rewards that follow each other; 0 where all of them
    are equal."""
    found: list[float] = []
    for first in range(0, len(rewards), group):
        part = rewards[first : first + group]
        mean = math.fsum(part) / len(part)
        deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in part) / len(part))
        found += [(reward - mean) / deviation if deviation else 0.0 for reward in part]
    return found


@dataclass(frozen=True)
class GRPO(ForgetRetain):
    """Minimises -gamma sum A log p / tokens (own answers) + alpha CE(R). A is an answer's advantage among the
    `rollouts` answers to its question, see `advantages`; the sum is over the tokens of all answers of a step.

    The answers of a step are drawn with the weights that it begins with, so the ratio of the policies is 1, and there
    is nothing to clip: the gradient is that of A log p. For the first `cold_steps` steps the answers are ones that say
    nothing, with A = 1, which is plain training on them: the cold start of the paper. Ours: the reward is by words
    (jobs.unlearn.judge), and the paper's KL to a reference (weight 1e-3) is left out, for it needs a second model.
    """

    name = "grpo"
    goal = "suppression"
    kinds = (ROLLOUT, RETAIN)

    rollouts: Annotated[int, Within(2, 4096)] = 8
    """Answers to each question of a step."""
    temperature: Annotated[float, Within(0.01, 100)] = 1.0
    """Of the softmax that answers are drawn from."""
    answer_tokens: Annotated[int, Within(1, 2**20)] = 64
    """The most tokens of an answer."""
    cold_steps: Annotated[int, Within(0, MOST_STEPS)] = 10
    """Steps at the beginning that learn answers which say nothing."""

    def terms(self, state: State) -> Mapping[str, float]:
        """See Method."""
        return {ROLLOUT: self.gamma, RETAIN: self.alpha, REWARD: 0.0}

    def counts(self, kind: str, labels: Tensor) -> Mapping[str, int]:
        """See Method."""
        return {kind: tokens(labels), **({REWARD: rows(labels)} if kind == ROLLOUT else {})}

    def loss(self, kind: str, output: Tensor, labels: Tensor, before: Tensor | None) -> Mapping[str, Tensor]:
        """See Method; of its own answers, `before` is [batch, 2]: each one's advantage and reward."""
        if kind == RETAIN:
            return {kind: self.retain_loss(output, labels, None)}
        assert before is not None
        advantage, reward = before.detach().float().unbind(dim=1)
        kept = torch.where(has_labels(labels), advantage, 0.0)
        return {ROLLOUT: (kept * row_nll(output, labels)).sum(), REWARD: of_rows(reward, labels)}
