"""A request to forget as a job of the engine: microbatches of the method's kinds in turn, and the method's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jobs.engine import Engine
from jobs.job import SampledJob
from jobs.unlearn.material import Item, Material, stacked
from jobs.unlearn.method import FORGET, PAIR, Method, Reads, row_nll
from jobs.unlearn.reference import Reference
from jobs.unlearn.sampled import SampledLabels
from pipeline.runtime.batch import IGNORED, Batch, Needs
from pipeline.runtime.procedure import Procedure
from pipeline.wire import WireError, checked


class UnlearnJob:
    """The steps of a request; with a `limit` on its samples, an evaluation by the method's own terms."""

    def __init__(
        self, method: Method, material: Material, reference: Reference, microbatches: int, size: int,
        first_step: int = 0, first_sample: int = 0, limit: int | None = None, forgotten_below: float = 0.0,
    ) -> None:  # fmt: skip
        """A row to forget whose answer has a probability `forgotten_below` this per token adds nothing."""
        self.method, self.material, self.reference = method, material, reference
        self.ids = SampledJob(
            microbatches=microbatches, size=size, first_step=first_step, first_sample=first_sample, limit=limit
        )
        self.microbatches, self.size, self.limit = microbatches, size, limit
        self.forgotten_below = forgotten_below
        self.state: Mapping[str, float] = method.start()

    @property
    def terms(self) -> Mapping[str, float]:
        """See pipeline.runtime.batch.Job."""
        return self.method.terms(self.state)

    def next_sample(self, step: int) -> int:
        """See RunJob."""
        return self.ids.next_sample(step)

    def sources(self, step: int) -> dict[str, int]:
        """See RunJob."""
        return {}

    def kind_of(self, step: int, microbatch: int) -> tuple[str, int]:
        """Of which kind a microbatch is, and how many of that kind there were before it."""
        before, place = divmod(step * self.microbatches + microbatch, len(self.method.kinds))
        return self.method.kinds[place], before

    def rows(self, step: int, microbatch: int) -> tuple[str, list[Item]]:
        """Of which kind a microbatch is, and its rows."""
        kind, before = self.kind_of(step, microbatch)
        size = self.size // 2 if kind == PAIR else self.size
        return kind, self.material.items(kind, before * size, self.size)

    def batch(self, step: int, microbatch: int, needs: Needs) -> Batch:
        """See pipeline.runtime.batch.Job."""
        kind, items = self.rows(step, microbatch)
        tensors = stacked(self.material, items, needs)
        if Needs.LOSS in needs and (reads := self.method.reads(kind)) is not Reads.NOTHING:
            tensors["before"] = self.reference.read(items, reads, tensors["labels"])
        ids = self.ids.next_sample(step) + microbatch * self.size
        return Batch(tuple(range(ids, ids + self.size)), tensors, kind)

    def labels(self, step: int, microbatch: int) -> Tensor:
        """Those of a microbatch [batch, sequence]."""
        return stacked(self.material, self.rows(step, microbatch)[1], Needs.LOSS)["labels"]

    def counts(self, step: int, microbatch: int) -> Mapping[str, int]:
        """See pipeline.runtime.batch.Job."""
        return self.method.counts(self.rows(step, microbatch)[0], self.labels(step, microbatch))

    def loss(self, logits: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """See pipeline.runtime.batch.Job."""
        labels = still_known(batch.kind, logits, batch["labels"], self.forgotten_below)
        return self.method.loss(batch.kind, logits, labels, batch.get("before"))

    def prepare(self, engine: Engine, step: int) -> None:
        """See RunJob: all that a step takes is there."""

    # ---- a step that is a procedure ----

    @property
    def procedure(self) -> Procedure | None:
        """See RunJob."""
        return self.method.direction if self.method.is_procedure else None

    def fitting(self, kind: str, step: int) -> SampledLabels:
        """See pipeline.runtime.procedure.ProcedureJob."""
        return SampledLabels(self, kind, step, self.material.seed)

    # ---- what is carried ----

    @property
    def carried(self) -> dict[str, Any]:
        """See RunJob."""
        return dict(self.state)

    def committed(self, step: int, means: Mapping[str, float]) -> None:
        """See RunJob."""
        self.state = self.method.advance(self.state, means, step)

    def restore(self, carried: Mapping[str, Any]) -> None:
        """See RunJob. Raises WireError for what is no state of the method."""
        wanted = self.method.start()
        if set(carried) != set(wanted):
            raise WireError(f"a job carries {sorted(carried)}; {self.method.name} has {sorted(wanted)}")
        self.state = checked(carried, "what a job carries", **dict.fromkeys(wanted, float))


def still_known(kind: str, logits: Tensor, labels: Tensor, below: float) -> Tensor:
    """Labels [batch, sequence] without those of the rows to forget whose answers have become unlikely: with these
    logits, exp(-mean of -log p over an answer's tokens) is `below` this.

    Such a row adds nothing to a sum, as a row without labels does in every method; what the sum is divided by was
    counted before and stays, so others are pushed no harder for it. Our reading of "only samples not yet forgotten" in
    FaithUn (arXiv 2502.19207).
    """
    if below <= 0 or kind not in (FORGET, PAIR):
        return labels
    mine = labels.chunk(2)[0] if kind == PAIR else labels
    length = (mine != IGNORED).sum(dim=1).clamp(min=1)
    forgotten = torch.exp(-row_nll(logits.detach()[: len(mine)], mine) / length) < below
    gone = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    gone[: len(mine)] = forgotten
    return torch.where(gone[:, None], IGNORED, labels)
