"""When it makes no sense to go on: what is lost again and again, without a step between, will be lost once more.

An allocation that no machine has room for, or a file that cannot be read, fails the same way in every replacement.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated

from pipeline.exit_codes import GIVE_UP
from pipeline.settings import WEEK_S, Within

LIMIT = 3
STOPPING_LIMIT = 2
"""Of a run that was asked to stop: it has less time."""


@dataclass(frozen=True)
class SupervisionSettings:
    """When a worker counts as lost, who takes its place, and when a run gives up."""

    heartbeat: Annotated[float, Within(2, WEEK_S, note=" (seconds)")] = 10.0
    """Seconds without a sign of life after which a worker is given up."""
    deadline: Annotated[float, Within(0, WEEK_S, above=True, note=" (a week)")] = 300.0
    """Seconds after which a worker that is busy with one step is given up."""
    spares: Annotated[int, Within(0, 1024)] = 0
    """Workers per agent that wait with everything loaded, to take a lost one's place a little sooner."""
    max_failures: Annotated[int, Within(0, 10**9)] = 100
    """Lost workers after which the run gives up. Whatever the number, three losses of one place, or of three sets of
    workers that were ready, without a step between end it with the code 93: another try would end alike."""
    max_preemptions: Annotated[int, Within(0, 10**9)] = 1000
    """Machines that go, with notice or without, after which the run gives up. Their workers are no failures."""


class TooManyFailures(RuntimeError):
    """Workers are lost faster than it makes sense to replace them. Names the last loss."""


class NoProgress(TooManyFailures):
    """Another try would end the same way."""

    code = GIVE_UP


class Losses:
    """Counts what was lost since the last step. `most` losses in all end a run, or `most_preemptions` machines that
    went, and `limit` losses of one place, or with one error that a worker has told, without a step between."""

    def __init__(self, most: float, most_preemptions: float = math.inf) -> None:
        self.count, self._most = 0, most
        self.preemptions, self._most_preemptions = 0, most_preemptions
        self._seen: defaultdict[tuple[str, str], set[int]] = defaultdict(set)

    def progress(self, place: int | None = None) -> None:
        """A step was made; or, with `place`, what is there has done some of it."""
        if place is None:
            self._seen.clear()
        else:
            self._seen.pop(("place", str(place)), None)

    def note(self, worker: int, place: int, reason: str, *, told: bool, when: int, limit: int = LIMIT) -> None:
        """A worker is lost. `told`: it has said why itself; what was lost for one reason at one time (`when`, such as
        a view) counts once. Raises TooManyFailures."""
        self.count += 1
        if self.count > self._most:
            raise TooManyFailures(
                f"{self.count} workers were lost, the last: worker {worker} {reason}; "
                f"allowed by max_failures: {self._most}"
            )
        for key in (("place", str(place)), *([("error", reason)] if told else [])):
            self._seen[key].add(when)
            if len(self._seen[key]) >= limit:
                raise NoProgress(
                    f"worker {worker} {reason}; {len(self._seen[key])} times in a row without a step between, so that "
                    "another try would end the same way"
                )

    def preempted(self, machine: int) -> None:
        """A machine has gone. Raises TooManyFailures."""
        self.preemptions += 1
        if self.preemptions > self._most_preemptions:
            raise TooManyFailures(
                f"{self.preemptions} machines have gone, the last: machine {machine}; "
                f"allowed by max_preemptions: {self._most_preemptions}"
            )

    def cycle(self, view: int, reason: str, limit: int = LIMIT) -> None:
        """A view that all its workers had entered has ended by a loss; steps may have been made in it. Raises
        NoProgress after `limit` of them without one."""
        self._seen["cycle", ""].add(view)
        if len(self._seen["cycle", ""]) >= limit:
            raise NoProgress(
                f"{len(self._seen['cycle', ''])} views in a row have ended without a step, the last: {reason}"
            )
