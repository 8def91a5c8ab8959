"""RoundPipe's planner: the formula, the published figures, the clock and the simulator, the search and all cuts."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.cli import main
from pipeline.schedule.costs import CostError
from pipeline.schedule.ops import COMPUTE, LOAD, OFFLOAD, dumps, loads
from pipeline.schedule.simulate import Costs, simulate
from pipeline.schedule.verify import verify
from pipeline.schedule.work_units import BACKWARD, FORWARD, FUSED, Cut, forward_units, schedule_of, units
from schedulers.roundpipe import ORDERS, RULES, Clock, RoundsProblem, dealt, ideal_bubble, repeated, search
from schedulers.roundpipe_search.anneal import Annealer
from schedulers.roundpipe_search.bound import lower_bound
from schedulers.roundpipe_search.problem import cut_from, rounds_from_json

FILE = Path(__file__).parents[1] / "benchmarks" / "data" / "roundpipe_costs.json"
PUBLISHED = json.loads(FILE.read_text())


def plan_json(capsys: pytest.CaptureFixture[str], *flags: str) -> dict:
    assert main(["plan", "--scheduler", "roundpipe", "--costs", str(FILE), "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


@st.composite
def problems(draw: st.DrawFn) -> tuple[RoundsProblem, Cut]:
    layers = draw(st.integers(2, 9))
    times = st.lists(st.floats(0, 5), min_size=layers, max_size=layers)
    microbatches = draw(st.integers(1, 7))
    problem = RoundsProblem(
        tuple(draw(times)), tuple(draw(times)), draw(st.integers(1, 5)), microbatches,
        draw(st.integers(0, microbatches)), draw(st.sampled_from([0.0, 0.25])),
    )  # fmt: skip
    last = draw(st.integers(1, layers - 1))

    def spans() -> tuple[tuple[int, int], ...]:
        inner = draw(st.sets(st.integers(1, last - 1), max_size=last - 1)) if last > 1 else set[int]()
        return tuple(itertools.pairwise([0, *sorted(inner), last]))

    return problem, Cut(spans(), (last, layers), spans()[::-1])


@settings(max_examples=200)
@given(problems(), st.booleans(), st.sampled_from(RULES), st.data())
def test_the_clock_is_the_simulator_and_every_deal_is_a_sound_schedule(
    case: tuple[RoundsProblem, Cut], by_stage: bool, rule: str, data: st.DataObject
) -> None:
    problem, cut = case
    speeds = [data.draw(st.sampled_from([0.25, 1.0, 2.0])) for _ in range(problem.workers)]
    row = units(cut, problem.microbatches, problem.round, by_stage=by_stage)
    plan = dealt(problem, cut, row, rule, speeds=speeds)
    schedule = plan.schedule()
    verify(schedule)
    assert loads(dumps(schedule)) == schedule
    costs = Costs(problem.forward, problem.backward, speed=dict(enumerate(speeds)))
    assert simulate(schedule, costs, problem.network).makespan_s == pytest.approx(plan.makespan, abs=1e-9)
    assert plan.makespan >= lower_bound(problem, speeds)
    timer = Annealer(problem, rule == "ready", speeds)
    assert timer.time(cut, by_stage) == pytest.approx(plan.makespan, abs=1e-9)


@given(problems(), st.booleans())
def test_a_worker_never_holds_more_than_two_spans(case: tuple[RoundsProblem, Cut], by_stage: bool) -> None:
    problem, cut = case
    row = units(cut, problem.microbatches, problem.round, by_stage=by_stage)
    for lane in dealt(problem, cut, row, "ready").schedule().lanes.values():
        held: set[tuple[int, int]] = set()
        for op in lane:
            held ^= {op.span} if op.kind in (LOAD, OFFLOAD) else set()
            assert len(held) <= 2
            assert op.kind not in COMPUTE or op.span in held
        assert not held


@pytest.mark.parametrize(("workers", "stages", "rounds"), [(2, 3, 1), (4, 6, 2), (8, 15, 2), (8, 17, 4)])
def test_equal_stages_have_the_bubble_of_the_formula(workers: int, stages: int, rounds: int) -> None:
    forward, ended = (stages - 1) // 2, rounds * stages + workers - 1
    back = stages - 1 - forward
    layers = forward * back  # a stage takes 1 s each way; of a backward one, next to nothing is the forward run again
    problem = RoundsProblem(
        (*[1e-9 / back] * layers, 1e-9), (*[1 / forward] * layers, 1.0), workers, workers * rounds
    )  # fmt: skip
    cut = Cut(
        tuple((i * back, (i + 1) * back) for i in range(forward)), (layers, layers + 1),
        tuple((i * forward, (i + 1) * forward) for i in reversed(range(back))),
    )  # fmt: skip
    row = units(cut, workers * rounds, workers, by_stage=False)
    alike = [unit._replace(span=cut.fused, kinds=FUSED if unit.span[0] == 0 else BACKWARD) for unit in row]
    assert Cut(*cut).stages[forward][0] == FUSED
    clock = Clock(problem)
    clock.deal(alike)
    assert clock.end == pytest.approx(ended, abs=1e-5)
    assert 1 - rounds * stages / clock.end == pytest.approx(ideal_bubble(workers, rounds, stages), abs=1e-6)


@pytest.mark.parametrize("model", sorted(PUBLISHED["models"]))
def test_published_figures(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = PUBLISHED["models"][model]
    told = plan_json(capsys, "--model", model)
    bubbles = {"published": said["published_bubble_percent"]["roundpipe_sync"], **{
        name: said["published_bubble_percent"][name] for name in ("gpipe", "one_f_one_b", "interleaved")
    }}  # fmt: skip
    rows = {**told, **told["baselines"]}
    for name, percent in bubbles.items():
        assert 100 * rows[name]["bubble"] == pytest.approx(percent, abs=0.01), name
    assert told["published"]["makespan_ms"] == pytest.approx(said["published_makespan_ms"], abs=0.06)
    assert told["planned"]["makespan_ms"] <= said["searched_makespan_ms"]
    assert told["planned"]["makespan_ms"] == pytest.approx(told["simulated_ms"], abs=1e-3)
    assert said["published_bubble_percent"]["roundpipe_async"] < 100 * told["published, in order"]["async_bubble"]
    assert told["planned"]["async_bubble"] < told["planned"]["bubble"]
    assert told["planned"]["bubble"] < {"1.7B": 0.0784, "8B": 0.0464, "20B": 0.0722}[model], "as before annealing"
    assert told["planned"]["makespan_ms"] < {"1.7B": 2007.6, "8B": 5483.4, "20B": 6751.6}[model], "as before annealing"
    assert 0 < told["planned"]["gap"] < 0.06


@pytest.mark.parametrize("seed", range(6))
def test_the_search_finds_what_trying_all_cuts_finds(seed: int) -> None:
    layers = 6
    costs = [[((seed + 1) * (3 * i + 7 * k + 1) * 37 % 11 + 1) / 4 for i in range(layers)] for k in range(2)]
    problem = RoundsProblem(tuple(costs[0]), tuple(costs[1]), 2 + seed % 2, 4, 2, 0.1)
    best = min(
        dealt(problem, cut, units(cut, 4, 2, by_stage=order == "by_stage"), "ready").makespan
        for cut in all_cuts(layers)
        for order in ORDERS
    )
    found = search(problem, rule="ready", tries=40_000)
    assert found.best.makespan == pytest.approx(best, abs=1e-9)
    assert found.lower_bound <= best
    assert search(problem, rule="ready", tries=40_000) == found


@settings(max_examples=200)
@given(problems(), st.booleans(), st.data())
def test_no_cut_and_no_deal_is_faster_than_the_bound(
    case: tuple[RoundsProblem, Cut], by_stage: bool, data: st.DataObject
) -> None:
    problem, cut = case
    speeds = [data.draw(st.sampled_from([0.25, 1.0, 2.0])) for _ in range(problem.workers)]
    row = units(cut, problem.microbatches, problem.round, by_stage=by_stage)
    homes = [data.draw(st.integers(0, problem.workers - 1)) for _ in row]
    schedule = schedule_of(cut, row, homes, range(problem.workers), problem.microbatches, "random")
    costs = Costs(problem.forward, problem.backward, speed=dict(enumerate(speeds)))
    assert simulate(schedule, costs, problem.network).makespan_s >= lower_bound(problem, speeds)


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("at_once", [1, 2])
def test_no_deal_at_all_of_a_small_problem_is_faster_than_the_bound(workers: int, at_once: int) -> None:
    """Every cut of four layers, every deal of its units in either order, or, where these are many, every 97th."""
    problem = RoundsProblem((0.5, 1.0, 1.5, 1.0), (1.0, 2.0, 3.0, 2.0), workers, 2, at_once, 0.25)
    best = math.inf
    for cut, by_stage in itertools.product(all_cuts(4), (True, False)):
        row = units(cut, 2, at_once, by_stage=by_stage)
        deals = itertools.product(range(workers), repeat=len(row) - 1)
        for homes in itertools.islice(deals, 0, 20_000, max(1, workers ** (len(row) - 1) // 60)):
            schedule = schedule_of(cut, row, (0, *homes), range(workers), 2, "any")
            best = min(best, simulate(schedule, problem.costs, problem.network).makespan_s)
    assert lower_bound(problem) <= best
    assert search(problem, rule="ready", tries=5000).best.makespan <= 1.3 * lower_bound(problem)


def test_the_bound_is_met_where_nothing_is_lost() -> None:
    alone = RoundsProblem((0.0, 1.0, 1.0, 1.0), (0.0, 2.0, 2.0, 2.0), 1, 5, 2)
    assert search(alone, tries=5000).best.makespan == pytest.approx(lower_bound(alone))
    chain = RoundsProblem((1.0, 1.0), (2.0, 2.0), 4, 3, 3, 0.5)  # one round, two layers: everything waits for the loss
    assert search(chain, tries=5000).best.makespan == pytest.approx(lower_bound(chain))
    parcels = RoundsProblem((0.0, 5.0), (0.0, 5.0), 2, 3, 1)  # three losses, two workers
    assert search(parcels, tries=5000).best.makespan == pytest.approx(lower_bound(parcels)) == pytest.approx(20.0)


def all_cuts(layers: int) -> list[Cut]:
    def ways(end: int) -> list[tuple[tuple[int, int], ...]]:
        inner = range(1, end)
        chosen = itertools.chain.from_iterable(itertools.combinations(inner, k) for k in range(end))
        return [tuple(itertools.pairwise([0, *marks, end])) for marks in chosen]

    return [
        Cut(forward, (last, layers), backward[::-1])
        for last in range(1, layers)
        for forward in ways(last)
        for backward in ways(last)
    ]


def test_a_slow_worker_holds_up_strict_round_robin_and_not_the_ready_queue() -> None:
    problem = RoundsProblem((0.0, *[1.0] * 24, 1.0), (0.0, *[2.0] * 24, 2.0), 4, 8, 4)
    cut = search(problem).best.cut
    row = units(cut, 8, 4, by_stage=True)
    strict, ready = (dealt(problem, cut, row, rule, speeds=[1, 1, 1, 0.25]).makespan for rule in RULES)
    assert strict / ready >= 1.5


def test_one_step_behind_is_filled_and_drained_once() -> None:
    problem, cut = rounds_from_json(PUBLISHED, "8B")
    assert cut is not None
    row = units(cut, 16, 8, by_stage=False)
    one, many = repeated(problem, row, "round_robin", 1), repeated(problem, row, "round_robin", 30)
    assert one == dealt(problem, cut, row, "round_robin").makespan
    assert problem.work(cut) / 8 < many / 30 < one


def test_spans_keep_to_the_room_of_a_device() -> None:
    problem = RoundsProblem(
        (0.0, *[1.0] * 8, 1.0), (0.0, *[2.0] * 8, 2.0), 2, 4, 2, sizes=(5.0, *[2.0] * 8, 6.0), room=7.0
    )
    cut = search(problem).best.cut
    assert all(problem.fits(span) for span in (*cut.forward, cut.fused, *cut.backward))
    alone = RoundsProblem((0.0, *[1.0] * 20, 1.0), (0.0, *[2.0] * 20, 2.0), 1, 2, 1, sizes=(1.0,) * 22, room=1.0)
    assert len(search(alone).best.cut.backward) == 21
    with pytest.raises(CostError, match=r"layer 9 takes 6 bytes; allowed: 5"):
        RoundsProblem(problem.forward, problem.backward, 2, 4, 2, sizes=problem.sizes, room=5.0)


def test_an_evaluation_is_forward_alone() -> None:
    cut = cut_from([2, 2], [0, 1, 3], 6)
    row = forward_units(cut, 3, 2)
    assert {unit.kinds for unit in row} == {FORWARD}
    schedule = schedule_of(cut, row, [i % 2 for i in range(len(row))], range(2), 3, "evaluation")
    verify(schedule)
    assert BACKWARD[1] not in {op.kind for _, op in schedule.ops()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.pop("models"), "no 'models'"),
        (lambda v: v["models"]["8B"].update(layers=2.5), "layers of '8B' is 2.5; allowed: a whole number"),
        (lambda v: v["models"]["8B"].update(forward_ms="x"), "forward_ms of '8B' is 'x'"),
        (lambda v: v["models"]["8B"].update(published_forward=[1]), "numbers of blocks that sum to 32"),
        (lambda v: v["models"]["8B"].update(published_backward=7), "a list of numbers of blocks"),
        (lambda v: v.update(gpus=0), "workers is 0; allowed: 1 or more"),
        (lambda v: v.update(round=17), "at_once is 17; allowed: 0 to microbatches"),
    ],
)
def test_a_bad_file_is_refused_by_name(change, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = json.loads(FILE.read_text())
    change(values)
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(values))
    assert main(["plan", "--scheduler", "roundpipe", "--costs", str(path), "--model", "8B"]) == 2
    assert said in capsys.readouterr().err
