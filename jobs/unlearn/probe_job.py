"""An evaluation of rows inside a request: how probable the answers are that are to be forgotten, and the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.job import SampledJob
from jobs.unlearn.material import Item, Material, stacked
from jobs.unlearn.method import FORGET, RETAIN, row_nll, rows, tokens
from pipeline.runtime.batch import IGNORED, Batch, Needs


def probability(kind: str) -> str:
    """The term of a kind that is a probability: exp(-mean of -log p over an answer's tokens), averaged over rows."""
    return f"{kind}_probability"


@dataclass(frozen=True)
class ProbeJob(SampledJob):
    """Rows of FORGET and RETAIN. What is told as its loss is that of the rows that are kept."""

    material: Material
    items: Sequence[Item]

    @property
    def terms(self) -> Mapping[str, float]:
        """See pipeline.runtime.batch.Job."""
        return {RETAIN: 1.0, FORGET: 0.0, probability(RETAIN): 0.0, probability(FORGET): 0.0}

    def _rows(self, step: int, microbatch: int) -> list[Item]:
        return [self.items[i] for i in self.sample_ids(step, microbatch)]

    def batch(self, step: int, microbatch: int, needs: Needs) -> Batch:
        """See pipeline.runtime.batch.Job."""
        items = self._rows(step, microbatch)
        tensors = stacked(self.material, items, needs)
        if Needs.LOSS in needs:
            tensors["forget"] = torch.tensor([item.source == FORGET for item in items])
        return Batch(self.sample_ids(step, microbatch), tensors)

    def counts(self, step: int, microbatch: int) -> Mapping[str, int]:
        """See pipeline.runtime.batch.Job."""
        if not (items := self._rows(step, microbatch)):  # the last part of an evaluation may have fewer
            return {}
        labels, found = stacked(self.material, items, Needs.LOSS)["labels"], dict[str, int]()
        for kind in (RETAIN, FORGET):
            mine = labels[torch.tensor([item.source == kind for item in items])]
            if tokens(mine):
                found |= {kind: tokens(mine), probability(kind): rows(mine)}
        return found

    def loss(self, logits: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """See pipeline.runtime.batch.Job."""
        labels, found = batch["labels"], dict[str, Tensor]()
        nll, length = row_nll(logits, labels), (labels != IGNORED).sum(dim=1)
        sure = torch.where(length > 0, torch.exp(-nll / length.clamp(min=1)), 0.0)
        for kind, mine in ((RETAIN, ~batch["forget"]), (FORGET, batch["forget"])):
            if tokens(labels[mine]):
                found |= {kind: nll[mine].sum(), probability(kind): sure[mine].sum()}
        return found
