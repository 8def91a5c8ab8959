"""Virtual time, and actors of which one runs at a time: each hands on wherever the real thing would wait or talk."""

from __future__ import annotations

import heapq
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

from greenlet import getcurrent, greenlet

DEADLINE_S = 400.0
"""Virtual seconds within which a run has ended, well or by name."""


class Killed(BaseException):
    """The actor's process is gone."""


class Broken(AssertionError):
    """An invariant does not hold."""


@dataclass
class Process:
    """A simulated process: its actors end together."""

    name: str
    dead: bool = False
    stopped_until: float = 0.0
    code: int | None = None

    @property
    def gone(self) -> bool:
        return self.dead or self.code is not None


class World:
    """All actors, the clock, and what is drawn from the seed. It stands in for the module `time`."""

    def __init__(self, seed: int, *, log: bool = False) -> None:
        self.chance, self.log = random.Random(seed), log
        self.now = 0.0
        self._queue: list[tuple[float, int, greenlet, Process]] = []
        self._number = 0
        self._hub: greenlet = getcurrent()
        self._processes: dict[greenlet, Process] = {}

    def say(self, text: str) -> None:
        """For who replays a run."""
        if self.log:
            sys.stdout.write(f"{self.now:9.3f}  {text}\n")

    @property
    def process(self) -> Process:
        """Of the actor that runs."""
        return self._processes[getcurrent()]

    def start(self, process: Process, run: Callable[[], None], after_s: float = 0.0) -> None:
        """Have an actor begin. What it raises, but for Killed, ends the run of the world."""

        def main() -> None:
            if not process.dead:
                try:
                    run()
                except Killed:
                    return

        self._later(actor := greenlet(main, self._hub), process, self.now + after_s)
        self._processes[actor] = process

    def _later(self, actor: greenlet, process: Process, when: float) -> None:
        self._number += 1
        heapq.heappush(self._queue, (when, self._number, actor, process))

    def sleep(self, seconds: float) -> None:
        """Hand on, and go on after so long. Raises Killed where the process is gone by then."""
        process, when = self.process, self.now + max(0.0, seconds)
        if process.dead:
            raise Killed
        if self._queue and when < self._queue[0][0] and process.stopped_until <= when <= DEADLINE_S:
            self.now = when  # nobody comes before
            return
        self._later(getcurrent(), process, when)
        self._hub.switch()
        if process.dead:
            raise Killed

    def run(self, until: Callable[[], bool]) -> None:
        """Give turns until that holds. Raises Broken for a run that does not end, and what an actor raises."""
        self._hub = getcurrent()
        for actor in self._processes:
            actor.parent = self._hub
        try:
            while not until():
                if not self._queue:
                    raise Broken("nobody has anything to do, and the run has not ended")
                when, _, actor, process = heapq.heappop(self._queue)
                if process.stopped_until > when and not process.dead:
                    self._later(actor, process, process.stopped_until)
                    continue
                self.now = max(self.now, when)
                if self.now > DEADLINE_S:
                    raise Broken(f"the run has not ended after {DEADLINE_S:g} s")
                actor.switch()
        finally:
            for process in self._processes.values():
                process.dead = True
            for actor in list(self._processes):
                while actor:  # it has begun, and is not over
                    actor.switch()

    # ---- in place of the module ----

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def time_ns(self) -> int:
        return int(self.now * 1e9)
