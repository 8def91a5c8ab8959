"""The best clocks where a worker has only certain ones: branch and bound over the workers.

Three bounds leave out most of the tree: the longest known path with the rest as fast as the cap lets each of them be;
the multipliers of the convex programme, under which every worker's part of the bound is its own; and, once the least
step is known, the energy that the rest takes at its least. What is left is simulated, and adds its critical path.
"""

from __future__ import annotations

import numpy as np

from schedulers.frequency_search.paths import TimedStep, step_at
from schedulers.frequency_search.power import ClockProblem, Vector
from schedulers.frequency_search.relaxed import Relaxed

MOST_NODES = 20_000
"""Of each of the two searches: about a second. Four workers with five clocks each are 780."""


def stepped(problem: ClockProblem, relaxed: Relaxed, tolerance: float) -> tuple[Vector, TimedStep, float]:
    """Clocks that are steps, their step, and seconds that no others under the cap can beat."""
    tree = _Tree(problem, relaxed)
    tree.start(tree.rounded())
    whole = tree.search(energy=False)
    bound_s = tree.found[1].seconds if whole else relaxed.bound_s
    tree.limit = tree.found[1].seconds * (1 + tolerance)
    tree.lower()
    tree.search(energy=True)
    return np.array(tree.found[0]), tree.found[1], bound_s


class _Tree:
    """By worker and step, ascending: watts, stretch, part of the bound, and joules above the static ones."""

    found: tuple[list[float], TimedStep]
    least_joules: float
    limit: float
    """Seconds that a step must stay below."""

    def __init__(self, problem: ClockProblem, relaxed: Relaxed) -> None:
        self.problem, self.fastest, self.thriftiest = problem, relaxed.fastest, relaxed.clocks
        self.constants = np.array([path.constant for path in relaxed.paths])
        self.works = np.array([path.work for path in relaxed.paths])
        self.prices, per_watt = relaxed.prices @ self.works, relaxed.per_watt
        self.base = float(relaxed.prices @ self.constants) - per_watt * problem.cap
        self.cap = problem.cap * (1 + 1e-12)
        self.steps: list[tuple[float, ...]] = []
        self.watts: list[list[float]] = []
        self.stretch: list[list[float]] = []
        self.parts: list[list[float]] = []
        self.joules: list[list[float]] = []
        for worker, near, price in zip(problem.workers, relaxed.clocks, self.prices, strict=True):
            power = problem.powers[worker]
            work = relaxed.step.busy_s[worker] / power.stretch(float(near))
            watts, stretch = [power.watts(f) for f in power.steps], [power.stretch(f) for f in power.steps]
            self.steps.append(power.steps)
            self.watts.append(watts)
            self.stretch.append(stretch)
            self.parts.append([float(price) * x + per_watt * w for x, w in zip(stretch, watts, strict=True)])
            self.joules.append([work * x * (w - power.static) for x, w in zip(stretch, watts, strict=True)])

    def rounded(self) -> list[int]:
        """The steps below the clocks of the convex programme, then one up where a watt gains most, while there are."""
        at = [
            max((k for k, f in enumerate(steps) if f <= near + 1e-9), default=0)
            for steps, near in zip(self.steps, self.fastest, strict=True)
        ]
        left = self.cap - sum(watts[k] for watts, k in zip(self.watts, at, strict=True))
        while True:
            gains = {
                i: float(self.prices[i]) * (self.stretch[i][k] - self.stretch[i][k + 1]) / max(more, 1e-12)
                for i, k in enumerate(at)
                if k + 1 < len(self.steps[i]) and (more := self.watts[i][k + 1] - self.watts[i][k]) <= left
            }
            if not gains or max(gains.values()) <= 0:
                return at
            best = max(gains, key=gains.__getitem__)
            left -= self.watts[best][at[best] + 1] - self.watts[best][at[best]]
            at[best] += 1

    def start(self, at: list[int]) -> None:
        """Take these steps as the best so far."""
        clocks = [steps[k] for steps, k in zip(self.steps, at, strict=True)]
        step = step_at(self.problem, clocks)
        self.found, self.limit = (clocks, step), step.seconds * (1 - 1e-9)
        self.least_joules = self._joules(at)

    def lower(self) -> None:
        """One step down where that saves most and keeps the step below the limit, while there is such a worker. From
        the best so far, and from just above the clocks of the convex programme."""
        above = [
            min((k for k, f in enumerate(steps) if f >= near - 1e-9), default=len(steps) - 1)
            for steps, near in zip(self.steps, self.thriftiest, strict=True)
        ]
        best = [steps.index(f) for steps, f in zip(self.steps, self.found[0], strict=True)]
        for at in (best, above):
            if sum(watts[k] for watts, k in zip(self.watts, at, strict=True)) > self.cap:
                continue
            left = set(range(len(at)))
            self._simulate(at, self._joules(at), energy=True)
            while movable := [i for i in left if at[i]]:
                i = max(movable, key=lambda i: self.joules[i][at[i]] - self.joules[i][at[i] - 1])
                at[i] -= 1
                if not self._simulate(at, self._joules(at), energy=True):
                    at[i] += 1
                    left.remove(i)

    def _joules(self, at: list[int]) -> float:
        return sum(joules[k] for joules, k in zip(self.joules, at, strict=True))

    def search(self, *, energy: bool) -> bool:
        """The least step below the limit, or, for `energy`, the least joules of the steps below it. Whether all of the
        tree was looked at."""
        count, nodes = len(self.steps), 0
        order = sorted(range(count), key=lambda i: (-float(self.prices[i]), i))
        watts_of, parts_of, joules_of = [[0.0] * (count + 1) for _ in range(3)]
        for depth in reversed(range(count)):
            for of, values in ((watts_of, self.watts), (parts_of, self.parts), (joules_of, self.joules)):
                of[depth] = of[depth + 1] + min(values[order[depth]])
        chosen, stretches = [0] * count, np.zeros(count)

        def down(depth: int, watts: float, part: float, joules: float) -> None:
            nonlocal nodes
            nodes += 1
            room = self.cap - watts - watts_of[depth]
            if room < 0 or part + parts_of[depth] >= self.limit or nodes > MOST_NODES:
                return
            if energy and joules + joules_of[depth] >= self.least_joules:
                return
            for i in order[depth:]:
                most = room + self.watts[i][0]
                stretches[i] = self.stretch[i][max(k for k, w in enumerate(self.watts[i]) if w <= most or k == 0)]
            if float((self.constants + self.works @ stretches).max()) >= self.limit:
                return
            if depth == count:
                self._simulate(chosen, joules, energy=energy)
                return
            i = order[depth]
            near = float(self.thriftiest[i] if energy else self.fastest[i])
            for k in sorted(range(len(self.steps[i])), key=lambda k: abs(self.steps[i][k] - near)):
                chosen[i], stretches[i] = k, self.stretch[i][k]
                down(depth + 1, watts + self.watts[i][k], part + self.parts[i][k], joules + self.joules[i][k])

        down(0, 0.0, self.base, 0.0)
        return nodes <= MOST_NODES

    def _simulate(self, at: list[int], joules: float, *, energy: bool) -> bool:
        """Take these steps as the best so far, if their step is below the limit; whether it is."""
        stretches = np.array([values[k] for values, k in zip(self.stretch, at, strict=True)])
        if float((self.constants + self.works @ stretches).max()) >= self.limit:
            return False
        clocks = [steps[k] for steps, k in zip(self.steps, at, strict=True)]
        step = step_at(self.problem, clocks)
        self.constants = np.append(self.constants, step.path.constant)
        self.works = np.vstack((self.works, step.path.work))
        if step.seconds >= self.limit:
            return False
        if not energy:
            self.limit = step.seconds * (1 - 1e-9)
        if not energy or joules < self.least_joules:
            self.found, self.least_joules = (clocks, step), joules
        return True
