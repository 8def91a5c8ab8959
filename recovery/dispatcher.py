"""Gives units to workers, takes what they give back, and counts every gradient exactly once.

It knows workers only by what they have and how fast they are. A unit that comes back is given out again; what others
wait for in vain meanwhile is taken back as well, so that nobody waits behind his own cure.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pipeline.schedule.ops import B, Span
from pipeline.schedule.work_units import WorkUnit
from pipeline.state.host_optimizer import HostOptimizer
from pipeline.wire import WireError
from recovery.runs import Fact, Given, Iteration, PoolMember

ROOM = 2
"""Work units that a worker has at once: one under way, one whose weights are being loaded."""


class Deal(Protocol):
    """Gives a unit to a worker. `free`: seconds until each is through with what it has; `speeds`: as measured."""

    def __call__(self, unit: WorkUnit, free: Mapping[int, float], speeds: Mapping[int, float], /) -> int: ...


class Dispatcher:
    """The runs under way, the free gradient blocks, and the workers in `members`, which its owner keeps.

    `tell(member, ...)` sends a message; `cost(unit)` is what a microbatch of a unit takes, in any unit.
    """

    def __init__(
        self, members: Mapping[int, PoolMember], tell: Callable[..., None], optimizer: HostOptimizer, blocks: int,
        cost: Callable[[WorkUnit], float], deal: Deal,
    ) -> None:  # fmt: skip
        self.members, self._tell, self._optimizer = members, tell, optimizer
        self._cost, self._deal = cost, deal
        self.active: list[Iteration] = []
        self.blocks = list(range(blocks))
        self._next_order = self._next_run = 0

    @property
    def ready(self) -> list[int]:
        """The workers that can be used."""
        return [member.id for member in self.members.values() if member.channel is not None]

    @property
    def speeds(self) -> dict[int, float]:
        """Worker -> cost units per second; who was not measured yet is taken for an average one."""
        known = [member.rate for member in self.members.values() if member.rate is not None]
        mean = sum(known) / len(known) if known else 1.0
        return {member.id: member.rate or mean for member in self.members.values()}

    def submit(
        self, row: Sequence[WorkUnit], boundaries: Sequence[int], *, step: int, job: str, source: str, version: int,
        side: int = 0, weights: Mapping[str, float] | None = None, told: Mapping[str, Any] | None = None,
    ) -> Iteration:  # fmt: skip
        """Begin with a row of units as soon as those before it are all given out; `weights` are those of the terms,
        where they change from step to step, and `told` what else workers must hear of the job (JSON).

        While another is under way, call `count` once the update of that one has been asked for: gradients of both
        must not meet.
        """
        run = Iteration(
            self._next_run, step, job, row, boundaries, source, version, side, weights, told,
            counted=not self.active,
        )  # fmt: skip
        self._next_run += 1
        run.pending, run.left, run.began = deque(range(len(row))), len(row), time.monotonic()
        run.done = {i: set() for i in range(len(row))}
        run.members = frozenset(self.ready)
        self.active.append(run)
        self.dispatch()
        return run

    def count(self, run: Iteration) -> None:
        """Add the gradients of a run from now on, and those that have waited."""
        run.counted = True
        for span in list(run.waiting):
            self._add_in_order(run, span)

    def op_done(
        self, member: PoolMember, given: Given, m: int, sums: Mapping[str, float] | None, busy_s: float
    ) -> None:
        """A worker is through with a microbatch of a unit. Raises WireError for one that is not in it."""
        run, unit = given.run, given.unit
        if m not in unit.microbatches:
            raise WireError(f"microbatch {m} is told of; expected one of {unit.microbatches}")
        member.work, member.busy = 0.9 * member.work + self._cost(unit), 0.9 * member.busy + busy_s
        if m in run.done[given.index]:
            return
        run.done[given.index].add(m)
        if sums is not None:
            run.sums[m] = dict(sums)
        made = run.makes(unit, m)
        run.facts.update(made)
        for other in self.members.values():
            told: list[Fact] = []
            for theirs in other.given.values():
                if theirs.run is run:
                    wanted = {fact for each in theirs.unit.microbatches for fact in run.needs(theirs.unit, each)}
                    told += [fact for fact in made if fact in wanted]
            if told:
                self._tell(other, facts=[[run.number, *fact] for fact in told])

    def lacks(self, given: Given) -> str:
        """What is wrong with the gradient of a unit that is said to be done, or ""."""
        if given.block < 0:
            return ""
        return self._optimizer.store.lacks(given.block, given.id, given.unit.microbatches)

    def unit_done(self, member: PoolMember, given: Given, version: int, events: Sequence[Any]) -> None:
        """A worker is through with a unit, whose gradient counts from now on."""
        run, unit = given.run, given.unit
        run.left -= 1
        if version != run.version:
            raise RuntimeError(f"span {unit.span} was read at version {version}; expected {run.version}")
        run.events.setdefault(member.place, []).extend(events)
        if given.block >= 0:
            run.committed.update((unit.span, m) for m in unit.microbatches)
            run.waiting.setdefault(unit.span, {})[unit.microbatches] = given.block
            if run.counted:
                self._add_in_order(run, unit.span)

    def _add_in_order(self, run: Iteration, span: Span) -> None:
        """Rounds are added in their own order, so that the sum is the same whoever was first."""
        rounds = [unit.microbatches for unit in run.row if unit.span == span and B in unit.kinds]
        waiting, at = run.waiting[span], run.added.get(span, 0)
        while at < len(rounds) and rounds[at] in waiting:
            self._optimizer.add(waiting.pop(rounds[at]), span)
            at += 1
        run.added[span] = at

    def dispatch(self) -> None:
        """Give out what can be given: the units of the oldest run first, in their order."""
        for run in self.active:
            while run.pending and self._give(run):
                pass
            if run.pending:
                return

    def _give(self, run: Iteration) -> bool:
        usable = [w for w in self.ready if w in run.members]
        if not usable and (usable := self.ready):
            run.members = frozenset(usable)  # all whom it began with are lost
        index = run.pending[0]
        unit = run.row[index]
        if not usable or self._optimizer.version(unit.span, run.source) < run.version:
            return False
        # what a run keeps back must leave enough for the one before it to be done, and done again
        kept = 0 if run.counted else ROOM * len(self.members)
        if B in unit.kinds and len(self.blocks) <= kept:
            return False
        speeds = self.speeds
        free = {w: self._left(self.members[w], speeds[w]) for w in usable}
        member = self.members[self._deal(unit, free, {w: speeds[w] for w in usable})]
        if len(member.given) >= ROOM:
            return False
        run.pending.popleft()
        self._next_order += 1
        given = Given(self._next_order, run, index, self.blocks.pop() if B in unit.kinds else -1)
        member.given[given.id] = given
        member.since = time.monotonic()
        needed = [fact for m in unit.microbatches for fact in run.needs(unit, m)]
        skip = [m for m in unit.microbatches if m in run.done[index]]
        mine = [m for m in unit.microbatches if given.block >= 0 or m not in skip]
        order = {
            "id": given.id, "run": run.number, "step": run.step, "job": run.job, "kinds": unit.kinds,
            "span": unit.span, "microbatches": mine, "source": run.source, "side": run.side, "block": given.block,
            "skip": skip, "weights": run.weights, "told": run.told,
        }  # fmt: skip
        self._tell(member, do=order, facts=[[run.number, *fact] for fact in needed if fact in run.facts])
        return True

    def _left(self, member: PoolMember, speed: float) -> float:
        """Seconds until a worker is through with what it has."""
        left = 0.0
        for given in member.given.values():
            done = given.run.done[given.index]
            left += self._cost(given.unit) * sum(m not in done for m in given.unit.microbatches)
        return left / speed

    def take_back(self, given: Given) -> None:
        """A worker has given a unit back, and its block with it."""
        if given.block >= 0:
            self.blocks.append(given.block)
        self.put_back(given)

    def put_back(self, given: Given) -> None:
        """A unit is to be given out again, and before it whatever others wait for in vain meanwhile."""
        run = given.run
        if given.block < 0 and run.done[given.index] >= set(given.unit.microbatches):
            run.left -= 1  # all its results had been told, only its last word was not
        else:
            run.pending = deque(sorted([*run.pending, given.index]))
        for member in self.members.values():
            for other in member.given.values():
                if other.recalled or (other.run.number, other.index) < (run.number, given.index):
                    continue
                if any(fact not in other.run.facts for m in other.unit.microbatches
                       for fact in other.run.needs(other.unit, m)):  # fmt: skip
                    other.recalled = True
                    self._tell(member, recall=other.id)
