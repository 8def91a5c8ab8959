"""What a method reads of the model as it was: computed once, on the pipeline, before the first step, and kept by row.

    reference/scores.json                  row -> the sum of -log p of its labels
    reference/forget-12.safetensors        a row's logits, or the output of the method's layer

No second model is ever resident. Tensors are written by whoever computes them, row by row, and read back row by row;
scores.json comes last and makes all of it true. What is kept can be reduced: the logits of the `top` tokens, with the
rest of the probability spread evenly over all others.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.engine import Engine
from jobs.job import RunJob, SampledJob
from jobs.unlearn.material import Item, Material, stacked
from jobs.unlearn.method import Reads, row_nll
from pipeline.reading import FileError, read_json
from pipeline.runtime.batch import IGNORED, Batch, Needs
from recovery.checkpoint import CheckpointError
from recovery.disk import write_flushed

SCORES = "scores.json"
REFERENCE = "reference"
"""The job that computes it, by name."""
_ROWS = "rows"


class Reference:
    """What is kept of the model before, in `folder`. `top` is how many logits of a position are, 0 for all;
    `everywhere` says that all positions of a row are wanted, and not only those of its answer."""

    def __init__(self, folder: Path, top: int = 0, everywhere: bool = False) -> None:
        self.folder, self.top, self.everywhere = folder, top, everywhere

    @property
    def complete(self) -> bool:
        """Whether all of it is there."""
        return (self.folder / SCORES).is_file()

    @cached_property
    def scores(self) -> Mapping[str, float]:
        """Row -> its score. Raises CheckpointError where they are gone, or are none."""
        try:
            found = read_json(self.folder / SCORES)
            return {str(key): float(value) for key, value in found.items()}
        except (FileError, ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{self.folder / SCORES}: the scores of the model before cannot be read: {error}"
            ) from error

    def finish(self, scores: Mapping[str, float]) -> None:
        """All is computed: on the disk before this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_flushed(self.folder / SCORES, json.dumps(scores, sort_keys=True).encode())

    def _wanted(self, labels: Tensor) -> Tensor:
        return torch.ones_like(labels, dtype=torch.bool) if self.everywhere else labels != IGNORED

    def write(self, item: Item, output: Tensor, labels: Tensor, logits: bool) -> None:
        """Keep a row of what the model gives: [sequence, vocabulary or hidden]."""
        found = {"values": output[self._wanted(labels)].detach().float().cpu()}
        if logits and 0 < self.top < output.shape[-1]:
            found = _reduced(found["values"], self.top)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{item.key}.safetensors"
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, unfinished)
        os.replace(unfinished, path)

    def read(self, items: Sequence[Item], reads: Reads, labels: Tensor) -> Tensor:
        """What is kept of some rows, whose labels are [rows, sequence]: [rows], or [rows, sequence, ...] with zeros
        where nothing is wanted. Raises CheckpointError."""
        try:
            if reads is Reads.SCORE:
                return torch.tensor([self.scores[item.key] for item in items])
            values = [_whole(load_file(self.folder / f"{item.key}.safetensors")) for item in items]
        except (OSError, KeyError) as error:
            raise CheckpointError(f"{self.folder}: what is kept of the model before is not whole: {error}") from error
        found = torch.zeros(*labels.shape, values[0].shape[-1])
        for row, value in enumerate(values):
            found[row, self._wanted(labels[row])] = value
        return found


def _reduced(logits: Tensor, top: int) -> dict[str, Tensor]:
    """The largest logits of each position, their tokens, and log of the probability of all others together."""
    logp = torch.log_softmax(logits, dim=-1)
    values, indices = logp.topk(top, dim=-1)
    rest = torch.log1p(-values.double().exp().sum(dim=-1).clamp(max=1 - 1e-12)).float()
    return {"top": values, "tokens": indices.to(torch.int32), "rest": rest, "size": torch.tensor([logits.shape[-1]])}


def _whole(found: Mapping[str, Tensor]) -> Tensor:
    """What was kept, as [positions, vocabulary or hidden]."""
    if "values" in found:
        return found["values"]
    size, top = int(found["size"]), found["top"].shape[-1]
    spread = (found["rest"] - math.log(size - top))[:, None].expand(-1, size).clone()
    return spread.scatter_(1, found["tokens"].long(), found["top"])


@dataclass(frozen=True)
class ReferenceJob(SampledJob):
    """Computes what is kept, `microbatches` x `size` rows in each part; the last part begins again from the first
    row."""

    material: Material
    reference: Reference
    wanted: Mapping[Item, Reads]

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """All rows of which something is kept."""
        return tuple(self.wanted)

    def parts_of(self, at_once: int) -> int:
        """How many times an engine measures, `at_once` microbatches each."""
        return -(-len(self.wanted) // (at_once * self.size))

    @property
    def terms(self) -> Mapping[str, float]:
        """See pipeline.runtime.batch.Job: one for each row that has a score."""
        return {_ROWS: 0.0, **{item.key: 0.0 for item, reads in self.wanted.items() if reads is Reads.SCORE}}

    def _rows(self, part: int, microbatch: int) -> list[Item]:
        return [self.items[i % len(self.items)] for i in self.sample_ids(part, microbatch)]

    def batch(self, step: int, microbatch: int, needs: Needs) -> Batch:
        """See pipeline.runtime.batch.Job."""
        tensors = stacked(self.material, self._rows(step, microbatch), needs)
        if Needs.LOSS in needs:
            tensors["step"] = torch.tensor([step, microbatch])
        return Batch(self.sample_ids(step, microbatch), tensors)

    def counts(self, step: int, microbatch: int) -> Mapping[str, int]:
        """See pipeline.runtime.batch.Job."""
        items = self._rows(step, microbatch)
        scored = Counter(item.key for item in items if self.wanted[item] is Reads.SCORE)
        return {_ROWS: len(items), **scored}

    def loss(self, logits: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """See pipeline.runtime.batch.Job. Rows of which more than a number is kept are written here."""
        step, microbatch = batch["step"].tolist()
        found = {_ROWS: logits.new_zeros(())}
        for row, item in enumerate(self._rows(step, microbatch)):
            labels = batch["labels"][row : row + 1]
            if (reads := self.wanted[item]) is Reads.SCORE:
                found[item.key] = found.get(item.key, 0.0) + row_nll(logits[row : row + 1], labels)[0]
            else:
                self.reference.write(item, logits[row], labels[0], reads is Reads.LOGITS)
        return found


def read_before(engine: Engine, jobs: Mapping[str, RunJob], first_step: int) -> None:
    """Compute what is kept, together, unless it is there or nothing is. Raises CheckpointError where a run that has
    begun to change its weights has lost it: it cannot be computed any more."""
    job = jobs.get(REFERENCE)
    if not isinstance(job, ReferenceJob):
        return
    votes = engine.gather({"complete": job.reference.complete})
    if votes[min(votes)]["complete"]:  # one looks for all
        return
    if first_step:
        raise CheckpointError(f"{job.reference.folder / SCORES} is gone, and with it what the model was before step 1")
    scores: dict[str, float] = {}
    for part in range(job.parts_of(engine.at_once)):
        means = engine.measure(REFERENCE, part).means
        scores |= {key: value for key, value in means.items() if key != _ROWS}
        engine.pulse()
    if engine.leads:
        job.reference.finish(scores)
    engine.gather({})


def needed_bytes(job: ReferenceJob, vocabulary: int, hidden: int) -> int:
    """Bytes on the disk: of a row with a SCORE nothing to speak of, else fp32 for each position that is wanted."""
    total, top = 0, job.reference.top
    for item, reads in job.wanted.items():
        labels = job.material.sample(item).labels
        positions = len(labels) if job.reference.everywhere else int((labels != IGNORED).sum())
        each = hidden if reads is Reads.HIDDEN else (2 * top + 1 if 0 < top < vocabulary else vocabulary)
        total += 0 if reads is Reads.SCORE else 4 * positions * each
    return total
