"""What the engine asks of a job: microbatches of named tensors, signed terms of a loss, and what each is divided by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Flag, auto
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

IGNORED = -100
"""The label that counts for nothing, as everywhere in transformers."""


class Needs(Flag):
    """What of a microbatch a span computes with, beside the masks and positions that every span is given."""

    NOTHING = 0
    INPUT = auto()
    """The ids: of the span that begins with the embedding."""
    LOSS = auto()
    """Labels and whatever else the loss reads: of the span that ends with the head."""


@dataclass(frozen=True)
class Batch:
    """One microbatch. `sample_ids` are global: the same sample has the same id wherever and whenever it is computed.

    `tensors` are on one device. Of their names the engine knows `input_ids` [batch, sequence], int64, which the
    embedding takes, and `attention_mask` [batch, sequence] (1 for a token, 0 for padding) and `position_ids` [batch,
    sequence], which every block is given where they are there; all others are the job's own.
    """

    sample_ids: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    kind: str = "text"
    """Which of its terms a job computes on it."""

    def __getitem__(self, name: str) -> Tensor:
        """Raises KeyError for what was not asked for."""
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        """A tensor, if it is there."""
        return self.tensors.get(name)

    def to(self, device: torch.device) -> Batch:
        """The same on another device; the host does not wait for it."""
        if device.type == "cpu":
            return self
        moved = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return replace(self, tensors=moved)

    @property
    def num_bytes(self) -> int:
        """Of all its tensors, each memory counted once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors.values()}
        return sum(storages.values())


class Job(Protocol):
    """A stream of microbatches and what to do with their logits. Every worker holds the same one.

    What is minimised is the sum over the terms t of terms[t] * (sum over the step's microbatches of loss(...)[t]) /
    (sum of counts(...)[t]).
    """

    @property
    def terms(self) -> Mapping[str, float]:
        """Term -> its signed weight."""
        ...

    def batch(self, step: int, microbatch: int, needs: Needs) -> Batch:
        """The microbatch, on the host, with what is needed of it. Gives the same on every worker and every call."""
        ...

    def counts(self, step: int, microbatch: int) -> Mapping[str, int]:
        """Term -> how much of the microbatch counts for it: labels that are not IGNORED, or sequences. Terms that the
        microbatch is none of are left out. Known before anything is computed."""
        ...

    def loss(self, logits: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """Term -> its sum (not mean) over what counts, a scalar; logits [batch, sequence, vocabulary]. The keys are
        those of `counts`."""
        ...


@runtime_checkable
class ToldJob(Job, Protocol):
    """A job whose microbatches follow from what was computed before. Who trains knows that; workers that hold nothing
    are told it with each of their orders."""

    def tell(self, step: int, /) -> dict[str, Any]:
        """What the microbatches of a step follow from (JSON)."""
        ...

    def hear(self, step: int, told: Mapping[str, Any], /) -> None:
        """What another's `tell` has returned: the next microbatches are those of this step."""
        ...
