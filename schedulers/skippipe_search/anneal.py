"""Local search over paths, and over the cut into stages: simulated annealing, first by an estimate, then by the clock.

The estimate times each home alone, as if nobody stood in anybody's way elsewhere; it costs microseconds and leads to
the neighbourhood in which the clock, a hundred times dearer, finishes. All moves keep paths legal and visits balanced:
two microbatches exchange a node or all that they visit, a path turns a pair of stages round, a node takes the place
of another that has visits to spare, and two nodes exchange names, which moves them between stages where the cut is
searched too. The budget is either a number of moves, which makes the result depend on the seed alone, or seconds.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from schedulers.skippipe_search.clock import PathClock, Rule
from schedulers.skippipe_search.problem import Path, RoutingProblem, quotas

_ESTIMATED = 0.3  # of the budget
_HOT, _COLD = 0.006, 0.0006  # temperatures, as shares of the iteration at the start
_WORSE = 0.2  # of an iteration: a move that makes its paths so much longer is not looked at
_PAIRS = 4  # how many moves by the estimate count as one by the clock
_SLOPES = ((0.05, 0.3), (0.1, 0.0))  # what the mean home and the mean microbatch count beside the slowest home
_CHAIN, _MOST_CHAINS = 8000, 8  # moves by the clock that a chain is worth starting for


@dataclass
class Budget:
    """`moves` by the clock, or `seconds`; a search may also be told that it has reached what cannot be beaten."""

    moves: int | None = None
    seconds: float | None = None
    began: float = field(default_factory=time.monotonic)

    def part(self, share: float) -> Budget:
        """So much of it, from now on."""
        return Budget(
            None if self.moves is None else int(self.moves * share),
            None if self.seconds is None else max(0.0, self.seconds - (time.monotonic() - self.began)) * share,
        )

    def progress(self, moves: float) -> float:
        """From 0 to 1, when so many moves have been made."""
        if self.seconds is not None:
            return (time.monotonic() - self.began) / max(1e-9, self.seconds)
        return moves / max(1, self.moves or 0)


@dataclass(frozen=True)
class Annealed:
    """The best there was: its stages, its paths, whom idle nodes serve, and the seconds of its iteration."""

    stages: tuple[tuple[int, ...], ...]
    paths: tuple[Path, ...]
    rule: Rule
    iteration_s: float


def anneal(
    problem: RoutingProblem, starts: Sequence[Sequence[Path]], budget: Budget, *, seed: int = 0, joint: bool = False,
    bound: float = 0.0,
) -> Annealed:  # fmt: skip
    """The best paths found from `starts`; at `bound` the search ends at once. `joint` searches the stages too.

    Several chains, each with a seed of its own, as many as the budget leaves long enough; then one from the best.
    """
    judged = [_Search(problem, start, seed, joint).judge() for start in starts]
    ranking = sorted(range(len(starts)), key=lambda i: judged[i].iteration_s)
    starts, best = [starts[i] for i in ranking], judged[ranking[0]]
    chains = _chains(problem, starts[0], budget)
    for chain in range(chains + 1):
        if best.iteration_s <= bound * (1 + 1e-6) or problem.path_length == 1:
            break
        last = chain == chains
        start = starts[chain % len(starts)]
        search = _Search(problem, start, seed * 1000 + chain, joint, _SLOPES[chain // len(starts) % len(_SLOPES)])
        part = budget.part(1.0 if last else 1 / (chains + 1 - chain))
        if last:
            search.load(best)
        else:
            search.descend(part.part(_ESTIMATED), search.estimate, _PAIRS)
        search.descend(part.part(1.0), search.exact, 1, bound)
        best = min(best, search.judge(), key=lambda found: found.iteration_s)
    return best


def _chains(problem: RoutingProblem, start: Sequence[Path], budget: Budget) -> int:
    """How many chains before the last one; none where the budget is for one alone."""
    moves = budget.moves
    if moves is None:
        began = time.monotonic()
        PathClock(problem).finish(start)
        moves = int((budget.seconds or 0.0) / max(1e-5, time.monotonic() - began))
    return min(_MOST_CHAINS, moves // _CHAIN)


class _Search:
    """The current paths and stages, moves on them, and two ways to say what they are worth."""

    def __init__(
        self,
        problem: RoutingProblem,
        start: Sequence[Path],
        seed: int,
        joint: bool,
        slope: tuple[float, float] = _SLOPES[0],
    ) -> None:
        self.problem, self.joint, self.slope = problem, joint, slope
        self.random = random.Random(seed)
        self.clock = PathClock(problem)
        self.homes = len(problem.homes)
        self.nodes = [n for stage in problem.stages for n in stage]
        self.paths: list[Path] = list(start)
        self.stage_of = problem.stage_of
        (self.stage_least, self.stage_most), self.quota = quotas(problem)
        self.uneven = self.stage_least != self.stage_most or any(a != b for a, b in self.quota.values())
        self.worst, self.slowest = 0, math.inf
        self.own: list[float] = []  # by home, as estimated
        self.trips: list[float] = []

    def load(self, found: Annealed) -> None:
        self.paths = list(found.paths)
        cut = self.problem.with_stages(found.stages)
        self.stage_of, self.quota = cut.stage_of, quotas(cut)[1]

    def judge(self) -> Annealed:
        """The current paths by the clock, under the better rule."""
        seconds, rule = self.clock.best(self.paths)
        others = (
            tuple(sorted(n for n in self.nodes if self.stage_of[n] == i)) for i in range(1, len(self.problem.stages))
        )
        homes = tuple(path[0] for path in self.paths[: self.homes])
        return Annealed((homes, *others), tuple(self.paths), rule, seconds)

    # ---- what paths are worth ----

    def worth(self, by_home: list[float], all_: list[float]) -> float:
        """The slowest home counts most; the next ones, and the sum over `all_` microbatches, a little, so that there
        is a slope where it is not them."""
        ordered = sorted(by_home, reverse=True)
        self.worst, self.slowest = by_home.index(ordered[0]), ordered[0]
        if math.isinf(ordered[0]):
            return math.inf
        second, third = (*ordered, 0.0, 0.0)[1:3]
        (home, each), mean = self.slope, math.fsum(ordered) / len(ordered)
        return ordered[0] + 0.1 * second + 0.05 * third + home * mean + each * math.fsum(all_) / len(all_)

    def exact(self, _: dict[int, Path] | None) -> float:
        """By the clock, which times all microbatches anew, whichever are new."""
        finish = self.clock.finish(self.paths)
        return self.worth([max(finish[home :: self.homes]) for home in range(self.homes)], finish)

    def estimate(self, changed: dict[int, Path] | None) -> float:
        """Each home alone; `changed` are the microbatches whose paths are new, None for all."""
        if changed is None:
            self.trips = [self.problem.round_trip(path) for path in self.paths]
            self.own = [self._alone(home) for home in range(self.homes)]
        else:
            for m, path in changed.items():
                self.trips[m] = self.problem.round_trip(path)
            for home in {m % self.homes for m in changed}:
                self.own[home] = self._alone(home)
        return self.worth(self.own, self.trips)

    def _alone(self, home: int) -> float:
        """One home's iteration when its microbatches are back after their round trips, first come, first served."""
        trips, node = self.trips[home :: self.homes], self.paths[home][0]
        forward, _, backward = self.clock.times[node]
        gap, now, end, begun = self.clock.gap, 0.0, 0.0, 0
        free, back = [0.0] * min(self.problem.slots[node], len(trips)), list[float]()
        while begun < len(trips) or back:
            start = max(now, free[0]) if begun < len(trips) and free else math.inf
            if not back or start <= max(now, back[0]):  # what waits since the beginning has come first
                heappush(back, start + trips[begun] - backward)
                heappop(free)
                now, begun = start + forward + gap, begun + 1
            else:
                end = max(now, heappop(back)) + backward
                now = end + gap
                heappush(free, end)
        return end

    # ---- annealing ----

    def descend(
        self, budget: Budget, worth: Callable[[dict[int, Path] | None], float], per_move: int, bound: float = 0.0
    ) -> None:
        """Anneal by `worth`; the best paths seen are the current ones afterwards. Ends where the slowest home is at
        `bound`."""
        now = worth(None)
        best, kept = now, (list(self.paths), dict(self.stage_of), dict(self.quota))
        scale = self.problem_scale(now)
        made = 0
        while (progress := budget.progress(made / per_move)) < 1:
            made += 1
            changed, names = self.propose()
            if not changed and names is None:
                continue
            old = {m: self.paths[m] for m in changed}
            trips = sum(map(self.problem.round_trip, changed.values())) - sum(
                map(self.problem.round_trip, old.values())
            )
            if trips > _WORSE * scale:
                continue
            worst = self.worst
            self.apply(changed, names)
            then = worth(changed)
            heat = scale * _HOT * (_COLD / _HOT) ** progress
            if then <= now or self.random.random() < math.exp((now - then) / heat):
                now = then
                if now < best - 1e-9:
                    best, kept = now, (list(self.paths), dict(self.stage_of), dict(self.quota))
                    if self.slowest <= bound * (1 + 1e-6):
                        break
            else:
                self.apply(old, names)
                if worth == self.estimate:
                    worth(old)
                self.worst = worst
        self.paths, self.stage_of, self.quota = kept

    def problem_scale(self, worth: float) -> float:
        """Seconds that temperatures are shares of."""
        if math.isfinite(worth):
            return worth / 1.25
        return max(self.problem.round_trip(path) for path in self.paths)

    def apply(self, changed: dict[int, Path], names: tuple[int, int] | None) -> None:
        for m, path in changed.items():
            self.paths[m] = path
        if names is not None:
            a, b = names
            self.stage_of[a], self.stage_of[b] = self.stage_of[b], self.stage_of[a]
            shares = self.quota.pop(a, None), self.quota.pop(b, None)
            self.quota |= {node: share for node, share in ((b, shares[0]), (a, shares[1])) if share is not None}

    # ---- moves ----

    def propose(self) -> tuple[dict[int, Path], tuple[int, int] | None]:
        """New paths by microbatch, and the two nodes that exchange names, if any do."""
        kind = self.random.random()
        if kind < (0.2 if self.joint else 0.1):
            return self._rename()
        count = len(self.paths)
        a = self.random.randrange(count)
        if self.random.random() < 0.4:
            a = self.worst + self.homes * self.random.randrange(count // self.homes)
        b = self.random.randrange(count)
        if kind < 0.3 and self.problem.swaps:
            return self._kept({a: self._ordered(self.paths[a][0], self.paths[a][1:])}), None
        if a == b:
            return {}, None
        one, two = self.paths[a], self.paths[b]
        if kind < 0.45:
            return self._kept({a: self._ordered(one[0], two[1:]), b: self._ordered(two[0], one[1:])}), None
        if kind < 0.55 and self.uneven:
            return self._replace(a), None
        i, j = self.random.randrange(1, len(one)), self.random.randrange(1, len(two))
        x, y = one[i], two[j]
        if x == y or not (self._fits(one, i, y) and self._fits(two, j, x)):
            return {}, None
        first, second = [*one[1:i], y, *one[i + 1 :]], [*two[1:j], x, *two[j + 1 :]]
        return self._kept({a: self._ordered(one[0], first), b: self._ordered(two[0], second)}), None

    def _kept(self, new: dict[int, Path]) -> dict[int, Path]:
        return {m: path for m, path in new.items() if path != self.paths[m]}

    def _fits(self, path: Path, at: int, node: int) -> bool:
        """Whether `node` may stand there: its stage is not visited elsewhere on the path."""
        stage = self.stage_of[node]
        return all(i == at or self.stage_of[other] != stage for i, other in enumerate(path))

    def _ordered(self, home: int, visited: Sequence[int]) -> Path:
        """The path in ascending order of stages; with swaps, mostly in the cheapest order that is legal."""
        path = (home, *sorted(visited, key=self.stage_of.__getitem__))
        if not self.problem.swaps or len(path) < 3:
            return path
        turned = [(*path[:i], path[i + 1], path[i], *path[i + 2 :]) for i in range(1, len(path) - 1)]
        if self.random.random() < 0.2:
            return self.random.choice([path, *turned])
        return min((path, *turned), key=self.problem.travel)

    def _replace(self, a: int) -> dict[int, Path]:
        """Another node for one of a path's, where both counts allow it."""
        path, visits = self.paths[a], Counter(n for p in self.paths for n in p[1:])
        at = self.random.randrange(1, len(path))
        old, new = path[at], self.random.choice(self.nodes)
        if new not in self.quota or old not in self.quota or self.stage_of[new] == 0 or not self._fits(path, at, new):
            return {}
        if visits[old] - 1 < self.quota[old][0] or visits[new] + 1 > self.quota[new][1]:
            return {}
        if (s := self.stage_of[old]) != (t := self.stage_of[new]):
            counts = Counter(self.stage_of[n] for n, k in visits.items() for _ in range(k))
            if counts[s] - 1 < self.stage_least or counts[t] + 1 > self.stage_most:
                return {}
        return {a: self._ordered(path[0], [*path[1:at], new, *path[at + 1 :]])}

    def _rename(self) -> tuple[dict[int, Path], tuple[int, int] | None]:
        """Two nodes exchange all that they do. Between stages only where the cut is searched, and where neither comes
        to sit behind too slow a link to its new replicas."""
        a, b = self.random.sample(self.nodes, 2)
        s, t = self.stage_of[a], self.stage_of[b]
        if s != t:
            if not self.joint or self.problem.slots[a] != self.problem.slots[b]:
                return {}, None
            for node, old, stage in ((b, a, s), (a, b, t)):
                hops = (self.problem.hop_s[node][n] for n in self.nodes if self.stage_of[n] == stage and n != old)
                if max(hops, default=0.0) > self.problem.replica_hop_s:
                    return {}, None
        elif s == 0 or self.quota[a] != self.quota[b]:
            return {}, None  # homes are dealt in a fixed order; what they do is exchanged by other moves
        names = {a: b, b: a}
        changed = {
            m: tuple(names.get(n, n) for n in path) for m, path in enumerate(self.paths) if a in path or b in path
        }
        return changed, (a, b) if s != t else None
