"""Clocks under a power cap: against every choice there is where clocks are steps, and against bounds where not."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from launch.cli import main
from pipeline.schedule.costs import Costs, Network
from pipeline.schedule.lower import lower
from pipeline.schedule.ops import LOAD, B, F, Op, Route, Schedule
from pipeline.schedule.simulate import simulate
from schedulers import build
from schedulers.frequency import ClockError, Power, at_clocks, even_clocks, plan_clocks
from schedulers.frequency_search.paths import step_at
from schedulers.frequency_search.power import ClockProblem
from schedulers.frequency_search.relaxed import relax

STEPS = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4)


def pipeline(costs: list[float], microbatches: int = 8, name: str = "one_f_one_b") -> tuple[Schedule, Costs]:
    return build(name, [(i, i + 1) for i in range(len(costs))], microbatches), Costs(costs)


def alike(schedule: Schedule, **changes: Any) -> dict[int, Power]:
    return dict.fromkeys(schedule.lanes, Power(**{"static": 150.0, "dynamic": 550.0, **changes}))


@st.composite
def steps_of_time(draw: st.DrawFn) -> tuple[Schedule, Costs, Network | None]:
    """A small pipeline, its layers, the speed of its first worker, and perhaps slow links that all share."""
    workers = draw(st.integers(1, 4))
    layers = [float(draw(st.integers(1, 4))) for _ in range(workers)]
    schedule, _ = pipeline(
        layers, draw(st.integers(1, 6)), draw(st.sampled_from(["one_f_one_b", "gpipe", "zero_bubble"]))
    )
    network = draw(st.sampled_from([None, 2.0, 10.0]))
    return (
        lower(schedule) if draw(st.booleans()) else schedule,
        Costs(layers, speed={0: draw(st.sampled_from([0.5, 1.0, 2.0]))}, output_bytes=1.0),
        network
        and Network.uniform(
            workers,
            0.1,
            network,
        ),
    )


@st.composite
def drawn(draw: st.DrawFn, steps: bool) -> Power:
    number = st.just(0.0) | st.floats(1.0, 600.0)
    clocks = draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=4, unique=True).map(sorted)) if steps else ()
    return Power(
        draw(number), draw(number), 0.5, draw(st.sampled_from([0.5, 1.0, 1.3])),
        draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])), draw(st.sampled_from([1.0, 2.0, 3.0])), tuple(clocks),
    )  # fmt: skip


def cap_between(powers: dict[int, Power], share: float) -> float:
    low, high = (sum(p.watts(p.range[end]) for p in powers.values()) for end in (0, 1))
    return low + share * (high - low)


# ---- the model ----


def test_power_is_cubic_and_memory_does_not_wait_for_the_clock() -> None:
    power = Power(static=100.0, dynamic=400.0, bound=0.75)
    assert [power.watts(f) for f in (0.5, 1.0, 2.0)] == [150.0, 500.0, 3300.0]
    assert [power.stretch(f) for f in (0.5, 1.0, 2.0)] == [1.75, 1.0, 0.625]


def test_watts_and_joules_of_a_step() -> None:
    """Two workers, one forward and backward each: one computes for 3 of 9 s, the other for 6."""
    schedule, costs = pipeline([1.0, 2.0], 1)
    found = at_clocks(schedule, costs, alike(schedule), {0: 1.0, 1: 1.0})
    assert found.seconds == 9.0
    assert found.busy == pytest.approx({0: 1 / 3, 1: 2 / 3})
    assert found.joules == pytest.approx(2 * 150 * 9 + 550 * 9)
    assert found.watts == pytest.approx({0: 150 + 550 / 3, 1: 150 + 1100 / 3})
    assert found.mean_watts == pytest.approx(sum(found.watts.values()))
    assert found.peak_watts == 1400.0
    faster = at_clocks(schedule, costs, alike(schedule), {0: 1.0, 1: 1.25})
    assert faster.seconds == pytest.approx(3 + 6 / 1.25)
    assert faster.joules == pytest.approx(2 * 150 * 7.8 + 550 * (3 + 6 * 1.25**2))


@given(steps_of_time(), st.lists(st.floats(0.5, 1.5), min_size=4, max_size=4), st.sampled_from([0.5, 1.0]))
@example_settings(max_examples=60)
def test_the_path_of_a_step_is_a_bound_on_it_at_all_other_clocks(
    step: tuple[Schedule, Costs, Network | None], clocks: list[float], bound: float
) -> None:
    schedule, costs, network = step
    powers = alike(schedule, bound=bound, least=0.5, most=1.5)
    problem = ClockProblem(schedule, costs, powers, 1e9, network)
    nominal, other = step_at(problem, [1.0] * len(powers)), step_at(problem, clocks[: len(powers)])
    stretches = np.array([powers[0].stretch(f) for f in clocks[: len(powers)]])
    assert nominal.seconds == pytest.approx(simulate(schedule, costs, network).makespan_s)
    assert nominal.path.constant + nominal.path.work.sum() == pytest.approx(nominal.seconds)
    assert other.path.constant + other.path.work @ stretches == pytest.approx(other.seconds)
    assert nominal.path.constant + nominal.path.work @ stretches <= other.seconds + 1e-9


@pytest.mark.parametrize("number", [float, int, np.float64])
def test_the_path_is_found_whatever_numbers_the_costs_are(number: Any) -> None:
    schedule, _ = pipeline([1.0, 1.0], 3)
    costs = Costs({(0, 1): number(1), (1, 2): number(2)}, step_s=0.0)
    found = step_at(ClockProblem(schedule, costs, alike(schedule), 1e9), [1.0, 1.0])
    assert found.path.constant == pytest.approx(0.0)
    assert found.path.work.sum() == pytest.approx(found.seconds) == pytest.approx(3 + 6 * 3)


# ---- steps, against every choice ----


@given(steps_of_time(), st.data(), st.floats(0.0, 1.05))
@example_settings(max_examples=40)
def test_steps_are_the_best_of_all(
    step: tuple[Schedule, Costs, Network | None], data: st.DataObject, share: float
) -> None:
    """The least time of all choices that keep the cap, and of those the least energy."""
    schedule, costs, network = step
    powers = {worker: data.draw(drawn(steps=True)) for worker in schedule.lanes}
    cap = cap_between(powers, share)
    choices = [dict(zip(powers, clocks, strict=True)) for clocks in product(*(p.steps for p in powers.values()))]
    kept = [c for c in choices if sum(powers[w].watts(f) for w, f in c.items()) <= cap * (1 + 1e-12)]
    every = [at_clocks(schedule, costs, powers, clock, network) for clock in kept]
    least_s = min(each.seconds for each in every)
    found = plan_clocks(schedule, costs, powers, cap, network)
    assert found.peak_watts <= cap * (1 + 1e-9)
    assert found.bound_s == pytest.approx(least_s)
    assert found.seconds <= least_s * (1 + 1e-6)
    least_joules = min(each.joules for each in every if each.seconds <= least_s * (1 + 1e-6))
    assert found.joules <= least_joules * (1 + 2e-6)


# ---- any clock ----


@given(steps_of_time(), st.data(), st.floats(0.0, 1.05))
@example_settings(max_examples=40)
def test_any_clocks_reach_their_bound_and_nothing_beats_it(
    step: tuple[Schedule, Costs, Network | None], data: st.DataObject, share: float
) -> None:
    schedule, costs, network = step
    powers = {worker: data.draw(drawn(steps=False)) for worker in schedule.lanes}
    cap = cap_between(powers, share)
    found = plan_clocks(schedule, costs, powers, cap, network)
    assert found.peak_watts <= cap * (1 + 1e-9)
    assert found.bound_s <= found.seconds * (1 + 1e-9)
    assert found.seconds <= found.bound_s * (1 + 3e-6)
    for _ in range(3):  # any clocks that keep the cap
        clock = {w: p.least + data.draw(st.floats(0.0, 1.0)) * (p.most - p.least) for w, p in powers.items()}
        other = at_clocks(schedule, costs, powers, clock, network)
        assert other.peak_watts > cap or other.seconds >= found.bound_s * (1 - 1e-6)


def test_two_stages_by_hand() -> None:
    """One microbatch: seconds 3 / f0 + 6 / f1, watts f0^3 + f1^3 = 2. Lagrange: f1^4 = 2 f0^4."""
    schedule, costs = pipeline([1.0, 2.0], 1)
    found = plan_clocks(schedule, costs, alike(schedule, static=0.0, dynamic=1.0, most=2.0), 2.0)
    slow = (2 / (1 + 2**0.75)) ** (1 / 3)
    assert found.clock == pytest.approx({0: slow, 1: slow * 2**0.25}, rel=1e-3)
    assert found.seconds == pytest.approx(3 / slow + 6 / (slow * 2**0.25), rel=3e-6)


def test_who_waits_is_lowered_where_the_cap_is_no_limit() -> None:
    """A worker beside the critical path: its clock falls until it would lengthen the step, all others stay up."""
    spans = ((0, 1), (1, 2))
    routes = [Route.through((span,)) for span in spans]
    lanes = {w: tuple(Op(kind, span, w) for kind in (F, B)) for w, span in enumerate(spans)}
    schedule = Schedule(tuple(routes), lanes)
    found = plan_clocks(schedule, Costs([3.0, 2.0]), alike(schedule, most=1.2), 1e6)
    assert found.clock == pytest.approx({0: 1.2, 1: 0.8}, rel=1e-4)
    assert found.seconds == pytest.approx(9 / 1.2, rel=2e-6)
    steps = plan_clocks(schedule, Costs([3.0, 2.0]), alike(schedule, steps=(0.5, 0.7, 0.9, 1.0, 1.2)), 1e6)
    assert steps.clock == {0: 1.2, 1: 0.9}


def test_a_longer_step_saves_energy_if_it_may_be_longer() -> None:
    schedule, costs = pipeline([1.0, 1.5, 0.7, 1.2])
    powers = alike(schedule)
    fast, thrifty = (plan_clocks(schedule, costs, powers, 1e6, tolerance=share) for share in (1e-6, 0.05))
    assert fast.seconds < thrifty.seconds <= 1.05 * fast.seconds * (1 + 1e-6)
    assert thrifty.joules < 0.9 * fast.joules
    stepped = {share: plan_clocks(schedule, costs, alike(schedule, steps=STEPS[:-1]), 1e6, tolerance=share)
               for share in (1e-6, 0.05)}  # fmt: skip
    assert stepped[0.05].seconds <= 1.05 * stepped[1e-6].seconds * (1 + 1e-6)
    assert stepped[0.05].joules < stepped[1e-6].joules


@pytest.mark.parametrize("count", [8, 16])
def test_many_workers(count: int) -> None:
    """Uneven layers under the cap of all at nominal: faster than even clocks, proved, and nearly so in steps of 1 %."""
    layers = [float(x) for x in np.random.default_rng(count).uniform(0.5, 1.5, count)]
    schedule, costs = pipeline(layers, 2 * count)
    powers, cap = alike(schedule, bound=0.9), 0.8 * 700 * count
    even = at_clocks(schedule, costs, powers, even_clocks(powers, cap))
    found = plan_clocks(schedule, costs, powers, cap)
    assert found.seconds < 0.92 * even.seconds
    assert found.seconds <= found.bound_s * (1 + 3e-6)
    steps = alike(schedule, bound=0.9, steps=tuple(round(0.5 + n / 100, 2) for n in range(76)))
    stepped = plan_clocks(schedule, costs, steps, cap)
    assert stepped.peak_watts <= cap
    assert found.bound_s <= stepped.seconds < 1.01 * found.bound_s


def test_copies_beside_the_work_do_not_change_with_the_clock() -> None:
    """A worker that loads its span for 10 s: no clock helps before, only the 3 s of compute shrink."""
    schedule = Schedule((Route.through(((0, 1),)),), {0: (Op(LOAD, (0, 1)), Op(F, (0, 1), 0), Op(B, (0, 1), 0))})
    costs = Costs([1.0], parameter_bytes=10.0, host_bandwidth=1.0)
    found = plan_clocks(schedule, costs, alike(schedule, most=2.0), 1e6)
    assert found.seconds == pytest.approx(10 + 1.5)


def test_an_idle_worker_has_its_lowest_clock_and_an_empty_schedule_has_none() -> None:
    schedule, costs = pipeline([1.0, 1.0], 2)
    lanes = {**schedule.lanes, 2: ()}
    idle = Schedule(schedule.routes, lanes)
    found = plan_clocks(idle, costs, alike(idle), 2100.0)
    assert found.clock[2] == 0.5
    assert found.busy[2] == 0.0
    assert found.watts[2] == 150.0
    assert min(found.clock[0], found.clock[1]) > 1.0
    assert plan_clocks(Schedule((), {}), costs, {}, 0.0).clock == {}


def test_the_cap_of_the_lowest_clocks_is_kept() -> None:
    schedule, costs = pipeline([1.0, 2.0])
    powers = alike(schedule)
    least = 2 * powers[0].watts(0.5)
    assert plan_clocks(schedule, costs, powers, least).clock == {0: 0.5, 1: 0.5}
    assert plan_clocks(schedule, costs, alike(schedule, steps=(0.5, 1.0)), least).clock == {0: 0.5, 1: 0.5}


def test_a_clock_that_draws_nothing_is_high_under_any_cap() -> None:
    schedule, costs = pipeline([1.0, 2.0])
    powers = {0: Power(100.0, 0.0), 1: Power(100.0, 200.0)}
    assert plan_clocks(schedule, costs, powers, 100 + powers[1].watts(0.5)).clock == {0: 1.25, 1: 0.5}


def test_even_clocks_keep_the_cap() -> None:
    powers = {0: Power(150.0, 550.0), 1: Power(100.0, 300.0, steps=(0.6, 0.8, 1.0, 1.2))}
    assert even_clocks(powers, 1e4) == {0: 1.0, 1: 1.0}
    found = even_clocks(powers, 800.0)
    assert found[1] == 0.8
    assert 0.8 <= found[0] < 1.0
    assert sum(powers[w].watts(f) for w, f in found.items()) == pytest.approx(800.0)
    with pytest.raises(ClockError, match=r"the cap is 100 W; 2 workers at their lowest clocks may draw 383\.55 W"):
        even_clocks(powers, 100.0)


def test_relaxed_prices_prove_the_bound() -> None:
    """The multipliers alone, without any path's maximum, give the bound again."""
    schedule, costs = pipeline([1.0, 1.4, 0.8, 1.1])
    problem = ClockProblem(schedule, costs, alike(schedule), 2500.0)
    found = relax(problem, 1e-6)
    grid = np.linspace(0.5, 1.25, 4001)
    price = found.prices @ np.array([path.work for path in found.paths])
    parts = [(p / grid + found.per_watt * (150 + 550 * grid**3)).min() for p in price]
    constant = found.prices @ np.array([path.constant for path in found.paths]) - found.per_watt * 2500.0
    assert constant + sum(parts) == pytest.approx(found.bound_s, rel=1e-5)


# ---- what is refused ----


def test_what_cannot_be_is_refused() -> None:
    schedule, costs = pipeline([1.0, 1.0, 1.0])
    powers = alike(schedule)
    with pytest.raises(
        ClockError, match=r"the cap is 600 W; 3 workers at their lowest clocks may draw 656\.25 W; allo"
    ):
        plan_clocks(schedule, costs, powers, 600.0)
    with pytest.raises(ClockError, match=r"the cap is nan W"):
        plan_clocks(schedule, costs, powers, float("nan"))
    with pytest.raises(ClockError, match=r"powers have no worker 2; allowed: one for each of 0, 1, 2"):
        plan_clocks(schedule, costs, {0: powers[0], 1: powers[1]}, 3000.0)
    with pytest.raises(ClockError, match=r"powers have worker 7, which has no lane; allowed: 0, 1, 2"):
        plan_clocks(schedule, costs, {**powers, 7: powers[0]}, 3000.0)
    with pytest.raises(ClockError, match=r"only workers 1 have steps; allowed: steps for all workers, or for none"):
        plan_clocks(schedule, costs, {**powers, 1: Power(1.0, 1.0, steps=(1.0,))}, 3000.0)
    with pytest.raises(ClockError, match=r"tolerance is 0\.0; allowed: 1e-06 to 1"):
        plan_clocks(schedule, costs, powers, 3000.0, tolerance=0.0)
    with pytest.raises(ClockError, match=r"the clock of worker 1 is 1\.5; allowed: 0\.5 to 1\.25"):
        at_clocks(schedule, costs, powers, {0: 1.0, 1: 1.5, 2: 1.0})
    with pytest.raises(ClockError, match=r"clocks have no worker 2"):
        at_clocks(schedule, costs, powers, {0: 1.0, 1: 1.0})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"static": -1.0}, r"static is -1\.0; allowed: 0 to 1e\+09"),
        ({"dynamic": float("nan")}, "dynamic is nan"),
        ({"bound": 1.5}, r"bound is 1\.5; allowed: 0 to 1"),
        ({"exponent": 0.5}, r"exponent is 0\.5; allowed: 1 to 10"),
        ({"least": 0.0}, r"least is 0\.0; allowed: 0\.01 to 100"),
        ({"least": 2.0}, r"least is 2, above most, 1\.25"),
        ({"steps": (1.0, 0.5)}, r"steps are \(1\.0, 0\.5\); allowed: ascending, from 0\.01 to 100"),
        ({"steps": (0.0, 0.5)}, "steps are"),
    ],
)
def test_a_power_that_cannot_be_meant(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ClockError, match=said):
        Power(**{"static": 1.0, "dynamic": 1.0, **values})


# ---- the command ----


def test_the_command_plans_clocks(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--workers", "4", "--model", "llama-tiny", "--power-cap", "2800"]
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["simulated"] is True
    assert found["nominal"]["step"] == pytest.approx(1.0)
    assert found["planned"]["step"] < 0.95
    assert found["planned"]["peak_watts"] <= 2800 * (1 + 1e-9)
    assert list(found["planned"]["clock"]) == ["0", "1", "2", "3"]
    assert main([*asked[:-1], "1400"]) == 0
    text = capsys.readouterr().out
    assert "clocks, simulated" in text
    assert "2800 (over)" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--power-cap 2800", "workers is None; allowed: a number, with --losses or --power-cap"),
        ("--workers 4 --power-cap 100", "the cap is 100 W; 4 workers at their lowest clocks may draw 875 W"),
        ("--workers 4 --power-cap 0", "power_cap is 0.0; allowed: above 0"),
        ("--workers 4 --power-cap 2800 --losses 1", "power_cap is 2800.0; allowed: unset with --losses"),
        ("--workers 4 --power-cap 2800 --watts 700", "watts is '700'; allowed: two numbers"),
        ("--workers 4 --power-cap 2800 --watts=-1:2", "static is -1.0; allowed: 0 to"),
        ("--workers 4 --power-cap 2800 --clock-range 1.1:2", "clock_range is '1.1:2'; allowed: LEAST:MOST with 1"),
        ("--workers 4 --power-cap 2800 --scheduler roundpipe", "scheduler is 'roundpipe'"),
    ],
)  # fmt: skip
def test_the_command_refuses(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words.split()]) == 2
    assert said in capsys.readouterr().err
