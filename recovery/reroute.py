"""Around who is lost: microbatches take other routes, over replicas or past a stage that nobody holds.

Training goes on at once, over the workers that are left, while a replacement is started; once that is ready it joins
at the end of a step, as under redundant computation, and its state comes from a replica, or from a remedy. What the
routes are, a planner says, which recovery is given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from pipeline.schedule.ops import Schedule, dumps
from recovery.membership import View, substitute

Planner = Callable[[Collection[int]], Mapping[str, Schedule]]
"""The places that have workers -> lowered schedules by purpose, by place. Raises CannotRestore."""


def arrange_detour(planner: Planner, view: View) -> View:
    """`view` with schedules over the workers that it has. Raises CannotRestore."""
    at = {view.places[worker]: worker for worker in view.workers}
    made = planner(sorted(at))
    return replace(view, schedules={purpose: dumps(substitute(schedule, at)) for purpose, schedule in made.items()})
