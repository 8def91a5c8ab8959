"""The layout for the workers that are there: how many stages and replicas, who is in which, and which layers each has.

Every number of stages and of replicas is tried that the places allow; the layers are cut by the minimax partition for
the speeds and the memory of the stages' workers; the simulator says which takes the least time. Replicas of a stage
hold the same layers, so places of like speed share one. The microbatches of a step, and what they are divided by, are
the same in all layouts.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from math import fsum

from pipeline.schedule.costs import Costs
from pipeline.schedule.layout import EVALUATE, TRAIN, Layout
from pipeline.schedule.lower import lower
from pipeline.schedule.ops import Schedule, ScheduleError, Span
from pipeline.schedule.simulate import simulate
from pipeline.schedule.verify import verify
from schedulers.balanced_search.pieces import Held, Shape
from schedulers.least_time import least_of_any_cut, least_of_cut
from schedulers.partition import PartitionError
from schedulers.plan import in_line, num_spans, plan


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
    balanced_memory: Held = "free"
    balanced_shape: Shape = "line"


@dataclass(frozen=True)
class Sized:
    """A layout, `stages` x `replicas` of it, and the seconds that a step of it is predicted to take."""

    stages: int
    replicas: int
    seconds: float
    layout: Layout = field(repr=False)


def resize(
    problem: ResizeProblem, places: Collection[int], *, speeds: Mapping[int, float] | None = None,
    limits: Mapping[int, float] | None = None, held: Mapping[int, Set[int]] | None = None, least_replicas: int = 1,
) -> Sized:  # fmt: skip
    """The layout over `places` that takes the least time, among those that fit; of equal ones the one with the fewest
    workers, then the fewest replicas.

    `speeds[place]` is how many times as fast a place is (1 where missing), `limits[place]` its bytes (unlimited where
    missing), `held[place]` the layers that it has: stages are dealt so that these stay where they are. Raises
    PartitionError where nothing fits with `least_replicas`, and ScheduleError where all that fits is refused by the
    verifier.
    """
    search = _Search(problem, places, speeds or {}, limits or {}, held or {}, least_replicas)
    refused: ScheduleError | None = None
    for seconds, stages, replicas in search.ranked():
        try:
            return Sized(stages, replicas, seconds, search.layout(stages, replicas))
        except ScheduleError as error:
            refused = refused or error
    if refused is not None:
        raise refused
    layers, most = len(problem.layer_costs), sum((limits or {}).get(place, float("inf")) for place in places)
    raise PartitionError(
        f"{len(places)} workers cannot hold the {layers} layers: they take {fsum(problem.layer_bytes):.4g} bytes; "
        f"the workers together have {most:.4g}"
    )


def predicted(
    problem: ResizeProblem, places: Collection[int], *, speeds: Mapping[int, float] | None = None,
    limits: Mapping[int, float] | None = None,
) -> tuple[float, int, int]:  # fmt: skip
    """Seconds, stages and replicas of the layout that `resize` chooses, which is neither written nor proved. Raises
    PartitionError where nothing fits."""
    for found in _Search(problem, places, speeds or {}, limits or {}, {}).ranked():
        return found
    raise PartitionError(f"{len(places)} workers cannot hold the {len(problem.layer_costs)} layers")


def shapes(problem: ResizeProblem, workers: int, least_replicas: int = 1) -> Iterator[tuple[int, int]]:
    """(stages, replicas) that so many workers can be, and whose replicas share the microbatches evenly."""
    for replicas in range(least_replicas, min(workers, problem.most_replicas) + 1):
        if problem.microbatches % replicas == 0:
            for stages in range(1, workers // replicas + 1):
                if num_spans(problem.scheduler, stages, problem.chunks) <= len(problem.layer_costs):
                    yield stages, replicas


def grouped(
    stages: int, replicas: int, places: Collection[int], speeds: Mapping[int, float], held: Mapping[int, Set[int]]
) -> list[list[int]]:
    """The places of each stage. The fastest are taken; those of like speed share a stage; who has early layers comes
    early. Within a stage the slowest is last."""
    return _dealt(stages, replicas, *_ordered(places, speeds, held))


def _ordered(
    places: Collection[int], speeds: Mapping[int, float], held: Mapping[int, Set[int]]
) -> tuple[list[int], dict[int, float]]:
    """The places, fastest first, and the middle of the layers that each has."""
    middle = {place: fsum(mine) / len(mine) if (mine := held.get(place)) else float("inf") for place in places}
    return sorted(places, key=lambda place: (-speeds.get(place, 1.0), middle[place], place)), middle


def _dealt(stages: int, replicas: int, ordered: Sequence[int], middle: Mapping[int, float]) -> list[list[int]]:
    groups = [list(ordered[i * replicas : (i + 1) * replicas]) for i in range(stages)]
    return sorted(groups, key=lambda group: (min(middle[place] for place in group), group))


class _Search:
    """Best first: a shape stands in the queue with a time that it cannot beat, is taken out when no other can be
    better, and goes back with a nearer one: a bound for any cut, a bound for its own cut, what the simulator says. The
    first that comes out with the last of these is the best, so most shapes are never cut, and few simulated."""

    def __init__(
        self, problem: ResizeProblem, places: Collection[int], speeds: Mapping[int, float],
        limits: Mapping[int, float], held: Mapping[int, Set[int]], least_replicas: int = 1,
    ) -> None:  # fmt: skip
        self.least_replicas = least_replicas
        self.problem, self.speeds, self.limits = problem, speeds, limits
        self.ordered, self.middle = _ordered(places, speeds, held)
        self.cuts: dict[tuple[tuple[float, ...], tuple[float, ...]], tuple[Span, ...]] = {}

    def ranked(self) -> Iterator[tuple[float, int, int]]:
        """(seconds, stages, replicas) of all that fits, best first."""
        queue = [
            (self._least(stages, replicas), stages * replicas, replicas, 0)
            for stages, replicas in shapes(self.problem, len(self.ordered), self.least_replicas)
        ]
        heapq.heapify(queue)
        nearer = (self._least_of_cut, self._seconds)
        while queue:
            seconds, workers, replicas, known = heapq.heappop(queue)
            if known == len(nearer):
                yield seconds, workers // replicas, replicas
                continue
            with contextlib.suppress(PartitionError):  # it does not fit
                seconds = nearer[known](workers // replicas, replicas)
                heapq.heappush(queue, (seconds, workers, replicas, known + 1))

    def layout(self, stages: int, replicas: int) -> Layout:
        """Lowered and proved. Raises ScheduleError."""
        problem, groups = self.problem, _dealt(stages, replicas, self.ordered, self.middle)
        at = [groups[stage][replica] for replica in range(replicas) for stage in range(stages)]
        lowered: dict[str, Schedule] = {}
        for purpose, evaluated in ((TRAIN, None), (EVALUATE, problem.evaluated)):
            schedule = self._plan(groups, problem.microbatches, replicas, evaluated)
            lanes = {at[worker]: lane for worker, lane in schedule.lanes.items()}
            lowered[purpose] = lower(Schedule(schedule.routes, dict(sorted(lanes.items())), schedule.name))
            verify(lowered[purpose], peaks=False)
        backups: list[tuple[Span, int]] = []
        if problem.copies and replicas == 1 and stages > 1:
            before = {place: at[worker - 1] for worker, place in enumerate(at)}
            backups = [(span, before[place]) for span, places in lowered[TRAIN].holders.items() for place in places]
        return Layout(lowered, tuple(backups))

    def _plan(
        self, groups: Sequence[Sequence[int]], microbatches: int, replicas: int, evaluated: int | None = None
    ) -> Schedule:
        problem, stages = self.problem, len(groups)
        return plan(
            problem.scheduler, problem.layer_costs, stages, microbatches, replicas, chunks=problem.chunks,
            evaluated=evaluated, ends="home" if stages == 1 and problem.ends_apart else "in-line",
            speeds=self._paces(groups), memory=problem.layer_bytes or None, limits=self._rooms(groups),
            balanced_memory=problem.balanced_memory, balanced_shape=problem.balanced_shape,
        )  # fmt: skip

    def _paces(self, groups: Sequence[Sequence[int]]) -> list[float]:
        return [self.speeds.get(group[-1], 1.0) for group in groups]

    def _rooms(self, groups: Sequence[Sequence[int]]) -> list[float]:
        return [min(self.limits.get(place, float("inf")) for place in group) for group in groups]

    def _least(self, stages: int, replicas: int) -> float:
        slowest = self.ordered[replicas - 1 : stages * replicas : replicas]
        paces = [self.speeds.get(place, 1.0) for place in slowest]
        problem = self.problem
        return least_of_any_cut(problem.scheduler, problem.layer_costs, paces, problem.microbatches // replicas)

    def _least_of_cut(self, stages: int, replicas: int) -> float:
        """Raises PartitionError where there is no cut that fits."""
        problem = self.problem
        if problem.scheduler == "balanced" or (stages == 1 and problem.ends_apart):
            return self._least(stages, replicas)
        groups = _dealt(stages, replicas, self.ordered, self.middle)
        paces, rooms = tuple(self._paces(groups)), tuple(self._rooms(groups))
        if (paces, rooms) not in self.cuts:
            self.cuts[paces, rooms] = in_line(
                problem.scheduler, problem.layer_costs, stages, problem.chunks, speeds=paces,
                memory=problem.layer_bytes or None, limits=rooms,
            )  # fmt: skip
        cut = self.cuts[paces, rooms]
        return least_of_cut(problem.scheduler, problem.layer_costs, cut, paces, problem.microbatches // replicas)

    def _seconds(self, stages: int, replicas: int) -> float:
        """Of one replica: that of the slowest worker of each stage. All have the same lanes, and none waits for
        another, so it ends last."""
        groups = _dealt(stages, replicas, self.ordered, self.middle)
        schedule = self._plan(groups, self.problem.microbatches // replicas, 1)
        costs = Costs(list(self.problem.layer_costs), speed=dict(enumerate(self._paces(groups))))
        return simulate(schedule, costs).makespan_s
