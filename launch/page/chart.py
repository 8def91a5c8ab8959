"""Curves over steps that fit every width: the plane is stretched to the page, its lines and its text are not.

So a page needs no script to be right on a phone and on a desk; a script adds what is under the pointer, and a zoom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from launch.page.blocks import Flag
from pipeline.drawing.plot import Plot, Point
from pipeline.drawing.svg import coord, figure, tag, ticks, tooltip

WIDE, TALL = 1000.0, 300.0
_COLUMNS = 400
"""Columns of a plane in which a curve has two points at most."""
_ROOM = 2.6
"""Percent of the width that a flag takes."""


@dataclass(frozen=True)
class Curve:
    """Points under a name. `colour` is one of the page's, c1 to c6; `style` is line, pale, dashed or dots."""

    name: str
    points: Sequence[Point]
    colour: str = "c1"
    style: str = "line"


@dataclass(frozen=True)
class Chart:
    """A plane as the template puts it down; `data` is what its script reads."""

    key: str
    title: str
    svg: str
    rows: Sequence[tuple[float, str]]
    columns: Sequence[tuple[float, str]]
    legend: Sequence[Curve]
    flags: Sequence[Flag]
    data: dict[str, Any]
    x_name: str
    short: bool
    kind: ClassVar[str] = "chart"


def chart(
    key: str, title: str, curves: Sequence[Curve], marks: Sequence[tuple[float, int, str]] = (), *,
    x_name: str = "step", zero: bool = False, form: Callable[[float], str] = figure, short: bool = False,
    robust: bool = False,
) -> Chart | None:  # fmt: skip
    """A chart of what is finite in `curves`, or None where nothing is. `marks` are (x, number of a loss, words); `zero`
    begins the axis at 0; `robust` leaves out the wildest hundredth of what is pale at either end."""
    thin = [Curve(c.name, thinned(c.points), c.colour, c.style) for c in curves]
    thin = [c for c in thin if c.points]
    if not thin:
        return None
    xs = [x for c in thin for x, _ in (c.points[0], c.points[-1])]
    x_range = min(xs), max(xs)
    room = 0.012 * (x_range[1] - x_range[0]) or 0.5  # a dot at the end is whole
    x_range = x_range[0] - room, x_range[1] + room
    plot = Plot(0.0, 0.0, WIDE, TALL, x_range, _range(thin, zero, robust))
    body = [tooltip(title)]
    body.append(tag("path", d="".join(f"M0 {coord(plot.y(y))}H{WIDE:g}" for y in _ticks(plot.values)), _class="grid"))
    shown = [(plot.x(x), number, words) for x, number, words in marks if x_range[0] <= x <= x_range[1]]
    for x, _, words in shown:
        body.append(tag("path", tooltip(words), d=f"M{coord(x)} 0V{TALL:g}", _class="mark"))
    for curve in thin:
        body.append(tag("path", d=_line(plot, curve), _class=f"{curve.style} {curve.colour}"))
    view = f"0 0 {WIDE:g} {TALL:g}"
    svg = tag("svg", "".join(body), viewBox=view, preserveAspectRatio="none", role="img", aria_label=title)
    rows = [(100 * plot.y(y) / TALL, form(y)) for y in _ticks(plot.values)]
    columns = [(plot.x(x) / 10, f"{x:,.0f}") for x in ticks(*x_range, 8) if x == int(x)]
    data = {
        "x": list(x_range), "y": list(plot.values), "name": x_name,
        "curves": [
            {"name": c.name, "colour": c.colour, "points": [[_short(x), _short(y)] for x, y in c.points],
             "values": [form(y) for _, y in c.points]} for c in thin
        ],
    }  # fmt: skip
    return Chart(key, title, svg, rows, columns, thin, flags(shown, WIDE), data, x_name, short)


def flags(marks: Sequence[tuple[float, int, str]], width: float) -> list[Flag]:
    """A flag for every mark that has room beside those before it."""
    found: list[Flag] = []
    for x, number, words in sorted(marks):
        left = 100 * x / width
        if not found or left - found[-1].left >= _ROOM:
            found.append(Flag(number, left, words))
    return found


def thinned(points: Sequence[Point], columns: int = _COLUMNS) -> list[Point]:
    """The finite points, with at most the least and the most of each of so many columns."""
    found = [p for p in points if math.isfinite(p[1])]
    if len(found) <= 2 * columns:
        return found
    first, last = found[0][0], found[-1][0]
    scale = columns / max(last - first, 1e-9)
    held: dict[int, tuple[Point, Point]] = {}
    for point in found:
        column = int((point[0] - first) * scale)
        if (pair := held.get(column)) is None:
            held[column] = point, point
        elif point[1] < pair[0][1]:
            held[column] = point, pair[1]
        elif point[1] > pair[1][1]:
            held[column] = pair[0], point
    held[columns] = found[-1], found[-1]  # where the run is now
    return [point for pair in held.values() for point in sorted({*pair})]


def _line(plot: Plot, curve: Curve) -> str:
    if curve.style == "dots":
        return "".join(f"M{coord(plot.x(x))} {coord(plot.y(y))}h0" for x, y in curve.points)
    at = [f"{coord(plot.x(x))} {coord(plot.y(y))}" for x, y in curve.points]
    return f"M{at[0]}h0" if len(at) == 1 else "M" + "L".join(at)


def _ticks(values: tuple[float, float]) -> list[float]:
    return ticks(*values, 5)


def _range(curves: Sequence[Curve], zero: bool, robust: bool) -> tuple[float, float]:
    """The least and the most of the axis. `robust` cuts the noise, which is what is pale, and nothing else."""
    noise = sorted(y for c in curves for _, y in c.points if c.style == "pale")
    cut = len(noise) // 100 if robust else 0
    values = sorted([*noise[cut : len(noise) - cut], *(y for c in curves for _, y in c.points if c.style != "pale")])
    lo, hi = values[0], values[-1]
    if zero and lo >= 0:
        return 0.0, hi * 1.06 or 1.0
    room = 0.06 * (hi - lo) or 0.05 * abs(hi) or 1.0
    return lo - room, hi + room


def _short(value: float) -> float:
    """A number in six figures: that is a hundredth of a pixel."""
    return float(f"{value:.6g}")
