"""A worker that is killed is known to be gone before the operating system has taken it down, and is told of once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from launch.death_watch import _HELD, _SLOT, _SLOTS, DeathWatch, exit_code
from launch.forkserver import Exit, ForkServer


def entry(payload: dict[str, Any]) -> int:
    if "leave" in payload:
        os._exit(int(payload["leave"]))
    time.sleep(payload.get("sleep", 60))
    return 5


@pytest.fixture
def forkserver() -> Iterator[ForkServer]:
    made = ForkServer(entry)
    yield made
    made.close()


def told(forkserver: ForkServer, seconds: float = 10.0, count: int = 1) -> list[Exit]:
    """The next ends."""
    found, deadline = list[Exit](), time.monotonic() + seconds
    while len(found) < count and time.monotonic() < deadline:
        found += forkserver.poll(0.05)
    return found


def holds(forkserver: ForkServer, slot: int) -> None:
    """Wait until a worker holds its mutex."""
    deadline = time.monotonic() + 10
    while not forkserver._watch._memory[slot * _SLOT + _HELD]:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def none_is_ending(forkserver: ForkServer) -> None:
    deadline = time.monotonic() + 10
    while forkserver._ending and time.monotonic() < deadline:
        assert forkserver.poll(0.02) == [], "nobody dies twice"
    assert not forkserver._ending


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGALRM])
def test_a_death_is_seen_though_nobody_waits_for_the_process(forkserver: ForkServer, signum: int) -> None:
    """The forkserver, which alone could see its exit, is stopped."""
    for _ in range(2):  # a slot is used again
        slot = forkserver._watch._free[-1]
        pid = forkserver.start({})
        holds(forkserver, slot)
        os.kill(forkserver.pid, signal.SIGSTOP)
        os.kill(pid, signum)
        assert told(forkserver) == [Exit(pid, -signum)]
        assert forkserver._ending == {pid}, "it may still have what it had"
        os.kill(forkserver.pid, signal.SIGCONT)
        none_is_ending(forkserver)
        assert not psutil.pid_exists(pid)


def test_who_ends_by_itself_is_told_of_once_it_has_ended(forkserver: ForkServer) -> None:
    pid = forkserver.start({"sleep": 0.05})
    assert told(forkserver) == [Exit(pid, 5)]
    assert not forkserver._ending
    assert forkserver.poll(0.2) == []
    left = forkserver.start({"leave": 3})
    assert told(forkserver) == [Exit(left, 3)]
    assert forkserver.poll(0.2) == []
    assert not forkserver._ending


def test_many_at_once_are_told_of_once_each(forkserver: ForkServer) -> None:
    pids = [forkserver.start({}) for _ in range(12)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)  # some before they hold anything
    assert sorted(told(forkserver, count=12), key=lambda each: each.pid) == [Exit(pid, -9) for pid in sorted(pids)]
    none_is_ending(forkserver)


def test_a_worker_with_a_device_is_gone_when_its_device_is_free_of_it(forkserver: ForkServer) -> None:
    pid = forkserver.start({"device": "cuda:0"})
    os.kill(forkserver.pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    assert told(forkserver, 0.3) == []
    os.kill(forkserver.pid, signal.SIGCONT)
    assert told(forkserver) == [Exit(pid, -9)]


def test_where_there_are_no_robust_mutexes_the_end_is_told_as_ever(
    forkserver: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forkserver._watch, "works", False)
    pid = forkserver.start({})
    os.kill(pid, signal.SIGKILL)
    assert told(forkserver) == [Exit(pid, -9)]
    assert not forkserver._ending


def test_a_slot_comes_back_and_too_many_are_not_watched() -> None:
    watch = DeathWatch()
    slots = [watch.slot() for _ in range(_SLOTS)]
    assert len(set(slots)) == _SLOTS
    assert watch.slot() is None
    assert slots[0] is not None
    watch.give_back(slots[0])
    assert watch.slot() == slots[0]


def test_who_lives_has_no_exit_code_and_neither_has_who_is_gone() -> None:
    assert exit_code(os.getpid()) is None
    assert exit_code(2**22 - 1) is None
