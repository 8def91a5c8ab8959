"""The critical path of a simulated step, as a line in the speeds of the workers.

Whatever the clocks, a step takes as long as its longest chain of ops and transfers. Along one chain the time is the
sum of what each worker computes in it, times how much its clock stretches that, plus what no clock changes. So every
chain is a lower bound on the step at all other clocks too; the step is the largest of them, convex in the stretches.

The chain is found by the simulator itself: given speeds that are floats with a memory, its sums and maxima carry along
what they are made of. Nothing of its rules is written twice, and whatever it can time has a path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.schedule.simulate import simulate
from schedulers.frequency_search.power import ClockProblem, Vector


class _Spent(float):
    """Seconds that `worker` computes."""

    worker: int

    def __radd__(self, begin: float) -> _Moment:
        return _Moment.of(float(begin) + float(self), begin, self)


class _Moment(float):
    """A time of the simulator: at `before`, then what was `spent`. What it is made of is summed up at the end only."""

    before: float
    spent: float

    @classmethod
    def of(cls, value: float, before: float, spent: float) -> _Moment:
        made = cls(value)
        made.before, made.spent = before, spent
        return made

    def __add__(self, other: float) -> _Moment:
        return _Moment.of(float(self) + float(other), self, other)


class _Speed(float):
    """How fast `worker` is: a number of seconds divided by it is known to be that worker's."""

    worker: int
    __array_ufunc__ = None  # else a numpy number would divide itself, and forget

    def __rtruediv__(self, seconds: float) -> _Spent:
        spent = _Spent(float(seconds) / float(self))
        spent.worker = self.worker
        return spent


@dataclass(frozen=True)
class CriticalPath:
    """A chain of a step: it takes `constant + work @ stretches` seconds, `work[i]` those of worker i at nominal
    clock."""

    constant: float
    work: Vector


@dataclass(frozen=True)
class TimedStep:
    """A step at certain clocks: its seconds, its critical path, and what each worker computes at these clocks."""

    seconds: float
    path: CriticalPath
    busy_s: Mapping[int, float]


def step_at(problem: ClockProblem, clocks: Sequence[float] | Vector) -> TimedStep:
    """The step at `clocks[i]` of worker i, in the order of `problem.workers`. Raises what `simulate` raises."""
    index = {worker: i for i, worker in enumerate(problem.workers)}
    stretches = [problem.powers[w].stretch(float(f)) for w, f in zip(problem.workers, clocks, strict=True)]
    speed: dict[int, float] = {}
    for worker, stretch in zip(problem.workers, stretches, strict=True):
        speed[worker] = made = _Speed(problem.costs.speed.get(worker, 1.0) / stretch)
        made.worker = worker
    timeline = simulate(problem.schedule, replace(problem.costs, speed=speed), problem.network)
    work = np.zeros(len(index))
    last = at = max((event.end for event in timeline.events), default=0.0)
    while isinstance(at, _Moment):
        if isinstance(at.spent, _Spent):
            work[index[at.spent.worker]] += float(at.spent)
        at = at.before
    if isinstance(at, _Spent):  # a time of 0 that nothing was added to
        work[index[at.worker]] += float(at)
    constant = max(0.0, float(last) - float(work.sum()))
    busy_s = {worker: float(seconds) for worker, seconds in timeline.busy_s.items()}
    return TimedStep(float(last), CriticalPath(constant, work / np.array(stretches)), busy_s)
