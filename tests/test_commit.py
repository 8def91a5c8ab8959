"""A step is committed by all or by none, in every interleaving of votes, deadlines and a coordinator that ends it."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist

from pipeline.runtime.step_commit import Combine, Settled, Vote, agree, busy_seconds, everything
from pipeline.runtime.terms import StepTerms
from recovery import keys
from recovery.commit import ABORT, COMMIT, Aborted, Ballot, CommitError, Follower, decide
from recovery.lifeline import Lifeline


def ballots(store: dist.Store, count: int, view: int = 1, **more: Any) -> list[Ballot]:
    members = list(range(count))
    return [Ballot(store, view, worker, members, **more) for worker in members]


def together(calls: list[Any]) -> list[Any]:
    """What each call returns or raises, all at the same time."""
    found: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            found[number] = calls[number]()
        except (Aborted, CommitError) as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a vote hangs"
    return found


def test_all_votes_come_to_all() -> None:
    store = dist.HashStore()
    deadline = time.monotonic() + 10
    for iteration in (1, 2, 3):
        votes = [partial(b, iteration, {"mine": b.worker}, deadline) for b in ballots(store, 3)]
        found = together(votes)
        assert found == [{str(w): {"mine": w} for w in range(3)}] * 3


def test_who_gives_up_ends_the_step_for_all() -> None:
    """Worker 0 waits in vain for worker 1, which votes a moment later: neither has committed."""
    store = dist.HashStore()
    first, second = ballots(store, 2)
    with pytest.raises(CommitError, match=r"no vote of workers \[1\] on iteration 1, view 1"):
        first(1, {}, time.monotonic() + 0.05)
    with pytest.raises(Aborted):
        second(1, {}, time.monotonic() + 10)
    follower = Follower(store, 1)
    assert not follower.follow()
    assert follower.given_up, "the coordinator must know that this view is over"


def test_who_gives_up_too_late_obeys_the_commit() -> None:
    """Between the last look and giving up the other one has voted: what stands is a commit, for both."""
    store = dist.HashStore()

    class Late(Ballot):
        def _await(self, iteration: int, deadline: float) -> bytes:
            other(iteration, {"mine": 1}, time.monotonic() + 10)
            return super()._await(iteration, deadline)

    first, other = Late(store, 1, 0, [0, 1]), Ballot(store, 1, 1, [0, 1])
    assert first(1, {"mine": 0}, time.monotonic() - 1) == {"0": {"mine": 0}, "1": {"mine": 1}}


@pytest.mark.parametrize("seed", range(60))
def test_one_outcome_in_every_interleaving(seed: int) -> None:
    """Deadlines that pass at random moments, workers that never vote, and a coordinator that ends the view."""
    chance, store = random.Random(seed), dist.HashStore()
    count = chance.randint(2, 4)
    silent = {w for w in range(count) if chance.random() < 0.1}
    plans = {w: (chance.uniform(0, 0.004), chance.uniform(0, 0.008)) for w in range(count)}
    aborts = chance.random() < 0.5

    def vote(ballot: Ballot) -> Any:
        begin, patience = plans[ballot.worker]
        time.sleep(begin)
        return "silent" if ballot.worker in silent else ballot(1, {}, time.monotonic() + patience)

    def coordinate() -> Any:
        time.sleep(chance.uniform(0, 0.006))
        if aborts:
            Follower(store, 1).abort()

    found = together([*(lambda b=b: vote(b) for b in ballots(store, count)), coordinate])[:-1]
    committed = [isinstance(each, dict) for each, w in zip(found, range(count), strict=True) if w not in silent]
    assert all(committed) or not any(committed), found
    if not any(committed) and len(silent) < count:
        assert decide(store, 1, 1, COMMIT) == ABORT


def test_the_coordinator_ends_the_first_step_that_is_not_committed() -> None:
    store = dist.HashStore()
    assert decide(store, 1, 1, COMMIT) == COMMIT
    assert decide(store, 1, 2, COMMIT) == COMMIT
    follower = Follower(store, 1)
    follower.abort()
    assert follower.iteration == 3
    assert decide(store, 1, 3, COMMIT) == ABORT


def test_a_stranger_s_outcome_is_no_commit() -> None:
    store = dist.HashStore()
    store.set("view1/outcome/1", b"\xff\xfe")
    (ballot,) = ballots(store, 1)
    with pytest.raises(Aborted):
        ballot(1, {}, time.monotonic() + 10)
    store.set("view3/outcome/1", "commit\n[")
    with pytest.raises(CommitError, match="the outcome of iteration 1, view 3 is no JSON"):
        Ballot(store, 3, 0, [0, 1])(1, {}, time.monotonic() + 10)


@pytest.mark.parametrize(
    ("vote", "combine", "told"),
    [
        (b"[", everything, "the vote of worker 0 is no JSON"),
        (b"{}", lambda votes: {"sum": sum(vote["mine"] for vote in votes.values())}, "KeyError 'mine'"),
        (b'{"mine": []}', lambda votes: {"sum": sum(vote["mine"] for vote in votes.values())}, "TypeError"),
    ],
)
def test_a_vote_that_is_none_ends_the_step_for_all(vote: bytes, combine: Combine, told: str) -> None:
    """A stranger has written in the place of worker 0: nobody commits, and the one that has read it says why."""
    store = dist.HashStore()
    store.set("view1/vote/1/0", vote)
    store.add("view1/votes/1", 1)
    with pytest.raises(CommitError, match=f"the votes on iteration 1 of view 1 are none: .*{told}"):
        Ballot(store, 1, 1, [0, 1])(1, {"mine": 1}, time.monotonic() + 10, combine)
    assert decide(store, 1, 1, COMMIT) == ABORT


def test_the_last_one_reads_the_votes_and_the_others_what_they_come_to() -> None:
    store, read = dist.HashStore(), list[int]()

    def combine(votes: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
        read.append(len(votes))
        return {"sum": sum(vote["mine"] for vote in votes.values())}

    for iteration in (1, 2, 3, 4):
        calls = [partial(b, iteration, {"mine": b.worker}, time.monotonic() + 10, combine) for b in ballots(store, 5)]
        assert together(calls) == [{"sum": 10}] * 5
    assert read == [5] * 4, "each vote is read once, whoever was the last"


def test_a_wait_without_end_ends_with_the_coordinator() -> None:
    """Others may take as long as they come on; who sees to that is alive, or the wait is over."""
    store = dist.HashStore()
    (ballot, _) = ballots(store, 2, guided=Lifeline(store, patience_s=0.8))
    ends = time.monotonic() + 1.2

    def beat() -> None:
        number = 0
        while time.monotonic() < ends:
            number += 1
            keys.beat_agent(store, 0, number)
            time.sleep(0.05)

    threading.Thread(target=beat).start()
    began = time.monotonic()
    with pytest.raises(CommitError, match=r"no vote of workers \[1\]"):
        ballot(1, {}, math.inf)
    assert 1.9 < time.monotonic() - began < 5.0


def test_what_each_worker_has_computed_is_one_text_that_the_coordinator_reads() -> None:
    terms = StepTerms({"text": 1.0}, ({"text": 2},), ())
    votes = {w: Vote({0: {"text": 3.0}} if w == 10 else {}, busy_s=0.25 * w).as_json() for w in (10, 2)}
    found = Settled.from_json(json.loads(json.dumps(asdict(agree(0, terms, [], votes)))))
    assert found.busy_s == "2:0.5 10:2.5"
    assert busy_seconds(found.busy_s) == {2: 0.5, 10: 2.5}
    for text in ("2", "2:a", "a:1", "1:2:3"):
        with pytest.raises(ValueError):  # noqa: PT011
            busy_seconds(text)
