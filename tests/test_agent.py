"""The supervisor of a machine's workers, alone with a store and a forkserver that does what a test says."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from jobs.config import ConfigError
from launch.agent import Agent, RunFailed, fail_before_start
from launch.forkserver import Exit, ForkServerGone, StartError
from launch.signals import NotStarted, stop_signals
from pipeline.exit_codes import STOPPED
from pipeline.schedule.layout import Layout
from recovery import keys
from recovery.membership import EVICTED, View, publish

LAYOUT = Layout({})


class Full:
    """A forkserver whose machine has no room for a while."""

    def __init__(self, refusals: int) -> None:
        self.refusals, self.started = refusals, list[dict[str, Any]]()

    def prepare(self, details: dict[str, Any]) -> None:
        pass

    def start(self, payload: dict[str, Any]) -> int:
        if self.refusals:
            self.refusals -= 1
            raise StartError("could not be started: Cannot allocate memory")
        self.started.append(payload)
        return 1_000_000 + len(self.started)

    def poll(self, timeout_s: float) -> list[Exit]:
        time.sleep(min(timeout_s, 0.01))
        return []


class Enough(Exception):
    """The test has seen what it wanted."""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.agent._TRY_AGAIN_S", 0.02)


def supervised(refusals: int, ticks: int = 400) -> tuple[Full, dist.Store]:
    full, store = Full(refusals), dist.HashStore()
    agent = Agent(0, full, store, [0, 1], lambda worker, *_: {"worker": worker})  # type: ignore[arg-type]
    agent.start()
    left = [ticks]

    def tick() -> None:
        left[0] -= 1
        if not left[0] or len(full.started) == 2:
            raise Enough

    with pytest.raises(Enough):
        agent.supervise(tick)
    return full, store


def test_a_worker_without_room_is_tried_again() -> None:
    full, store = supervised(refusals=3)
    assert sorted(payload["worker"] for payload in full.started) == [0, 1]
    assert keys.newest_loss(store) == b""


def test_a_worker_for_which_there_is_no_room_at_all_is_a_loss() -> None:
    full, store = supervised(refusals=1_000_000, ticks=60)
    assert not full.started
    reports = [keys.read_loss(store, n) for n in range(2)]
    assert sorted(r.worker for r in reports if r is not None) == [0, 1]
    assert {r.reason for r in reports if r is not None} == {"could not be started: Cannot allocate memory"}


# ---- how workers end ----


class Scripted(Full):
    """A forkserver that tells of the ends that a test puts into it."""

    def __init__(self) -> None:
        super().__init__(0)
        self.ends: list[Exit] = []

    def poll(self, timeout_s: float) -> list[Exit]:
        time.sleep(0.001)
        ends, self.ends = self.ends, []
        return ends


def watched(tick: Callable[[Agent, Scripted, dist.Store], None]) -> tuple[dist.Store, Callable[[], int]]:
    forkserver, store = Scripted(), dist.HashStore()
    agent = Agent(0, forkserver, store, [0, 1], lambda worker, *_: {"worker": worker})  # type: ignore[arg-type]
    agent.start()

    def run() -> int:
        with stop_signals(agent.asked_to_stop):
            return agent.supervise(lambda: tick(agent, forkserver, store))

    return store, run


def pid_of(agent: Agent, worker: int) -> int:
    return next(pid for pid, each in agent.pids.items() if each == worker)


def test_an_error_that_others_would_meet_ends_the_run_and_any_other_is_a_loss() -> None:
    ticks = [0]

    def tick(agent: Agent, forkserver: Scripted, store: dist.Store) -> None:
        ticks[0] += 1
        if ticks[0] == 1:
            keys.report_error(store, 0, keys.ErrorReport("ValueError: here alone", fatal=False))
            forkserver.ends.append(Exit(pid_of(agent, 0), 1))
        if ticks[0] == 3:
            report = keys.read_loss(store, 0)
            assert report is not None
            assert (report.worker, report.reason, report.told) == (0, "ValueError: here alone", True)
            keys.report_error(store, 1, keys.ErrorReport("NonFiniteLoss: everywhere", fatal=True))
            forkserver.ends.append(Exit(pid_of(agent, 1), 1))

    _, run = watched(tick)
    with pytest.raises(RunFailed, match="worker 1: NonFiniteLoss: everywhere"):
        run()


def test_who_was_evicted_is_nobody_s_loss() -> None:
    """It lives on for a while beside the one that has its place; what it says and how it ends counts for nothing."""
    ticks = [0]

    def tick(agent: Agent, forkserver: Scripted, store: dist.Store) -> None:
        ticks[0] += 1
        if ticks[0] == 1:
            forkserver.ends.append(Exit(pid_of(agent, 1), EVICTED))
        if ticks[0] == 4:
            forkserver.ends.append(Exit(pid_of(agent, 0), 0))

    store, run = watched(tick)
    assert run() == 0
    assert keys.read_loss(store, 1) is None
    assert keys.failure(store) is None


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_becomes_a_state_of_the_run(monkeypatch: pytest.MonkeyPatch, signum: int) -> None:
    """Who joins after it came finds it in the store, whether or not those live who got the signal."""
    monkeypatch.setattr("launch.agent._send", lambda pids, number: None)  # they are nobody's
    ticks = [0]

    def tick(agent: Agent, forkserver: Scripted, store: dist.Store) -> None:
        ticks[0] += 1
        if ticks[0] == 2:
            assert not keys.stop_asked(store)
            os.kill(os.getpid(), signum)
        if ticks[0] == 5:
            assert keys.stop_asked(store)
            forkserver.ends += [Exit(pid, STOPPED) for pid in agent.pids]

    before = signal.signal(signum, signal.default_int_handler)  # it may be ignored here, as under nohup
    try:
        _, run = watched(tick)
        assert run() == STOPPED
        assert signal.getsignal(signum) is signal.default_int_handler
    finally:
        signal.signal(signum, before)


def test_a_hang_up_that_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ticks = [0]

    def tick(agent: Agent, forkserver: Scripted, store: dist.Store) -> None:
        ticks[0] += 1
        if ticks[0] == 2:
            os.kill(os.getpid(), signal.SIGHUP)
        if ticks[0] == 4:
            assert not keys.stop_asked(store)
            forkserver.ends += [Exit(pid, 0) for pid in agent.pids]

    try:
        _, run = watched(tick)
        assert run() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_who_joins_as_the_run_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step was committed, and the coordinator let a worker join a moment later: it would find nobody."""
    killed: list[int] = []
    monkeypatch.setattr("launch.agent._send", lambda pids, number: killed.extend(pids))
    ticks = [0]

    def tick(agent: Agent, forkserver: Scripted, store: dist.Store) -> None:
        ticks[0] += 1
        if ticks[0] == 1:
            places = {0: 0, 2: 1}
            view = View(2, (0, 2), LAYOUT.key, places=places, agents={0: 0, 1: 0}, joined={2: 1}, next_worker=3)
            publish(store, view, LAYOUT)
        if ticks[0] == 3:
            forkserver.ends.append(Exit(pid_of(agent, 0), 0))
        if ticks[0] > 3 and 2 in (agent.pids.get(pid) for pid in killed):
            forkserver.ends += [Exit(pid, -9) for pid in agent.pids]

    began = time.monotonic()
    store, run = watched(tick)
    assert run() == 0
    assert time.monotonic() - began < 5.0
    assert keys.newest_loss(store) == b""


def test_who_never_began_is_told_from_who_failed_on_every_agent() -> None:
    def tick(agent: Agent, forkserver: Scripted, store: dist.Store) -> None:
        fail_before_start(store, NotStarted())

    _, run = watched(tick)
    with pytest.raises(NotStarted):
        run()


def test_once_a_worker_has_ended_well_a_signal_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr("launch.agent._send", lambda pids, number: told.append(number))
    ticks = [0]

    def tick(agent: Agent, forkserver: Scripted, store: dist.Store) -> None:
        ticks[0] += 1
        if ticks[0] == 1:
            forkserver.ends.append(Exit(pid_of(agent, 0), 0))
        if ticks[0] == 3:
            agent.asked_to_stop(signal.SIGINT)
            agent.asked_to_stop(signal.SIGINT)
            forkserver.ends.append(Exit(pid_of(agent, 1), 0))

    _, run = watched(tick)
    assert run() == 0
    assert signal.SIGTERM not in told


def test_an_agent_ends_though_its_forkserver_is_gone() -> None:
    class Gone(Scripted):
        def poll(self, timeout_s: float) -> list[Exit]:
            raise ForkServerGone("the forkserver has ended unexpectedly")

    agent = Agent(0, Gone(), dist.HashStore(), [], lambda worker, *_: {})  # type: ignore[arg-type]
    agent.pids[2_000_000_000] = 0
    agent.end()


# ---- a machine that goes ----


def test_a_machine_that_goes_says_so_and_ends_once_its_workers_are_in_no_view() -> None:
    ticks = [0]

    def tick(agent: Agent, forkserver: Scripted, store: dist.Store) -> None:
        ticks[0] += 1
        if ticks[0] == 1:
            agent.leave(60.0)
        if ticks[0] == 3:
            assert keys.leavers(store)
            assert keys.leaves(store, 0)
            forkserver.ends += [Exit(pid, EVICTED) for pid in agent.pids]

    store, run = watched(tick)
    assert run() == STOPPED
    assert keys.read_loss(store, 0) is None
    agent = Agent(0, Scripted(), store, [0, 1], lambda worker, *_: {"worker": worker})  # type: ignore[arg-type]
    agent.start()
    assert not keys.leaves(store, 0), "it is back"


def test_an_agent_whose_workers_only_wait_to_join_ends_when_the_run_has_ended_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last workers may all be on another machine: what they have finished is finished."""
    monkeypatch.setattr("launch.agent._send", lambda pids, number: None)
    ticks = [0]

    def tick(agent: Agent, forkserver: Scripted, store: dist.Store) -> None:
        ticks[0] += 1
        if ticks[0] == 1:
            places = {0: 0, 1: 1, 2: 2}
            view = View(2, (2,), LAYOUT.key, places=places, agents=dict.fromkeys(range(3), 0), awaited={0: 0, 1: 1})
            publish(store, view, LAYOUT)
        if ticks[0] == 2:
            keys.end(store, 0)
        if ticks[0] == 4:
            forkserver.ends += [Exit(pid, -9) for pid in agent.pids]

    store, run = watched(tick)
    assert run() == 0
    assert keys.newest_loss(store) == b""


def test_a_machine_that_may_stay_says_so_and_starts_who_is_awaited_on_it() -> None:
    ticks = [0]

    def tick(agent: Agent, forkserver: Scripted, store: dist.Store) -> None:
        ticks[0] += 1
        if ticks[0] == 1:
            agent.leave(60.0)
        if ticks[0] == 3:
            assert keys.leaves(store, 0) == pytest.approx(60.0, abs=5.0)
            places = {0: 0, 2: 1}
            view = View(2, (0,), LAYOUT.key, places=places, agents={0: 0, 1: 0}, awaited={2: 1}, next_worker=3)
            publish(store, view, LAYOUT)
        if ticks[0] == 5:
            assert 2 not in agent.pids.values()
            agent.stay()
        if ticks[0] == 8:
            assert keys.leaves(store, 0) is None
            assert 2 in agent.pids.values()
            forkserver.ends += [Exit(pid, 0) for pid in agent.pids]

    _, run = watched(tick)
    assert run() == 0


def test_a_machine_whose_time_is_over_reports_its_workers_lost() -> None:
    def tick(agent: Agent, forkserver: Scripted, store: dist.Store) -> None:
        agent.leave(0.0)

    store, run = watched(tick)
    assert run() == STOPPED
    for worker in (0, 1):
        report = keys.read_loss(store, worker)
        assert report is not None
        assert report.reason == "was on a machine that is gone"


def test_an_agent_that_comes_back_starts_whom_the_newest_view_awaits_and_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("launch.agent._BEAT_S", 0.01)
    store, forkserver = dist.HashStore(), Scripted()
    keys.beat_agent(store, 1, 7)
    places = {0: 0, 5: 1, 6: 2}
    for number in (1, 2, 3):
        view = View(  # worker 7 has joined, and was started by the one before
            number,
            (0, 7),
            LAYOUT.key,
            places={**places, 7: 3},
            agents={0: 0, 1: 1, 2: 1, 3: 1},
            joined={7: 4},
            awaited={5: 1, 6: 2},
            next_worker=8,
        )
        publish(store, view, LAYOUT)
    agent = Agent(1, forkserver, store, [1, 2], lambda worker, place, *_: {"worker": worker, "place": place})  # type: ignore[arg-type]
    agent.start()
    agent._follow(over=False)
    assert sorted(payload["worker"] for payload in forkserver.started) == [5, 6]


def test_two_agents_of_one_rank_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.agent._BEAT_S", 0.1)
    store = dist.HashStore()
    keys.beat_agent(store, 1, 1)
    beats = threading.Timer(0.1, lambda: keys.beat_agent(store, 1, 2))
    beats.start()
    agent = Agent(1, Scripted(), store, [1], lambda worker, *_: {"worker": worker})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="node_rank is 1; allowed: one whose agent does not live"):
        agent.start()
    beats.join()


# ---- spare workers ----


def test_a_spare_worker_that_was_called_is_followed_by_another_once_others_have_had_time_to_recover(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("launch.agent._REFILL_S", 0.05)
    forkserver, store = Scripted(), dist.HashStore()
    agent = Agent(0, forkserver, store, [0], lambda worker, *_: {"worker": worker, "store": {}}, num_spares=1)  # type: ignore[arg-type]
    agent.start()
    publish(store, View(1, (0,), LAYOUT.key, places={0: 0}, agents={0: 0}), LAYOUT)
    publish(store, View(2, (1,), LAYOUT.key, places={1: 0}, agents={0: 0}, joined={1: 0}), LAYOUT)
    assert [each["worker"] for each in forkserver.started] == [0, -1]
    began = time.monotonic()
    seen: list[float] = []

    def tick() -> None:
        if len(forkserver.started) == 3:
            assert forkserver.started[-1]["worker"] == -1
            seen.append(time.monotonic() - began)
            raise Enough
        if time.monotonic() - began > 10:
            raise AssertionError("no spare worker was started")

    with pytest.raises(Enough):
        agent.supervise(tick)
    assert store.check(["spare/0/0"]), "the first one was called"
    assert seen[0] >= 0.05
