"""The steps of a request whose answers are the model's own: they belong to a step as its batch does.

Before a step every worker takes part in the answers to its questions, and judges them; all come to the same. Nothing of
them is saved or moved: who joins, resumes, or begins the step again, has them computed again by the committed weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from jobs.engine import Engine
from jobs.unlearn.job import UnlearnJob
from jobs.unlearn.judge import judge
from jobs.unlearn.material import Material
from jobs.unlearn.method import FORGET, ROLLOUT
from jobs.unlearn.methods.grpo import GRPO, advantages
from jobs.unlearn.reference import Reference
from jobs.unlearn.rollout import Measures, RolloutJob, roll_out
from jobs.unlearn.samples import answer_of, as_sample, prompt_of, tensors_of
from pipeline.model.rng import derive
from pipeline.runtime.batch import Batch, Needs


@dataclass(frozen=True)
class Answer:
    """One answer, with the question before it."""

    tokens: tuple[int, ...]
    start: int
    """The first token of the answer."""
    advantage: float
    reward: float


class OnPolicyJob(UnlearnJob):
    """The steps of grpo. `asks` draws the tokens; `tokenizer` is the folder of the one that makes text of them."""

    def __init__(
        self, method: GRPO, material: Material, reference: Reference, microbatches: int, size: int, first_step: int,
        first_sample: int, asks: RolloutJob, tokenizer: Path,
    ) -> None:  # fmt: skip
        super().__init__(method, material, reference, microbatches, size, first_step, first_sample)
        self.grpo, self.asks, self.folder = method, asks, tokenizer
        self.prepared = -1
        """The step that the answers are of."""
        self.answers: Sequence[Answer] = ()

    @cached_property
    def tokenizer(self) -> Any:
        """Loaded by who judges."""
        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def free(self) -> tuple[str, ...]:
        """The answers that say nothing, as text."""
        return tuple(self._text(answer) for answer in self.material.idk)

    def asked(self, step: int) -> list[int]:
        """The row whose question each answer of a step is to: `rollouts` answers to one question follow each other."""
        count, group = self.microbatches // len(self.method.kinds) * self.size, self.grpo.rollouts
        return [self.material.drawn(FORGET, (step * count + answer) // group) for answer in range(count)]

    def prepare(self, engine: Engine | Measures, step: int) -> None:
        """See RunJob."""
        rows, method = self.asked(step), self.grpo
        samples = [self.material.data.row(row) for row in rows]
        prompts = [prompt_of(sample) for sample in samples]
        cold = step < method.cold_steps
        if cold:
            said = [self._says_nothing(step, number) for number in range(len(rows))]
        else:
            said = roll_out(engine, self.asks, step, prompts, method.answer_tokens)
        rewards = [
            judge(
                self._text(prompt), self._text(answer_of(sample)), self._text(answer),
                answer[-1:] == [self.asks.end_token], self.free,
            ).reward
            for sample, prompt, answer in zip(samples, prompts, said, strict=True)
        ]  # fmt: skip
        worth = [1.0] * len(rows) if cold else advantages(rewards, method.rollouts)
        self.prepared = step
        self.answers = [
            Answer((*prompt, *answer), len(prompt), each, reward)
            for prompt, answer, each, reward in zip(prompts, said, worth, rewards, strict=True)
        ]

    def _says_nothing(self, step: int, number: int) -> list[int]:
        idk = self.material.idk
        return list(idk[derive(self.material.seed, "cold", step, number) % len(idk)])

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    # ---- microbatches ----

    def batch(self, step: int, microbatch: int, needs: Needs) -> Batch:
        """See pipeline.runtime.batch.Job."""
        if (answers := self._answers(step, microbatch)) is None:
            return super().batch(step, microbatch, needs)
        tensors = self._tensors(answers, needs)
        if Needs.LOSS in needs:
            tensors["before"] = torch.tensor([[each.advantage, each.reward] for each in answers])
        first = self.ids.next_sample(step) + microbatch * self.size
        return Batch(tuple(range(first, first + self.size)), tensors, ROLLOUT)

    def counts(self, step: int, microbatch: int) -> Mapping[str, int]:
        """See pipeline.runtime.batch.Job."""
        if (answers := self._answers(step, microbatch)) is None:
            return super().counts(step, microbatch)
        return self.method.counts(ROLLOUT, self._tensors(answers, Needs.LOSS)["labels"])

    def _answers(self, step: int, microbatch: int) -> Sequence[Answer] | None:
        """Those of a microbatch; None for one of another kind. Raises RuntimeError for a step that was not prepared."""
        kind, before = self.kind_of(step, microbatch)
        if kind != ROLLOUT:
            return None
        if self.prepared != step:
            raise RuntimeError(f"the answers of step {step} are not there; those that are, are of step {self.prepared}")
        first = before % (self.microbatches // len(self.method.kinds)) * self.size
        return self.answers[first : first + self.size]

    def _tensors(self, answers: Sequence[Answer], needs: Needs) -> dict[str, Tensor]:
        length, end = self.asks.sequence_length, self.asks.end_token
        return tensors_of([as_sample(each.tokens, each.start, length, end) for each in answers], needs)

    # ---- workers that hold nothing ----

    def tell(self, step: int) -> dict[str, Any]:
        """See ToldJob."""
        return {"answers": [[list(map(int, each.tokens)), *astuple(each)[1:]] for each in self.answers]}

    def hear(self, step: int, told: Mapping[str, Any]) -> None:
        """See ToldJob."""
        self.prepared = step
        self.answers = [Answer(tuple(tokens), *others) for tokens, *others in told["answers"]]
