"""Axes, numbers and colours of the hand-written pictures."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from pipeline.drawing.svg import coord, data_size, document, duration, figure, mix, oklch, tag, text, ticks, time_unit


@pytest.mark.parametrize(
    ("lo", "hi", "count", "expected"),
    [
        (0, 10, 5, [0, 2, 4, 6, 8, 10]),
        (0, 0.35, 8, [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35]),
        (1.9, 5.2, 4, [2, 3, 4, 5]),
        (-3, 3, 3, [-2, 0, 2]),
        (7, 7, 5, [7]),
    ],
)
def test_ticks_are_round_and_inside(lo: float, hi: float, count: int, expected: list[float]) -> None:
    assert ticks(lo, hi, count) == pytest.approx(expected)


@pytest.mark.parametrize(("lo", "hi"), [(1, 0), (0, float("inf")), (float("nan"), 1)])
def test_ticks_refuse_what_is_no_range(lo: float, hi: float) -> None:
    with pytest.raises(ValueError, match="expected finite lo <= hi"):
        ticks(lo, hi)


def test_times_take_the_unit_in_which_they_read_best() -> None:
    assert [time_unit(s)[1] for s in (90.0, 0.5, 0.0005, 0.0)] == ["s", "ms", "µs", "s"]
    assert duration(1.2345) == "1.23 s"
    assert duration(0.0362) == "36.2 ms"
    assert duration(87e-6) == "87 µs"


def test_numbers_show_three_figures() -> None:
    assert [figure(v) for v in (0, 3, 0.1234, 12.345, 1234.5, -0.5, 1e-9)] == (
        ["0", "3", "0.123", "12.3", "1,234", "-0.5", "1e-09"]
    )
    assert [coord(v) for v in (0.0, -0.001, 1.5, 2.345678)] == ["0", "0", "1.5", "2.35"]
    assert [data_size(n) for n in (512, 1536, 3 * 2**30, 5 * 2**40)] == ["512 B", "1.5 KiB", "3 GiB", "5 TiB"]


@pytest.mark.parametrize(
    ("coordinates", "expected"),  # the corners of sRGB in OKLCH, as CSS Color 4 implementations give them
    [
        ((1.0, 0.0, 0.0), "#ffffff"),
        ((0.0, 0.0, 0.0), "#000000"),
        ((0.62796, 0.25768, 29.234), "#ff0000"),
        ((0.86644, 0.29483, 142.495), "#00ff00"),
        ((0.45201, 0.31321, 264.052), "#0000ff"),
    ],
)
def test_oklch_agrees_with_known_colours(coordinates: tuple[float, float, float], expected: str) -> None:
    got = oklch(*coordinates)
    assert all(abs(int(got[i : i + 2], 16) - int(expected[i : i + 2], 16)) <= 4 for i in (1, 3, 5)), got


def test_a_colour_no_screen_shows_gives_up_chroma_not_lightness() -> None:
    assert oklch(0.6, 5.0, 120) != oklch(0.8, 5.0, 120)
    assert oklch(0.6, 0.0, 120) == oklch(0.6, 0.0, 300)


def test_mix_goes_from_one_colour_to_the_other() -> None:
    assert [mix("#000000", "#ff8000", share) for share in (0, 0.5, 1)] == ["#000000", "#804000", "#ff8000"]


def test_a_document_is_well_formed_whatever_it_says() -> None:
    nasty = "<&>\"' \x00 \ud800"
    page = document(
        10, 10, [text(1, 2, nasty), tag("g", tag("rect", x=1.0, fill=nasty))], title=nasty, description=nasty
    )
    root = ET.fromstring(page.encode())
    assert root.get("role") == "img"
    assert root.get("viewBox") == "0 0 10 10"
