"""The signals that ask a run to save itself and stop: of a person, of a scheduler, of a terminal that is closed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class NotStarted(KeyboardInterrupt):
    """A run was asked to stop before it had anything to save. It leaves nothing."""


@contextmanager
def stop_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Inside, `handle(number)` is called for each of STOP. A SIGHUP that is ignored, as under nohup, stays ignored."""
    before = {s: signal.getsignal(s) for s in STOP}
    before = {s: old for s, old in before.items() if s != signal.SIGHUP or old != signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, lambda number, _: handle(number))
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, signal.SIG_DFL if old is None else old)


class Stopping:
    """What each of STOP does to a run: it ends it by NotStarted, until there is something to save; from `trains` on it
    calls what asks the run to save itself; and once that is `over` it does nothing.

    While a run ends by the first one, what cleans up is not cut short by another, but for a second Ctrl-C.
    """

    def __init__(self) -> None:
        self._handle = self._end
        self._asked = False

    def __call__(self, number: int) -> None:
        self._handle(number)

    def _end(self, number: int) -> None:
        if not self._asked or number == signal.SIGINT:
            self._asked = True
            raise NotStarted

    def trains(self, handle: Callable[[int], None]) -> None:
        """There are workers, who can save something. Raises NotStarted where the run was asked to stop before."""
        self._handle = handle
        if self._asked:  # what was raised then came up in code that lets nothing through
            raise NotStarted

    @property
    def too_early(self) -> bool:
        """Whether the run was asked to stop before there was anything to save."""
        return self._asked and self._handle == self._end

    def over(self) -> None:
        """All is saved: nothing that a signal could ask for is left."""
        self._handle = _ignore


def _ignore(_: int) -> None:
    pass


@contextmanager
def stopping() -> Iterator[Stopping]:
    """Inside, STOP does what the Stopping says at the moment. Raises NotStarted for an error that code of others has
    made of it."""
    with stop_signals(found := Stopping()):
        try:
            yield found
        except Exception as error:
            if found.too_early:
                raise NotStarted from error
            raise


@contextmanager
def skippable() -> Iterator[None]:
    """Inside, the first of STOP ends the block and nothing else; those that come while it ends do nothing."""
    ends = True

    def skip(_: int) -> None:
        nonlocal ends
        if ends:
            ends = False
            raise KeyboardInterrupt

    with stop_signals(skip), suppress(KeyboardInterrupt):
        try:
            yield
        finally:
            ends = False  # in the block that is suppressed: a signal just before it is, too
