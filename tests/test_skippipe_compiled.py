"""The compiled search: its clock against the readable one, its moves' bookkeeping, its seeds, its bounds."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from pipeline.schedule.simulate import simulate
from schedulers.skippipe import mended, replan, skippipe, without
from schedulers.skippipe_search import anneal as anneal_
from schedulers.skippipe_search.anneal import Budget, Search, anneal, ready
from schedulers.skippipe_search.clock import RULES, STUCK, PathClock, clock
from schedulers.skippipe_search.conflicts import dealt_paths
from schedulers.skippipe_search.flat import flatten, room_of, state_of
from schedulers.skippipe_search.problem import NetworkError, RoutingProblem, check_paths, routing_from_json
from schedulers.skippipe_search.problem import Path as Nodes
from schedulers.skippipe_search.relaxed import all_paths, packing_bound
from tests.test_skippipe import GCP, legal, network
from tests.test_skippipe_hostile import routed

ROOT = Path(__file__).parent.parent


@settings(max_examples=300)
@given(routed())
def test_the_compiled_clock_is_the_readable_one_to_the_bit(given_: tuple[RoutingProblem, list[Nodes]]) -> None:
    problem, paths = given_
    search = Search(problem, joint=False)
    for rule in RULES:
        lanes: list[list[tuple[int, int]]] = [[] for _ in problem.hop_s]
        want = PathClock(problem).finish(paths, rule, lanes)
        flat, room = flatten(problem)._replace(furthest=rule == "furthest"), room_of(problem)
        served = search.kernels.run_clock(flat, np.array(paths), room)
        got: list[list[tuple[int, int]]] = [[] for _ in problem.hop_s]
        for node, m, at in room.lane[:served].tolist():
            got[node].append((m, at))
        assert room.finish.tolist() == want
        assert max(want) == STUCK or max(want) <= flat.most_s
        assert got == lanes


@settings(max_examples=60)
@given(routed())
def test_moves_keep_what_they_must(given_: tuple[RoutingProblem, list[Nodes]]) -> None:
    problem = given_[0]
    if problem.path_length == 1:
        return
    for joint, exact in itertools.product((False, True), repeat=2):
        search = Search(problem, joint)
        search.load(problem, dealt_paths(problem), 3)
        search.descend(Budget(60), exact=exact)
        cut, paths = search.current()
        check_paths(cut, paths)
        fresh, state = state_of(cut, paths, 0), search.state
        for name in ("stage_of", "least", "most", "visits", "stage_visits"):
            assert getattr(fresh, name).tolist() == getattr(state, name).tolist(), name
        assert Counter(map(len, cut.stages)) == Counter(map(len, problem.stages))


def test_a_move_taken_back_leaves_no_trace() -> None:
    problem = network(1, (3, 2, 3, 2), path_length=3, num_microbatches=9, swaps=True)
    search = Search(problem, joint=True)
    search.load(problem, dealt_paths(problem), 1)
    kept, names = search.state.paths.copy(), search.state.stage_of.copy()
    before = {name: np.copy(getattr(search.state, name)) for name in ("paths", "stage_of", "visits", "least", "trips")}
    worth = np.array([-1e9, -1e9, 0.0, 0.0])  # nothing is as good, so every move is taken back
    search.kernels.descend(
        search.flat, search.state, search.room, kept, names, worth, False, 500, 1e-9, 1.0, 0.05, 0.3, 0.0
    )
    for name, value in before.items():
        assert getattr(search.state, name).tolist() == value.tolist(), name


def test_the_seed_alone_decides_within_a_budget_in_moves() -> None:
    problem = routing_from_json(GCP, skip=0.33, swaps=True)
    found = [anneal(problem, [dealt_paths(problem)], Budget(3000), seed=seed, joint=True) for seed in (1, 1, 2)]
    assert found[0] == found[1]
    assert found[0].paths != found[2].paths


def test_a_budget_in_moves_leads_to_the_same_plan_on_any_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anneal_, "_CHAIN", 500)
    problem = routing_from_json(GCP, skip=0.33, swaps=True)
    found = [anneal(problem, [dealt_paths(problem)], Budget(3000), seed=1, cores=cores) for cores in (1, 2, 5)]
    assert found[0] == found[1] == found[2]
    bound = 1.2 * found[0].run.iteration_s  # several chains come there: the first one's plan it is, not the fastest's
    early = [anneal(problem, [dealt_paths(problem)], Budget(3000), seed=1, bound=bound, cores=c) for c in (1, 2, 5)]
    assert early[0] == early[1] == early[2]
    assert found[0].run.iteration_s < early[0].run.iteration_s <= bound * (1 + 1e-6)


def test_paths_that_lock_each_other_out_are_left() -> None:
    problem = network(1, (4, 3, 3, 3, 3), path_length=4, num_microbatches=24, swaps=True, slots=(1,) * 16)
    search = Search(problem, joint=False)
    search.load(problem, dealt_paths(problem), 0)
    search.descend(Budget(20_000), exact=False)
    assert search.judge(*search.current()).run.iteration_s == STUCK, "the estimate knows no locks: try another network"
    search.descend(Budget(3000))
    assert search.judge(*search.current()).run.iteration_s < search.flat.most_s


@pytest.mark.parametrize("seed", range(6))
def test_packed_bounds_hold_against_every_plan(seed: int) -> None:
    """Uneven slots, speeds and visits, with swaps: all assignments of paths, under both rules."""
    stages, length, many = [((1, 2, 1), 2, 4), ((2, 1, 1), 3, 4), ((1, 1, 2, 1), 3, 3)][seed % 3]
    size = sum(stages)
    problem = network(
        seed, stages, path_length=length, num_microbatches=many, swaps=bool(seed % 2),
        slots=tuple(1 + (seed + n) % 3 for n in range(size)), gap_s=0.1 * (seed % 2),
    )  # fmt: skip
    best, choices = float("inf"), [legal(problem, problem.home(m)) for m in range(many)]
    for paths in itertools.product(*choices):
        try:
            check_paths(problem, paths)
        except NetworkError:
            continue
        best = min(best, *(clock(problem, paths, rule).iteration_s for rule in RULES))
    for any_stages in (False, True):
        bound = packing_bound(problem, 0.05 * best, best, any_stages)
        assert 0.05 * best < bound <= best + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_no_plan_beats_the_packed_bound(seed: int) -> None:
    problem = network(seed, (4, 2, 3, 2), path_length=3, num_microbatches=12 + seed, swaps=seed > 0, slots=(3,) * 11)
    plan = skippipe(problem, seconds=0.3)
    joint = skippipe(problem, seconds=0.3, joint=True)
    assert 0 < plan.lower_bound_s <= plan.iteration_s + 1e-9
    assert 0 < joint.lower_bound_s <= min(joint.iteration_s, plan.iteration_s) + 1e-9
    assert packing_bound(problem, 1.0) <= plan.iteration_s + 1e-9, "also where no plan is known"


def test_too_many_paths_are_not_listed() -> None:
    problem = network(0, (9,) * 8, path_length=7, num_microbatches=18, slots=(3,) * 72)
    assert all_paths(problem, any_stages=False) is None
    assert all_paths(problem, any_stages=True) is None
    assert packing_bound(problem, 3.5) == 3.5


def test_a_lost_node_leaves_the_other_homes_their_paths() -> None:
    problem = network(2, (4, 3, 3, 3), path_length=3, num_microbatches=12, slots=(3,) * 13)
    plan = skippipe(problem, moves=2000)
    left = without(plan.problem, [plan.problem.stages[1][0]])
    paths = mended(plan.paths, plan.problem, left)
    kept = [path for path in plan.paths if plan.problem.stages[1][0] not in path]
    assert len(Counter(kept) & Counter(paths)) >= 0.7 * len(set(kept))
    again = replan(plan, left)
    assert simulate(again.schedule(), again.costs, again.network).makespan_s == pytest.approx(again.iteration_s)
    assert replan(plan, left) == again, "a seed decides"


def test_no_garbage_is_collected_while_a_plan_is_mended_and_it_is_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = skippipe(network(2, (4, 3, 3, 3), path_length=3, num_microbatches=12, slots=(3,) * 13), moves=200)
    left, found, usual = without(plan.problem, [plan.problem.stages[1][0]]), list[str](), gc.get_threshold()

    def collections() -> int:
        found.clear()
        replan(plan, left)
        return found.count("start")

    gc.callbacks.append(lambda phase, _: found.append(phase))
    gc.set_threshold(5)
    try:
        guarded = collections()
        monkeypatch.setattr("schedulers.skippipe.no_collection", nullcontext)
        bare = collections()
        monkeypatch.undo()
    finally:
        gc.set_threshold(*usual)
        gc.callbacks.pop()
    assert guarded < bare / 3, "one may be due before, and one when it is over"
    monkeypatch.setattr("schedulers.skippipe.repair", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replan(plan, left)
    assert gc.isenabled()


def test_what_is_judged_has_the_lanes_of_the_readable_clock() -> None:
    problem = network(2, (4, 3, 3, 3), path_length=3, num_microbatches=12, slots=(3,) * 13)
    paths = dealt_paths(problem)
    judged = Search(problem, joint=False).judge(problem, paths)
    assert judged.run == clock(problem, paths, judged.rule)
    assert judged.run.iteration_s == min(clock(problem, paths, rule).iteration_s for rule in RULES)


def test_many_homes_are_searched_by_a_sum() -> None:
    problem = network(3, (20, 6, 6), path_length=2, num_microbatches=40, slots=(3,) * 32)
    start = clock(problem, dealt_paths(problem)).iteration_s
    found = anneal(problem, [dealt_paths(problem)], Budget(3000))
    assert found.run.iteration_s < 0.9 * start


def test_the_compiler_is_loaded_where_something_is_searched_and_only_there() -> None:
    code = "import sys, launch.cli, schedulers.skippipe; print(any(m in sys.modules for m in ('numba', 'highspy')))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'launch' / 'public'}"},
    )  # fmt: skip
    assert done.stdout.strip() == "False"
    ready()
    assert "numba" in sys.modules
