"""From what layers cost to a schedule: cut the layers into spans, then order the work. The one door for jobs."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

from pipeline.schedule import Schedule, Span
from schedulers.balanced import balanced
from schedulers.evaluation import evaluation
from schedulers.gpipe import gpipe
from schedulers.head_with_embedding import head_with_embedding
from schedulers.interleaved import interleaved
from schedulers.one_f_one_b import one_f_one_b
from schedulers.partition import partition
from schedulers.zero_bubble import zero_bubble

SCHEDULERS = {"gpipe": gpipe, "one_f_one_b": one_f_one_b, "interleaved": interleaved, "zero_bubble": zero_bubble}
"""Name -> (spans, microbatches, replicas, ...) -> Schedule: orders of work on a given cut."""

PLANNERS = (*SCHEDULERS, "balanced")
"""What --scheduler accepts: the orders above, and those that choose their own cut."""


def build(name: str, spans: Sequence[Span], microbatches: int, replicas: int = 1, **options: int) -> Schedule:
    """The schedule of the named scheduler. Raises ValueError for a name that is none, or as the scheduler does."""
    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}; allowed: {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name](spans, microbatches, replicas, **options)


def num_spans(name: str, stages: int, chunks: int) -> int:
    """The spans that a plan cuts the layers into at least: no model may have fewer layers."""
    return stages * chunks if name == "interleaved" else stages


def plan(
    name: str, layer_costs: Sequence[float], stages: int, microbatches: int, replicas: int = 1, *, chunks: int = 2,
    evaluate: bool = False, head_first: bool = False,
) -> Schedule:  # fmt: skip
    """A schedule of layers that cost `layer_costs` seconds each, on `stages` workers per replica; not yet lowered.

    `evaluate` gives forwards alone, on the same spans. `head_first` places the last layer, the head, on the first
    worker, in the order of 1F1B. Raises ValueError, or PartitionError where there are fewer layers than spans.
    """
    if name not in PLANNERS:
        raise ValueError(f"unknown scheduler {name!r}; allowed: {', '.join(PLANNERS)}")
    if name == "balanced":
        return balanced(layer_costs, stages, microbatches, replicas, evaluate=evaluate)
    if head_first:
        part = fsum(layer_costs) / stages
        speeds = [max(0.05, 1 - layer_costs[-1] / part), *[1.0] * (stages - 1)]
        spans = (*partition(layer_costs[:-1], speeds), (len(layer_costs) - 1, len(layer_costs)))
        return head_with_embedding(spans, microbatches, replicas, evaluate=evaluate)
    spans = partition(layer_costs, [1.0] * num_spans(name, stages, chunks))
    if evaluate:
        return evaluation(spans, microbatches, replicas, stages=stages)
    return build(name, spans, microbatches, replicas, **({"chunks": chunks} if name == "interleaved" else {}))
