"""The rows of one kind under labels that are drawn from the model's own distribution: what its curvature is fitted on.

Each label is drawn by a number that is keyed by (seed, step, sample) alone, so it depends neither on who computes the
row nor on how rows are dealt to microbatches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jobs.unlearn.method import cross_entropy, tokens
from pipeline.model.rng import derive
from pipeline.runtime.batch import IGNORED, Batch, Needs

if TYPE_CHECKING:
    from jobs.unlearn.job import UnlearnJob

SAMPLED = "sampled"


class SampledLabels:
    """A step of a job as a FitJob: microbatches of other kinds count for nothing, and the terms of the job are told of
    beside the sampled one, with no weight."""

    sampled = SAMPLED

    def __init__(self, job: UnlearnJob, kind: str, step: int, seed: int) -> None:
        self._job, self._kind, self._step, self._seed = job, kind, step, seed

    @property
    def terms(self) -> Mapping[str, float]:
        """See pipeline.runtime.batch.Job."""
        return {**dict.fromkeys(self._job.terms, 0.0), SAMPLED: 1.0}

    def batch(self, step: int, microbatch: int, needs: Needs) -> Batch:
        """See pipeline.runtime.batch.Job."""
        return self._job.batch(step, microbatch, needs)

    def counts(self, step: int, microbatch: int) -> Mapping[str, int]:
        """See pipeline.runtime.batch.Job."""
        counts = self._job.counts(step, microbatch)
        if self._job.rows(step, microbatch)[0] != self._kind:
            return counts
        return {**counts, SAMPLED: tokens(self._job.labels(step, microbatch))}

    def loss(self, logits: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """See pipeline.runtime.batch.Job."""
        told = {term: value.detach() for term, value in self._job.loss(logits, batch).items()}
        labels = batch["labels"]
        return {**told, SAMPLED: cross_entropy(logits, drawn(logits, labels, batch.sample_ids, self._seed, self._step))}

    def positions(self, step: int, microbatch: int) -> Tensor:
        """Those of a row up to its last label: what comes after it, padding, is seen by no label."""
        kind, labels = self._job.rows(step, microbatch)[0], self._job.labels(step, microbatch)
        if kind != self._kind:
            return torch.zeros_like(labels, dtype=torch.bool)
        return (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0


@torch.no_grad()
def drawn(logits: Tensor, labels: Tensor, sample_ids: tuple[int, ...], seed: int, step: int) -> Tensor:
    """Labels [batch, sequence] drawn from softmax(logits) [batch, sequence, vocabulary], where `labels` count."""
    where = labels != IGNORED
    chances = [
        torch.rand(labels.shape[1], generator=torch.Generator().manual_seed(derive(seed, SAMPLED, step, sample)))
        for sample in sample_ids
    ]
    chance = torch.stack(chances).to(logits.device)[where].double()
    upto = torch.softmax(logits[where].double(), dim=-1).cumsum(dim=-1)
    found = torch.full_like(labels, IGNORED)
    least = torch.searchsorted(upto, (chance * upto[:, -1])[:, None])[:, 0]
    found[where] = least.clamp(max=logits.shape[-1] - 1)
    return found
