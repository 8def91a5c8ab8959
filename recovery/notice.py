"""Notices that a machine is about to go: who has one, for how long, and whether a hand-over fits into that.

A hand-over takes a step, which ends first, and what the leaving workers hold at the rate at which state has moved in
this run. Where it does not fit, and others have the same state, they go on at once. Where nobody has it, it is handed
over layer by layer as far as the time goes: a checkpoint would be the same bytes, on a disk.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

from recovery.membership import View

_RATE = 3e7  # bytes a second, before anything was measured: a slow disk's
_MOVE_S = 1.0


class Notices:
    """Those of one run."""

    def __init__(self) -> None:
        self._until: dict[int, float] = {}  # agent -> when it goes, in time.monotonic seconds
        self._decided: set[int] = set()
        self._workers: dict[int, int] = {}  # worker -> its agent, of those that had a notice
        self._rate, self._move_s = _RATE, _MOVE_S

    def took(self, seconds: float, moved: float) -> None:
        """A view that moves so many bytes has taken so long."""
        if moved > 0 and seconds > 0:
            self._rate, self._move_s = max(moved / seconds, 1.0), seconds

    def see(self, view: View, left_s: Mapping[int, float]) -> None:
        """These agents are about to go; the others are not, or not any more."""
        for agent, seconds in left_s.items():
            self._until.setdefault(agent, time.monotonic() + seconds)
        for agent in set(self._until) - set(left_s):
            del self._until[agent]
            self._decided.discard(agent)
        self._workers |= {w: a for w in view.workers if (a := view.agents[view.places[w]]) in left_s}

    def stay(self, workers: Sequence[int]) -> tuple[int, ...]:
        """Members whose notice was taken back: told once."""
        found = tuple(w for w in workers if w in self._workers and self._workers[w] not in self._until)
        for worker in found:
            del self._workers[worker]
        return found

    def undecided(self, view: View, leaving: Collection[int]) -> set[int]:
        """Agents of which it is not known yet what comes of them."""
        return {view.agents[view.places[worker]] for worker in leaving} - self._decided

    def decide(self, agents: Collection[int]) -> None:
        """It is known."""
        self._decided |= set(agents)

    def left(self, agents: Collection[int]) -> float:
        """Seconds until the first of them goes."""
        return min(self._until[agent] for agent in agents) - time.monotonic()

    def least_left(self) -> float | None:
        """Seconds until the first of all goes, if any does."""
        return self.left(self._until) if self._until else None

    def seconds(self, moved: float, step_s: float) -> float:
        """What handing over so many bytes takes, from the middle of a step on."""
        return step_s + max(self._move_s, moved / self._rate)
