"""Rows of random tokens, the cases of methods that are tried on them, and their jobs: the same in every process.

A method of the registry is a case by itself. One that needs options has a line in OPTIONS, another way to use it one in
MORE, and one that is no sum of terms over microbatches is listed in APART, with what tests it instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import LlamaConfig

from jobs.config import TrainConfig
from jobs.job import RunJob
from jobs.row_data import Sample
from jobs.unlearn.job import UnlearnJob
from jobs.unlearn.jobs import wanted_of
from jobs.unlearn.material import Material
from jobs.unlearn.method import ANCHOR, POISON, TRACE, Method, State
from jobs.unlearn.reference import REFERENCE, Reference, ReferenceJob
from jobs.unlearn.registry import METHODS, make_method
from pipeline.runtime.batch import IGNORED, Batch, Needs
from pipeline.schedule.layout import TRAIN

VOCABULARY, LENGTH, MICROBATCHES, SIZE = 64, 12, 4, 4
STEP = 1
"""The step that is compared: not the first, so that an order which starts again at each step is seen."""
LAYER = 2
"""Where hidden states are read: three of the five blocks, so that four workers have a layer each."""
SHAPE = LlamaConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=5, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=VOCABULARY, max_position_embeddings=32, tie_word_embeddings=True, initializer_range=0.2,
)  # fmt: skip
"""Its weights are large for a first draw: what it says is neither even nor certain."""


@dataclass(frozen=True)
class Case:
    """A method with options; `top` is that of --reference-top."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    top: int = 0

    def make(self) -> Method:
        return make_method(self.method, self.options)


OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "rmu": {"layer": LAYER}, "r2mu": {"layer": LAYER}, "pdu": {"dual_warmup": 0}, "undial": {"alpha": 0.5},
    "simnpo": {"beta": 0.5, "gamma": 1.0}, "satimp": {"saturation_power": 0.25, "gamma": 1.0},
    "wga": {"weight_power": 0.25},
}  # fmt: skip
"""What every term needs to have a gradient that counts: the defaults suit a model that knows what it is to forget."""
MORE = {
    "kl_min, all positions": Case("kl_min", {"positions": "all"}),
    "kl_min, top 8": Case("kl_min", top=8),
    "undial, top 8": Case("undial", OPTIONS["undial"], top=8),
    "roka, top 8": Case("roka", top=8),
    "rmu, all positions, top 8": Case("rmu", {"layer": LAYER, "positions": "all"}, top=8),
}
APART = ("replay", "s3t", "first_epoch", "grpo", "ofmu", "kfade")
"""They take no steps of their own (test_replay.py, test_s3t.py), make their rows as they go
(test_rollout.py), or take more than a gradient (test_procedure.py)."""

CASES: Mapping[str, Case] = {
    name: Case(name, OPTIONS.get(name, {}))
    for name in sorted({method.name for method in METHODS.values()}.difference(APART))
} | MORE
DEEP = tuple(name for name, case in CASES.items() if case.make().depth is not None)
"""The model ends at their layer."""
WHOLE = tuple(name for name in CASES if name not in DEEP)


class RandomRows:
    """Row i, of `kind`: some prompt, some answer, padding. Those in `blank` are rows that are forgotten already."""

    def __init__(self, kind: int, blank: Sequence[int] = ()) -> None:
        self.kind, self.blank = kind, blank

    def row(self, index: int, /) -> Sample:
        chance = np.random.default_rng([self.kind, index])
        ids = chance.integers(1, VOCABULARY, LENGTH + 1)
        start, end = int(chance.integers(1, 5)), int(chance.integers(7, LENGTH + 1))
        labels = np.full(LENGTH, IGNORED, dtype=np.int64)
        if index not in self.blank:
            labels[start:end] = ids[1:][start:end]
        return Sample(ids[:-1].astype(np.int64), labels, None)


def material(blank: Sequence[int] = (6, 23)) -> Material:
    return Material(
        RandomRows(0, blank), range(7), range(7, 24), 3, [[5, 9, 2], [7, 2]],
        {TRACE: (RandomRows(1), 5), ANCHOR: (RandomRows(2), 5), POISON: (RandomRows(3), 6)},
    )  # fmt: skip


def reference(name: str, folder: Path) -> Reference:
    case = CASES.get(name, Case(name))
    return Reference(folder / name, case.top, everywhere=getattr(case.make(), "positions", "answer") == "all")


def job(name: str, folder: Path, blank: Sequence[int] = (6, 23)) -> UnlearnJob:
    return UnlearnJob(CASES[name].make(), material(blank), reference(name, folder), MICROBATCHES, SIZE)


MEAN = 0.25
"""What every term is said to have come to in the step before: a method may weigh its terms by it."""


def after_first(method: Method) -> State:
    """What a method carries at STEP."""
    return method.advance(method.start(), dict.fromkeys(method.terms(method.start()), MEAN), 0)


def later_job(name: str, folder: Path) -> UnlearnJob:
    """The job at STEP."""
    found = job(name, folder)
    found.committed(0, dict.fromkeys(found.terms, MEAN))
    return found


def reading(name: str, folder: Path, at_once: int) -> dict[str, RunJob]:
    """What reads of the model before, as `unlearn_jobs` has it: nothing where nothing is read."""
    rows = material()
    if not (wanted := wanted_of(CASES[name].make(), rows)):
        return {}
    return {
        REFERENCE: ReferenceJob(
            microbatches=at_once, size=SIZE, material=rows, reference=reference(name, folder), wanted=wanted
        )
    }


# ---- in a pool, whose workers know their jobs from the start ----

DATA = "unlearn:"
"""Names of cases follow it, in what settings call `data`."""


def names_in(data: str) -> tuple[str, ...]:
    return tuple(data.removeprefix(DATA).split(";"))


class InTurn:
    """Step n is STEP of case n."""

    def __init__(self, jobs: Sequence[UnlearnJob]) -> None:
        self.jobs, self.now = jobs, 0

    @property
    def terms(self) -> Mapping[str, float]:
        return self.jobs[self.now].terms

    def batch(self, step: int, microbatch: int, needs: Needs) -> Batch:
        self.now = step
        return self.jobs[step].batch(STEP, microbatch, needs)

    def counts(self, step: int, microbatch: int) -> Mapping[str, int]:
        self.now = step
        return self.jobs[step].counts(STEP, microbatch)

    def loss(self, logits: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        return self.jobs[self.now].loss(logits, batch)


def pool_jobs(config: TrainConfig, *_: Any, make: Callable[[str, Path], UnlearnJob] = job) -> dict[str, Any]:
    """TRAIN, and for each case what reads, by both names. A pool's workers are not told what has been committed."""
    names, folder = names_in(str(config.data)), config.out / "read"
    found: dict[str, Any] = {TRAIN: InTurn([make(name, folder) for name in names])}
    for name in names:
        found |= {f"{kind} {name}": each for kind, each in reading(name, folder, config.microbatches).items()}
    return found


# ---- answers of the model ----


def prompts() -> list[list[int]]:
    """Of several lengths, two of which leave no room for an answer."""
    chance = np.random.default_rng(11)
    return [
        chance.integers(2, VOCABULARY, size).tolist() for size in (3, 9, 5, 12, 1, 2, LENGTH + 1, 4, 7, LENGTH + 2, 6)
    ]
