"""A lock is held by one, though its file comes and goes."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

import pipeline.locks
from jobs.config import ConfigError
from launch.run_lock import RunLock
from pipeline.locks import lock, unlock


def test_one_holds_it_and_the_file_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = lock(path)
    with pytest.raises(BlockingIOError):
        lock(path)
    unlock(path, held)
    assert not path.exists()
    unlock(path, lock(path))


def test_a_file_that_its_holder_removes_in_the_meantime_locks_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second opens the file; the first lets go and removes it; the third makes a new one and locks that; only then
    does the second lock what it has opened. It must not believe that it holds the lock."""
    path = tmp_path / "lock"
    first, third = lock(path), list[int]()
    flock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        if not third:
            third.append(-1)
            unlock(path, first)
            third[0] = lock(path)
        flock(descriptor, how)

    monkeypatch.setattr(pipeline.locks.fcntl, "flock", late)
    with pytest.raises(BlockingIOError):
        lock(path)
    unlock(path, third[0])


def test_a_run_folder_is_claimed_by_one_at_a_time_under_a_rush(tmp_path: Path) -> None:
    """Many threads claim and release the same folder: never are there two at once."""
    inside, most, claims = [0], [0], [0]
    guard = threading.Lock()

    def rush() -> None:
        for _ in range(60):
            try:
                claim = RunLock(tmp_path / "run")
            except ConfigError:
                continue
            with guard:
                inside[0] += 1
                claims[0] += 1
                most[0] = max(most[0], inside[0])
            with guard:
                inside[0] -= 1
            claim.release()

    threads = [threading.Thread(target=rush) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert claims[0] > 10
    assert most[0] == 1


def test_who_lets_go_does_not_remove_what_is_another_s(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = lock(path)
    os.unlink(path)  # by somebody's hand
    other = lock(path)
    unlock(path, held)
    assert path.exists()
    unlock(path, other)
