"""ZB-V against torch's own order, the formula of its bubble, and all readers of a schedule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble

from pipeline.schedule.lower import lower
from pipeline.schedule.ops import F, I, Span, W
from pipeline.schedule.simulate import Costs, simulate
from pipeline.schedule.verify import verify
from schedulers.zb_v import zb_v


def spans(count: int) -> list[Span]:
    return [(i, i + 1) for i in range(count)]


@pytest.mark.parametrize(("p", "m"), [(1, 1), (1, 5), (2, 1), (2, 3), (2, 8), (3, 2), (4, 4), (4, 7), (4, 16), (8, 32)])
def test_the_order_is_that_of_torch(p: int, m: int) -> None:
    known = SimpleNamespace(pp_group_size=p, num_stages=2 * p, _n_microbatches=m)
    kinds = {"FORWARD": F, "BACKWARD_INPUT": I, "BACKWARD_WEIGHT": W}
    schedule = zb_v(spans(2 * p), m)
    verify(schedule)
    verify(lower(schedule))
    for k in range(p):
        actions = ScheduleZBVZeroBubble._calculate_single_rank_operations(known, k)  # type: ignore[arg-type]
        theirs = [(kinds[a.computation_type.name], a.stage_index, a.microbatch_index) for a in actions if a is not None]
        assert [(op.kind, op.span[0], op.microbatch) for op in schedule.lanes[k]] == theirs


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 3), (2, 8), (4, 7), (4, 16), (8, 15), (8, 32)])
def test_bubble_and_memory(p: int, m: int) -> None:
    """A worker waits only until it begins, and until the others are through."""
    schedule = zb_v(spans(2 * p), m)
    timeline = simulate(schedule, Costs(forward=1.0, backward=2.0))
    assert timeline.makespan_s == pytest.approx(6 * m + p - 1)
    assert max(verify(schedule).peak_activations.values()) <= 2 * p


def test_replicas_and_what_cannot_be() -> None:
    schedule = zb_v(spans(4), 5, 2)
    verify(schedule)
    assert schedule.holders[0, 1] == (0, 2)
    assert schedule.holders[1, 2] == (1, 3)
    assert schedule.holders[3, 4] == (0, 2)
    with pytest.raises(ValueError, match=r"spans: 3; allowed: an even number"):
        zb_v(spans(3), 4)
