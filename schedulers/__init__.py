"""Planners: pure functions from a problem to a Schedule. No torch, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.schedule import Schedule, Span
from schedulers.evaluation import evaluation
from schedulers.gpipe import gpipe
from schedulers.greedy import greedy
from schedulers.head_with_embedding import head_with_embedding
from schedulers.interleaved import interleaved
from schedulers.one_f_one_b import one_f_one_b
from schedulers.partition import PartitionError, partition
from schedulers.zero_bubble import zero_bubble

__all__ = [
    "SCHEDULERS", "PartitionError", "build", "evaluation", "gpipe", "greedy", "head_with_embedding", "interleaved",
    "one_f_one_b", "partition", "zero_bubble",
]  # fmt: skip

SCHEDULERS: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "one_f_one_b": one_f_one_b,
    "interleaved": interleaved,
    "zero_bubble": zero_bubble,
}
"""Name -> (spans, microbatches, replicas, ...) -> Schedule; what --scheduler accepts."""


def build(name: str, spans: Sequence[Span], microbatches: int, replicas: int = 1, **options: int) -> Schedule:
    """The schedule of the named scheduler. Raises ValueError for a name that is none, or as the scheduler does."""
    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}; allowed: {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name](spans, microbatches, replicas, **options)
