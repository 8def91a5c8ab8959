"""What the engine asks of a job: the samples of a microbatch, their loss, and how many tokens they count for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One microbatch. `sample_ids` are global: the same sample has the same id wherever and whenever it is computed."""

    sample_ids: tuple[int, ...]
    input_ids: Tensor
    """[batch, sequence], int64."""
    labels: Tensor
    """[batch, sequence], int64, already shifted: labels[:, i] follows input_ids[:, i]. -100 counts for nothing."""
    attention_mask: Tensor | None = None
    """[batch, sequence], 1 for a token and 0 for padding; None where there is no padding."""


class Job(Protocol):
    """A stream of microbatches and what to do with their logits. Every worker holds the same one."""

    def batch(self, step: int, microbatch: int) -> Batch:
        """The microbatch, on the host. Must give the same one on every worker and every call."""
        ...

    def tokens(self, step: int, microbatch: int) -> int:
        """How many labels of the microbatch count: what its loss and gradients are divided by, summed over the step."""
        ...

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss summed (not averaged) over the tokens that count; logits [batch, sequence, vocabulary]."""
        ...
