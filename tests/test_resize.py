"""The size of a run: what the planner chooses against all there is, what moves between two cuts, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from jobs.config import ConfigError, TrainConfig
from jobs.resizing import make_planner
from launch.cli import configured, main
from launch.config import config_from_dict
from launch.loss_plan import first_view as view
from launch.plan_command import PlanConfig, plan_command
from pipeline.schedule.costs import Costs
from pipeline.schedule.ops import Schedule, span_text
from pipeline.schedule.simulate import simulate
from recovery import keys
from recovery.keys import Beat
from recovery.losses import Losses
from recovery.membership import next_view
from recovery.policy import Recovery
from recovery.remedy import CannotRestore, Has, has, losses
from recovery.resize import Resize
from recovery.speeds import Speeds
from schedulers import PartitionError, plan
from schedulers.resize import ResizeProblem, resize, shapes
from tests.test_coordinator import Run

LAYERS = 8


def problem(**changes: Any) -> ResizeProblem:
    return replace(ResizeProblem("one_f_one_b", [1.0] * LAYERS, 4, 2, 2), **changes)


# ---- the planner ----


def every_time(asked: ResizeProblem, places: Collection[int], speeds: dict[int, float]) -> float:
    """The least time over all shapes and all ways to deal the places to them, each cut by the minimax partition."""
    found = float("inf")
    for stages, replicas in shapes(asked, len(places)):
        for order in permutations(places, stages * replicas):
            at = list(order)  # worker replica * stages + stage of the plan -> its place
            paces = [min(speeds[at[r * stages + stage]] for r in range(replicas)) for stage in range(stages)]
            made = plan(asked.scheduler, asked.layer_costs, stages, asked.microbatches, replicas, speeds=paces)
            schedule = Schedule(made.routes, {at[w]: lane for w, lane in made.lanes.items()}, "")
            found = min(found, simulate(schedule, Costs(list(asked.layer_costs), speed=speeds)).makespan_s)
    return found


@given(
    st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=1, max_size=4),
    st.lists(st.integers(1, 4), min_size=5, max_size=5),
)
@example_settings(max_examples=40, deadline=None)
def test_the_plan_is_near_the_best_of_all_deals(speeds: list[float], costs: list[int]) -> None:
    """Stages stand in the order of the layers that their workers have, not in the one that pipelines fastest."""
    asked = problem(layer_costs=[float(c) for c in costs])
    known = dict(enumerate(speeds))
    found = resize(asked, range(len(speeds)), speeds=known).seconds
    best = every_time(asked, range(len(speeds)), known)
    assert best - 1e-9 <= found
    if len(set(speeds)) == 1:
        assert found == pytest.approx(best), "with workers that are alike it is the best"
    else:
        assert found <= 1.5 * best


def test_memory_is_a_limit() -> None:
    asked = problem(layer_bytes=[10.0] * LAYERS, most_replicas=1)
    found = resize(asked, range(4), limits={0: 10.0, 1: 30.0, 2: 40.0, 3: 20.0})
    held = {places[0]: hi - lo for (lo, hi), places in found.layout.holders.items()}
    assert all(10.0 * n <= {0: 10.0, 1: 30.0, 2: 40.0, 3: 20.0}[place] for place, n in held.items())
    with pytest.raises(PartitionError, match=r"2 workers cannot hold the 8 layers: they take 80 bytes; .* have 70"):
        resize(asked, (1, 2), limits={1: 30.0, 2: 40.0})


def test_a_slow_worker_gets_less() -> None:
    found = resize(problem(most_replicas=1), range(3), speeds={1: 0.25})
    held = {places[0]: hi - lo for (lo, hi), places in found.layout.holders.items()}
    assert held.get(1, 0) < min(held[0], held[2])


def test_layers_stay_where_they_are() -> None:
    """Two replicas of two stages, one worker less: every survivor keeps what it can."""
    home = resize(problem(), range(4)).layout
    around = make_planner(problem(), home)
    for gone in range(4):
        before = {p: {n for s, ps in home.holders.items() if p in ps for n in range(*s)} for p in range(4)}
        after = around(set(range(4)) - {gone}, {})
        kept = sum(len(before[p] & set(range(*s))) for s, ps in after.holders.items() for p in ps)
        assert kept >= LAYERS // 2
    with pytest.raises(CannotRestore, match="no worker is left"):
        around((), {})


# ---- what moves ----


@given(st.integers(1, 6), st.integers(1, 6), st.booleans())
@example_settings(max_examples=60, deadline=None)
def test_what_moves_is_the_difference_of_what_is_held_and_wanted(old: int, new: int, tied: bool) -> None:
    """Every state that a worker wants and lacks is named once, with all who have it; nothing else is."""
    asked = problem(most_replicas=1, layer_costs=[1.0] * 6)
    a, b = resize(asked, range(old)).layout, resize(asked, range(new)).layout
    first = view(a)
    before: Has = has(first, a, 6, tied)
    after = replace(view(b), workers=tuple(range(new)), places={w: w for w in range(new)})
    found: dict[int, list[str]] = {}
    for loss in losses(after, b, before, 6, tied):
        names = [loss.part] if loss.part == "tied" else [str(n) for n in range(*map(int, loss.part.split(":")))]
        found.setdefault(loss.joiner, []).extend(names)
        owners = [w for w in after.workers if set(names) <= before.get(w, set())]
        assert list(loss.copies) == owners
    wanted = has(replace(after, moves=()), b, 6, tied)
    for worker in after.workers:
        lacks = wanted[worker] - before.get(worker, set())
        assert sorted(found.get(worker, [])) == sorted(lacks)


def recovery(tmp_path: Path, policy: str = "auto", **changes: Any) -> Recovery:
    asked = problem(most_replicas=1, layer_costs=[1.0] * 9, **changes)
    home = resize(asked, range(3)).layout
    size = Resize(make_planner(asked, home), 2, 0.0, 0.0)
    return Recovery(policy, view(home), home, 9, False, tmp_path, resize=size)


def test_a_lost_stage_is_the_mean_of_what_is_left_beside_it(tmp_path: Path) -> None:
    made = recovery(tmp_path)
    after = made.after_loss(made.home, (1,))
    assert (after.workers, dict(after.awaited)) == ((0, 2), {3: 1})
    assert {m.remedy for m in after.moves} == {"rehearse"}
    assert sorted(m.part for m in after.moves) in (["3:4", "4:6"], ["3:5", "5:6"])
    assert {source for m in after.moves for source in m.sources} == {(0, "0:3"), (2, "6:9")}
    back = made.with_ready(after.settled(), (3,))
    assert back.layout == made.layout.key
    assert {m.remedy for m in back.moves} == {"replica"}, "nothing is lost when one comes"


def test_who_gave_still_has_until_the_view_is_settled(tmp_path: Path) -> None:
    """A worker that comes is lost in the middle of the move to it: what it was to get is where it was."""
    made = recovery(tmp_path)
    small = made.after_loss(made.home, (1,)).settled()
    growing = made.with_ready(small, (3,))
    again = made.after_loss(growing, (3,))
    assert again.workers == (0, 2)
    assert again.rollback is None
    assert not again.moves, "both have what they had"


def test_a_run_of_one_policy_goes_back_to_a_checkpoint_in_another_layout(tmp_path: Path) -> None:
    made = recovery(tmp_path, "checkpoint")
    after = made.after_loss(made.home, (0, 1))
    assert (after.workers, after.rollback) == ((2,), "start")
    more = made.after_loss(after, ())
    assert more.rollback == "start"
    assert [span_text(s) for s in made.layouts[after.layout].holders] == ["0:9"]


def test_who_leaves_hands_over_first_and_is_a_member_meanwhile(tmp_path: Path) -> None:
    made = recovery(tmp_path, "none")
    over = made.without(made.home, (1,))
    assert over.workers == (0, 1, 2)
    assert not any(1 in places for places in made.layouts[over.layout].holders.values())
    assert {(m.worker, m.remedy) for m in over.moves} == {(0, "replica"), (2, "replica")}
    assert {source for m in over.moves for source, _ in m.sources} == {1}
    gone = made.without(over, (1,))
    assert (gone.workers, gone.moves, gone.layout, dict(gone.awaited)) == ((0, 2), (), over.layout, {3: 1})


def test_how_fast_who_is_costs_no_copy_and_counts_only_where_layers_go_by_it(tmp_path: Path) -> None:
    asked = problem(layer_costs=[1.0] * 8, most_replicas=2)
    home = resize(asked, range(4), least_replicas=2).layout
    speeds = Speeds([1.0] * 8)
    first = view(home)
    for _ in range(3):
        speeds.note(first, home, {0: 1.0, 1: 1.0, 2: 1.0, 3: 9.0})
    for shifts in (False, True):
        size = Resize(make_planner(asked, home), 1, 0.0, 0.0, shifts=shifts, speeds=speeds)
        made = Recovery("replica", first, home, 8, False, tmp_path, resize=size)
        assert bool(made.speeds(first)) == shifts
        found = made.layouts[made.layout_over(first.at, made.speeds(first))]
        assert min(map(len, found.holders.values())) == 2
        assert (found == home) != shifts


# ---- the coordinator ----


class Sized(Run):
    """A coordinator of a run that changes its size."""

    def __init__(self, tmp_path: Path, agent_of_1: int = 0, **changes: Any) -> None:
        made = recovery(tmp_path, copies=changes.pop("copies", False))
        assert made.resize is not None
        made = replace(made, resize=replace(made.resize, **{"speeds": Speeds([1.0] * 9), **changes}))
        super().__init__(made, replace(made.home, agents={0: 0, 1: agent_of_1, 2: 0}), heartbeat_s=0.4)

    def beat(self, *workers: int, agents: Collection[int] = (0,)) -> None:
        self._number = getattr(self, "_number", 0) + 1
        for worker in workers:
            keys.beat(self.store, worker, Beat(self._number, "", 0, True))
        for agent in agents:
            keys.beat_agent(self.store, agent, self._number)


def lose(run: Sized, *workers: int) -> None:
    run.train()
    for worker in workers:
        keys.report_loss(run.store, worker, "was killed by SIGKILL")
    run.until(lambda: run.view.number > 1)


def test_nobody_is_let_in_before_the_cooldown_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Sized(tmp_path, cooldown_s=5.0)
    lose(run, 1)
    assert [event["workers"] for event in run.named("resized")] == [2]
    run.beat(0, 2, 3)
    run.train()
    assert run.view.number == 2
    run.coordinator._planned._resized -= 5.0
    run.commit()
    run.coordinator.tick()
    run.until(lambda: run.view.number == 3)
    assert run.view.workers == (0, 2, 3)


@pytest.mark.parametrize(("lost", "workers"), [((1,), (0, 2, 3)), ((1, 2), (0,))])
def test_spare_workers_take_the_places_of_as_many_as_they_are(
    tmp_path: Path, lost: tuple[int, ...], workers: tuple[int, ...]
) -> None:
    run = Sized(tmp_path, spares=1, wait_s=60.0)
    lose(run, *lost)
    assert run.view.workers == workers
    assert bool(run.named("resized")) == (len(lost) > 1)


def test_too_few_workers_are_waited_for_and_then_asked_to_stop(tmp_path: Path) -> None:
    run = Sized(tmp_path, wait_s=0.2)
    lose(run, 1, 2)
    assert run.view.workers == (0,)
    assert not keys.stop_asked(run.store)
    run.until(lambda: keys.stop_asked(run.store))
    (said,) = run.named("too_few")
    assert (said["workers"], said["least"]) == (1, 2)


def test_a_place_whose_machine_is_gone_is_nobodys_loss(tmp_path: Path) -> None:
    """Its worker is started when the machine comes back; meanwhile it costs no try."""
    run = Sized(tmp_path, agent_of_1=1)
    lose(run, 1)
    heir = next(iter(run.view.awaited))
    run.coordinator._signs._seen["agent/1"] = SimpleNamespace(number=None, at=-1e9, progress=0, progress_at=-1e9)  # type: ignore[assignment]
    number = run.view.number
    for _ in range(3):
        run.coordinator._looked = 0.0
        run.beat(0, 2)
        run.coordinator.tick()
    assert run.view.number == number
    assert run.view.agents[1] == 1
    assert heir in run.view.awaited


def test_workers_that_go_with_their_machine_are_a_preemption(tmp_path: Path) -> None:
    run = Sized(tmp_path, agent_of_1=1)
    run.coordinator._losses = Losses(0, 1)
    run.coordinator._signs._seen["agent/1"] = SimpleNamespace(number=None, at=-1e9, progress=0, progress_at=-1e9)  # type: ignore[assignment]
    lose(run, 1)
    assert (run.coordinator._losses.count, run.coordinator._losses.preemptions) == (0, 1)


def steps(run: Sized, until: Callable[[], bool]) -> None:
    """Steps go on until something holds."""

    def on() -> bool:
        run.beat(*run.view.workers, agents=(0, 1))
        run.commit()
        return until()

    run.until(on)


def test_a_notice_that_is_taken_back_is_backed_out_of(tmp_path: Path) -> None:
    run = Sized(tmp_path, agent_of_1=1)
    run.beat(0, 1, 2, agents=(0, 1))
    run.train()
    keys.leave(run.store, 1, 60.0)
    steps(run, lambda: run.view.number == 2)
    assert run.view.workers == (0, 1, 2)
    assert 1 not in run.coordinator.layout.train.lanes, "it has handed over, and is still there"
    (said,) = run.named("notice")
    assert (said["workers"], said["plan"]) == ([1], "hand over")
    keys.stay(run.store, 1)
    steps(run, lambda: run.view.number == 3)
    assert run.view.workers == (0, 1, 2)
    assert run.view.layout == run.recovery.layout.key
    assert {move.remedy for move in run.view.moves} == {"replica"}
    assert run.coordinator._losses.preemptions == 0


def test_a_machine_that_goes_leaves_in_two_steps_and_is_one_preemption(tmp_path: Path) -> None:
    run = Sized(tmp_path, agent_of_1=1)
    run.beat(0, 1, 2, agents=(0, 1))
    run.train()
    keys.leave(run.store, 1, 60.0)
    steps(run, lambda: 1 not in run.view.workers)
    assert [event["event"] for event in run.events if event["event"] in ("shrunk", "left")] == ["shrunk"]
    assert run.coordinator._losses.preemptions == 1


@pytest.mark.parametrize(("copies", "plan"), [(True, "the others have copies"), (False, "hand over")])
def test_what_does_not_fit_into_the_notice_is_not_waited_for_where_others_have_it(
    tmp_path: Path, copies: bool, plan: str
) -> None:
    run = Sized(tmp_path, agent_of_1=1, copies=copies, layer_bytes=[1e12] * 9)
    run.beat(0, 1, 2, agents=(0, 1))
    run.train()
    keys.leave(run.store, 1, 5.0)
    run.until(lambda: bool(run.named("notice")))
    (said,) = run.named("notice")
    assert (said["needs"] > 1e4, said["left"] <= 5.0, said["plan"]) == (True, True, plan)
    assert (1 in run.view.workers) == (not copies)


def test_layers_leave_a_worker_that_has_become_slow_and_come_back(tmp_path: Path) -> None:
    run = Sized(tmp_path, shifts=True)
    run.beat(0, 1, 2)
    run.train()
    run.coordinator._planned._steps.extend([0.001] * 5)
    home = run.view.layout

    def busy(factor: float) -> None:
        for _ in range(6):
            run.coordinator._planned.stepped(run.view, {"busy_s": f"0:1 1:{factor} 2:1"})

    def held() -> int:
        return sum(hi - lo for (lo, hi), places in run.coordinator.layout.holders.items() if 1 in places)

    busy(2.5)
    steps(run, lambda: run.view.number == 2)
    assert held() < 3
    (said,) = run.named("shifted")
    assert said["speeds"] == {"1": 0.4}
    assert {move.remedy for move in run.view.moves} == {"replica"}
    busy(held() / 3)
    steps(run, lambda: run.view.number == 3)
    assert run.view.layout == home


# ---- settings ----


def test_a_range_of_workers_is_two_settings() -> None:
    config = config_from_dict(TrainConfig, {"workers": "2:5"})
    assert (config.min_workers, config.workers) == (2, 5)
    assert config_from_dict(TrainConfig, {"workers": 3}).min_workers == 0


@pytest.mark.parametrize("text", ["0:4", "4:", ":4", "a:b", "1:2:3", "-1:4"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="workers is"):
        config_from_dict(TrainConfig, {"workers": text})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--workers", "5:4"], "workers is '5:4'; allowed: MIN:MAX, MIN first"),
        (["--workers", "2:4", "--scheduler", "roundpipe"], "allowed: one number under scheduler roundpipe"),
        (["--workers", "2:4", "--recovery", "redundant"], "allowed: one that keeps no copies in certain places"),
        (["--workers", "2:4", "--ends", "apart"], "allowed: auto or in-line where workers are MIN:MAX"),
        (["--exact-sums", "--scheduler", "roundpipe"], "exact_sums is True; allowed: False under scheduler roundpipe"),
    ],
)
def test_what_has_no_layouts_of_other_sizes_is_refused(
    capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["train", *flags]) == 2
    assert said in capsys.readouterr().err


def test_the_size_of_a_view_is_what_is_left(tmp_path: Path) -> None:
    made = recovery(tmp_path)
    left = next_view(made.home, (2,), wait=True)
    assert left.workers == (0, 1)
    assert dict(left.awaited) == {3: 2}


# ---- what every loss leads to ----


def table(*flags: str) -> dict[str, Any]:
    values, text = plan_command(given_plan(*flags))
    assert "losses, simulated" in text
    return values


def given_plan(*flags: str) -> PlanConfig:
    return configured(PlanConfig, "unbroken plan", ["--model", "llama-tiny", *flags])


def test_every_set_of_losses_has_its_outcome() -> None:
    found = table("--workers", "6", "--losses", "2", "--snapshot", "neighbour", "--recovery", "replica")
    assert len(found["sets"]) == 6 + 15
    for each in found["sets"]:
        lost = each["lost"]
        keepers = {place: (place - 1) % 6 for place in lost}  # the stage before keeps the copy
        assert each["survives"] == (not any(keeper in lost for keeper in keepers.values())), each
        if each["survives"]:
            assert each["stages"] * each["replicas"] <= 6 - len(lost)
            assert each["step_time"] >= 1.0
            assert each["remedies"] == ["replica"]
            assert each["peak_bytes"] > 0
        else:
            assert "no other worker holds" in each["why"]


def test_a_table_needs_a_number_of_workers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--losses", "1"]) == 2
    assert "workers is None; allowed: a number, with --losses" in capsys.readouterr().err
