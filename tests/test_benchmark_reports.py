"""What benchmarks make of their curves."""

from __future__ import annotations

import pytest

from benchmarks.checkfree_report import time_to


@pytest.mark.parametrize(
    ("losses", "target", "seconds"),
    [
        ([3.0, 1.0, 2.0, 1.0], 1.5, 25.0),  # what a failure undoes is not reached yet
        ([3.0, 1.0, 1.4, 1.0], 1.5, 7.5),
        ([3.0, 1.0, 1.0, 2.0], 1.5, None),
        ([1.0, 1.2, 1.0, 1.0], 1.5, 0.0),
        ([3.0, 2.0, 1.5, 1.5], 1.5, 20.0),
    ],
)
def test_a_loss_is_reached_once_it_is_not_left_again(losses: list[float], target: float, seconds: float | None) -> None:
    curve = [(10 * i, 10.0 * i, loss) for i, loss in enumerate(losses)]
    assert time_to(curve, target) == (None if seconds is None else pytest.approx(seconds))
