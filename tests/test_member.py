"""The thread beside a worker: signs of life, and the wish to stop, in both directions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch.distributed as dist

from jobs.config import TrainConfig
from jobs.train import Trainer
from pipeline.runtime.mailbox import Mailbox
from pipeline.runtime.peak_flops import UNKNOWN, Capability
from pipeline.schedule.layout import TRAIN, Layout
from recovery import keys
from recovery.member import Joined, Member, Watcher, combine_ready
from recovery.membership import View, publish
from schedulers import plan

KNOWN = {"capability": UNKNOWN.as_json()}


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


def entered(mine: dict[str, Any] | None, others: dict[int, dict[str, Any]]) -> Joined:
    """What worker 3 learns when it enters a view; `mine` is what it knows of the last step."""
    store, layout = dist.HashStore(), Layout({TRAIN: plan("one_f_one_b", [1.0] * 6, 2, 4)})
    publish(store, View(2, (0, 3), layout.key, places={0: 0, 3: 1}, joined={3: 1}), layout)
    worker, communicator = MagicMock(id=3, norms={}), MagicMock()
    worker.store.model.num_layers, worker.store.model.tied = 6, False
    worker.store.states = worker.store.aside = {}
    kept = {"norms": {}, "links": [], "sums": {}, **KNOWN}
    communicator.kept.return_value = {}
    votes = {w: {**kept, **vote} for w, vote in {**others, 3: {"position": None, "last": mine}}.items()}
    exchange = MagicMock(side_effect=[combine_ready(votes), {"error": "", "again": False}])
    member = Member(worker, communicator, store, {}, lambda _: None, lambda: True, Path())
    with patch("recovery.member.StepCommit", lambda _: SimpleNamespace(agree=exchange)):
        return member.enter(2, None, mine)


def test_who_joins_learns_what_is_to_be_told_of_the_last_step() -> None:
    """All who made the step may be lost before one of them has told of it: then the joiner does."""
    told = {"step": 5, "loss": 1.5}
    joined = entered(None, {0: {"position": {"step": 5}, "last": told}})
    assert joined.position == {"step": 5}
    assert joined.last == told
    own = {"step": 5, "loss": 1.5, "tokens_per_s": 7.0}
    assert entered(own, {0: {"position": {"step": 5}, "last": told}}).last == own
    assert entered(None, {0: {"position": None, "last": None}}).last is None


def test_a_trainer_that_joined_tells_of_a_step_that_it_did_not_make() -> None:
    said: list[dict[str, Any]] = []
    engine: Any = SimpleNamespace(leads=True)
    job: Any = SimpleNamespace(restore=lambda carried: None)
    trainer = Trainer(TrainConfig(), engine, job, "", SimpleNamespace(put=said.append), bool)  # type: ignore[arg-type]
    told = {"kind": "step", "step": 5}
    where = {"step": 5, "due": True, "stopping": False, "again": False, "carried": {}}
    trainer._entered(Joined(View(3, (3, 4), ""), where, told, 0.0, {"view": 0.1}))
    assert said[0] == told


def test_a_new_view_wakes_who_waits_and_ends_what_waits_for_the_lost() -> None:
    store, box, lost = dist.HashStore(), Mailbox(), list[set[int]]()
    box.advance(1, 0)
    communicator = SimpleNamespace(peers={0, 1, 2}, poison=lost.append)
    member: Any = SimpleNamespace(
        migration=None, worker=SimpleNamespace(transport=SimpleNamespace(mailbox=box)), communicator=communicator
    )
    watcher = Watcher(store, 0, 1, threading.Event())
    watcher.attach(member)
    until(lambda: (found := keys.read_beat(store, 0)) is not None and found.built)
    view = View(2, (0, 2, 3), (layout := Layout({})).key, places={0: 0, 2: 2, 3: 1}, next_worker=4)
    publish(store, view, layout)
    until(lambda: box.woken() == "view 2 has begun")
    until(lambda: lost == [{1}])
    store.set("view/3", b"[")
    until(lambda: len(lost) == 1 and box.woken() is not None)
    watcher.stop()


def vote(position: int | None, last: str | None = None, **more: Any) -> dict[str, Any]:
    told = None if last is None else {"told": last}
    where = None if position is None else {"step": position}
    return {"position": where, "last": told, "norms": {}, "links": [], "sums": {}, **KNOWN, **more}


def test_what_a_view_comes_to_before_anything_moves() -> None:
    found = combine_ready({
        1: vote(None, links=[2, 3], sums={}),
        2: vote(5, links=[1, 3], sums={"0:1": 3, "tied": 1}, norms={"0": 0.5}),
        3: vote(5, "x", links=[2, 4], sums={"0:1": 4}, norms={"0": 0.5, "1": 2.0}),
    })  # fmt: skip
    assert found["positions"] == [{"step": 5}]
    assert found["last"] == {"told": "x"}
    assert found["norms"] == {"0": 0.5, "1": 2.0}
    assert found["links"] == [(1, 2), (2, 3)], "1 and 3, and 3 and 4, do not both have theirs"
    assert found["sums"] == {"0:1": (4, [2, 3]), "tied": (1, [2])}
    assert combine_ready({1: vote(5), 2: vote(6), 3: vote(5)})["positions"] == [{"step": 5}, {"step": 6}]
    assert combine_ready({1: vote(None), 2: vote(None)})["positions"] == []


def test_a_view_can_do_what_its_devices_can_each_counted_once() -> None:
    """Two workers share one GPU of three; whatever the number of workers, a device that is not known leaves all
    unknown."""
    at = {1: ("a", 2e12), 2: ("a", 2e12), 3: ("b", 3e12)}
    votes = {w: vote(5, capability=Capability(*each).as_json()) for w, each in at.items()}
    assert combine_ready(votes)["peak_flops"] == 5e12
    assert combine_ready({w: votes[w] for w in (1, 2)})["peak_flops"] == 2e12
    assert combine_ready({**votes, 4: vote(5)})["peak_flops"] is None
