"""Language modelling on text: the job that training and evaluation run, with one term, `text`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from jobs.job import SampledJob
from pipeline.runtime.batch import IGNORED, Batch, Needs

TEXT = "text"


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy summed over the labels that count, in fp32; logits [batch, sequence, vocabulary]."""
    return functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def inputs_of(tokens: Tensor, end_token: int) -> Tensor:
    """The input ids [batch, sequence] of samples [batch, sequence + 1], in which what was forgotten is IGNORED."""
    inputs = tokens[:, :-1]
    return inputs.masked_fill(inputs == IGNORED, end_token).contiguous()


def document_positions(inputs: Tensor, end_token: int) -> Tensor:
    """[batch, sequence]: each document of `inputs` begins again at 0 after the end token before it. By this, attention
    keeps them apart."""
    places = torch.arange(inputs.shape[1]).expand_as(inputs)
    begins = torch.zeros_like(inputs)
    begins[:, 1:] = torch.where(inputs[:, :-1] == end_token, places[:, 1:], 0)
    return (places - begins.cummax(dim=1).values).contiguous()


@dataclass(frozen=True)
class TextJob(SampledJob):
    """Microbatches of `size` samples, read from `sample(global id) -> tokens [sequence + 1]`; a label of IGNORED counts
    for nothing, and as an input it is the `end_token`.

    `counted(id)` says how many labels of a sample count, where that is known without reading it. With `apart`, every
    span is given `position_ids`, so that no token sees another document of its sample.
    """

    sample: Callable[[int], np.ndarray]
    sequence_length: int
    counted: Callable[[int], int] | None = None
    end_token: int = 0
    apart: bool = False
    terms: Mapping[str, float] = field(default_factory=lambda: {TEXT: 1.0})

    def batch(self, step: int, microbatch: int, needs: Needs) -> Batch:
        """See pipeline.runtime.batch.Job."""
        ids = self.sample_ids(step, microbatch)
        tensors: dict[str, Tensor] = {}
        if needs or self.apart:
            tokens = torch.from_numpy(np.stack([self.sample(i) for i in ids]))  # [batch, sequence + 1]
            inputs = inputs_of(tokens, self.end_token)
            if self.apart:
                tensors["position_ids"] = document_positions(inputs, self.end_token)
            if Needs.INPUT in needs:
                tensors["input_ids"] = inputs
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
