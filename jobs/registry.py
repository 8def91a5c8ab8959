"""The jobs that a run can be of, by name, and the one place where they are built, the same in every process of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jobs.config import TrainConfig
from jobs.data import Dataset
from jobs.plan import evaluation_samples
from jobs.text import TextJob
from pipeline.schedule.layout import EVALUATE, TRAIN


@dataclass(frozen=True)
class Start:
    """Where in its data a run begins: with which step and sample. An evaluation is run `at_once` microbatches at a
    time, or whole."""

    step: int = 0
    sample: int = 0
    at_once: int | None = None


def text_jobs(config: TrainConfig, dataset: Dataset, start: Start) -> dict[str, TextJob]:
    """Language modelling on packed text, every label of which counts; and its held-out loss."""
    evaluated, size = evaluation_samples(config, dataset), config.microbatch_size

    def counted(_: int) -> int:
        return config.sequence_length

    return {
        TRAIN: TextJob(
            dataset.train_sample, config.sequence_length, counted, microbatches=config.microbatches, size=size,
            first_step=start.step, first_sample=start.sample,
        ),
        EVALUATE: TextJob(
            dataset.held_out_spread(evaluated), config.sequence_length, counted,
            microbatches=start.at_once or -(-evaluated // size), size=size, limit=evaluated,
        ),
    }  # fmt: skip


JOBS: Mapping[str, Callable[[TrainConfig, Dataset, Start], dict[str, TextJob]]] = {"text": text_jobs}


def make_jobs(config: TrainConfig, dataset: Dataset, start: Start, name: str = "text") -> dict[str, TextJob]:
    """What is trained and what is evaluated, as TRAIN and EVALUATE. Raises KeyError for a job that is none."""
    return JOBS[name](config, dataset, start)
