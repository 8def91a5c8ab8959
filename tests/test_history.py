"""The picture of a run that changes its size: who held what when, and what was lost or came."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from pipeline.drawing.history import Era, Mark, history_svg

SVG = "{http://www.w3.org/2000/svg}"
ERAS = [
    Era(0.0, {0: [(0, 3)], 1: [(3, 6)]}),
    Era(10.0, {0: [(0, 6)]}),
    Era(15.0, {0: [(0, 2), (2, 3)], 1: [(3, 6)]}),
]
MARKS = [Mark(10.0, "worker 1 is lost: replica", lost=True), Mark(15.0, "worker 2 comes: replica", lost=False)]


def drawn(**changes: object) -> ET.Element:
    commits = [0.5 * n for n in range(41)]
    made = {"eras": ERAS, "marks": MARKS, "commits": commits, "losses": [(t, 5 - t / 10) for t in commits]}
    return ET.fromstring(history_svg(**{**made, "end": 20.0, "num_layers": 6, **changes}))  # type: ignore[arg-type]


def boxes(picture: ET.Element) -> list[ET.Element]:
    return [rect for rect in picture.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]


def test_every_place_has_a_box_for_what_it_holds_and_none_while_nobody_is_there() -> None:
    said = [rect.findtext(f"{SVG}title") or "" for rect in boxes(drawn())]
    assert [words.split(",")[0] for words in said] == ["0:3", "0:6", "0:2 2:3", "3:6", "3:6"]


def test_boxes_follow_one_another_in_time() -> None:
    found = [(float(r.attrib["x"]), float(r.attrib["width"])) for r in boxes(drawn())[:3]]
    for (x, width), (after, _) in pairwise(found):
        assert x + width == pytest.approx(after, abs=0.02)
    assert found[0][1] == pytest.approx(2 * found[1][1], abs=0.05), "ten seconds and five"


def test_losses_and_arrivals_are_told_apart() -> None:
    picture = drawn()
    lines = [path for path in picture.iter(f"{SVG}path") if path.find(f"{SVG}title") is not None]
    assert [path.findtext(f"{SVG}title") for path in lines] == [mark.words for mark in MARKS]
    assert len({path.attrib["stroke"] for path in lines}) == 2
    words = [each.text for each in picture.iter(f"{SVG}text")]
    assert "1 to 2 workers, 41 steps in 20 s" in words
    assert {"place 0", "place 1", "steps/s", "loss"} <= set(words)


def test_a_run_without_a_step_is_drawn_and_one_without_an_era_refused() -> None:
    assert boxes(drawn(commits=[], losses=[], marks=[]))
    with pytest.raises(ValueError, match="there is no era"):
        drawn(eras=[])
