"""Local search over paths, and over the cut into stages: simulated annealing, first by an estimate, then by the clock.

The estimate times each home alone, as if nobody stood in anybody's way elsewhere; it costs a microsecond and leads to
the neighbourhood in which the clock, far dearer, finishes. Moves and clock are compiled (compiled_*.py); here the
budget is dealt out in slices. It is either a number of moves, which makes the result depend on the seed alone, or
seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from schedulers.skippipe_search.clock import RULES, Rule, Run
from schedulers.skippipe_search.flat import State, flatten, room_of, state_of
from schedulers.skippipe_search.problem import Path, RoutingProblem

_ESTIMATED = 0.3  # of the budget
_HOT, _COLD = 0.006, 0.0006  # temperatures, as shares of the iteration at the start
_MANY = 16  # homes from which on the slowest ones are too few to lead a search
_SUMS = ((False, 2.0, 0.01, 0.0005, 0.4), (True, 3.0, 0.004, 0.0005, 0.6), (True, 8.0, 0.002, 0.0003, 0.7))
"""Then, one after another: by the clock or not, the power of the sum, temperatures, and the share of what is left."""
_PAIRS = 4  # how many moves by the estimate count as one by the clock
_SLOPES = ((0.05, 0.3), (0.1, 0.0))  # what the mean home and the mean microbatch count beside the slowest home
_CHAIN, _MOST_CHAINS = 250_000, 8  # moves by the clock that a chain is worth starting for
_OP_S = 5e-8  # seconds of a move by the clock, per op of an iteration, roughly
_ITSELF = 0.9  # of the iteration: a home that is so slow alone is what a repair begins with
_REPAIR = 4000  # moves for that
_SLICE_S = 0.02
_SLICES = 100  # of a budget in moves


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

    def less(self, used: Budget) -> Budget:
        """What is left of it after a part; seconds pass by themselves."""
        return self if self.moves is None else Budget(self.moves - (used.moves or 0))

    def progress(self, moves: int) -> float:
        """From 0 to 1, when so many moves have been made."""
        if self.seconds is not None:
            return (time.monotonic() - self.began) / max(1e-9, self.seconds)
        return moves / self.moves if self.moves else 1.0


@dataclass(frozen=True)
class Annealed:
    """The best there was: its stages, its paths, whom idle nodes serve, and the iteration."""

    stages: tuple[tuple[int, ...], ...]
    paths: tuple[Path, ...]
    rule: Rule
    run: Run


def anneal(
    problem: RoutingProblem, starts: Sequence[Sequence[Path]], budget: Budget, *, seed: int = 0, joint: bool = False,
    bound: float = 0.0, cores: int | None = None,
) -> Annealed:  # fmt: skip
    """The best paths found from `starts`; at `bound` the search ends at once. `joint` searches the stages too.

    Several chains, each with a seed of its own, as many as the budget leaves long enough, side by side on `cores`, by
    default all that the process may use; then one from the best, or, under a budget in seconds, one on each core. A
    budget in moves leads to the same result on any number of cores.
    """
    from schedulers.compiled import COMPILED  # as in Search

    judging, end = Search(problem, joint), bound * (1 + 1e-6)
    judged = sorted((judging.judge(problem, start) for start in starts), key=lambda found: found.run.iteration_s)
    best, timed, many = judged[0], budget.moves is None, len(problem.homes) >= _MANY
    if problem.path_length == 1 or best.run.iteration_s <= end:
        return best
    cores = (cores or len(os.sched_getaffinity(0))) if COMPILED else 1
    chains = 0 if many else _chains(problem, budget, cores)
    reached: list[int] = []  # chains that came to the bound; -1 where nobody waits any more

    def share(number: int) -> float:
        """What a chain gets of all moves; or of the seconds left as it begins, which later rounds must have some of."""
        if not timed:
            return 1 / (chains + 1)
        return 1.0 if number >= chains else 1 / (-(-chains // cores) - number // cores + 1)

    def chain(best: Annealed, number: int) -> Annealed:
        last, part = number >= chains, budget.part(share(number))
        start = best if last else judged[number % len(judged)]
        search = Search(problem, joint, lambda: any(timed or other < number for other in reached))
        search.slope = _SLOPES[0 if last else number // len(judged) % len(_SLOPES)]
        search.load(problem.with_stages(start.stages), start.paths, seed * 1000 + number)
        if many:
            for exact, power, hot, cold, most in _SUMS:
                search.descend(used := part.part(most), exact=exact, power=power, hot=hot, cold=cold)
                part = part.less(used)
        elif not last or not chains:
            search.descend(used := part.part(_ESTIMATED), exact=False)
            part = part.less(used)
        search.descend(part.part(1.0), bound=bound)
        found = search.judge(*search.current())
        if found.run.iteration_s <= end:
            reached.append(number)
        return found

    with ThreadPoolExecutor(cores) as threads:
        try:
            for numbers in (range(chains), range(chains, chains + (cores if timed else 1))):
                for found in threads.map(chain, [best] * len(numbers), numbers):
                    best = min(best, found, key=lambda each: each.run.iteration_s)
                    if best.run.iteration_s <= end:
                        return best
        finally:
            reached.append(-1)
    return best


@cache
def ready() -> None:
    """Have the search compiled, which takes some seconds unless it was done before."""
    anneal(RoutingProblem([[0.0, 1.0], [1.0, 0.0]], ((0,), (1,)), 2, 1), [[(0, 1)]], Budget(1))


def repair(problem: RoutingProblem, start: Sequence[Path], moves: int, seed: int = 0) -> Annealed:
    """Better paths near `start`: one short chain by the clock, cold from the beginning."""
    search = Search(problem, joint=False)
    if problem.path_length > 1 and moves:
        search.load(problem, start, seed)
        if search.alone() > _ITSELF * min(search.seconds(search.state.paths)):
            search.descend(Budget(_REPAIR), exact=False, hot=2 * _COLD)
        search.descend(Budget(moves), hot=2 * _COLD)
        problem, start = search.current()
    return search.judge(problem, start)


def _chains(problem: RoutingProblem, budget: Budget, cores: int) -> int:
    """How many chains before the last one; none where the budget is for one alone."""
    moves = budget.moves
    if moves is None:
        seconds = cores * (budget.seconds or 0.0)
        moves = int(seconds / (_OP_S * problem.num_microbatches * (2 * problem.path_length + 1)))
    return min(max(_MOST_CHAINS, cores if budget.moves is None else 0), moves // _CHAIN)


class Search:
    """The current paths and stages, and moves on them, until `over()` at the latest."""

    def __init__(self, problem: RoutingProblem, joint: bool, over: Callable[[], bool] = lambda: False) -> None:
        from schedulers.skippipe_search import compiled_search  # takes a third of a second, which others need not

        self.kernels = compiled_search
        self.problem, self.slope, self.over = problem, _SLOPES[0], over
        self.flat, self.room = flatten(problem, joint), room_of(problem)
        self.rules = [self.flat._replace(furthest=rule == "furthest") for rule in RULES]
        self.state: State
        self.made = self.asked = 0
        """Moves so far, and how many of them the clock was asked for."""

    def load(self, problem: RoutingProblem, paths: Sequence[Path], seed: int) -> None:
        """Start from there."""
        self.state = state_of(problem, paths, seed)

    def current(self) -> tuple[RoutingProblem, list[Path]]:
        """The problem under the current stages, and the paths."""
        paths = [tuple(row) for row in self.state.paths.tolist()]
        homes = tuple(path[0] for path in paths[: self.flat.homes])
        names = self.state.stage_of
        others = (tuple(np.flatnonzero(names == i).tolist()) for i in range(1, len(self.problem.stages)))
        return self.problem.with_stages((homes, *others)), paths

    def judge(self, problem: RoutingProblem, paths: Sequence[Path]) -> Annealed:
        """By the clock, under the better rule."""
        rows = np.array(paths, np.int64)
        ends = self.seconds(rows)
        best = ends.index(min(ends))
        served = self.kernels.run_clock(self.rules[best], rows, self.room)
        steps = self.room.lane[:served]
        by_node = np.argsort(steps[:, 0], kind="stable")
        order = [*zip(*steps[by_node, 1:].T.tolist(), strict=True)]  # (microbatch, position), node after node
        cuts = np.searchsorted(steps[by_node, 0], np.arange(len(self.flat.hop) + 1)).tolist()
        lanes = tuple(tuple(order[a:b]) for a, b in pairwise(cuts))
        run = Run(tuple(self.room.finish.tolist()), lanes)
        return Annealed(problem.stages, tuple(map(tuple, paths)), RULES[best], run)

    def seconds(self, rows: NDArray[np.int64]) -> list[float]:
        """Of an iteration with the paths [M, L], under each of RULES."""
        found: list[float] = []
        for flat in self.rules:
            self.kernels.run_clock(flat, rows, self.room)
            found.append(float(self.room.finish.max()))
        return found

    def alone(self) -> float:
        """Seconds of the slowest home, each alone."""
        state = self.state
        state.changed[:], state.tally[0] = np.arange(len(state.changed)), len(state.changed)
        self.kernels.estimated(self.flat, state, self.room, *self.slope)
        return float(state.own.max())

    def descend(
        self,
        budget: Budget,
        *,
        exact: bool = True,
        bound: float = 0.0,
        hot: float = _HOT,
        power: float = 0.0,
        cold: float = _COLD,
    ) -> None:
        """Anneal by the clock, or by the estimate; the best paths seen are the current ones afterwards. Ends where
        the slowest home is at `bound`."""
        flat, state, room, kernels = self.flat, self.state, self.room, self.kernels
        room.shape[0] = 0.0
        state.changed[:], state.tally[0] = np.arange(len(state.changed)), len(state.changed)
        now = about = kernels.estimated(flat, state, room, *self.slope)
        if power:
            room.shape[:] = power, max(float(state.own.mean()), 1e-9)
            state.tally[0] = 0  # nothing is derived anew, but valued in the other way
            now = about = kernels.estimated(flat, state, room, *self.slope)
        state.slow[:] = state.own
        if exact:
            now = kernels.timed(flat, state, room, *self.slope)
            state.slow[:] = room.ends
        scale = float(room.shape[1]) if power else (about if state.slow.max() >= flat.most_s else now) / 1.25
        seconds = np.array([now, now, state.slow.max(), about])
        kept, names = state.paths.copy(), state.stage_of.copy()
        total = None if budget.moves is None else budget.moves * (1 if exact else _PAIRS)
        moves, cool = 16, 1.0
        if total is not None:
            moves, cool = max(1, total // _SLICES), (cold / hot) ** (1 / max(1, total))
            budget = Budget(total)
        end, done = bound * (1 + 1e-6), 0
        while (progress := budget.progress(done)) < 1 and not (exact and seconds[2] <= end) and not self.over():
            began = time.monotonic()
            moves = moves if total is None else min(moves, total - done)
            heat = scale * hot * (cold / hot) ** progress
            self.asked += kernels.descend(
                flat, state, room, kept, names, seconds, exact, moves, heat, cool, *self.slope, end
            )
            done += moves
            if total is None:
                moves = max(1, int(moves * min(2.0, _SLICE_S / max(1e-6, time.monotonic() - began))))
        self.made += done
        state.paths[:], state.stage_of[:] = kept, names
        fresh = state_of(*self.current(), 0)
        fresh.draw[:] = state.draw
        self.state = fresh
