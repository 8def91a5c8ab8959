"""What a run can be of, by name: its settings, its plan and its jobs, the same in every process of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jobs.config import TrainConfig
from jobs.engine import Engine
from jobs.job import RunJob, Start
from jobs.mixture import Mixture
from jobs.plan import Plan, evaluation_samples, make_plan, open_dataset
from jobs.row_data import RowDataset
from jobs.row_job import RowJob
from jobs.text import TextJob
from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.first_gradients import FirstGradientsConfig, first_gradients_jobs
from jobs.unlearn.jobs import unlearn_fingerprint, unlearn_jobs
from jobs.unlearn.plan import make_unlearn_plan
from jobs.unlearn.reference import read_before
from jobs.unlearn.traces import TraceConfig, trace_jobs, write_traces
from pipeline.schedule.layout import EVALUATE, TRAIN


def text_jobs(config: TrainConfig, start: Start) -> dict[str, RunJob]:
    """Language modelling on packed text, every label of which counts that was not forgotten, or on rows, whose answers
    do; and the held-out loss."""
    dataset = open_dataset(config.out)
    evaluated, size = evaluation_samples(config, dataset), config.microbatch_size
    train: dict[str, Any] = {
        "microbatches": config.microbatches, "size": size, "first_step": start.step, "first_sample": start.sample,
        "source": dataset.source_of if isinstance(dataset, Mixture) else None,
    }  # fmt: skip
    held_out: dict[str, Any] = {
        "microbatches": start.at_once or -(-evaluated // size), "size": size, "limit": evaluated
    }  # fmt: skip
    length = config.sequence_length
    if isinstance(dataset, RowDataset) or (isinstance(dataset, Mixture) and dataset.rows):
        counted, packed = dataset.num_labels, dataset.pack
        return {
            TRAIN: RowJob(dataset.train_sample, length, counted, packed, **train),
            EVALUATE: RowJob(dataset.held_out_spread(evaluated), length, None, packed, **held_out),
        }

    end, whole = dataset.end_token, None if dataset.blank else (lambda _: length)
    return {
        TRAIN: TextJob(dataset.train_sample, length, dataset.num_labels, end, config.document_mask, **train),
        EVALUATE: TextJob(dataset.held_out_spread(evaluated), length, whole, end, config.document_mask, **held_out),
    }


class Before(Protocol):
    """What a run does together before its first step."""

    def __call__(self, engine: Engine, jobs: Mapping[str, RunJob], first_step: int) -> None: ...


@dataclass(frozen=True)
class Kind:
    """`settings` is a TrainConfig; `plan(settings, progress, those of the start before)` gives the first view; `jobs`
    has TRAIN, EVALUATE and whatever else is measured; `data` is a hash of what all samples follow from;
    `before` comes before the first step, and is all there is unless the run `trains`."""

    settings: type[TrainConfig]
    plan: Callable[..., Plan]
    jobs: Callable[[Any, Start], dict[str, RunJob]]
    data: Callable[[Any], str]
    before: Before = read_before
    trains: bool = True


KINDS: Mapping[str, Kind] = {
    TrainConfig.job: Kind(TrainConfig, make_plan, text_jobs, lambda config: open_dataset(config.out).fingerprint),
    UnlearnConfig.job: Kind(UnlearnConfig, make_unlearn_plan, unlearn_jobs, unlearn_fingerprint),
    FirstGradientsConfig.job: Kind(
        FirstGradientsConfig,
        make_plan,
        lambda config, start: first_gradients_jobs(config, text_jobs(config, start)),
        lambda config: open_dataset(config.out).fingerprint,
    ),
    TraceConfig.job: Kind(
        TraceConfig, make_unlearn_plan, trace_jobs, unlearn_fingerprint, before=write_traces, trains=False
    ),
}


def make_jobs(config: TrainConfig, start: Start) -> dict[str, RunJob]:
    """The jobs of a run. Raises KeyError for a kind that is none."""
    return KINDS[config.job].jobs(config, start)
