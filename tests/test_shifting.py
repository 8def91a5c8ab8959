"""Workers that become slow: what is measured, and when the layout changes for it, against staying and always moving."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import pytest

from benchmarks.slow_worker import EVEN, UNEVEN, always, best, ours, seconds, stay, steps_per_second
from pipeline.schedule.layout import TRAIN, Layout
from recovery.membership import View
from recovery.shifting import Shifter
from recovery.speeds import Speeds
from schedulers import plan

LAYOUT = Layout({TRAIN: plan("one_f_one_b", [1.0] * 6, 3, 4)})
VIEW = View(1, (0, 1, 2), LAYOUT.key, places={w: w for w in range(3)}, agents=dict.fromkeys(range(3), 0))


# ---- what is measured ----


def measured(*steps: Mapping[int, float]) -> Speeds:
    found = Speeds([1.0] * 6)
    for busy in steps:
        found.note(VIEW, LAYOUT, busy)
    return found


def test_a_worker_that_takes_longer_for_the_same_work_is_slow() -> None:
    found = measured(*[{0: 1.0, 1: 5.0, 2: 1.1}] * 4).of(VIEW.workers)
    assert found == {1: pytest.approx(1.1 / 5.0)}


def test_one_disturbed_step_says_nothing_and_noise_neither() -> None:
    calm = {0: 1.0, 1: 1.3, 2: 0.9}
    assert measured(calm, calm, {**calm, 1: 20.0}, calm, calm).of(VIEW.workers) == {}
    assert measured({0: 1.0, 1: 5.0, 2: 1.0}).of(VIEW.workers) == {}, "too few steps"


def test_who_does_less_and_takes_as_long_is_slow() -> None:
    """The work counts: two of six layers on each of three, but three and one elsewhere."""
    uneven = Layout({TRAIN: plan("one_f_one_b", [1.0, 1.0, 1.0, 1.0, 0.01, 0.01], 2, 4)})
    view = View(1, (0, 1), uneven.key, places={0: 0, 1: 1}, agents={0: 0, 1: 0})
    found = Speeds([1.0] * 6)
    for _ in range(3):
        found.note(view, uneven, {0: 1.0, 1: 6.0})
    work = [sum(hi - lo for (lo, hi), places in uneven.holders.items() if place in places) for place in (0, 1)]
    assert found.of((0, 1)) == {1: pytest.approx(work[1] / 6.0 / work[0])}


def test_who_is_gone_is_forgotten_and_who_idles_says_nothing() -> None:
    found = measured(*[{0: 1.0, 1: 5.0, 2: 1.0}] * 4)
    fewer = View(2, (0, 2), LAYOUT.key, places={0: 0, 2: 2}, agents={0: 0, 2: 0})
    found.note(fewer, LAYOUT, {0: 1.0, 1: 9.0, 2: 0.0})
    assert found.of((0, 1, 2)) == {}


def test_who_has_nothing_to_do_is_tried_again_and_later_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("recovery.speeds.time", SimpleNamespace(monotonic=lambda: now[0]))
    found = measured(*[{0: 1.0, 1: 20.0, 2: 1.0}] * 3)
    without = Layout({TRAIN: plan("one_f_one_b", [1.0] * 6, 1, 4)})  # worker 0 alone
    tried: list[float] = []
    while now[0] < 100.0:
        found.note(VIEW, without, {0: 1.0, 1: 0.0, 2: 0.0})
        if 1 not in found._paces:
            tried.append(now[0])
            for _ in range(3):
                found.note(VIEW, LAYOUT, {0: 1.0, 1: 20.0, 2: 1.0})
            assert found.of((0, 1))
        now[0] += 1.0
    assert tried == [11.0, 33.0, 75.0]


# ---- when to change ----


@pytest.mark.parametrize("cost_s", [0.05, 1.0, 10.0])
@pytest.mark.parametrize("every_s", [0.5, 1.0, 3.0, 8.0, 20.0, 50.0])
def test_it_is_never_five_percent_below_the_better_of_staying_and_always_moving(every_s: float, cost_s: float) -> None:
    found = steps_per_second(ours(cost_s), every_s, cost_s)
    assert found >= 0.95 * max(steps_per_second(stay, every_s, cost_s), steps_per_second(always, every_s, cost_s))


def test_the_first_change_comes_when_as_much_was_lost_as_it_costs() -> None:
    shifter = Shifter(best, seconds, cost_s=4.0)
    assert shifter.consider(0.0, {}, EVEN) == EVEN
    assert shifter.consider(10.0, {1: 0.2}, EVEN) == EVEN
    lost = 1 - seconds({1: 0.2}, UNEVEN) / seconds({1: 0.2}, EVEN)
    assert shifter.consider(10.0 + 3.9 / lost, {1: 0.2}, EVEN) == EVEN
    assert shifter.consider(10.0 + 4.1 / lost, {1: 0.2}, EVEN) == UNEVEN


def test_what_gains_next_to_nothing_is_left() -> None:
    shifter = Shifter(lambda _: UNEVEN, lambda _, layout: 1.0 if layout == UNEVEN else 1.02, cost_s=0.0)
    assert shifter.consider(0.0, {}, EVEN) == EVEN
    assert shifter.consider(1e6, {}, EVEN) == EVEN


def test_many_situations_are_not_remembered_for_ever() -> None:
    shifter = Shifter(best, seconds, cost_s=1.0)
    for n in range(200):
        shifter.consider(float(n), {n: 0.1}, EVEN)
    assert len(shifter._known) <= 16
