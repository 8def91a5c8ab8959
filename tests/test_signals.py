"""What the signals that ask a run to stop do, at each time of it."""

from __future__ import annotations

import os
import signal

import pytest

from launch.signals import STOP, NotStarted, skippable, stopping


@pytest.mark.parametrize("signum", STOP, ids=lambda s: s.name)
def test_a_signal_means_something_else_before_within_and_after_the_training(signum: signal.Signals) -> None:
    before, told = signal.signal(signum, signal.SIG_DFL), list[int]()  # a SIGHUP may be ignored here, as under nohup
    try:
        with stopping() as found:
            with pytest.raises(NotStarted):
                os.kill(os.getpid(), signum)
            found.trains(told.append)
            os.kill(os.getpid(), signum)
            found.over()
            os.kill(os.getpid(), signum)
        assert told == [signum]
        assert signal.getsignal(signum) == signal.SIG_DFL
    finally:
        signal.signal(signum, before)


def test_what_can_be_skipped_ends_and_nothing_else_does() -> None:
    with stopping() as found:
        found.over()
        with skippable():
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("it went on")
        os.kill(os.getpid(), signal.SIGTERM)
