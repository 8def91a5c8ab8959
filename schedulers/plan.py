"""From what layers cost to a schedule: cut the layers into spans, then order the work. The one door for jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import Annotated, Literal

from pipeline.schedule.ops import Schedule, Span
from pipeline.settings import RunShape, Within, limit_work, require, require_known
from schedulers.balanced import balanced
from schedulers.balanced_search.pieces import Held, Shape
from schedulers.evaluation import evaluation
from schedulers.gpipe import gpipe
from schedulers.head_with_embedding import head_with_embedding
from schedulers.interleaved import interleaved
from schedulers.one_f_one_b import one_f_one_b
from schedulers.partition import partition
from schedulers.swapped import swapped
from schedulers.zero_bubble import zero_bubble

SCHEDULERS = {"gpipe": gpipe, "one_f_one_b": one_f_one_b, "interleaved": interleaved, "zero_bubble": zero_bubble}
"""Name -> (spans, microbatches, replicas, ...) -> Schedule: orders of work on a given cut."""

PLANNERS = (*SCHEDULERS, "balanced")
"""The orders above, and those that choose their own cut."""

ENGINES = (*PLANNERS, "skippipe", "roundpipe")
"""What `train --scheduler` accepts: the planners, routes through a network, and a pool of workers that hold nothing."""


Ends = Literal["in-line", "home", "apart"]


@dataclass(frozen=True)
class ScheduleSettings:
    """How the work is spread over workers."""

    workers: Annotated[int, Within(1, 1024)] = 4
    """Worker processes in all, over every stage and replica; or MIN:MAX, where the run goes on with fewer and with more
    (see --min-workers)."""
    replicas: Annotated[int, Within(1, 1024)] = 1
    """Data-parallel copies of the pipeline; must divide --workers and --microbatches."""
    scheduler: str = "one_f_one_b"
    """gpipe, one_f_one_b, interleaved, zero_bubble, balanced (shares layers between neighbours), skippipe (partial
    routes through the slow links of --network), or roundpipe (workers that hold nothing, state in host memory)."""
    microbatches: Annotated[int, Within(1, 65536)] = 8
    """Microbatches per step, over all replicas, whose gradients are added up: global batch = microbatches x
    microbatch_size. See also --grad-accumulation and --global-batch."""
    ends: Literal["auto", "in-line", "home", "apart"] = "auto"
    """Where the embedding and the head go: in-line with the blocks, the head home to the first worker, or both apart
    from the blocks on a worker of their own (--scheduler one_f_one_b); auto is in-line unless --recovery needs more."""

    def check(self, run: RunShape) -> None:
        """Raise ConfigError for what no schedule can be made of."""
        require_known("scheduler", self.scheduler, ENGINES)
        require(self.workers % self.replicas == 0, "replicas", self.replicas, f"a divisor of workers ({self.workers})")
        require(
            self.microbatches % self.replicas == 0, "microbatches", self.microbatches,
            f"a multiple of replicas ({self.replicas})",
        )  # fmt: skip
        limit_work("stages", run.stages, self.microbatches)
        if self.ends in ("home", "apart"):
            require(
                self.scheduler == "one_f_one_b" and run.stages > 1, "ends", self.ends,
                "auto or in-line; home and apart only with scheduler one_f_one_b and 2 or more stages",
            )  # fmt: skip


def build(name: str, spans: Sequence[Span], microbatches: int, replicas: int = 1, **options: int) -> Schedule:
    """The schedule of the named scheduler. Raises ValueError for a name that is none, or as the scheduler does."""
    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}; allowed: {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name](spans, microbatches, replicas, **options)


def num_spans(name: str, stages: int, chunks: int) -> int:
    """The spans that a plan cuts the layers into at least: no model may have fewer layers."""
    return stages * chunks if name == "interleaved" else stages


def in_line(
    name: str, layer_costs: Sequence[float], stages: int, chunks: int = 2, *, speeds: Sequence[float] | None = None,
    memory: Sequence[float] | None = None, limits: Sequence[float] | None = None,
) -> tuple[Span, ...]:  # fmt: skip
    """The spans of a plan whose ends are in-line, of which stage k holds number k, k + stages and so on: see `plan`.
    Raises PartitionError."""
    turns = num_spans(name, stages, chunks) // stages  # how often a stage has a span
    paces, rooms = [*(speeds or [1.0] * stages)] * turns, [*(limits or [])] * turns
    fits = {} if memory is None else {"memory": memory, "limits": [room / turns for room in rooms]}
    return partition(layer_costs, paces, **fits)


def plan(
    name: str, layer_costs: Sequence[float], stages: int, microbatches: int, replicas: int = 1, *, chunks: int = 2,
    evaluated: int | None = None, ends: Ends = "in-line", swap: bool = False, speeds: Sequence[float] | None = None,
    memory: Sequence[float] | None = None, limits: Sequence[float] | None = None, balanced_memory: Held = "free",
    balanced_shape: Shape = "line",
) -> Schedule:  # fmt: skip
    """A schedule of layers that cost `layer_costs` seconds each, on `stages` workers per replica; not yet lowered.

    `evaluated` gives the forwards alone of so many
    microbatches, on the spans and workers of training. `ends` says where the first and the last layer, the embedding
    and the head, go: "in-line" with the others; the head "home" to the first worker, or both "apart" there, as spans
    of their own, both in the order of 1F1B; `swap` then swaps the routes of every other microbatch.

    In-line, `speeds[k]` and `limits[k]` are those of stage k's slowest and smallest worker, `memory[l]` the bytes of a
    layer: see `partition`. The scheduler that shares layers between neighbours takes all workers as
    alike; `balanced_memory` and `balanced_shape` are what `BalancedSettings` says.

    Raises ValueError, or PartitionError where there are fewer layers than spans.
    """
    if name not in PLANNERS:
        raise ValueError(f"unknown scheduler {name!r}; allowed: {', '.join(PLANNERS)}")
    if name == "balanced":
        return balanced(
            layer_costs, stages, microbatches, replicas, held=balanced_memory, shape=balanced_shape,
            evaluated=evaluated,
        )  # fmt: skip
    count = microbatches if evaluated is None else evaluated
    if ends != "in-line":
        head = (len(layer_costs) - 1, len(layer_costs))
        if ends == "home":
            part = fsum(layer_costs) / stages
            spans = (*partition(layer_costs[:-1], [max(0.05, 1 - layer_costs[-1] / part), *[1.0] * (stages - 1)]), head)
        else:
            blocks = partition(layer_costs[1:-1], [1.0] * (stages - 1))
            spans = ((0, 1), *((lo + 1, hi + 1) for lo, hi in blocks), head)
        order = swapped if swap else head_with_embedding
        return order(spans, count, replicas, evaluate=evaluated is not None)
    spans = in_line(name, layer_costs, stages, chunks, speeds=speeds, memory=memory, limits=limits)
    if evaluated is not None:
        return evaluation(spans, count, replicas, stages=stages)
    return build(name, spans, microbatches, replicas, **({"chunks": chunks} if name == "interleaved" else {}))
