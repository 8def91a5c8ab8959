"""The simulation of large runs agrees with what can be worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from benchmarks.elastic_scale import Job, simulate_job
from benchmarks.elastic_scale_model import (
    Draw,
    Stalls,
    checkpoint_restart,
    daly_goodput,
    daly_interval,
    draw_failures,
    elastic,
    replacing_only,
)

HOUR = 3600.0


def always(seconds: float) -> Draw:
    return lambda _: seconds


def fixed(replace: float = 0.0, shrink: float = 0.0, grow: float = 0.0) -> Stalls:
    return Stalls(always(replace), always(shrink), always(grow))


@pytest.mark.parametrize(("mtbf", "write", "restart"), [(HOUR, 5.0, 120.0), (HOUR / 2, 30.0, 600.0), (9e4, 60.0, 20.0)])
def test_checkpoints_cost_what_daly_says(mtbf: float, write: float, restart: float) -> None:
    horizon, every = 20_000 * mtbf, daly_interval(mtbf, write)
    failures = draw_failures(np.random.default_rng(0), 1 / mtbf, horizon, 0.0, 1.0)
    found = checkpoint_restart(failures, horizon, every, write, restart)
    assert found == pytest.approx(daly_goodput(mtbf, every, write, restart), rel=0.01)
    for other in (0.5, 2.0):
        assert found > checkpoint_restart(failures, horizon, other * every, write, restart), "it is the best interval"


def test_standing_until_all_are_back_is_the_idle_share_of_an_endless_queue() -> None:
    """Of M/G/oo: exp(-rate * mean time away), whatever the distribution of the time."""
    failures = draw_failures(np.random.default_rng(1), 1 / HOUR, 20_000 * HOUR, HOUR / 2, 0.5)
    found = replacing_only(np.random.default_rng(2), failures, 20_000 * HOUR, fixed(replace=60.0))
    assert found == pytest.approx(math.exp(-(0.5 * HOUR / 2 + 60) / HOUR), rel=0.01)


def test_going_on_with_fewer_is_a_mean_over_how_many_are_away() -> None:
    """The number away is Poisson; a stall comes on top."""
    slow = [1.0, 1.1, 1.3, 2.0, *[4.0] * 20]
    failures = draw_failures(np.random.default_rng(3), 1 / HOUR, 20_000 * HOUR, HOUR, 0.0)
    found = elastic(np.random.default_rng(4), failures, 20_000 * HOUR, fixed(), slow)
    share = [math.exp(-1) / math.factorial(k) for k in range(len(slow))]
    assert found == pytest.approx(sum(p / s for p, s in zip(share, slow)), rel=0.01)
    stalled = elastic(np.random.default_rng(4), failures, 20_000 * HOUR, fixed(shrink=36.0, grow=36.0), [1.0] * 24)
    assert stalled == pytest.approx(math.exp(-72 / HOUR), rel=0.01)


def test_without_failures_nothing_is_lost() -> None:
    rng = np.random.default_rng(0)
    assert elastic(rng, [], 1e6, fixed(9, 9, 9), [1.0]) == 1.0
    assert replacing_only(rng, [], 1e6, fixed(9, 9, 9)) == 1.0
    assert checkpoint_restart([], 1e6, 100.0, 1.0, 9.0) == pytest.approx(100 / 101, rel=1e-3)


JOB = Job(replicas=64, microbatches=30)


def test_more_reliable_workers_give_more_and_seeds_decide_all() -> None:
    slow = [1.0, *[1.05] * 40]
    found = [simulate_job(JOB, slow, mtbf_h=mtbf, seeds=range(4), days=20) for mtbf in (500.0, 2000.0, 8000.0)]
    for before, after in pairwise(found):
        assert all(np.mean(before[name]) < np.mean(after[name]) for name in before)
    assert found[0] == simulate_job(JOB, slow, mtbf_h=500.0, seeds=range(4), days=20)
    assert len(set(found[0]["elastic"])) == 4
    assert all(0 < value < 1 for values in found[0].values() for value in values)


def test_the_planner_says_how_slow_fewer_are() -> None:
    slow = JOB.slow(hosts=3)
    assert slow[0] == 1.0
    assert slow == sorted(slow)
    assert slow[1] <= (32 + 15) / (30 + 15), "60 replicas could take 32 microbatches each instead of 30"
    assert slow[3] == pytest.approx((32 + 15) / (30 + 15))
