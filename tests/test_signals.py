"""What the signals that ask a run to stop do, at each time of it."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest

from launch.signals import STOP, NotStarted, skippable, stopping


@pytest.mark.parametrize("signum", STOP, ids=lambda s: s.name)
def test_a_signal_means_something_else_within_and_after_the_training(signum: signal.Signals) -> None:
    before, told = signal.signal(signum, signal.SIG_DFL), list[int]()  # a SIGHUP may be ignored here, as under nohup
    try:
        with stopping() as found:
            found.trains(told.append)
            os.kill(os.getpid(), signum)
            found.over()
            os.kill(os.getpid(), signum)
        assert told == [signum]
        assert signal.getsignal(signum) == signal.SIG_DFL
    finally:
        signal.signal(signum, before)


def _asked_twice_before_the_first_step(first: int, second: int, cleaned: list[int]) -> None:
    with stopping():
        try:
            os.kill(os.getpid(), first)
        finally:
            os.kill(os.getpid(), second)
            cleaned.append(second)


def _asked_where_nothing_is_let_through(first: int) -> None:
    with stopping() as found:
        with suppress(NotStarted):  # as in a destructor
            os.kill(os.getpid(), first)
        found.trains(lambda _: None)


@pytest.mark.parametrize("second", STOP, ids=lambda s: s.name)
@pytest.mark.parametrize("first", STOP, ids=lambda s: s.name)
def test_a_run_that_ends_before_its_first_step_cleans_up_whatever_comes_next(
    first: signal.Signals, second: signal.Signals
) -> None:
    """A scheduler may send SIGTERM and SIGHUP at once. A second Ctrl-C is of a person who does not want to wait."""
    before, cleaned = {s: signal.signal(s, signal.SIG_DFL) for s in STOP}, list[int]()
    try:
        with pytest.raises(NotStarted):
            _asked_twice_before_the_first_step(first, second, cleaned)
        assert cleaned == ([] if second == signal.SIGINT else [second])
        with pytest.raises(NotStarted):
            _asked_where_nothing_is_let_through(first)
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


@pytest.mark.parametrize("second", STOP, ids=lambda s: s.name)
def test_a_second_signal_while_the_first_ends_what_can_be_skipped_does_nothing(second: signal.Signals) -> None:
    before, went_on = {s: signal.signal(s, signal.SIG_DFL) for s in STOP}, False
    try:
        with stopping() as found:
            found.over()
            with skippable():
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                finally:
                    os.kill(os.getpid(), second)
                    went_on = True
            with pytest.raises(ZeroDivisionError), skippable():
                raise ZeroDivisionError
        assert went_on
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


def test_what_can_be_skipped_ends_and_nothing_else_does() -> None:
    with stopping() as found:
        found.over()
        with skippable():
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("it went on")
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("handled", [True, False])
def test_what_code_of_others_makes_of_a_signal_is_the_signal_still(handled: bool) -> None:
    """transformers gives its own error for whatever goes wrong while it builds a model."""

    def build() -> None:
        try:
            if handled:
                os.kill(os.getpid(), signal.SIGTERM)
            raise KeyError("gpt3")
        except BaseException as error:
            raise ValueError("a model that cannot be built") from error

    def late() -> None:
        with stopping() as found:
            found.trains(lambda _: None)  # there is something to save
            build()

    with pytest.raises(NotStarted if handled else ValueError), stopping():
        build()
    with pytest.raises(ValueError, match="cannot be built"):
        late()
