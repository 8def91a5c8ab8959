"""The writer of views, alone with a store: what it takes for a loss, what it waits for, and when it gives up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from pipeline.exit_codes import GIVE_UP
from pipeline.schedule.layout import TRAIN, Layout
from recovery import checkpoint, keys
from recovery.commit import COMMIT, decide
from recovery.coordinator import Coordinator
from recovery.keys import Beat
from recovery.losses import Losses, NoProgress, TooManyFailures
from recovery.membership import START, View, next_view, read_view
from recovery.policy import Recovery
from recovery.remedy import CannotRestore
from recovery.resize import Resize
from schedulers import plan

LAYOUT = Layout({TRAIN: plan("one_f_one_b", [1.0] * 6, 3, 4)})


@dataclass
class Scripted:
    """A recovery that takes its time: replaces whoever is lost once `go` is set."""

    go: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[int, ...]] = field(default_factory=list)
    meanwhile: str | None = None
    resize: Resize | None = None
    layouts: dict[str, Layout] = field(default_factory=lambda: {LAYOUT.key: LAYOUT})
    verifier: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(came_on_at=0.0))

    def after_loss(self, view: View, lost: tuple[int, ...]) -> View:
        self.asked.append(lost)
        assert self.go.wait(20)
        return next_view(view, lost)

    def before_training(self, view: View, lost: tuple[int, ...]) -> View:
        return next_view(view, lost)

    def with_ready(self, view: View, ready: Sequence[int]) -> View:
        raise NotImplementedError


class Run:
    """A coordinator and a store; the workers are what a test says of them."""

    def __init__(self, recovery: Any = None, view: View | None = None, **changes: Any) -> None:
        self.store, self.events = dist.HashStore(), list[dict[str, Any]]()
        self.recovery = recovery or Scripted()
        view = view or View(
            1, (0, 1, 2), LAYOUT.key, places={w: w for w in range(3)}, agents=dict.fromkeys(range(3), 0), next_worker=3
        )
        settings = {"heartbeat_s": 10.0, "deadline_s": 30.0, "max_failures": 100, **changes}
        self.coordinator = Coordinator(self.store, view, self.recovery, self.event, **settings)

    def event(self, name: str, **fields: Any) -> None:
        self.events.append({"event": name, **fields})

    def named(self, name: str) -> list[dict[str, Any]]:
        return [each for each in self.events if each["event"] == name]

    @property
    def view(self) -> View:
        return self.coordinator.view

    def commit(self, count: int = 1) -> None:
        """The workers of the view settle something."""
        first = self.coordinator._follower.iteration
        for iteration in range(first, first + count):
            decide(self.store, self.view.number, iteration, COMMIT)

    def train(self) -> None:
        """The workers of the view are ready, and have made a step."""
        self.commit(3)
        self.coordinator.tick()

    def until(self, holds: Callable[[], bool], seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, self.events
            self.coordinator.tick()
            time.sleep(0.002)


def test_a_loss_leads_to_the_next_view() -> None:
    run = Run()
    run.recovery.go.set()
    run.train()
    keys.report_loss(run.store, 1, "was killed by SIGKILL")
    run.coordinator.tick()
    assert run.view.workers == (0, 2, 3)
    assert read_view(run.store, 2) == run.view
    assert decide(run.store, 1, 4, COMMIT) != COMMIT, "the step under way has ended"


def test_before_anything_was_trained_a_loss_needs_no_remedy_and_that_is_said() -> None:
    run = Run()
    keys.report_loss(run.store, 1, "was killed by SIGKILL")
    run.coordinator.tick()
    assert run.view.workers == (0, 2, 3)
    assert run.recovery.asked == []
    assert run.named("remedy")[0]["remedy"] == "the weights of the start, as nothing was trained yet"


def test_the_run_is_looked_after_while_the_next_view_is_being_found_out() -> None:
    """Verifying a large checkpoint takes minutes: no tick waits for it, and a second loss is taken in."""
    run = Run()
    run.train()
    keys.report_loss(run.store, 1, "was killed by SIGKILL")
    for _ in range(20):
        began = time.monotonic()
        run.coordinator.tick()
        assert time.monotonic() - began < 0.5
    assert run.view.number == 1
    keys.report_loss(run.store, 2, "was killed by SIGKILL")
    keys.report_loss(run.store, 1, "was killed by SIGKILL")  # told again by somebody else
    run.coordinator.tick()
    run.recovery.go.set()
    run.until(lambda: run.view.number == 2)
    assert run.recovery.asked == [(1,), (1, 2)]
    assert run.view.workers == (0, 3, 4)
    assert [each["worker"] for each in run.named("detected")] == [1, 2]


def test_what_is_found_out_may_take_as_long_as_it_comes_on() -> None:
    run = Run(deadline_s=0.3)
    run.train()
    keys.report_loss(run.store, 1, "was killed by SIGKILL")
    began = time.monotonic()
    while time.monotonic() - began < 0.9:
        run.recovery.verifier.came_on_at = time.monotonic()
        run.coordinator.tick()
        time.sleep(0.01)
    with pytest.raises(CannotRestore, match=r"worker 1 was killed by SIGKILL; .* has not been found out for 0\.3 s"):
        run.until(lambda: False)
    run.recovery.go.set()


def test_why_nothing_brings_it_back_is_told_without_a_dangling_end() -> None:
    class Hopeless(Scripted):
        def after_loss(self, view: View, lost: tuple[int, ...]) -> View:
            raise CannotRestore("no remedy is left")

    run = Run(Hopeless())
    run.train()
    keys.report_loss(run.store, 1, "was killed by SIGKILL")
    with pytest.raises(CannotRestore, match=r"^worker 1 was killed by SIGKILL; no remedy is left$"):
        run.coordinator.tick()


def test_a_report_whose_writer_died_in_the_middle_of_it_is_found_and_hides_none() -> None:
    run = Run()
    run.recovery.go.set()
    run.train()
    keys.report_loss(run.store, 1, "was killed by SIGKILL")
    run.store.delete_key("losses")  # its writer did not come to say that there is something
    run.until(lambda: run.view.number == 2)
    keys.report_loss(run.store, 2, "was killed by SIGKILL")
    run.coordinator.tick()
    assert run.view.workers == (0, 3, 4)


# ---- agents ----


def lost_on_agent_1(heartbeat_s: float) -> Run:
    """The view in which worker 3 takes the place of worker 1, at an agent that has given one sign of life."""
    run = Run(heartbeat_s=heartbeat_s)
    run.recovery.go.set()
    run.coordinator.view = replace(run.view, agents={0: 0, 1: 1, 2: 0})
    run.train()
    keys.beat_agent(run.store, 1, 1)
    keys.report_loss(run.store, 1, "was killed by SIGKILL")
    run.coordinator.tick()
    return run


def test_a_worker_that_was_told_of_keeps_its_agent_and_no_id_is_started_twice() -> None:
    """Worker 3 was to be started by agent 1, which then is silent, perhaps for a moment alone."""
    run = lost_on_agent_1(heartbeat_s=0.6)
    assert run.view.agents[1] == 1
    told = run.view.number
    number = 0
    deadline = time.monotonic() + 5.0
    while 3 in run.view.places:
        number += 1
        for worker in (0, 2):
            beat(run, worker, number)
        run.coordinator.tick()
        assert 3 not in run.view.places or run.view.agents[1] == 1
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert run.view.number == told + 1
    assert run.view.agents[1] == 0
    assert [each["reason"] for each in run.named("detected")][1:] == [
        "was being started by an agent that has given no sign of life since"
    ]
    assert read_view(run.store, told).workers == (0, 2, 3)
    assert run.view.workers == (0, 2, 4)


def test_a_worker_that_lives_keeps_its_agent_though_that_says_nothing_for_a_while() -> None:
    run = lost_on_agent_1(heartbeat_s=2.0)
    began, number = time.monotonic(), 0
    while time.monotonic() - began < 1.5:
        number += 1
        for worker in (0, 2, 3):
            beat(run, worker, number)
        run.coordinator.tick()
        time.sleep(0.01)
    assert 1 not in run.coordinator.alive
    keys.report_loss(run.store, 2, "was killed by SIGKILL")
    run.coordinator.tick()
    assert run.view.joined.keys() == {3, 4}
    assert run.view.agents[1] == 1


# ---- who hangs ----


def beat(run: Run, worker: int, number: int, progress: int = 0, waiting: str = "") -> None:
    keys.beat(run.store, worker, Beat(number, waiting, progress, built=True))


def test_a_worker_whose_work_comes_on_is_not_stuck_and_one_whose_does_not_is() -> None:
    """Worker 0 loads for longer than the deadline, layer by layer; worker 1 does nothing; worker 2 waits for both."""
    run = Run(deadline_s=0.6, heartbeat_s=2.0)
    run.recovery.go.set()
    run.train()
    began, number = time.monotonic(), 0
    while time.monotonic() - began < 2.0 and run.view.number == 1:
        number += 1
        beat(run, 0, number, progress=number)
        beat(run, 1, number)
        beat(run, 2, number, waiting="the output of F")
        run.coordinator.tick()
        time.sleep(0.02)
    assert [(each["worker"], each["reason"]) for each in run.named("detected")] == [
        (1, "has been busy with one step for 0.6 s")
    ]


def test_a_machine_that_is_gone_before_its_agent_began_gives_its_places_to_others() -> None:
    """Found by the simulation: each replacement was started by the same agent, which was not there, until the third."""
    run = Run(deadline_s=0.4, heartbeat_s=2.0)
    run.recovery.go.set()
    run.coordinator.view = replace(run.view, agents={0: 0, 1: 1, 2: 0})
    beats = [0]

    def others_come_on() -> bool:
        beats[0] += 1
        for worker in (0, 2):
            beat(run, worker, beats[0], progress=beats[0])
        return run.view.number > 1

    run.until(others_come_on)
    lost = run.named("detected")
    assert [(each["worker"], each["reason"]) for each in lost] == [
        (1, "was being started by an agent that has given no sign of life since")
    ]
    assert run.view.agents == {0: 0, 1: 0, 2: 0}


@pytest.mark.parametrize("built", [None, False, True], ids=["no sign", "not built", "built"])
def test_a_worker_that_is_awaited_and_does_not_come_up_is_lost(built: bool | None) -> None:
    """The others go on meanwhile, so nothing but its own time says so."""

    class Without(Scripted):
        def after_loss(self, view: View, lost: tuple[int, ...]) -> View:
            return next_view(view, lost, wait=True)

        def with_ready(self, view: View, ready: Sequence[int]) -> View:
            raise CannotRestore("not yet")

    run = Run(Without(), deadline_s=0.5, heartbeat_s=2.0)
    run.train()
    keys.report_loss(run.store, 1, "was killed by SIGKILL")
    run.coordinator.tick()
    assert dict(run.view.awaited) == {3: 1}
    began, number = time.monotonic(), 0
    while time.monotonic() - began < (1.6 if built else 20.0) and len(run.named("detected")) < 2:
        number += 1
        for worker in (0, 2):
            beat(run, worker, number)
        if built is not None:
            keys.beat(run.store, 3, Beat(number, "", 0, built))
        run.commit()
        run.coordinator.tick()
        time.sleep(0.01)
    assert [each["reason"] for each in run.named("detected")][1:] == ([] if built else ["has not come up within 0.5 s"])


def test_a_worker_that_never_comes_up_is_lost() -> None:
    run = Run(deadline_s=0.5, heartbeat_s=2.0)
    run.recovery.go.set()
    run.until(lambda: run.view.number == 2)
    assert {each["reason"] for each in run.named("detected")} == {"has not come up within 0.5 s"}


def test_workers_that_have_waited_for_a_vote_in_vain_get_a_new_view() -> None:
    run = Run()
    run.recovery.go.set()
    run.train()
    decide(run.store, 1, 4, "abort")  # by a worker
    run.coordinator.tick()
    assert run.view.number == 2
    assert run.view.workers == (0, 1, 2)
    assert [(each["worker"], each["reason"]) for each in run.named("link")] == [(0, "has not voted in time")]


# ---- strangers ----


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"[]", b"{}", b'{"worker": "1"}', b"[" * 100_000])
def test_what_a_stranger_writes_is_left_aside_and_said(data: bytes) -> None:
    run = Run()
    run.recovery.go.set()
    run.train()
    for key in ("loss/0", "losses", "beat/1", "complaint/1", "agent/0", "error/1"):
        run.store.set(key, data)
    keys.report_loss(run.store, 2, "was killed by SIGKILL")
    run.until(lambda: run.view.number == 2)
    assert run.view.workers == (0, 1, 3)
    assert run.named("unreadable")


def test_a_loss_of_nobody_is_none() -> None:
    run = Run()
    run.train()
    keys.report_loss(run.store, 99, "was killed by SIGKILL")
    run.coordinator.tick()
    assert run.view.number == 1


# ---- when it makes no sense to go on ----


def lose(run: Run, place: int, reason: str, told: bool = False) -> None:
    worker = next(w for w, p in run.view.places.items() if p == place)
    keys.report_loss(run.store, worker, reason, told)
    run.until(lambda number=run.view.number: run.view.number > number)


def test_a_place_that_is_lost_three_times_without_a_step_ends_the_run_with_the_reason() -> None:
    run = Run()
    run.recovery.go.set()
    lose(run, 1, "RuntimeError: can't allocate 400 GiB", told=True)
    lose(run, 1, "RuntimeError: can't allocate 400 GiB", told=True)
    with pytest.raises(TooManyFailures, match=r"can't allocate 400 GiB; 3 times in a row without a step between"):
        lose(run, 1, "RuntimeError: can't allocate 400 GiB", told=True)


def test_an_error_that_goes_from_place_to_place_counts_as_one() -> None:
    run = Run()
    run.recovery.go.set()
    for place in (0, 1):
        lose(run, place, "ValueError: the same", told=True)
    with pytest.raises(TooManyFailures, match="ValueError: the same; 3 times in a row"):
        lose(run, 2, "ValueError: the same", told=True)


def test_steps_in_between_and_other_places_make_it_worthwhile() -> None:
    run = Run()
    run.recovery.go.set()
    for _ in range(4):
        lose(run, 1, "was killed by SIGKILL")
        run.train()
    for place in (0, 1, 2, 0, 1, 2):
        lose(run, place, "was killed by SIGKILL")


def test_a_run_that_is_to_stop_gives_up_sooner() -> None:
    run = Run()
    run.recovery.go.set()
    keys.ask_to_stop(run.store)
    lose(run, 1, "was killed by SIGKILL")
    with pytest.raises(TooManyFailures, match="2 times in a row"):
        lose(run, 1, "was killed by SIGKILL")


def test_all_losses_together_have_a_bound() -> None:
    losses = Losses(2)
    losses.note(0, 0, "a", told=False, when=1)
    losses.progress()
    losses.note(1, 1, "b", told=False, when=2)
    with pytest.raises(TooManyFailures, match=r"3 workers were lost, the last: worker 2 c; allowed by max_failures: 2"):
        losses.note(2, 2, "c", told=False, when=3)


def test_three_sets_of_workers_that_were_ready_and_made_no_step_end_the_run_for_good() -> None:
    run = Run()
    run.recovery.go.set()
    run.train()
    for place in (0, 1):
        lose(run, place, "was killed by SIGKILL")
        run.commit(2)  # all are ready, and no step comes
        run.coordinator.tick()
    with pytest.raises(NoProgress, match="3 views in a row have ended without a step, the last: worker 2 was killed"):
        lose(run, 2, "was killed by SIGKILL")
    assert NoProgress("").code == GIVE_UP == 93


def test_machines_that_go_have_a_budget_of_their_own() -> None:
    losses = Losses(0, 2)
    losses.preempted(1)
    losses.preempted(2)
    with pytest.raises(TooManyFailures, match="3 machines have gone, the last: machine 1; allowed by max_preempt"):
        losses.preempted(1)


# ---- back to where ----


def recovery(folder: Path, **changes: Any) -> Recovery:
    view = View(1, (0, 1, 2), LAYOUT.key, places={w: w for w in range(3)}, next_worker=3)
    return Recovery("checkpoint", replace(view, **changes), LAYOUT, 6, False, folder)


def test_without_a_checkpoint_all_go_back_to_the_start(tmp_path: Path) -> None:
    made = recovery(tmp_path)
    assert made.after_loss(made.home, (1,)).rollback == START
    gone = replace(made, source_changed=lambda: "models/x has changed: model.safetensors")
    with pytest.raises(CannotRestore, match=r"cannot start again: models/x has changed: model.safetensors"):
        gone.after_loss(gone.home, (1,))
    resumed = recovery(tmp_path, checkpoint="step-00000005")
    with pytest.raises(CannotRestore, match="and the one that the run began with is gone"):
        resumed.after_loss(resumed.home, (1,))


def test_what_would_happen_is_known_before_the_first_step(tmp_path: Path) -> None:
    made = recovery(tmp_path)
    assert made.forecast(1) == "checkpoint"
    assert replace(made, policy="auto").forecast(1) == "rehearse"
    assert replace(made, policy="checkfree").forecast(0).startswith("the run ends (what was lost cannot be ")


def test_a_checkpoint_that_was_read_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_checkpoint import save

    save(tmp_path, 3)
    reads: list[str] = []
    verify = checkpoint._verify
    monkeypatch.setattr(checkpoint, "_verify", lambda path, *rest: (reads.append(path.name), verify(path, *rest)))
    verifier = checkpoint.Verifier()
    for _ in range(3):
        assert verifier.find(tmp_path).path == checkpoint.directory(tmp_path, 3)
    assert len(reads) == 3, "three layers, once each"
    file = checkpoint.directory(tmp_path, 3) / "layer-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    found = verifier.find(tmp_path)
    assert found.path is None
    assert "layer-00001.safetensors has checksum" in found.skipped[0][1]
    assert verifier.came_on_at > 0
