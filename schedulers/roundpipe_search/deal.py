"""The rules of the clock for workers that run: who gets the next unit, by what is known at that moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pipeline.schedule.work_units import BACKWARD, WorkUnit
from schedulers.roundpipe_search.clock import RULES

Cost = Callable[[WorkUnit], float]
"""What one microbatch of a unit takes on a worker of speed 1."""


class Dealer:
    """`rule` as in `Clock`. Asked again about the same unit, `round_robin` gives the same answer."""

    def __init__(self, rule: str, cost: Cost) -> None:
        if rule not in RULES:
            raise ValueError(f"rule is {rule!r}; allowed: {', '.join(RULES)}")
        self._rule, self._cost = rule, cost
        self._unit: WorkUnit | None = None
        self._last = -1

    def __call__(self, unit: WorkUnit, free: Mapping[int, float], speeds: Mapping[int, float]) -> int:
        """The worker for a unit. `free`: worker -> seconds until it is through with what it has."""
        if self._rule == "ready":
            work = self._cost(unit) * len(unit.microbatches)
            return min(free, key=lambda w: (free[w] + work / speeds[w], -free[w], w))
        if unit == self._unit and self._last in free:
            return self._last
        self._unit = unit
        if unit.span[0] == 0 and unit.kinds != BACKWARD:
            self._last = min(free, key=lambda w: (free[w], w))
        else:
            self._last = min((w for w in free if w > self._last), default=min(free))
        return self._last
