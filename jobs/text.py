"""Language modelling on packed text: the job that training and evaluation run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from pipeline.runtime.batch import Batch

IGNORED = -100
"""The label that counts for nothing, as everywhere in transformers."""


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy summed over the labels that count, in fp32; logits [batch, sequence, vocabulary]."""
    return functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


@dataclass(frozen=True)
class TextJob:
    """Microbatches of `size` samples, read from `sample(global id) -> tokens [sequence + 1]`.

    Step s takes the samples from first_sample + (s - first_step) * microbatches * size on: the order is one sequence
    of global ids, whatever the number of workers. `limit` bounds the ids (an evaluation); the last microbatch is cut.
    """

    sample: Callable[[int], np.ndarray]
    sequence_length: int
    microbatches: int
    size: int
    first_step: int = 0
    first_sample: int = 0
    limit: int | None = None

    def sample_ids(self, step: int, microbatch: int) -> tuple[int, ...]:
        """The global ids of a microbatch's samples."""
        per_step = self.microbatches * self.size
        start = self.first_sample + (step - self.first_step) * per_step + microbatch * self.size
        end = start + self.size if self.limit is None else min(start + self.size, self.limit)
        return tuple(range(start, end))

    def next_sample(self, step: int) -> int:
        """The first sample id that steps before `step` did not take."""
        return self.first_sample + (step - self.first_step) * self.microbatches * self.size

    def batch(self, step: int, microbatch: int) -> Batch:
        """See pipeline.runtime.batch.Job."""
        ids = self.sample_ids(step, microbatch)
        tokens = torch.from_numpy(np.stack([self.sample(i) for i in ids]))
        return Batch(ids, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def tokens(self, step: int, microbatch: int) -> int:
        """See pipeline.runtime.batch.Job."""
        return len(self.sample_ids(step, microbatch)) * self.sequence_length

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """See pipeline.runtime.batch.Job."""
        return token_loss(logits, batch.labels)
