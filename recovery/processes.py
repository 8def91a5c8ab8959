"""The worker processes of a pool: started, seen to end, and until then not trusted.

Whoever was not seen to end may still write where it was told to. So what was given to it is held back, and the run does
not go past the iteration in which that was, until the operating system has reported its end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

_GONE_S = 5.0
_BY_ITSELF_S = 0.5  # a worker whose connection ends most often has ended, of which a report is on its way
_TRIES = 5
_TRY_AGAIN_S = 0.2  # doubled every time


class ProcessEnd(Protocol):
    """How a worker process ended."""

    @property
    def pid(self) -> int: ...

    @property
    def code(self) -> int: ...


@dataclass(frozen=True)
class Vacancy:
    """A place for which there was no room on the machine, and when it is tried again."""

    place: int
    tries: int
    due: float


class Processes:
    """`start(id)` forks a worker and returns its pid, or raises OSError; `exits(seconds)` tells which have ended.

    `vacancies` are places without a process, `unseen` processes that were ended and not seen to end: pid -> the
    gradient blocks that they may still write to.
    """

    def __init__(self, start: Callable[[int], int], exits: Callable[[float], Sequence[ProcessEnd]]) -> None:
        self._start, self._exits = start, exits
        self._ended: dict[int, ProcessEnd] = {}
        self.vacancies: list[Vacancy] = []
        self.unseen: dict[int, list[int]] = {}

    # ---- beginning ----

    def start(self, worker: int, place: int, tries: int = 0) -> int | str:
        """The pid of a new worker, or why there is none: then its place is tried again, a few times."""
        try:
            return self._start(worker)
        except OSError as error:
            if tries + 1 < _TRIES:
                self.vacancies.append(Vacancy(place, tries + 1, time.monotonic() + _TRY_AGAIN_S * 2**tries))
            return str(error)

    def due(self) -> list[Vacancy]:
        """The places to be tried again now, which are no vacancies any more."""
        now = time.monotonic()
        due = [each for each in self.vacancies if each.due <= now]
        self.vacancies = [each for each in self.vacancies if each.due > now]
        return due

    # ---- end ----

    def poll(self, timeout_s: float) -> None:
        """Take note of processes that have ended, waiting so long for the first."""
        self._ended.update((each.pid, each) for each in self._exits(timeout_s))

    def has_ended(self, pid: int) -> bool:
        """Whether a process was seen to end."""
        return pid in self._ended

    def end(self, pid: int, blocks: Iterable[int], *, by_itself: bool) -> tuple[ProcessEnd | None, bool]:
        """Wait for a process to end, for a moment `by_itself`, then by SIGKILL: nothing of it may write any more when
        its `blocks` go to others. How it ended, None where that was not seen; and whether it did by itself."""
        self._await(pid, _BY_ITSELF_S if by_itself else 0.0)
        if alone := pid not in self._ended:
            kill(pid)
            self._await(pid, _GONE_S)
        seen = self._ended.pop(pid, None)
        if seen is None:
            self.unseen[pid] = list(blocks)
        return seen, not alone

    def seen(self) -> list[int]:
        """The blocks of those who were seen to end since: they can go to others."""
        late = [pid for pid in self.unseen if self._ended.pop(pid, None) is not None]
        return [block for pid in late for block in self.unseen.pop(pid)]

    def end_all(self, pids: Iterable[int]) -> None:
        """Give processes that were told to end a while for it."""
        deadline, left = time.monotonic() + _GONE_S, set(pids)
        with contextlib.suppress(RuntimeError):  # who tells of exits may be what has failed
            while left - set(self._ended) and time.monotonic() < deadline:
                self.poll(0.05)
        for pid in left - set(self._ended):
            kill(pid)

    def _await(self, pid: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self.poll(0.0)
        while pid not in self._ended and time.monotonic() < deadline:
            self.poll(0.01)


def kill(pid: int) -> None:
    """End a process at once, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
