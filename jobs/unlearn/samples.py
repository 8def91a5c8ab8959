"""What a model is given of a row: the question and the answer in it, and another answer in their place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from jobs.row_data import Sample
from pipeline.runtime.batch import IGNORED, Needs


def as_sample(tokens: Sequence[int], start: int, length: int, end_token: int) -> Sample:
    """A row whose tokens from number `start` >= 1 on are its answer, as a model is given it; what is longer than
    `length` + 1 is cut."""
    ids = np.asarray(tokens[: length + 1], dtype=np.int64)
    input_ids, labels = np.full(length, end_token, np.int64), np.full(length, IGNORED, np.int64)
    input_ids[: len(ids) - 1] = ids[:-1]
    labels[start - 1 : max(start, len(ids)) - 1] = ids[start:]
    return Sample(input_ids, labels)


def prompt_of(sample: Sample) -> list[int]:
    """The tokens of a row before its answer: all but those whose label counts. Raises ValueError where none does."""
    counted = np.flatnonzero(sample.labels != IGNORED)
    if not len(counted):
        raise ValueError("a row without an answer, or one that was forgotten; allowed: rows with an answer")
    return sample.input_ids[: int(counted[0]) + 1].tolist()


def answer_of(sample: Sample) -> list[int]:
    """The tokens of a row's answer."""
    return sample.labels[sample.labels != IGNORED].tolist()


def answered(asked: Sample, answer: Sequence[int]) -> Sample:
    """The question of a row with another answer, as tokens, cut at the length of the sample. A row without labels has
    no question, and gets no answer."""
    length, end_token = len(asked.input_ids), int(asked.input_ids[-1])
    if not (asked.labels != IGNORED).any():
        return Sample(np.full(length, end_token, np.int64), np.full(length, IGNORED, np.int64))
    prompt = prompt_of(asked)
    return as_sample([*prompt, *answer], len(prompt), length, end_token)


def tensors_of(samples: Sequence[Sample], needs: Needs) -> dict[str, Tensor]:
    """The tensors of some rows that are needed: `input_ids` and `labels` [rows, sequence]."""
    found: dict[str, Tensor] = {}
    if Needs.INPUT in needs:
        found["input_ids"] = torch.from_numpy(np.stack([sample.input_ids for sample in samples]))
    if Needs.LOSS in needs:
        found["labels"] = torch.from_numpy(np.stack([sample.labels for sample in samples]))
    return found
