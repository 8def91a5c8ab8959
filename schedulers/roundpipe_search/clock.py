"""Deals units to workers and times them as it goes: one pass, no event queue. The simulator gives the same times.

`round_robin` is RoundPipe's order (arXiv, April 2026): a round begins with the worker that is free first and goes on
with the next one in turn. `ready` gives a unit to the worker that will be through with it first, under the speeds that
were measured, so a slow worker gets what does not hold up the others, or nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.schedule.ops import Schedule, Span
from pipeline.schedule.work_units import BACKWARD, FUSED, Cut, WorkUnit, schedule_of
from schedulers.roundpipe_search.problem import RoundsProblem, sums

RULES = ("round_robin", "ready")
"""How units are dealt."""


@dataclass
class Clock:
    """The times of the workers and microbatches, iteration after iteration: `deal` goes on where the last one ended."""

    problem: RoundsProblem
    rule: str = "round_robin"
    speeds: Sequence[float] = ()
    """How many times as fast each worker is; 1 each if empty."""
    early_head: bool = False
    """Whether a forward right before a backward, a loss' one or one that is run again, may begin before what it needs
    is there. RoundPipe's own simulator allows that; nothing can be run so. For comparing with its figures alone."""
    free: list[float] = field(init=False)
    last: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule is {self.rule!r}; allowed: {', '.join(RULES)}")
        if self.speeds and len(self.speeds) != self.problem.workers:
            raise ValueError(f"speeds has {len(self.speeds)} values; allowed: {self.problem.workers}, one per worker")
        self.free = [0.0] * self.problem.workers
        self._forward, self._backward = sums(self.problem.forward), sums(self.problem.backward)

    def deal(self, row: Sequence[WorkUnit], begin: float = 0.0) -> list[int]:
        """The worker of each unit; `free` then says when each worker is through. Nothing starts before `begin`."""
        problem, hop, free = self.problem, self.problem.hop_s, self.free
        speeds = self.speeds or [1.0] * problem.workers
        ended = [begin] * problem.microbatches
        at = [-1] * problem.microbatches
        homes: list[int] = []
        forwards: dict[Span, dict[int, tuple[float, int]]] = {}  # span -> microbatch -> its forward's end and worker
        ready = self.rule == "ready"
        for unit in row:
            kinds, (lo, hi), chosen = unit
            before = self._forward[hi] - self._forward[lo]
            after = self._backward[hi] - self._backward[lo]
            # What an input is waited for with: a forward's all at once; before a backward its forward is run again.
            if kinds == BACKWARD or (kinds == FUSED and self.early_head):
                head, tail = before, after
            else:
                head, tail = 0.0, before + (after if kinds == FUSED else 0.0)
            made: dict[int, tuple[float, int]] = {}
            if kinds == BACKWARD and lo and not self.early_head:
                made = next((ends for span, ends in forwards.items() if span[0] < lo <= span[1]), made)
            if ready:
                candidates: Sequence[int] = range(problem.workers)
            elif lo == 0 and kinds != BACKWARD:
                candidates = [min(range(problem.workers), key=lambda w: (free[w], w))]
            else:
                candidates = [(self.last + 1) % problem.workers]
            best, times = -1, list[float]()
            for worker in candidates:
                now, own, speed = free[worker], list[float](), speeds[worker]
                first, rest = head / speed, tail / speed
                for m in chosen:
                    if made:
                        end, home = made[m]
                        now = max(now, end if home == worker else end + hop)
                    there = ended[m] + hop if at[m] != worker and at[m] >= 0 else ended[m]
                    now += first
                    now = (there if there > now else now) + rest
                    own.append(now)
                # of two that end alike the one that was busy longest: the other is left for what comes next
                if best < 0 or now < times[-1] - 1e-12 or (now < times[-1] + 1e-12 and free[worker] > free[best]):
                    best, times = worker, own
            for m, end in zip(chosen, times, strict=True):
                ended[m], at[m] = end, best
            if kinds != BACKWARD:
                forwards.setdefault(unit.span, {}).update((m, (ended[m], best)) for m in chosen)
            free[best] = times[-1]
            self.last = best
            homes.append(best)
        return homes

    @property
    def end(self) -> float:
        """When the last worker is through."""
        return max(self.free)


@dataclass(frozen=True)
class Dealt:
    """A row of units and who runs each."""

    problem: RoundsProblem
    cut: Cut
    row: tuple[WorkUnit, ...]
    homes: tuple[int, ...]
    makespan: float

    @property
    def bubble(self) -> float:
        return self.problem.bubble(self.cut, self.makespan)

    def schedule(self, name: str = "roundpipe") -> Schedule:
        """As lanes, with LOAD and OFFLOAD."""
        problem = self.problem
        return schedule_of(self.cut, self.row, self.homes, range(problem.workers), problem.microbatches, name)


def dealt(
    problem: RoundsProblem, cut: Cut, row: Sequence[WorkUnit], rule: str, *, speeds: Sequence[float] = (),
    early_head: bool = False,
) -> Dealt:  # fmt: skip
    """One iteration, by itself."""
    clock = Clock(problem, rule, speeds, early_head)
    homes = clock.deal(row)
    return Dealt(problem, cut, tuple(row), tuple(homes), clock.end)


def repeated(problem: RoundsProblem, row: Sequence[WorkUnit], rule: str, iterations: int) -> float:
    """Seconds of so many iterations one after another where none waits for the one before it, as under an optimizer
    that is one step behind: filling before the first and draining after the last are in it, and nothing else is."""
    clock = Clock(problem, rule)
    for _ in range(iterations):
        clock.deal(row)
    return clock.end
