"""SkipPipe's planner: against brute force, the simulator, the verifier, its own bounds, and the published times."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import pytest

from launch.forkserver import ForkServer
from pipeline.schedule.costs import Network
from pipeline.schedule.lower import lower
from pipeline.schedule.ops import F, Op, Route, Schedule, ScheduleError, loads
from pipeline.schedule.simulate import simulate
from pipeline.schedule.verify import verify
from schedulers.skippipe import SkipPlan, replan, replay, skippipe, without
from schedulers.skippipe_search.bounds import any_cut, lower_bounds
from schedulers.skippipe_search.clock import RULES, clock
from schedulers.skippipe_search.conflicts import conflict_based, dealt_paths, prioritised
from schedulers.skippipe_search.problem import NetworkError, RoutingProblem, check_paths, routing_from_json
from schedulers.skippipe_search.router import Router
from tests.harness import run_command

DATA = Path(__file__).parent.parent / "benchmarks" / "data" / "skippipe_gcp20.json"
GCP = json.loads(DATA.read_text())


def network(seed: int, stages: tuple[int, ...], **changes: object) -> RoutingProblem:
    """A random network of sum(stages) nodes, cut in order."""
    draw, size = Random(seed), sum(stages)
    hops = [[0.0 if a == b else draw.uniform(0.2, 3.0) for b in range(size)] for a in range(size)]
    starts = [sum(stages[:i]) for i in range(len(stages))]
    cut = tuple(tuple(range(s, s + n)) for s, n in zip(starts, stages, strict=True))
    values: dict[str, object] = {
        "forward_s": 0.4, "backward_s": 0.6, "loss_s": 0.1, "gap_s": 0.05, "slots": (2,) * size,
        "speed": tuple(draw.choice((1.0, 0.5, 2.0)) for _ in range(size)),
    }  # fmt: skip
    return RoutingProblem(hops, cut, **{"path_length": len(cut) - 1, "num_microbatches": 6, **values, **changes})  # type: ignore[arg-type]


def legal(problem: RoutingProblem, home: int) -> list[tuple[int, ...]]:
    """Every path of a home that the rules allow, found without the router."""
    found = []
    for stages in itertools.combinations(range(1, len(problem.stages)), problem.path_length - 1):
        orders = [stages]
        if problem.swaps:
            orders += [(*stages[:i], stages[i + 1], stages[i], *stages[i + 2 :]) for i in range(len(stages) - 1)]
        for order in orders:
            found += [(home, *nodes) for nodes in itertools.product(*(problem.stages[i] for i in order))]
    return found


@pytest.mark.parametrize("swaps", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_the_router_finds_what_brute_force_finds(length: int, swaps: bool) -> None:
    for seed in range(4):
        problem = network(seed, (2, 2, 3, 1, 2), path_length=length, swaps=swaps)
        banned = {4} if length < 5 else set()
        for home in problem.homes:
            found = Router(problem).cheapest(home, banned)
            paths = [path for path in legal(problem, home) if not banned & set(path)]
            assert found is not None
            assert found[0] == pytest.approx(min(map(problem.round_trip, paths)))
            assert problem.round_trip(found[1]) == pytest.approx(found[0])
            assert found[1] in paths


@pytest.mark.parametrize("seed", range(4))
def test_no_plan_of_a_small_network_beats_the_bounds(seed: int) -> None:
    problem = network(seed, (1, 2, 1), path_length=2, num_microbatches=4, swaps=False)
    best = float("inf")
    for paths in itertools.product(legal(problem, 0), repeat=4):
        try:
            check_paths(problem, paths)
        except NetworkError:
            continue
        best = min(best, *(clock(problem, paths, rule).iteration_s for rule in RULES))
    found = skippipe(problem, moves=400)
    assert max(lower_bounds(problem).values()) <= best + 1e-9
    assert any_cut(problem) <= best + 1e-9
    assert best - 1e-9 <= found.iteration_s <= 1.1 * best


@pytest.mark.parametrize("seed", range(4))
def test_a_bound_for_all_cuts_holds_where_visits_are_uneven(seed: int) -> None:
    problem = network(seed, (1, 2, 1, 1), path_length=3, num_microbatches=3, slots=(3,) * 5)
    plans = itertools.product(legal(problem, 0), repeat=3)
    for paths in plans:
        try:
            check_paths(problem, paths)
        except NetworkError:
            continue
        assert any_cut(problem) <= min(clock(problem, paths, rule).iteration_s for rule in RULES) + 1e-9


@pytest.mark.parametrize("contention", [False, True])
@pytest.mark.parametrize(
    ("stages", "length", "many"), [((2, 3, 2, 1), 3, 7), ((3, 2, 2), 3, 6), ((1, 1), 2, 3), ((2,), 1, 4)]
)
def test_a_plan_is_an_ordinary_schedule(stages: tuple[int, ...], length: int, many: int, contention: bool) -> None:
    problem = network(1, stages, path_length=length, num_microbatches=many, contention=contention)
    plan = skippipe(problem, moves=300, seed=2)
    schedule = plan.schedule()
    head = (len(stages), len(stages) + 1)
    slots = {n: 2 + (n in plan.problem.homes) for n in range(sum(stages))}
    verify(schedule, always=((0, 1), head), balanced=True, max_activations=slots)
    timeline = simulate(schedule, plan.costs, plan.network)
    assert timeline.makespan_s == pytest.approx(plan.iteration_s, abs=1e-6)
    assert plan.iteration_s >= plan.lower_bound_s - 1e-9
    assert skippipe(problem, moves=300, seed=2).paths == plan.paths


@pytest.mark.parametrize("skip", [0.0, 0.17, 0.33, 0.5])
def test_every_start_is_legal_and_balanced(skip: float) -> None:
    problem = routing_from_json(GCP, skip=skip, swaps=True)
    for paths in (dealt_paths(problem), conflict_based(problem), prioritised(problem, tries=5)):
        if paths is not None:
            check_paths(problem, paths)


def test_published_partition_is_planned_to_its_bound() -> None:
    plan = skippipe(routing_from_json(GCP, skip=0.33, swaps=True), moves=2000)
    assert plan.iteration_s <= 33.3
    assert plan.gap < 1e-6, "the plan is proved to be the best"
    assert plan.bounds["round trips"] == pytest.approx(30.28, abs=0.01)


def test_the_cut_is_searched_too() -> None:
    problem = routing_from_json(GCP, skip=0.33, swaps=True)
    plan = skippipe(problem, moves=9000, joint=True)
    assert plan.iteration_s < 32
    assert [len(stage) for stage in plan.problem.stages] == [5, 3, 3, 3, 3, 3]
    slow = max(plan.problem.hop_s[a][b] for stage in plan.problem.stages for a in stage for b in stage)
    assert slow <= problem.replica_hop_s


@cache
def gcp_plan() -> SkipPlan:
    return skippipe(routing_from_json(GCP, skip=0.33, swaps=True), moves=300)


@pytest.mark.parametrize("lost", [{15}, {0}, {15, 8, 14}, {12, 13}, {0, 3, 4, 10}])
def test_planning_again_without_some_nodes(lost: set[int]) -> None:
    plan = gcp_plan()
    again = replan(plan, without(plan.problem, lost), moves=300)
    assert len(again.paths) == 30
    assert not lost & {node for path in again.paths for node in path}
    check_paths(again.problem, again.paths)


def test_a_link_that_breaks_is_routed_around() -> None:
    plan = gcp_plan()
    problem = plan.problem
    a, b = plan.paths[0][1:3]
    hops = [list(row) for row in problem.hop_s]
    hops[a][b] = hops[b][a] = 500.0
    again = replan(plan, replace(problem, hop_s=hops), moves=1000)
    assert again.iteration_s < 100
    with pytest.raises(NetworkError, match="first stage"):
        without(problem, set(problem.homes))


def test_paths_that_lock_each_other_out() -> None:
    problem = network(0, (2, 1, 1), path_length=3, num_microbatches=2, slots=(1,) * 4, swaps=True)
    with pytest.raises(NetworkError, match="lock each other out"):
        replay(replace(problem, hop_s=[[0.0] * 4] * 4, speed=(1.0,) * 4), [(0, 2, 3), (1, 3, 2)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hop_s": [[0, 1], [1]]}, "pairs are missing"), ({"hop_s": [[0, -1], [1, 0]]}, r"hop_s\[0\]\[1\] is -1"),
        ({"hop_s": [[0, float("nan")], [1, 0]]}, "nan"), ({"forward_s": -1}, "forward_s"),
        ({"memory_slots": 0}, "memory_slots"), ({"stages": [[0, 1], [1]]}, "at most once"),
        ({"stages": [[0], []]}, "one or more nodes"), ({"speed": [0] * 20}, "speed"), ({"stages": 3}, "lists of nodes"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_planned_are_refused_by_name(change: dict[str, object], said: str) -> None:
    with pytest.raises(NetworkError, match=said):
        routing_from_json({**GCP, **change})


@pytest.mark.parametrize("skip", [0.4, 1.0, -0.1, 0.9])
def test_a_share_that_no_route_satisfies(skip: float) -> None:
    with pytest.raises(NetworkError, match="which no route satisfies"):
        routing_from_json(GCP, skip=skip)


def test_the_verifier_demands_first_stages_and_balance() -> None:
    schedule = skippipe(network(0, (1, 2, 1), path_length=2, num_microbatches=4), moves=50).schedule()
    with pytest.raises(ScheduleError, match="which none may skip"):
        verify(schedule, always=((1, 2),))
    ends = ((0, 1), (3, 4))
    one, other = sorted({route.forward for route in schedule.routes})
    for forwards, balanced in (((one, other) * 2, True), ((one, one, one, other), False)):
        routes = tuple(Route(forward, ()) for forward in forwards)
        lane = tuple(Op(F, span, m) for m, route in enumerate(routes) for span in route.forward)
        if balanced:
            verify(Schedule(routes, {0: lane}), always=ends, balanced=True)
        else:
            with pytest.raises(ScheduleError, match="not balanced"):
                verify(Schedule(routes, {0: lane}), always=ends, balanced=True)


def test_links_of_a_file_hold_one_message_unless_it_says_otherwise() -> None:
    assert Network.from_json({"hop_s": [[0, 1], [1, 0]]}).exclusive
    assert not Network.from_json({"hop_s": [[0, 1], [1, 0]], "contention": False}).exclusive


def test_published_times_are_replayed_within_a_percent(forkserver: ForkServer, tmp_path: Path) -> None:
    done = run_command(forkserver, tmp_path / "log", "plan", "--network", str(DATA), "--replay", "--json")
    assert done.code == 0, done.output
    rows = json.loads(done.output)["replayed"]
    assert sorted(round(row["published_s"], 2) for row in rows) == [33.31, 35.43, 48.92, 79.94]
    for row in rows:
        assert row["ratio"] == pytest.approx(1, abs=0.01), row
        assert row["completed"] == row["microbatches"]


def test_the_plan_command(forkserver: ForkServer, tmp_path: Path) -> None:
    flags = ["plan", "--scheduler", "skippipe", "--network", str(DATA), "--skip", "0.33", "--swaps", "--budget", "20"]
    done = run_command(forkserver, tmp_path / "log", *flags, "--json", "--out", str(tmp_path / "out"))
    assert done.code == 0, done.output
    found = json.loads(done.output)
    assert found["lower_bound_s"] <= found["iteration_s"] + 1e-6 <= 33.3
    assert len(found["paths"]) == 30
    assert [len(stage) for stage in found["stages"]] == [5, 3, 3, 3, 3, 3]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"network.svg", "timeline.svg", "schedule.txt"}
    proved = verify(lower(loads((tmp_path / "out" / "schedule.txt").read_text())))
    for name in ("peak_activations", "peak_messages"):
        assert found[name] == {str(w): n for w, n in getattr(proved, name).items()}
    refused = run_command(forkserver, tmp_path / "log2", *flags[:5], "--skip", "0.4")
    assert refused.code == 2
    assert "which no route satisfies" in refused.output
