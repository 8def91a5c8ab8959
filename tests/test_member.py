"""The thread beside a worker: signs of life, and the wish to stop, in both directions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from pipeline.mailbox import Mailbox
from recovery import keys
from recovery.member import Watcher
from recovery.membership import View, publish


def until(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_that_joins_late_learns_that_the_run_is_to_stop() -> None:
    store, stop = dist.HashStore(), threading.Event()
    keys.ask_to_stop(store)
    watcher = Watcher(store, 3, 1, stop)
    assert stop.wait(5.0)
    watcher.stop()


def test_a_worker_that_was_told_tells_the_run() -> None:
    store, stop = dist.HashStore(), threading.Event()
    watcher = Watcher(store, 3, 1, stop)
    stop.set()
    until(lambda: keys.stop_asked(store))
    watcher.stop()


def test_signs_of_life_come_before_anything_is_built_and_tell_what_comes_on() -> None:
    store = dist.HashStore()
    watcher = Watcher(store, 3, 1, threading.Event())
    until(lambda: keys.read_beat(store, 3) is not None)
    first = keys.read_beat(store, 3)
    assert first is not None
    assert not first.built
    for _ in range(5):
        watcher.pulse()
    until(lambda: (found := keys.read_beat(store, 3)) is not None and found.progress == 5)
    watcher.stop()


def test_a_new_view_wakes_who_waits_and_ends_what_waits_for_the_lost() -> None:
    store, box, lost = dist.HashStore(), Mailbox(), list[set[int]]()
    box.advance(1, 0)
    communicator = SimpleNamespace(peers={0, 1, 2}, poison=lost.append)
    member: Any = SimpleNamespace(
        worker=SimpleNamespace(transport=SimpleNamespace(mailbox=box)), communicator=communicator
    )
    watcher = Watcher(store, 0, 1, threading.Event())
    watcher.attach(member)
    until(lambda: (found := keys.read_beat(store, 0)) is not None and found.built)
    publish(store, View(2, (0, 2, 3), {}, places={0: 0, 2: 2, 3: 1}, next_worker=4))
    until(lambda: box.woken() == "view 2 has begun")
    until(lambda: lost == [{1}])
    store.set("view/3", b"[")
    until(lambda: len(lost) == 1 and box.woken() is not None)
    watcher.stop()
