"""Which clock each worker should have: higher for who does more, lower for who waits, all together under a power cap.

A fixed power budget is wasted on a worker that waits. Dynamic power grows with about the cube of the clock, so a little
less for many pays for a lot more for few: after a loss, the watts of who is gone and of who now waits speed up who has
taken over its layers. ElasWave (arXiv 2510.00606) lists this as its frequency axis, nonuniform tensor parallelism
(arXiv 2504.06095) as a power boost; saving energy off the critical path is Perseus' idea (arXiv 2312.06902).

The step is what `simulate` says of the schedule at these clocks: everything here is simulated, nothing measured. The
search (`schedulers.frequency_search`) is exact to a tolerance where clocks are continuous, exact where they are steps
and the tree is small enough; in both cases the plan tells the bound that it is judged by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.schedule.costs import Costs, Network
from pipeline.schedule.ops import Schedule
from schedulers.frequency_search.discrete import stepped
from schedulers.frequency_search.paths import step_at
from schedulers.frequency_search.power import ClockError, ClockProblem, Power
from schedulers.frequency_search.relaxed import relax

__all__ = ["ClockError", "Clocks", "Power", "at_clocks", "even_clocks", "plan_clocks"]


@dataclass(frozen=True)
class Clocks:
    """A clock for each worker, as a multiple of the nominal one, and what a step then takes. Simulated."""

    clock: Mapping[int, float]
    seconds: float
    joules: float
    """Of a step, over all workers, those who wait too."""
    peak_watts: float
    """If all workers computed at once: what a cap is on."""
    busy: Mapping[int, float]
    """Worker -> the share of the step in which it computes."""
    watts: Mapping[int, float]
    """Worker -> its mean over the step."""
    bound_s: float = 0.0
    """Seconds that no clocks under the same cap can beat; 0 where nothing was proved."""

    @property
    def mean_watts(self) -> float:
        """Of all workers together, over the step."""
        return self.joules / self.seconds if self.seconds else sum(self.watts.values())


def plan_clocks(
    schedule: Schedule, costs: Costs, powers: Mapping[int, Power], cap_watts: float, network: Network | None = None,
    *, tolerance: float = 1e-6,
) -> Clocks:  # fmt: skip
    """The clocks of the least step whose workers, were they all to compute at once, draw `cap_watts` at most; of those
    whose steps are longer by a share of up to `tolerance`, the ones that take the least energy.

    `powers` has each worker of the schedule; `costs` are those at nominal clocks. What is not compute - transfers,
    copies, sums, STEP - takes as long at any clock. Raises ClockError for a cap that cannot be kept and for powers
    that do not fit the schedule, and what `simulate` raises.
    """
    if not 1e-6 <= tolerance <= 1:
        raise ClockError(f"tolerance is {tolerance!r}; allowed: 1e-06 to 1")
    problem = ClockProblem(schedule, costs, powers, cap_watts, network)
    if not problem.workers:
        return at_clocks(schedule, costs, powers, {}, network)
    relaxed = relax(problem, tolerance)
    clocks, bound_s = relaxed.clocks, relaxed.bound_s
    if problem.discrete:
        clocks, _, bound_s = stepped(problem, relaxed, tolerance)
    clock = {w: _inside(powers[w], float(f)) for w, f in zip(problem.workers, clocks, strict=True)}
    return at_clocks(schedule, costs, powers, clock, network, bound_s=bound_s)


def even_clocks(powers: Mapping[int, Power], cap_watts: float) -> dict[int, float]:
    """The same clock for all, up to the nominal one, as high as the cap allows; the nearest below it for whom it is
    none of theirs. What a power limit on every device does. Raises ClockError where the lowest clocks exceed the cap.
    """

    def all_at(clock: float) -> dict[int, float]:
        return {worker: power.below(clock) for worker, power in powers.items()}

    def draws(clock: float) -> float:
        return sum(powers[worker].watts(f) for worker, f in all_at(clock).items())

    low, high = 0.01, 1.0
    if draws(high) <= cap_watts:
        return all_at(high)
    if draws(low) > cap_watts:
        raise ClockError(
            f"the cap is {cap_watts:g} W; {len(powers)} workers at their lowest clocks may draw {draws(low):g} W; "
            "allowed: that or more"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if draws(middle) <= cap_watts else (low, middle)
    return all_at(low)


def at_clocks(
    schedule: Schedule, costs: Costs, powers: Mapping[int, Power], clock: Mapping[int, float],
    network: Network | None = None, *, bound_s: float = 0.0,
) -> Clocks:  # fmt: skip
    """What a step takes at given clocks, whether or not they keep a cap. Raises ClockError for a clock that a worker
    cannot have, and what `simulate` raises."""
    problem = ClockProblem(schedule, costs, powers, float("inf"), network)
    for worker in problem.workers:
        if worker not in clock:
            raise ClockError(f"clocks have no worker {worker}; allowed: one for each worker of the schedule")
        if not powers[worker].allowed(clock[worker]):
            low, high = powers[worker].range
            among = f"one of {powers[worker].steps}" if powers[worker].steps else f"{low:g} to {high:g}"
            raise ClockError(f"the clock of worker {worker} is {clock[worker]:g}; allowed: {among}")
    step = step_at(problem, [clock[w] for w in problem.workers])
    dynamic = {w: (powers[w].watts(clock[w]) - powers[w].static) * step.busy_s[w] for w in problem.workers}
    static = {w: powers[w].static * step.seconds for w in problem.workers}
    whole = step.seconds or 1.0
    return Clocks(
        {w: float(clock[w]) for w in problem.workers}, step.seconds, sum(dynamic.values()) + sum(static.values()),
        problem.peak_watts(clock), {w: step.busy_s[w] / whole for w in problem.workers},
        {w: (dynamic[w] + static[w]) / whole for w in problem.workers}, bound_s,
    )  # fmt: skip


def _inside(power: Power, clock: float) -> float:
    """Off by a rounding at most."""
    low, high = power.range
    return min(high, max(low, clock))
