"""Lanes laid into one another: a worker takes over what another one did, in an order that cannot lock up."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.schedule.costs import Costs
from pipeline.schedule.ops import B, F, I, Op, Schedule, W
from pipeline.schedule.simulate import simulate


def bare(schedule: Schedule) -> Schedule:
    """F, B, I and W alone: what a scheduler wrote, before any pass."""
    lanes = {worker: tuple(op for op in lane if op.kind in (F, B, I, W)) for worker, lane in schedule.lanes.items()}
    return Schedule(schedule.routes, lanes, schedule.name)


def merge(schedule: Schedule, into: Mapping[int, int]) -> Schedule:
    """The schedule, bare, in which worker `into[w]` does the ops of each worker w of `into`, which has no lane then.

    All lanes keep the order in which the simulator starts their ops when a forward takes 1 and a backward 2 and nobody
    is missing: what an op waits for ends before it starts, so that order is possible whoever runs what. Raises
    ScheduleError as the simulator does.
    """
    old = bare(schedule)
    timeline = simulate(old, Costs.uniform(old))
    ops: dict[int, list[tuple[float, int, Op]]] = {worker: [] for worker in old.lanes if worker not in into}
    for number, event in enumerate(sorted(timeline.events, key=lambda e: (e.start, e.end))):
        ops[into.get(event.worker, event.worker)].append((event.start, number, event.op))
    lanes = {worker: tuple(op for _, _, op in sorted(found, key=lambda x: x[:2])) for worker, found in ops.items()}
    return Schedule(old.routes, lanes, schedule.name)
