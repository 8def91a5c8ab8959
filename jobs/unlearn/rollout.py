"""Answers that the model itself gives, computed on the pipeline that holds it: one pass forward for each new token.

The engine measures a job (see Engine.measure) whose terms are places of rows. Who has the head draws the next token of
each row, and the means carry it to all: a token's id is exact in a float. All append it, and go on until every row has
its end token or as many tokens as are allowed; rows that have ended are not computed any more. Nothing is kept from
token to token but the tokens: whoever is lost takes nothing along, and an answer that was interrupted is begun anew,
and is the same again. A token costs a pass over all before it, where a cache of keys and values would cost a position.

A token is drawn by the largest of logit / temperature + g, where g is Gumbel noise keyed by (seed, step, row, position)
(Gumbel, 1954: that is a sample of softmax(logits / temperature)); by the largest logit, where the temperature is 0. A
pass has the same bits with any number of workers. Where rows are dealt to microbatches otherwise, it is the same to
float tolerance only, so a token may differ where two are as close as that: about one in a million.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from jobs.job import SampledJob
from jobs.unlearn.method import ROLLOUT
from pipeline.model.rng import derive, uniforms
from pipeline.runtime.batch import Batch, Needs
from pipeline.runtime.step_commit import NonFiniteLoss
from pipeline.runtime.worker import StepResult


class Measures(Protocol):
    """What is asked of an engine: see jobs.engine."""

    def measure(self, job: str, part: int) -> StepResult: ...
    def pulse(self) -> None: ...


def draw(logits: Tensor, temperature: float, keys: Tensor) -> Tensor:
    """The next token of each row [rows] int64, or NaN where there is none, as float32 (exact below 2^24); logits
    [rows, vocabulary], keys [rows] int64."""
    if temperature:
        noise = -(-uniforms(keys, logits.shape[-1]).log()).log()
        best = (logits.double() / temperature + noise).argmax(dim=-1)
    else:
        best = logits.float().argmax(dim=-1)
    return best.float().masked_fill(logits.isnan().any(dim=-1), float("nan"))


@dataclass(frozen=True)
class Going:
    """A row that is gone on with: its tokens so far, and what its next one is keyed by."""

    tokens: Sequence[int]
    key: int


@dataclass(frozen=True, kw_only=True)
class RolloutJob(SampledJob):
    """Measured by the name ROLLOUT, it draws the next token of each of `rows`, which are spread evenly over its
    `microbatches`, at most `size` in each."""

    sequence_length: int
    end_token: int
    seed: int
    temperature: float = 0.0
    cut: bool = False
    """Whether a microbatch is as long as its longest row, and not as a sample: where what is sent tells its shape."""
    rows: list[Going] = field(default_factory=list)
    """At most `at_once`, of at most `sequence_length` tokens each: whoever measures the job sets them before."""

    @property
    def at_once(self) -> int:
        """How many rows one pass takes."""
        return self.microbatches * self.size

    @property
    def terms(self) -> Mapping[str, float]:
        """See pipeline.runtime.batch.Job: one for each place of a row."""
        return {str(place): 0.0 for place in range(self.at_once)}

    def counts(self, step: int, microbatch: int) -> Mapping[str, int]:
        """See pipeline.runtime.batch.Job: all places, whether they are taken or not."""
        return {str(microbatch * self.size + row): 1 for row in range(self.size)}

    def places(self) -> list[int]:
        """The place of each row."""
        return [n // self._each * self.size + n % self._each for n in range(len(self.rows))]

    @property
    def _each(self) -> int:
        return max(1, -(-len(self.rows) // self.microbatches))

    def batch(self, step: int, microbatch: int, needs: Needs) -> Batch:
        """See pipeline.runtime.batch.Job; a microbatch that no row is left for has one token, which nobody reads."""
        first = microbatch * self._each
        rows = self.rows[first : first + self._each] or [Going([self.end_token], 0)]
        length = max(len(going.tokens) for going in rows) if self.cut else self.sequence_length
        ids = tuple(range(microbatch * self.size, microbatch * self.size + len(rows)))
        tensors: dict[str, Tensor] = {}
        if Needs.INPUT in needs:
            input_ids = np.full((len(rows), length), self.end_token, dtype=np.int64)
            for row, going in zip(input_ids, rows):
                row[: len(going.tokens)] = going.tokens
            tensors["input_ids"] = torch.from_numpy(input_ids)
        if Needs.LOSS in needs:
            tensors["last"] = torch.tensor([len(going.tokens) - 1 for going in rows])
            tensors["keys"] = torch.tensor([going.key for going in rows])
            tensors["places"] = torch.tensor(ids)
        return Batch(ids, tensors)

    def loss(self, logits: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """See pipeline.runtime.batch.Job: each place's token."""
        rows = torch.arange(len(logits), device=logits.device)
        tokens = draw(logits[rows, batch["last"]], self.temperature, batch["keys"])
        return {str(place): token for place, token in zip(batch["places"].tolist(), tokens)}

    # ---- workers that hold nothing ----

    def tell(self, step: int) -> dict[str, Any]:
        """See ToldJob."""
        return {"rows": [[list(map(int, going.tokens)), going.key] for going in self.rows]}

    def hear(self, step: int, told: Mapping[str, Any]) -> None:
        """See ToldJob."""
        self.rows[:] = [Going(tokens, key) for tokens, key in told["rows"]]


def roll_out(
    engine: Measures, job: RolloutJob, step: int, prompts: Sequence[Sequence[int]], most: int
) -> list[list[int]]:
    """What the model answers to each prompt, at most `most` tokens, the end token last where it comes; as many as a
    sequence has room for. Together, by the weights as they are; `step` is what is drawn by. Raises NonFiniteLoss."""
    answers: list[list[int]] = [[] for _ in prompts]
    room = [min(most, job.sequence_length + 1 - len(prompt)) for prompt in prompts]
    going = [n for n, left in enumerate(room) if left > 0]
    while going:
        for first in range(0, len(going), job.at_once):
            part = going[first : first + job.at_once]
            job.rows[:] = [
                Going([*prompts[n], *answers[n]], derive(job.seed, "rollout", step, n, len(answers[n]))) for n in part
            ]
            try:
                means = engine.measure(ROLLOUT, step).means
            except NonFiniteLoss as error:
                raise NonFiniteLoss(f"no token can be drawn before step {step + 1}: {error}") from error
            for n, place in zip(part, job.places(), strict=True):
                answers[n].append(int(means[str(place)]))
        engine.pulse()
        going = [n for n in going if answers[n][-1] != job.end_token and len(answers[n]) < room[n]]
    return answers
