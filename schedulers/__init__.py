"""Planners: pure functions from a problem to a Schedule. No torch, no I/O."""

from schedulers.balanced import balanced
from schedulers.evaluation import evaluation
from schedulers.greedy import greedy
from schedulers.head_with_embedding import head_with_embedding
from schedulers.interleaved import interleaved
from schedulers.partition import PartitionError, partition
from schedulers.plan import PLANNERS, SCHEDULERS, build, num_spans, plan
from schedulers.swapped import swapped

__all__ = [
    "PLANNERS", "SCHEDULERS", "PartitionError", "balanced", "build", "evaluation", "greedy", "head_with_embedding",
    "interleaved", "num_spans", "partition", "plan", "swapped",
]  # fmt: skip
