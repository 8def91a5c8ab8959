"""Planners: pure functions from a problem to a Schedule. No torch, no I/O."""

from schedulers.balanced import balanced
from schedulers.evaluation import evaluation
from schedulers.gpipe import gpipe
from schedulers.greedy import greedy
from schedulers.head_with_embedding import head_with_embedding
from schedulers.interleaved import interleaved
from schedulers.one_f_one_b import one_f_one_b
from schedulers.partition import PartitionError, partition
from schedulers.plan import ENGINES, PLANNERS, SCHEDULERS, build, num_spans, plan
from schedulers.swapped import swapped
from schedulers.zero_bubble import zero_bubble

__all__ = [
    "ENGINES", "PLANNERS", "SCHEDULERS", "PartitionError", "balanced", "build", "evaluation", "gpipe", "greedy",
    "head_with_embedding", "interleaved", "num_spans", "one_f_one_b", "partition", "plan", "swapped", "zero_bubble",
]  # fmt: skip
