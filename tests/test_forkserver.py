"""The forkserver answers whatever happens: a fork that fails costs one worker, and the others live on."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from launch.forkserver import Exit, ForkServer, ForkServerGone, StartError, signal_name


def entry(payload: dict[str, Any]) -> int:
    time.sleep(payload.get("sleep", 0))
    return int(payload.get("code", 0))


@pytest.fixture
def parent() -> Iterator[ForkServer]:
    forkserver = ForkServer(entry)
    yield forkserver
    forkserver.close()


def ends(forkserver: ForkServer, pid: int, timeout_s: float = 10.0) -> int:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for exit_ in forkserver.poll(0.05):
            if exit_.pid == pid:
                return exit_.code
    raise AssertionError(f"process {pid} did not end")


def failing(monkeypatch: pytest.MonkeyPatch, times: int, number: int) -> None:
    """os.fork fails so often, from the second call on: the first makes the forkserver, which inherits this."""
    fork, calls = os.fork, [0]

    def forking() -> int:
        calls[0] += 1
        if 1 < calls[0] <= 1 + times:
            raise OSError(number, os.strerror(number))
        return fork()

    monkeypatch.setattr(os, "fork", forking)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_a_fork_that_fails_is_answered_and_costs_nobody_else(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    failing(monkeypatch, 2, number)
    forkserver = ForkServer(entry)
    try:
        for _ in range(2):
            with pytest.raises(StartError, match=f"could not be started: {os.strerror(number)}"):
                forkserver.start({})
        first = forkserver.start({"sleep": 0.3, "code": 7})
        assert ends(forkserver, first) == 7
    finally:
        forkserver.close()


def test_an_answer_that_comes_too_late_is_taken_for_no_other(
    parent: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asked has given it up, so the worker that was started after all is ended."""
    os.kill(parent.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr("launch.forkserver._ANSWER_S", 0.2)
        with pytest.raises(TimeoutError, match=r"did not answer within 0\.2 s"):
            parent.start({"sleep": 60})
    os.kill(parent.pid, signal.SIGCONT)
    assert ends(parent, parent.start({"code": 3})) == 3
    deadline = time.monotonic() + 10.0
    while children := psutil.Process(parent.pid).children():
        assert time.monotonic() < deadline, children
        assert parent.poll(0.01) == [], "of a worker that nobody has"
    assert parent.poll(0.1) == []


def test_a_worker_that_could_not_be_watched_is_ended_and_answered(parent: ForkServer) -> None:
    """No descriptor is left to see it end by: a real limit of a real process."""
    living = parent.start({"sleep": 60})
    open_ones = {int(name) for name in os.listdir(f"/proc/{parent.pid}/fd")}
    held = min(set(range(len(open_ones) + 1)) - open_ones)
    before = resource.prlimit(parent.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(parent.pid, resource.RLIMIT_NOFILE, (held, before[1]))
    with pytest.raises(StartError, match="Too many open files"):
        parent.start({"sleep": 60})
    resource.prlimit(parent.pid, resource.RLIMIT_NOFILE, before)
    assert [child.pid for child in psutil.Process(parent.pid).children()] == [living]
    assert ends(parent, parent.start({"code": 3})) == 3


def test_a_payload_of_any_size_arrives(parent: ForkServer) -> None:
    assert ends(parent, parent.start({"code": 5, "text": "x" * 3_000_000})) == 5


def test_exits_that_nobody_asks_for_do_not_stop_the_forkserver(parent: ForkServer) -> None:
    pids = {parent.start({}) for _ in range(20)}
    time.sleep(0.3)
    assert {exit_.pid for exit_ in parent.poll(1.0)} | {exit_.pid for exit_ in parent.poll(1.0)} == pids


def test_the_end_of_the_forkserver_is_told_after_all_that_it_has_told() -> None:
    forkserver = ForkServer(entry)
    pid = forkserver.start({"code": 9})
    time.sleep(0.3)
    os.kill(forkserver.pid, signal.SIGKILL)
    time.sleep(0.1)
    assert forkserver.poll(1.0) == [Exit(pid, 9)]
    for call in (lambda: forkserver.poll(1.0), lambda: forkserver.start({})):
        with pytest.raises(ForkServerGone, match="the forkserver has ended unexpectedly"):
            call()
    forkserver.close()


def test_a_forkserver_that_is_stopped_does_not_keep_its_agent_from_ending() -> None:
    forkserver = ForkServer(entry)
    os.kill(forkserver.pid, signal.SIGSTOP)
    began = time.monotonic()
    forkserver._channel.post({"never": "read"})
    import launch.forkserver as module

    patience, module._ANSWER_S = module._ANSWER_S, 0.3
    try:
        forkserver.close()
    finally:
        module._ANSWER_S = patience
    assert time.monotonic() - began < 5.0


def test_every_signal_has_a_name() -> None:
    assert signal_name(9) == "SIGKILL"
    assert signal_name(40) == "signal 40"
    assert str(Exit(1, -40)) == "was killed by signal 40"
