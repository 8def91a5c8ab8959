"""Language modelling on text: the job that training and evaluation run, with one term, `text`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from pipeline.runtime.batch import IGNORED, Batch, Needs

TEXT = "text"


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy summed over the labels that count, in fp32; logits [batch, sequence, vocabulary]."""
    return functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


@dataclass(frozen=True)
class TextJob:
    """Microbatches of `size` samples, read from `sample(global id) -> tokens [sequence + 1]`; a label of IGNORED counts
    for nothing.

    Step s takes the samples from first_sample + (s - first_step) * microbatches * size on: the order is one sequence
    of global ids, whatever the number of workers. `limit` bounds the ids (an evaluation); the last microbatch is cut.
    `counted(id)` says how many labels of a sample count, where that is known without reading it: of packed text, all.
    """

    sample: Callable[[int], np.ndarray]
    sequence_length: int
    microbatches: int
    size: int
    first_step: int = 0
    first_sample: int = 0
    limit: int | None = None
    counted: Callable[[int], int] | None = None
    terms: Mapping[str, float] = field(default_factory=lambda: {TEXT: 1.0})

    def sample_ids(self, step: int, microbatch: int) -> tuple[int, ...]:
        """The global ids of a microbatch's samples."""
        per_step = self.microbatches * self.size
        start = self.first_sample + (step - self.first_step) * per_step + microbatch * self.size
        end = start + self.size if self.limit is None else min(start + self.size, self.limit)
        return tuple(range(start, end))

    def next_sample(self, step: int) -> int:
        """The first sample id that steps before `step` did not take."""
        return self.first_sample + (step - self.first_step) * self.microbatches * self.size

    def batch(self, step: int, microbatch: int, needs: Needs) -> Batch:
        """See pipeline.runtime.batch.Job."""
        ids = self.sample_ids(step, microbatch)
        tensors: dict[str, Tensor] = {}
        if needs:
            tokens = torch.from_numpy(np.stack([self.sample(i) for i in ids]))  # [batch, sequence + 1]
            if Needs.INPUT in needs:
                tensors["input_ids"] = tokens[:, :-1].contiguous()
            if Needs.LOSS in needs:
                tensors["labels"] = tokens[:, 1:].contiguous()
        return Batch(ids, tensors)

    def counts(self, step: int, microbatch: int) -> Mapping[str, int]:
        """See pipeline.runtime.batch.Job."""
        counted = self.counted or self._read
        return {TEXT: sum(counted(i) for i in self.sample_ids(step, microbatch))}

    def _read(self, id: int) -> int:
        return int((self.sample(id)[1:] != IGNORED).sum())

    def loss(self, logits: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """See pipeline.runtime.batch.Job."""
        return {TEXT: token_loss(logits, batch["labels"])}
