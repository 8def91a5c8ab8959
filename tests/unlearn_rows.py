"""Rows of random tokens, and the jobs of every method over them: the same in workers and in one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jobs.row_data import Sample
from jobs.unlearn.job import UnlearnJob
from jobs.unlearn.jobs import wanted_of
from jobs.unlearn.material import Material
from jobs.unlearn.method import ANCHOR, TRACE, Method
from jobs.unlearn.methods.grpo import GRPO
from jobs.unlearn.on_policy import OnPolicyJob
from jobs.unlearn.reference import Reference, ReferenceJob
from jobs.unlearn.registry import METHODS, make_method
from jobs.unlearn.rollout import RolloutJob
from pipeline.runtime.batch import IGNORED

VOCABULARY, LENGTH, MICROBATCHES, SIZE = 64, 12, 4, 2
OPTIONS = {"rmu": {"layer": 1}, "r2mu": {"layer": 1}, "pdu": {"dual_warmup": 0}, "grpo": {"rollouts": 2}}
NAMES = sorted({method.name for method in METHODS.values()} - {"replay"})
DEEP = [name for name in NAMES if name in ("rmu", "r2mu")]
WHOLE = [name for name in NAMES if name not in DEEP]


class RandomRows:
    """Row i, of `kind`: some prompt, some answer, padding."""

    def __init__(self, kind: int) -> None:
        self.kind = kind

    def row(self, index: int, /) -> Sample:
        chance = np.random.default_rng([self.kind, index])
        ids = chance.integers(1, VOCABULARY, LENGTH + 1)
        start, end = int(chance.integers(1, 5)), int(chance.integers(7, LENGTH + 1))
        labels = np.full(LENGTH, IGNORED, dtype=np.int64)
        labels[start:end] = ids[1:][start:end]
        return Sample(ids[:-1].astype(np.int64), labels, None)


def material() -> Material:
    return Material(
        RandomRows(0), range(6), range(6, 15), 3, [[5, 9, 2], [7, 2]],
        {TRACE: (RandomRows(1), 5), ANCHOR: (RandomRows(2), 5)},
    )  # fmt: skip


def method(name: str) -> Method:
    return make_method(name, OPTIONS.get(name, {}))


def reference(name: str, folder: Path) -> Reference:
    return Reference(folder / name, everywhere=getattr(method(name), "positions", "answer") == "all")


def job(name: str, folder: Path) -> UnlearnJob:
    made, kept = method(name), reference(name, folder)
    if not isinstance(made, GRPO):
        return UnlearnJob(made, material(), kept, MICROBATCHES, SIZE)
    asks = RolloutJob(microbatches=MICROBATCHES, size=SIZE, sequence_length=LENGTH, end_token=1, seed=3)
    found = OnPolicyJob(made, material(), kept, MICROBATCHES, SIZE, 0, 0, asks, folder)
    chance = np.random.default_rng(5)
    answers = [chance.integers(1, VOCABULARY, int(chance.integers(4, LENGTH + 2))).tolist() for _ in range(4)]
    found.hear(0, {"answers": [[answer, 2 + n % 2, float(n) - 1.3, n % 2] for n, answer in enumerate(answers)]})
    return found


def reference_job(name: str, folder: Path, at_once: int = MICROBATCHES) -> ReferenceJob:
    rows = material()
    return ReferenceJob(
        microbatches=at_once, size=SIZE, material=rows, reference=reference(name, folder),
        wanted=wanted_of(method(name), rows),
    )  # fmt: skip


def prompts() -> list[list[int]]:
    """Of several lengths, two of which leave no room for an answer."""
    chance = np.random.default_rng(11)
    return [
        chance.integers(2, VOCABULARY, size).tolist() for size in (3, 9, 5, 12, 1, 2, LENGTH + 1, 4, 7, LENGTH + 2, 6)
    ]
