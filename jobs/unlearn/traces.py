"""Traces that the model itself writes about what it is to forget, as R2MU has them (arXiv 2506.12963; the authors'
code): a row's question, some words that ask for reasoning, and the first tokens with which the model goes on.

The pipeline of such a request ends at the layer that is steered, and cannot write. So the traces are a run of their own
before it, with the whole model and without a step: its workers answer, as before any step, and end. What is written is
kept in the request's folder, and shredded when the request is put away.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoTokenizer

from jobs.engine import Engine
from jobs.job import RunJob, Start
from jobs.row_data import RowDataset, Sample
from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.method import ROLLOUT, TRACE
from jobs.unlearn.request import Request
from jobs.unlearn.rollout import RolloutJob, roll_out
from jobs.unlearn.samples import as_sample, prompt_of
from pipeline.reading import FileError, read_json
from pipeline.schedule.layout import EVALUATE, TRAIN
from pipeline.settings import of_kind
from recovery.checkpoint import CheckpointError
from recovery.disk import write_flushed

ASKED_TO_REASON = "Let's reason this step by step.\n<think>"
FILE = "traces.json"


@dataclass(frozen=True)
class Traces:
    """Those of a request, in `folder`: its rows are they, in the order of the rows to forget."""

    folder: Path
    sequence_length: int
    end_token: int

    @property
    def complete(self) -> bool:
        """Whether all of them are there."""
        return (self.folder / FILE).is_file()

    @cached_property
    def tokens(self) -> Sequence[tuple[int, Sequence[int]]]:
        """(how many tokens the model was given, all tokens) of each. Raises CheckpointError."""
        try:
            return [(int(start), list(map(int, tokens))) for start, tokens in read_json(self.folder / FILE)["traces"]]
        except (FileError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.folder / FILE}: the model's traces cannot be read: {error}") from error

    def row(self, index: int, /) -> Sample:
        """See Rows. Raises CheckpointError."""
        start, tokens = self.tokens[index]
        return as_sample(tokens, start, self.sequence_length, self.end_token)

    def finish(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> None:
        """All are written: on the disk before this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        traces = [[len(p), [*map(int, p), *map(int, a)]] for p, a in zip(prompts, answers, strict=True)]
        write_flushed(self.folder / FILE, json.dumps({"traces": traces}).encode())


def traces_of(config: UnlearnConfig, dataset: RowDataset) -> Traces:
    """Where those of a request are."""
    return Traces(config.out / TRACE, config.sequence_length, dataset.end_token)


def asked_to_reason(dataset: RowDataset, rows: Sequence[int], tokenizer: Any) -> list[list[int]]:
    """What the model is given for each row: its question, and the words that ask for reasoning."""
    words = ASKED_TO_REASON if tokenizer.chat_template else f" {ASKED_TO_REASON}"
    asked = list(tokenizer(words, add_special_tokens=False)["input_ids"])
    return [[*prompt_of(dataset.row(row)), *asked] for row in rows]


@dataclass(frozen=True)
class TraceConfig(UnlearnConfig):
    """The run that writes the traces of a request."""

    job: ClassVar[str] = "trace"

    @classmethod
    def of(cls, config: UnlearnConfig) -> TraceConfig:
        """That of a request."""
        return of_kind(cls, config)

    @property
    def depth(self) -> None:
        """See TrainConfig: the whole model writes."""


@dataclass(frozen=True, kw_only=True)
class TraceJob(RolloutJob):
    """Draws the likeliest tokens."""

    traces: Traces
    prompts: Sequence[Sequence[int]]
    most: int


def trace_jobs(config: TraceConfig, start: Start) -> dict[str, RunJob]:
    """ROLLOUT; there is no step and no evaluation, whose jobs it stands for."""
    request, dataset = Request.read(config.out), RowDataset.open(config.run / "data")
    size = config.microbatch_size
    probed = sum(min(len(rows), config.evaluate_samples) for rows in (request.forget, request.retain))
    job = TraceJob(
        microbatches=start.at_once or -(-probed // size), size=size, sequence_length=config.sequence_length,
        end_token=dataset.end_token, seed=config.seed, cut=start.at_once is None,
        traces=traces_of(config, dataset), most=config.trace_tokens,
        prompts=asked_to_reason(dataset, request.forget, AutoTokenizer.from_pretrained(config.out / "tokenizer")),
    )  # fmt: skip
    return dict.fromkeys((TRAIN, EVALUATE, ROLLOUT), job)


def write_traces(engine: Engine, jobs: Mapping[str, RunJob], first_step: int) -> None:
    """Have the model write its traces, together. Raises CheckpointError where its weights have begun to change."""
    job = jobs[ROLLOUT]
    assert isinstance(job, TraceJob)
    if first_step:
        raise CheckpointError(f"{job.traces.folder / FILE} is gone, and with it what the model wrote before step 1")
    answers = roll_out(engine, job, 0, job.prompts, job.most)
    if engine.leads:
        job.traces.finish(job.prompts, answers)
    engine.gather({})
