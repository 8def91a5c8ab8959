"""The best clocks where any clock within the range can be had: a convex programme over critical paths.

In u = 1 / clock a path is linear, and power and energy are convex. So the least step under the cap is found by
cutting planes (Kelley 1960): solve for the paths that are known, simulate, and add the path that turned out to be the
longest, until it is one that is known. Each of these problems is solved by Newton's method under a log barrier (Boyd
and Vandenberghe, Convex Optimization, 11.3). What they find is a lower bound on the step at any clocks under the cap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from schedulers.frequency_search.paths import CriticalPath, TimedStep, step_at
from schedulers.frequency_search.power import ClockProblem, Vector

_EQUAL, _WORTH = 1e-6, 1e-4  # shares of a step, and of its energy, that are not looked for
_ROUNDS, _SAVING, _NEWTON, _SHARPEST = 300, 80, 50, 1e9


@dataclass(frozen=True)
class Relaxed:
    """Clocks in the order of the workers, their step, those before energy was saved, and seconds that no clocks under
    the cap can beat.

    `prices`, seconds per second of each of `paths`, and `per_watt`, seconds per watt, are the multipliers that prove
    it.
    """

    clocks: Vector
    step: TimedStep
    fastest: Vector
    bound_s: float
    paths: tuple[CriticalPath, ...]
    prices: Vector
    per_watt: float


@dataclass(frozen=True)
class _Model:
    """The programme in numbers; `lo` and `hi` of u, `spare` watts above the static ones, `work` of a step."""

    lo: Vector
    hi: Vector
    bound: Vector
    dynamic: Vector
    exponent: Vector
    spare: float
    work: Vector
    scale: float

    def power(self, u: Vector) -> tuple[Vector, Vector, Vector]:
        """Dynamic watts by worker, as a share of `spare`, and two derivatives."""
        e, p = self.exponent, self.dynamic / self.spare * u**-self.exponent
        return p, -e * p / u, e * (e + 1) * p / u**2

    def energy(self, u: Vector) -> tuple[Vector, Vector, Vector]:
        """Dynamic joules by worker, as a share of `spare` for `scale` seconds, and two derivatives."""
        (p, p1, p2), w, x = self.power(u), self.work / self.scale, self.bound * u + 1 - self.bound
        return w * x * p, w * (self.bound * p + x * p1), w * (2 * self.bound * p1 + x * p2)


def relax(problem: ClockProblem, tolerance: float) -> Relaxed:
    """The least step under the cap, and of the clocks that reach it, but for a share of `tolerance`, those that take
    the least energy."""
    hi = np.array([1 / problem.powers[w].range[0] for w in problem.workers])
    lo = np.array([1 / problem.powers[w].range[1] for w in problem.workers])
    slowest = step_at(problem, 1 / hi)
    bound, dynamic, exponent = problem.of("bound"), problem.of("dynamic"), problem.of("exponent")
    stretch = bound * hi + 1 - bound
    work = np.array([slowest.busy_s[w] for w in problem.workers]) / stretch
    lo = np.where(bound * work > 0, lo, hi)  # a clock that changes nothing is low
    spare = problem.cap - float(problem.of("static").sum())
    known = [slowest.path]
    if spare <= 0 or float((dynamic * hi**-exponent).sum()) >= spare * (1 - 1e-9) or not (hi > lo).any():
        u = np.where(dynamic == 0, lo, hi)  # what draws nothing may be high
        only = step_at(problem, 1 / u)
        return Relaxed(1 / u, only, 1 / u, only.seconds, (only.path,), np.ones(1), 0.0)
    model = _Model(lo, hi, bound, dynamic, exponent, spare, work, slowest.seconds)
    share = next(s for s in (0.5, 0.9, 0.99, 0.999, 1 - 1e-6, 1 - 1e-9) if model.power(lo + s * (hi - lo))[0].sum() < 1)
    middle = lo + share * (hi - lo)

    fastest = step_at(problem, 1 / lo)
    known.append(fastest.path)
    best, u = slowest, hi
    bound_s, prices, per_watt = fastest.seconds, np.array([0.0, 1.0]), 0.0
    if model.power(lo)[0].sum() <= 1:
        best, u = fastest, lo
    for _ in range(_ROUNDS):
        if best.seconds <= bound_s * (1 + _EQUAL / 4):
            break
        found = _least(model, known, u + 0.1 * (middle - u), None)
        if found[1] > bound_s:
            bound_s, prices, per_watt = found[1:]
        tried = step_at(problem, 1 / found[0])
        if tried.seconds < best.seconds:
            best, u = tried, found[0]
        known.append(tried.path)
    bound_s = min(bound_s, best.seconds)
    fast = u
    u, best = _saved(problem, model, known, u, best, middle, tolerance)
    prices = np.array([*prices, *[0.0] * (len(known) - len(prices))])
    return Relaxed(1 / u, best, 1 / fast, bound_s, tuple(known), prices, per_watt)


def _saved(
    problem: ClockProblem, model: _Model, known: list[CriticalPath], u: Vector, best: TimedStep, middle: Vector,
    tolerance: float,
) -> tuple[Vector, TimedStep]:  # fmt: skip
    """Less energy, in a step as long."""
    limit = best.seconds * (1 + tolerance)
    slow = step_at(problem, 1 / middle).seconds
    for _ in range(_SAVING):
        room = (limit - best.seconds) / 2
        near = u + min(0.1, max(1e-12, room) / max(slow - best.seconds, 1e-300)) * (middle - u)
        found = _least(model, known, near, limit)[0]
        had = float(model.energy(u)[0].sum())
        if model.energy(found)[0].sum() >= had * (1 - _WORTH):  # no clocks save more
            break
        tried = step_at(problem, 1 / found)
        if tried.seconds > limit:
            known.append(tried.path)  # the step is convex: it holds a part of the way
            found = u + 0.99 * (limit - best.seconds) / (tried.seconds - best.seconds) * (found - u)
            if model.energy(found)[0].sum() >= had * (1 - _WORTH):
                continue
            tried = step_at(problem, 1 / found)
        u, best = found, tried
    return u, best


def _least(
    model: _Model, paths: Sequence[CriticalPath], start: Vector, limit: float | None
) -> tuple[Vector, float, Vector, float]:
    """The least step over the paths, or, within `limit` seconds, the least energy: u; seconds that no u can beat; and
    the prices of paths and of a watt. `start` keeps the cap and the limit with something to spare."""
    barrier = _Barrier(model, paths, limit)
    at = np.append(start[barrier.free], 0.0)
    at[-1] = 1.1 * -barrier.slack(at).min() if limit is None else limit / model.scale
    sharp = 10.0
    while True:
        for _ in range(_NEWTON):
            gradient, hessian = barrier.derivatives(at, sharp)
            step = np.zeros(len(at))
            step[: len(gradient)] = -np.linalg.solve(hessian, gradient)
            fall = -float(gradient @ step[: len(gradient)])
            before, length = barrier.value(at, sharp), 1.0
            while fall >= 1e-9 and barrier.value(at + length * step, sharp) > before - 0.1 * length * fall:
                length /= 2
                if length < 1e-12:
                    fall = 0.0
            if fall < 1e-9:
                break
            at = at + length * step
        if sharp >= _SHARPEST:
            break
        sharp = min(sharp * 20, _SHARPEST)
    prices = 1 / (sharp * barrier.slack(at))
    bound_s = (float(at[-1]) - barrier.count / sharp) * model.scale
    return barrier.whole(at), bound_s, prices / prices.sum(), model.scale / (sharp * barrier.left(at) * model.spare)


class _Barrier:
    """Of the paths, the ranges and the cap, over a vector of those u that are free, and the step in units of `scale`,
    which is fixed where there is a limit."""

    def __init__(self, model: _Model, paths: Sequence[CriticalPath], limit: float | None) -> None:
        self.model, self.timed = model, limit is None
        self.free = model.hi > model.lo
        self.lo, self.hi = model.lo[self.free], model.hi[self.free]
        slope = np.array([path.work for path in paths]) * model.bound / model.scale
        self.rest = np.array([path.constant + path.work @ (1 - model.bound) for path in paths]) / model.scale
        self.rest += slope[:, ~self.free] @ model.lo[~self.free]
        self.slope = slope[:, self.free]
        self.count = len(paths) + 2 * len(self.lo) + 1

    def whole(self, at: Vector) -> Vector:
        """All u, those that are not free too."""
        u = self.model.lo.copy()
        u[self.free] = at[:-1]
        return u

    def slack(self, at: Vector) -> Vector:
        """By path: what is left of the step."""
        return at[-1] - self.rest - self.slope @ at[:-1]

    def left(self, at: Vector) -> float:
        """What is left of the watts to spare, as a share."""
        return 1 - float(self.model.power(self.whole(at))[0].sum())

    def value(self, at: Vector, sharp: float) -> float:
        """What Newton's method makes least; infinite outside."""
        gaps = np.concatenate((self.slack(at), at[:-1] - self.lo, self.hi - at[:-1], [self.left(at)]))
        if gaps.min() <= 0:
            return np.inf
        aim = at[-1] if self.timed else self.model.energy(self.whole(at))[0].sum()
        return sharp * float(aim) - float(np.log(gaps).sum())

    def derivatives(self, at: Vector, sharp: float) -> tuple[Vector, Vector]:
        """Gradient and Hessian, without the step where that is fixed."""
        u, free, n = self.whole(at), self.free, len(self.lo)
        _, p1, p2 = self.model.power(u)
        below, above, left = 1 / (at[:-1] - self.lo), 1 / (self.hi - at[:-1]), self.left(at)
        pull = 1 / self.slack(at)
        weighted = self.slope * pull[:, None]
        gradient = self.slope.T @ pull - below + above + p1[free] / left
        hessian = weighted.T @ weighted + np.outer(p1[free], p1[free]) / left**2
        diagonal = below**2 + above**2 + p2[free] / left
        if not self.timed:
            _, e1, e2 = self.model.energy(u)
            gradient += sharp * e1[free]
            diagonal = diagonal + sharp * e2[free]
        hessian[np.arange(n), np.arange(n)] += diagonal
        if not self.timed:
            return gradient, hessian
        across = -(weighted.T @ pull)[:, None]
        whole = np.block([[hessian, across], [across.T, np.array([[float((pull**2).sum())]])]])
        return np.append(gradient, sharp - float(pull.sum())), whole
