"""A layout as text: what a worker reads of it is what its schedules say, and what is none is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.schedule.layout import EVALUATE, TRAIN, Excerpt, Layout, read_assignment
from pipeline.schedule.lower import lower
from pipeline.schedule.ops import Span
from pipeline.wire import WireError
from schedulers import plan

LAYERS = 8
BACKUPS: tuple[tuple[Span, int], ...] = (((0, 2), 3), ((2, 4), 0))


def layout(scheduler: str = "one_f_one_b", workers: int = 4, replicas: int = 1) -> Layout:
    made = plan(scheduler, [1.0] * LAYERS, workers // replicas, 4, replicas)
    evaluated = plan(scheduler, [1.0] * LAYERS, workers // replicas, 4, replicas, evaluated=3)
    return Layout({TRAIN: lower(made), EVALUATE: lower(evaluated)}, BACKUPS)


@pytest.mark.parametrize("scheduler", ["gpipe", "one_f_one_b", "interleaved", "zero_bubble"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_each_place_reads_its_own_lane_and_what_all_need_to_know(scheduler: str, replicas: int) -> None:
    whole = layout(scheduler, replicas=replicas)
    for place in (*range(4), 9):
        part = read_assignment(whole.text, place)
        for purpose, schedule in whole.schedules.items():
            assert part.excerpts[purpose] == Excerpt.of(schedule, place)
            assert part.excerpts[purpose].holders == schedule.holders
        assert part.holders == whole.holders
        assert part.spans == tuple(span for span, places in whole.holders.items() if place in places)
    assert read_assignment(whole.text, 9).train.lane == (), "a place without work has a lane without ops"


def test_equal_layouts_have_one_key() -> None:
    assert layout().key == layout().key
    others = {layout("gpipe").key, layout(workers=2).key, Layout(layout().schedules).key, layout(replicas=2).key}
    assert len(others) == 4
    assert layout().key not in others


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: v.pop("schedules"), "a layout has no schedules"),
        (lambda v: v["schedules"].pop(TRAIN), "a layout has no schedule 'train'"),
        (lambda v: v["schedules"].update(train=3), "schedule 'train' of a layout is no object"),
        (lambda v: v["schedules"][TRAIN].update(routes=["route 1-2: 0:1 |"]), "expected the routes from microbatch 0"),
        (lambda v: v["schedules"][TRAIN].update(routes=["x"]), "expected 'route FIRST-LAST: spans | spans'"),
        (lambda v: v["schedules"][TRAIN]["lanes"].update({"1": "F[0:1]#99999999"}), "numbers below 1000000"),
        (lambda v: v["schedules"][TRAIN]["lanes"].update({"1": "X"}), "op 'X': expected e.g."),
        (lambda v: v["schedules"][TRAIN]["holders"].update({"0:2": ["a"]}), "a place is 'a'"),
        (lambda v: v["schedules"][TRAIN]["holders"].update({"a": [1]}), "invalid literal"),
        (lambda v: v["schedules"][TRAIN].update(sends=[[1]]), r"a send is \[1\]; expected a pair"),
        (lambda v: v.update(backups=[["0:2"]]), "expected a pair"),
        (lambda v: v.update(backups=[["02", 1]]), "expected a span and a place"),
    ],
)
def test_what_is_no_layout_is_refused(change: Any, told: str) -> None:
    values = json.loads(layout().text)
    change(values)
    with pytest.raises(WireError, match=told):
        read_assignment(json.dumps(values), 1)


def test_a_lane_that_nobody_here_runs_is_not_read() -> None:
    """Of many thousand ops a worker reads its own: the others may say what they like."""
    values = json.loads(layout().text)
    values["schedules"][TRAIN]["lanes"]["2"] = "nonsense"
    assert read_assignment(json.dumps(values), 1) == read_assignment(layout().text, 1)
