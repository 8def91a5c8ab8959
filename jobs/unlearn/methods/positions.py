"""Which positions of a row a method compares distributions or hidden states at."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from jobs.unlearn.method import has_labels
from pipeline.runtime.batch import IGNORED

Positions = Literal["answer", "all"]


def counted(labels: Tensor, positions: Positions) -> Tensor:
    """[batch, sequence], bool: those with a label, or all of the rows that have one, prompt and padding too."""
    return labels != IGNORED if positions == "answer" else has_labels(labels)[:, None].expand_as(labels)
