"""The signals that ask a run to save itself and stop: of a person, of a scheduler, of a terminal that is closed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, each of STOP raises NotStarted: until workers are there to save something, a run just ends."""

    def interrupt(_: int) -> None:
        raise NotStarted

    with stop_signals(interrupt):
        yield
