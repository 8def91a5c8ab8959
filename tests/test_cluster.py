"""The agents that a cluster places: who is asked for, who is waited for, and who is asked for again. Without Ray."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from jobs.config import ConfigError, TrainConfig
from launch import cluster as clusters
from launch.agent import Agent, RunFailed
from launch.agent_process import PARENT
from launch.cluster import AgentStart, Crew, on_nodes
from launch.config import config_from_toml
from launch.slots import Slot, StoreHandle, environment_of, find_slot
from pipeline.exit_codes import STOPPED
from recovery import keys
from recovery.membership import View, publish
from tests.test_agent import Scripted
from tests.test_coordinator import LAYOUT, Run

CONFIG = TrainConfig(workers=4, min_workers=2, cluster="ray", agent_workers=2, agent_cpus=3.0, out=Path("runs/one"))


class Pretended:
    """A cluster in which agents come and end when a test says so."""

    host = "127.0.0.1"

    def __init__(self) -> None:
        self.asked, self.ended_, self.killed, self.closed = list[AgentStart](), dict[int, str](), list[int](), False
        self.placed, self.room_for_first = set[int](), True

    def reserve(self, agents: Sequence[AgentStart]) -> None:
        assert not self.asked, "before anybody is asked for"
        self.first = [agent.rank for agent in agents]

    def reserved(self) -> bool:
        return self.room_for_first

    def start(self, what: AgentStart) -> int:
        self.asked.append(what)
        return len(self.asked) - 1

    def where(self, handle: int) -> str | None:
        return "node" if handle in self.placed else None

    def ended(self, handle: int) -> str | None:
        return self.ended_.get(handle)

    def end(self, handle: int) -> None:
        self.killed.append(handle)

    def room(self) -> str:
        return "its 1 nodes have 0 of 1 CPUs free"

    def close(self, handles: Collection[int]) -> None:
        self.closed = True


class Crowd:
    """A crew on it, whose clock ticks as the test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, begun: bool = True, **changes: Any) -> None:
        self.now = 1000.0
        monkeypatch.setattr(clusters.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(clusters.time, "sleep", self.sleep)
        self.store, self.cluster, self.told = dist.HashStore(), Pretended(), list[tuple[str, dict[str, Any]]]()
        self.config = replace(CONFIG, **changes)
        self.slot = find_slot(self.config, {})
        handle = StoreHandle(self.store, "10.0.0.1", 4711, "unbroken", b"t" * 32)
        self.crew = Crew.of(self.config, self.slot, self.cluster, handle)
        self.crew.tell = lambda event, **fields: self.told.append((event, fields))
        self.crew.ask()
        if begun:
            self.crew.tick()
        self.beats, self.living, self.gone = 0, set[int](), list[int]()
        self.crew.gone = self.gone.append

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.beats += 1
        for rank in self.living:
            keys.beat_agent(self.store, rank, self.beats)

    def pass_(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.sleep(0.5)
            self.crew.tick()

    @property
    def ranks(self) -> list[int]:
        return [start.rank for start in self.cluster.asked]


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> Crowd:
    return Crowd(monkeypatch)


# ---- settings and slots ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster": "slurm"}, "cluster is 'slurm'; allowed: ray, or ray://HOST:PORT"),
        ({"cluster": "ray://head"}, "cluster is 'ray://head'; allowed"),
        ({"min_workers": 0}, "workers is 4; allowed: MIN:MAX with cluster"),
        ({"nodes": 2, "store": "a:1"}, "nodes is 2; allowed: 1 with cluster"),
        ({"agent_workers": 0}, "agent_workers is 0; allowed: 1 to 1024"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        replace(CONFIG, **changes).validate()
    assert str(refused.value).startswith(message)


def test_settings_of_a_cluster_are_used_in_either_form() -> None:
    for name in ("ray", "ray://10.0.0.1:10001"):
        replace(CONFIG, cluster=name).validate()


def test_who_coordinates_has_no_workers_and_agents_have_neighbours() -> None:
    slot = find_slot(CONFIG, {})
    assert (slot.rank, slot.agents, slot.coordinates) == (0, 3, True)
    assert slot.dealt(4) == {0: 1, 1: 1, 2: 2, 3: 2}
    assert slot.workers(4) == []
    assert find_slot(replace(CONFIG, workers=5), {}).dealt(5) == {0: 1, 1: 1, 2: 2, 3: 2, 4: 3}
    own = replace(slot, rank=2)
    assert (own.workers(4), own.workers_here(4), own.local_index(3, 4)) == ([2, 3], 2, 1)


def test_an_agent_knows_its_place_by_what_it_was_started_with() -> None:
    slot = replace(find_slot(CONFIG, {}), rank=2)
    handle = StoreHandle(dist.HashStore(), "10.0.0.1", 4711, "unbroken", b"t" * 32)
    found = find_slot(CONFIG, {**environment_of(slot, handle), PARENT: "77"})
    assert found == Slot(2, 3, host="10.0.0.1", port=4711, prefix="unbroken", cluster=True, parent=77)
    assert not found.coordinates


def test_a_node_is_told_all_that_depends_on_the_machine_where_the_run_was_started(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = on_nodes(CONFIG)
    assert (told.out, told.threads) == (Path.cwd() / "runs/one", 3)
    assert on_nodes(replace(CONFIG, threads=2)).threads == 2
    (tmp_path / "settings.toml").write_text(crowd.cluster.asked[0].settings)
    assert config_from_toml(tmp_path / "settings.toml", TrainConfig) == crowd.config
    assert [(each.rank, each.cpus, each.gpus) for each in crowd.cluster.asked] == [(1, 6.0, 0), (2, 6.0, 0)]
    monkeypatch.setenv("UNBROKEN_CACHE", "here")
    monkeypatch.setenv("UNBROKEN_TOKEN", "t" * 32)
    other = Crowd(monkeypatch, device="cuda")
    assert [each.gpus for each in other.cluster.asked] == [2, 2]
    assert other.cluster.asked[0].environment["UNBROKEN_CACHE"] == "here"
    assert "UNBROKEN_TOKEN" not in other.cluster.asked[0].environment


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "launch.ray_cluster", None)
    with pytest.raises(ConfigError, match=r"cluster is 'ray', and the package ray is missing .*unbroken\[ray\]"):
        clusters.connect(CONFIG)


# ---- who comes and goes ----


@pytest.mark.parametrize(("least", "ranks"), [(1, [1]), (2, [1]), (3, [1, 2])])
def test_agents_without_which_the_run_cannot_begin_are_placed_together(
    monkeypatch: pytest.MonkeyPatch, least: int, ranks: list[int]
) -> None:
    crowd = Crowd(monkeypatch, begun=False, min_workers=least)
    assert crowd.cluster.first == crowd.ranks == ranks
    crowd.cluster.room_for_first = False
    for _ in range(3):
        crowd.now += 5
        crowd.crew.tick()
    assert crowd.ranks == ranks, "who could be done without takes no room of theirs"
    crowd.cluster.room_for_first = True
    crowd.now += 5
    crowd.crew.tick()
    assert crowd.ranks == [1, 2]


def test_who_is_lost_is_asked_for_again_under_its_rank(crowd: Crowd) -> None:
    crowd.living = {1, 2}
    crowd.pass_(3.0)
    assert crowd.crew.here == {1, 2}
    crowd.living = {1}
    crowd.cluster.ended_[1] = "was lost by Ray: its node died"
    crowd.pass_(4.0)
    assert crowd.ranks == [1, 2, 2]
    assert crowd.gone == [2], "before the heartbeat of its workers says so"
    assert ("agent_lost", {"agent": 2, "reason": "was lost by Ray: its node died"}) in crowd.told
    crowd.pass_(60.0)
    assert crowd.ranks == [1, 2, 2], "who was asked for is waited for, as long as there is no room"
    crowd.living = {1, 2}
    crowd.pass_(1.0)
    assert [event for event, _ in crowd.told].count("agent_came") == 3


def test_who_gives_no_sign_of_life_is_ended_and_asked_for_again(crowd: Crowd) -> None:
    """A cluster may take long to notice that a machine is gone."""
    crowd.living = {1, 2}
    crowd.pass_(3.0)
    crowd.living = {2}
    crowd.pass_(9.0)
    assert crowd.ranks == [1, 2]
    crowd.pass_(3.0)
    assert (crowd.ranks, crowd.cluster.killed) == ([1, 2, 1], [0])


def test_whom_the_cluster_has_lost_while_it_lives_is_not_asked_for_twice(crowd: Crowd) -> None:
    """Its raylet is gone, and it goes on: another one of its rank would be refused."""
    crowd.living = {1, 2}
    crowd.pass_(3.0)
    crowd.cluster.ended_[0] = "was lost by Ray: its node died"
    crowd.pass_(30.0)
    assert crowd.ranks == [1, 2]
    crowd.living = {2}
    crowd.pass_(4.0)
    assert crowd.ranks == [1, 2, 1]


def test_when_the_run_is_over_nobody_is_asked_for(crowd: Crowd) -> None:
    crowd.living = {1, 2}
    crowd.pass_(3.0)
    keys.end(crowd.store, 0)
    crowd.living, crowd.cluster.ended_ = set(), {0: "has ended with exit code 0", 1: "has ended with exit code 0"}
    crowd.pass_(30.0)
    assert crowd.ranks == [1, 2]


# ---- the beginning ----


def first(crowd: Crowd, wait: float = 0.0) -> tuple[int, ...]:
    return crowd.crew.await_first(crowd.slot.dealt(4), 2, 60.0, 60.0 + wait, lambda _: None)


def test_a_run_begins_at_once_when_all_have_come_and_after_a_while_with_enough(crowd: Crowd) -> None:
    crowd.living = {1, 2}
    assert first(crowd) == ()
    assert crowd.now < 1002.0


def test_a_run_begins_without_those_who_have_not_come(crowd: Crowd) -> None:
    crowd.living = {2}
    assert first(crowd) == (0, 1)
    assert 1060.0 <= crowd.now < 1061.0


def test_who_has_been_placed_has_time_to_start(crowd: Crowd) -> None:
    crowd.living, crowd.cluster.placed = {2}, {0, 1}
    assert first(crowd) == (0, 1)
    assert 1180.0 <= crowd.now < 1181.0
    crowd.living = {1, 2}
    assert first(crowd) == ()
    crowd.pass_(1.0)
    assert ("agent_came", {"agent": 1, "node": "node"}) in crowd.told


def test_too_few_are_waited_for_and_then_the_run_is_for_later(crowd: Crowd) -> None:
    with pytest.raises(RunFailed) as failed:
        first(crowd, wait=30.0)
    assert failed.value.code == STOPPED
    assert "of 4 workers 0 have come; its 1 nodes have 0 of 1 CPUs free, after 90 s; 2 are the fewest" in str(
        failed.value
    )


def test_what_ends_every_agent_before_a_sign_of_life_is_told(crowd: Crowd) -> None:
    crowd.cluster.ended_ = dict.fromkeys(range(20), "has ended with exit code 1: there is no package launch")
    with pytest.raises(RunFailed, match=r"agent \d has ended with exit code 1: there is no package launch; 3 times"):
        first(crowd)
    assert crowd.now < 1010.0


def test_a_view_without_those_who_have_not_come_awaits_them_and_counts_no_loss() -> None:
    run = Run()
    run.coordinator.begin_without((1,))
    assert run.view.number == 2
    assert not run.named("detected")
    assert run.coordinator._losses.count == 0
    run.coordinator.begin_without(())
    assert run.view.number == 2


def test_the_workers_of_a_machine_that_is_known_to_be_gone_are_lost_at_once() -> None:
    places = {worker: worker for worker in range(3)}
    run = Run(view=View(1, (0, 1, 2), LAYOUT.key, places=places, agents={0: 1, 1: 1, 2: 2}, next_worker=3))
    run.recovery.go.set()
    run.train()
    run.coordinator.machine_gone(1)
    run.until(lambda: run.view.number == 2)
    assert run.view.workers == (2, 3, 4)
    assert {each["reason"] for each in run.named("detected")} == {"was on a machine that is gone"}


def test_an_agent_that_comes_late_starts_whom_the_newest_view_awaits() -> None:
    """It has never been there: nobody has started those who are in its places."""
    store, forkserver = dist.HashStore(), Scripted()
    agents = {0: 1, 1: 2, 2: 2}
    view = View(2, (0,), LAYOUT.key, places={0: 0, 3: 1, 4: 2}, agents=agents, awaited={3: 1, 4: 2}, next_worker=5)
    publish(store, replace(view, number=1, workers=(0, 1, 2), places={0: 0, 1: 1, 2: 2}, awaited={}), LAYOUT)
    publish(store, view, LAYOUT)
    agent = Agent(2, forkserver, store, [1, 2], lambda worker, place, *_: {"worker": worker, "place": place})  # type: ignore[arg-type]
    agent.start()
    agent._follow(over=False)
    assert sorted(payload["worker"] for payload in forkserver.started) == [3, 4]


def test_an_agent_that_comes_late_starts_the_members_that_are_waited_for() -> None:
    """All wait for them, as without --workers MIN:MAX."""
    store, forkserver = dist.HashStore(), Scripted()
    view = View(1, (0, 1), LAYOUT.key, places={0: 0, 1: 1}, agents={0: 0, 1: 1}, next_worker=2)
    publish(store, view, LAYOUT)
    agent = Agent(1, forkserver, store, [1], lambda worker, place, number, joins: vars() | {"worker": worker})  # type: ignore[arg-type]
    agent.start()
    agent._follow(over=False)
    assert [payload["worker"] for payload in forkserver.started] == [1]
    assert forkserver.started[0]["joins"] is False


def test_workers_that_a_view_does_not_know_are_ended_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent came while the run began without it: whom it has started are others than who is awaited."""
    killed: list[int] = []
    monkeypatch.setattr("launch.agent._send", lambda pids, number: killed.extend(pids))
    store, forkserver = dist.HashStore(), Scripted()
    agent = Agent(1, forkserver, store, [1], lambda worker, *_: {"worker": worker})  # type: ignore[arg-type]
    agent.start()
    (began,) = agent.pids
    view = View(1, (0, 1), LAYOUT.key, places={0: 0, 1: 1}, agents={0: 0, 1: 1}, next_worker=2)
    publish(store, view, LAYOUT)
    publish(store, replace(view, number=2, workers=(0,), places={0: 0, 2: 1}, awaited={2: 1}), LAYOUT)
    agent._follow(over=False)
    assert killed == [began]
    assert [payload["worker"] for payload in forkserver.started] == [1, 2]


def test_an_agent_ends_with_the_process_that_has_started_it(tmp_path: Path) -> None:
    """As an actor that is killed takes its agent along."""
    (tmp_path / "child.py").write_text(
        "import os, time\nfrom launch.forkserver import die_with_parent\n"
        "die_with_parent(os.getppid())\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n"
    )
    child_path = str(tmp_path / "child.py")
    starts = f"import subprocess, sys, time; subprocess.Popen([sys.executable, {child_path!r}]); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", starts], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
        deadline = time.monotonic() + 10
        while Path(f"/proc/{child}").exists() and (Path(f"/proc/{child}/stat").read_text().split()[2] != "Z"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        parent.kill()
        parent.wait()
        if parent.stdout is not None:
            parent.stdout.close()
