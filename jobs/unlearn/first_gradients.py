"""The gradients of some rows in the steps of a run, kept as they come while the run is run again.

    gradients/step-00000003/0.safetensors      what the rows' part of the gradient of state 0 was in step 3

Each step is a procedure (pipeline/runtime/procedure.py) which asks for the gradient of all its labels, takes it, and
asks for the part of the rows that are looked for. Their labels are those that a copy of the data, in which they are
erased, has no more. A step that is run again writes the same again.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from jobs.config import TrainConfig
from jobs.data import Dataset
from jobs.job import RunJob
from jobs.mixture import Mixture
from jobs.plan import open_dataset
from jobs.row_data import RowDataset, Sample
from jobs.row_job import RowJob
from jobs.text import TEXT, TextJob, token_loss
from jobs.unlearn.weights import rewrite
from pipeline.runtime.batch import IGNORED, Batch, Needs
from pipeline.runtime.procedure import Oracle, Procedure, Vector
from pipeline.schedule.layout import TRAIN
from pipeline.settings import of_kind

ROWS = "rows"
"""The term of what is looked for."""


@dataclass(frozen=True)
class FirstGradientsConfig(TrainConfig):
    """A run that is run again to look for the gradients of some rows."""

    job: ClassVar[str] = "first_gradients"

    erased: Path = Path()
    """A copy of the run's data without the rows."""
    gradients: Path = Path()
    """Where what is found is kept."""
    wanted: str = "*"
    """Shell patterns of the names of the parameters, separated by commas."""

    @classmethod
    def of(cls, config: TrainConfig, erased: Path, gradients: Path, wanted: str) -> FirstGradientsConfig:
        """That of a run."""
        return of_kind(cls, config, erased=erased, gradients=gradients, wanted=wanted)

    @property
    def is_procedure(self) -> bool:
        """See TrainConfig."""
        return True


class FirstGradientsJob:
    """The training `job` of a run, and beside its term that of the rows which are in `data` and not in `erased`, where
    they come for the first time."""

    def __init__(
        self, job: RowJob | TextJob, data: Dataset | RowDataset, erased: Dataset | RowDataset, folder: Path, wanted: str
    ) -> None:
        self.job, self.data, self.erased, self.folder, self.wanted = job, data, erased, folder, wanted
        self.microbatches, self.size, self.limit = job.microbatches, job.size, job.limit
        self.terms: Mapping[str, float] = {TEXT: 1.0, ROWS: 0.0}
        self.carried: dict[str, Any] = {}

    def _labels(self, id: int) -> np.ndarray:
        """What is looked for in a sample: its labels that are erased, IGNORED elsewhere."""
        had, has = _sample(self.data, id), _sample(self.erased, id)
        gone = (had.labels != IGNORED) & (has.labels == IGNORED) & (id < self.data.num_train)
        return np.where(gone, had.labels, IGNORED)

    def _looked_for(self, step: int, microbatch: int) -> Tensor:
        return torch.from_numpy(np.stack([self._labels(id) for id in self.job.sample_ids(step, microbatch)]))

    def next_sample(self, step: int) -> int:
        """See RunJob."""
        return self.job.next_sample(step)

    def sources(self, step: int) -> dict[str, int]:
        """See RunJob."""
        return {}

    def batch(self, step: int, microbatch: int, needs: Needs) -> Batch:
        """See pipeline.runtime.batch.Job."""
        found = self.job.batch(step, microbatch, needs)
        if Needs.LOSS not in needs:
            return found
        return Batch(found.sample_ids, {**found.tensors, ROWS: self._looked_for(step, microbatch)}, found.kind)

    def counts(self, step: int, microbatch: int) -> Mapping[str, int]:
        """See pipeline.runtime.batch.Job. What is looked for is there or not, and counts for nothing by itself."""
        there = bool((self._looked_for(step, microbatch) != IGNORED).any())
        return {**self.job.counts(step, microbatch), **({ROWS: 0} if there else {})}

    def loss(self, logits: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """See pipeline.runtime.batch.Job."""
        found, labels = dict(self.job.loss(logits, batch)), batch[ROWS]
        return {**found, ROWS: token_loss(logits, labels)} if bool((labels != IGNORED).any()) else found

    @property
    def procedure(self) -> Procedure:
        """See RunJob."""
        return self.direction

    def direction(self, oracle: Oracle) -> Vector:
        """The step as it was; the rows' part of its gradient is written."""
        counts = [self.counts(oracle.step, m) for m in range(self.microbatches)]
        whole = oracle.gradient({TEXT: 1.0})
        if any(ROWS in each for each in counts):
            part = oracle.gradient({ROWS: 1 / sum(each[TEXT] for each in counts)})
            oracle.keep(part, self.folder / f"step-{oracle.step + 1:08d}", self._wanted)
        return whole

    def _wanted(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.wanted.split(","))

    def fitting(self, kind: str, step: int) -> Any:
        """See RunJob."""
        raise NotImplementedError

    def prepare(self, engine: Any, step: int) -> None:
        """See RunJob."""

    def committed(self, step: int, means: Mapping[str, float]) -> None:
        """See RunJob."""

    def restore(self, carried: Mapping[str, Any]) -> None:
        """See RunJob."""


def _sample(dataset: Dataset | RowDataset, id: int) -> Sample:
    found = dataset.train_sample(id)
    if isinstance(found, Sample):
        return found
    return Sample(found[:-1], found[1:], None)


def first_gradients_jobs(config: FirstGradientsConfig, jobs: dict[str, RunJob]) -> dict[str, RunJob]:
    """`jobs` of the run with another TRAIN."""
    train = jobs[TRAIN]
    assert isinstance(train, RowJob | TextJob)
    erased = RowDataset.open(config.erased) if isinstance(train, RowJob) else Dataset.open(config.erased)
    data = open_dataset(config.out)
    assert not isinstance(data, Mixture)  # of which nothing can be forgotten
    job = FirstGradientsJob(train, data, erased, config.gradients, config.wanted)
    return {**jobs, TRAIN: job}


def take_back_gradients(start: Path, gradients: Path, eta: float, tokenizer: Path, into: Path) -> None:
    """Write the model in `start` with eta times the sum of all gradients added. Raises ModelError."""
    sums: dict[str, Tensor] = {}
    for file in sorted(gradients.glob("step-*/*.safetensors")):
        for name, tensor in load_file(file).items():
            sums[name] = sums[name] + tensor if name in sums else tensor.clone()

    def taken_back(now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor + eta * sums[name] if name in sums else tensor for name, tensor in now.items()}

    rewrite(start, into, tokenizer, taken_back)
