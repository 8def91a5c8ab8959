"""SkipPipe's planner against what nobody would ask of it: odd networks, broken files, pairs of lost nodes."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.plan_command import published
from pipeline.schedule.simulate import simulate
from pipeline.schedule.verify import verify
from schedulers.skippipe import SkipPlan, replan, replay, skippipe, without
from schedulers.skippipe_search.clock import RULES, STUCK, clock
from schedulers.skippipe_search.problem import NetworkError, RoutingProblem, check_paths, routing_from_json
from schedulers.skippipe_search.problem import Path as Nodes
from tests.test_skippipe import GCP

SECONDS = st.sampled_from([0.0, 1e-6, 0.1, 0.25, 1.0, 7.5])


@st.composite
def routed(draw: st.DrawFn) -> tuple[RoutingProblem, list[Nodes]]:
    """A network with times from nothing to much, and legal paths through it, of any balance."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    size = sum(sizes)
    nodes = draw(st.permutations(range(size)))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    stages = tuple(tuple(nodes[s : s + n]) for s, n in zip(starts, sizes, strict=True))
    length = draw(st.integers(1, len(stages)))
    swaps = draw(st.booleans())
    problem = RoutingProblem(
        [[0.0 if a == b else draw(SECONDS) for b in range(size)] for a in range(size)], stages, length,
        draw(st.integers(sizes[0], sizes[0] + 5)), draw(SECONDS), draw(SECONDS), draw(SECONDS), draw(SECONDS),
        tuple(draw(st.integers(1, 3)) for _ in range(size)), tuple(draw(st.sampled_from([0.5, 1.0, 3.0]))
        for _ in range(size)), swaps, draw(st.booleans()),
    )  # fmt: skip
    paths: list[Nodes] = []
    for m in range(problem.num_microbatches):
        order = sorted(draw(st.permutations(range(1, len(stages))))[: length - 1])
        if swaps and len(order) > 1 and draw(st.booleans()):
            at = draw(st.integers(0, len(order) - 2))
            order[at : at + 2] = order[at + 1], order[at]
        paths.append((problem.home(m), *(draw(st.sampled_from(stages[i])) for i in order)))
    return problem, paths


@settings(max_examples=200)
@given(routed(), st.sampled_from(RULES))
def test_the_clock_says_what_the_simulator_says(given_: tuple[RoutingProblem, list[Nodes]], rule: Any) -> None:
    problem, paths = given_
    run = clock(problem, paths, rule)
    if run.iteration_s == STUCK:
        with pytest.raises(NetworkError, match="lock each other out"):
            replay(problem, paths, rule)
        return
    plan = SkipPlan(problem, tuple(paths), rule, run, {"none": 0.0})
    schedule = plan.schedule()
    verify(schedule, max_activations=plan.max_activations)
    assert simulate(schedule, plan.costs, plan.network).makespan_s == pytest.approx(run.iteration_s, abs=1e-6)


@settings(max_examples=60)
@given(routed())
def test_any_problem_is_planned_or_refused(given_: tuple[RoutingProblem, list[Nodes]]) -> None:
    problem = given_[0]
    try:
        plan = skippipe(problem, moves=30)
    except NetworkError:
        return
    check_paths(problem, plan.paths)
    assert plan.lower_bound_s <= plan.iteration_s + 1e-9
    assert simulate(plan.schedule(), plan.costs, plan.network).makespan_s == pytest.approx(plan.iteration_s, abs=1e-6)


def test_every_node_and_every_third_pair_of_nodes_is_lost() -> None:
    problem = routing_from_json(GCP, skip=0.33, swaps=True)
    plan = skippipe(problem, moves=200)
    nodes = sorted(problem.stage_of)
    for lost in [*((n,) for n in nodes), *[*itertools.combinations(nodes, 2)][::3]]:
        left = without(problem, lost)
        again = replan(plan, left, moves=5)
        check_paths(left, again.paths)
        assert len(again.paths) == len(plan.paths)
        assert not set(lost) & {node for path in again.paths for node in path}


def test_a_whole_stage_is_lost_beside_a_home() -> None:
    problem = routing_from_json(GCP, skip=0.0)
    plan = skippipe(problem, moves=20)
    for stage in problem.stages[1:]:
        left = without(problem, {*stage, problem.homes[0]})
        again = replan(plan, left, moves=5)
        assert {len(path) for path in again.paths} == {5}
        check_paths(left, again.paths)


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.floats(), st.text(max_size=3), st.lists(st.integers(-1, 25)),
    st.dictionaries(st.text(max_size=2), st.integers()), st.lists(st.lists(st.floats(allow_nan=True), max_size=3)),
)  # fmt: skip


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(sorted(GCP)), ODD, min_size=1, max_size=3))
def test_a_broken_file_is_refused_or_is_a_problem(changes: dict[str, Any]) -> None:
    values = {**copy.deepcopy(GCP), **changes}
    try:
        problem = routing_from_json(values, skip=0.33)
        published(problem, values)
    except NetworkError:
        return
    assert all(math.isfinite(s) and s >= 0 for row in problem.hop_s for s in row)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"published_paths": []}, r"published_paths is \[\]; allowed: an object"),
        ({"published_paths": {"a": [1]}}, "a is"), ({"published_paths": {"a": {"0": 3}}}, "allowed: {node: the next"),
        ({"published_paths": {"a": {"0": {"x": 1}}}}, "allowed: {node: the next"),
        ({"published_paths": {"a": {"0": {"0": 1, "1": 0}}}}, "is no path"),
        ({"published_paths": {"a": {str(k): {"0": 15} for k in range(7)}}}, "7 paths for 30 microbatches"),
        ({"published_iteration_s": {"full pipeline, 9 microbatches on 4 fixed pipelines": 1}}, "allowed: 1 to 3"),
        ({"published_iteration_s": {}, "published_paths": {}}, "no published_paths"),
    ],
)  # fmt: skip
def test_published_paths_that_cannot_be_read_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(NetworkError, match=said):
        published(routing_from_json(GCP), {**GCP, **change})
