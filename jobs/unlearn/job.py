"""An unlearning request as a job of the engine: microbatches of the kinds of its method, and the method's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from jobs.job import SampledJob
from jobs.unlearn.material import Item, Material, stacked
from jobs.unlearn.method import PAIR, Method, Reads
from jobs.unlearn.reference import Reference
from pipeline.runtime.batch import Batch, Needs
from pipeline.wire import WireError, checked


class UnlearnJob:
    """The steps of a request. Microbatch m is of the kind m mod the number of kinds."""

    def __init__(
        self, method: Method, material: Material, reference: Reference, microbatches: int, size: int,
        first_step: int = 0, first_sample: int = 0,
    ) -> None:  # fmt: skip
        self.method, self.material, self.reference = method, material, reference
        self.ids = SampledJob(microbatches=microbatches, size=size, first_step=first_step, first_sample=first_sample)
        self.microbatches, self.size, self.limit = microbatches, size, None
        self.state: Mapping[str, float] = method.start()

    @property
    def terms(self) -> Mapping[str, float]:
        """See pipeline.runtime.batch.Job."""
        return self.method.terms(self.state)

    def next_sample(self, step: int) -> int:
        """See RunJob."""
        return self.ids.next_sample(step)

    def kind(self, microbatch: int) -> str:
        """What a microbatch is of."""
        return self.method.kinds[microbatch % len(self.method.kinds)]

    def items(self, step: int, microbatch: int) -> list[Item]:
        """The rows of a microbatch."""
        kinds, kind = len(self.method.kinds), self.kind(microbatch)
        size = self.size // 2 if kind == PAIR else self.size
        before = step * (self.microbatches // kinds) + microbatch // kinds
        return self.material.items(kind, before * size, self.size)

    def batch(self, step: int, microbatch: int, needs: Needs) -> Batch:
        """See pipeline.runtime.batch.Job."""
        kind, tensors = self.kind(microbatch), dict[str, Tensor]()
        if needs:
            items = self.items(step, microbatch)
            tensors = stacked(self.material, items, needs)
            if Needs.LOSS in needs and (reads := self.method.reads(kind)) is not Reads.NOTHING:
                tensors["before"] = self.reference.read(items, reads, tensors["labels"])
        return Batch(self.ids.sample_ids(step, microbatch), tensors, kind)

    def counts(self, step: int, microbatch: int) -> Mapping[str, int]:
        """See pipeline.runtime.batch.Job."""
        labels = stacked(self.material, self.items(step, microbatch), Needs.LOSS)["labels"]
        return self.method.counts(self.kind(microbatch), labels)

    def loss(self, logits: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """See pipeline.runtime.batch.Job."""
        return self.method.loss(batch.kind, logits, batch["labels"], batch.get("before"))

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
