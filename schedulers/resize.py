"""The layout for the workers that are there: how many stages and replicas, who is in which, and which layers each has.

Every number of stages and of replicas is tried that the places allow; the layers are cut by the minimax partition for
the speeds and the memory of the stages' workers; the simulator says which takes the least time. Replicas of a stage
hold the same layers, so places of like speed share one. The microbatches of a step, and what they are divided by, are
the same in all layouts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from math import fsum

from pipeline.schedule.costs import Costs
from pipeline.schedule.layout import EVALUATE, TRAIN, Layout
from pipeline.schedule.lower import lower
from pipeline.schedule.ops import Schedule, Span
from pipeline.schedule.simulate import simulate
from pipeline.schedule.verify import verify
from schedulers.partition import PartitionError
from schedulers.plan import num_spans, plan


@dataclass(frozen=True)
class ResizeProblem:
    """`layer_costs[l]`: seconds of layer l's forward on a worker of speed 1; `layer_bytes[l]`: what holding it takes.

    `microbatches` and `evaluated` are those of a step and of an evaluation, over all replicas, of which there may be up
    to `most_replicas`.
    """

    scheduler: str
    layer_costs: Sequence[float]
    microbatches: int
    evaluated: int
    most_replicas: int = 1
    chunks: int = 2
    layer_bytes: Sequence[float] = ()
    copies: bool = False
    """Whether each stage that has no replica has a copy on the one before it."""
    ends_apart: bool = False
    """Whether the first and the last layer may not be in one span: their gradients on a weight that they share are to
    be summed one by one."""


@dataclass(frozen=True)
class Sized:
    """A layout, `stages` x `replicas` of it, and the seconds that a step of it is predicted to take."""

    stages: int
    replicas: int
    seconds: float
    layout: Layout = field(repr=False)


def resize(
    problem: ResizeProblem, places: Collection[int], *, speeds: Mapping[int, float] | None = None,
    limits: Mapping[int, float] | None = None, held: Mapping[int, Set[int]] | None = None,
) -> Sized:  # fmt: skip
    """The layout over `places` that takes the least time, among those that fit; of equal ones the one with the fewest
    workers, then the fewest replicas.

    `speeds[place]` is how many times as fast a place is (1 where missing), `limits[place]` its bytes (unlimited where
    missing), `held[place]` the layers that it has: stages are dealt so that these stay where they are. Raises
    PartitionError where nothing fits.
    """
    found = [sized for shape in shapes(problem, len(places)) if (sized := _sized(problem, shape, places, speeds or {},
             limits or {}, held or {}))]  # fmt: skip
    if not found:
        layers, most = len(problem.layer_costs), sum((limits or {}).get(place, float("inf")) for place in places)
        raise PartitionError(
            f"{len(places)} workers cannot hold the {layers} layers: they take {fsum(problem.layer_bytes):.4g} bytes; "
            f"the workers together have {most:.4g}"
        )
    return min(found, key=lambda sized: (sized.seconds, sized.stages * sized.replicas, sized.replicas))


def shapes(problem: ResizeProblem, workers: int) -> Iterator[tuple[int, int]]:
    """(stages, replicas) that so many workers can be, and whose replicas share the microbatches evenly."""
    for replicas in range(1, min(workers, problem.most_replicas) + 1):
        if problem.microbatches % replicas == 0:
            for stages in range(1, workers // replicas + 1):
                if num_spans(problem.scheduler, stages, problem.chunks) <= len(problem.layer_costs):
                    yield stages, replicas


def grouped(
    stages: int, replicas: int, places: Collection[int], speeds: Mapping[int, float], held: Mapping[int, Set[int]]
) -> list[list[int]]:
    """The places of each stage. The fastest are taken; those of like speed share a stage; who has early layers comes
    early."""

    def middle(place: int) -> float:
        mine = held.get(place, ())
        return fsum(mine) / len(mine) if mine else float("inf")

    ordered = sorted(places, key=lambda place: (-speeds.get(place, 1.0), middle(place), place))[: stages * replicas]
    groups = [ordered[i * replicas : (i + 1) * replicas] for i in range(stages)]
    return sorted(groups, key=lambda group: (min(map(middle, group)), group))


def _sized(
    problem: ResizeProblem, shape: tuple[int, int], places: Collection[int], speeds: Mapping[int, float],
    limits: Mapping[int, float], held: Mapping[int, Set[int]],
) -> Sized | None:  # fmt: skip
    """One shape, if it fits."""
    stages, replicas = shape
    groups = grouped(stages, replicas, places, speeds, held)
    paces = [min(speeds.get(place, 1.0) for place in group) for group in groups]
    rooms = [min(limits.get(place, float("inf")) for place in group) for group in groups]
    at = [groups[stage][replica] for replica in range(replicas) for stage in range(stages)]

    def made(evaluated: int | None) -> Schedule:
        schedule = plan(
            problem.scheduler, problem.layer_costs, stages, problem.microbatches, replicas, chunks=problem.chunks,
            evaluated=evaluated, ends="home" if stages == 1 and problem.ends_apart else "in-line", speeds=paces,
            memory=problem.layer_bytes or None, limits=rooms,
        )  # fmt: skip
        lanes = {at[worker]: lane for worker, lane in schedule.lanes.items()}
        return Schedule(schedule.routes, dict(sorted(lanes.items())), schedule.name)

    try:
        schedules = {TRAIN: made(None), EVALUATE: made(problem.evaluated)}
    except PartitionError:
        return None
    costs = Costs(list(problem.layer_costs), speed={place: speeds.get(place, 1.0) for place in at})
    seconds = simulate(schedules[TRAIN], costs).makespan_s
    lowered = {purpose: lower(schedule) for purpose, schedule in schedules.items()}
    for schedule in lowered.values():
        verify(schedule)
    backups: list[tuple[Span, int]] = []
    if problem.copies and replicas == 1 and stages > 1:
        before = {place: at[worker - 1] for worker, place in enumerate(at)}
        backups = [(span, before[place]) for span, places in lowered[TRAIN].holders.items() for place in places]
    return Sized(stages, replicas, seconds, Layout(lowered, tuple(backups)))
