"""Language modelling on rows: the job that learns answers to prompts, with the one term of jobs.text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from jobs.job import SampledJob
from jobs.row_data import Sample
from jobs.text import TEXT, token_loss
from pipeline.runtime.batch import IGNORED, Batch, Needs


@dataclass(frozen=True)
class RowJob(SampledJob):
    """Microbatches of `size` samples, read from `sample(global id)`; a label of IGNORED counts for nothing.

    With `packed`, every span is given `position_ids`, which keep the rows
    of a sample apart. `counted(id)` says how many labels of a sample count, where that is known without reading it;
    else each sample is read once for it.
    """

    sample: Callable[[int], Sample]
    sequence_length: int
    counted: Callable[[int], int] | None = None
    packed: bool = False
    terms: Mapping[str, float] = field(default_factory=lambda: {TEXT: 1.0})
    _counts: dict[int, int] = field(default_factory=dict, repr=False, compare=False)

    def batch(self, step: int, microbatch: int, needs: Needs) -> Batch:
        """See pipeline.runtime.batch.Job."""
        ids = self.sample_ids(step, microbatch)
        if not needs and not self.packed:
            return Batch(ids, {})
        samples = [self.sample(id) for id in ids]
        tensors: dict[str, Tensor] = {}
        if self.packed:
            tensors["position_ids"] = _stacked([_positions(sample) for sample in samples])
        if Needs.INPUT in needs:
            tensors["input_ids"] = _stacked([sample.input_ids for sample in samples])
        if Needs.LOSS in needs:
            tensors["labels"] = _stacked([sample.labels for sample in samples])
        return Batch(ids, tensors)

    def counts(self, step: int, microbatch: int) -> Mapping[str, int]:
        """See pipeline.runtime.batch.Job."""
        counted = self.counted or self._read
        return {TEXT: sum(counted(id) for id in self.sample_ids(step, microbatch))}

    def _read(self, id: int) -> int:
        if id not in self._counts:
            self._counts[id] = int((self.sample(id).labels != IGNORED).sum())
        return self._counts[id]

    def loss(self, logits: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """See pipeline.runtime.batch.Job."""
        return {TEXT: token_loss(logits, batch["labels"])}


def _positions(sample: Sample) -> np.ndarray:
    if sample.position_ids is None:
        raise ValueError("a packed job was given a sample without position_ids; allowed: samples of a packed dataset")
    return sample.position_ids


def _stacked(parts: list[np.ndarray]) -> Tensor:
    """[batch, sequence] int64."""
    return torch.from_numpy(np.stack(parts))
