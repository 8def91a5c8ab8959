"""A run over time: a lane for each place, with the layers that it holds, and below it how fast it went and learnt.

A place that nobody is in is blank. The colour of a box is where in the model its layers are, so that a move is seen
as a change of colour; a line across is a loss, or a worker that comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from pipeline.drawing.plot import Plot, Point
from pipeline.drawing.svg import (
    FAINT,
    INK,
    MUTED,
    RULE,
    coord,
    document,
    duration,
    oklch,
    tag,
    text,
    text_width,
    ticks,
    tooltip,
)

_LOST, _CAME, _LINE = oklch(0.55, 0.2, 25), oklch(0.6, 0.1, 165), oklch(0.52, 0.16, 255)
_ROW, _PANEL, _LEFT = 24.0, 90.0, 64.0
_WINDOW = 20  # steps over which a speed is taken


@dataclass(frozen=True)
class Era:
    """From `start` (seconds) on, each place holds these spans."""

    start: float
    holds: Mapping[int, Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class Mark:
    """A worker is lost, or comes, at a time."""

    at: float
    words: str
    lost: bool


def history_svg(
    eras: Sequence[Era], marks: Sequence[Mark], commits: Sequence[float], losses: Sequence[Point], *, end: float,
    num_layers: int, width: int = 1000, title: str = "sizes",
) -> str:  # fmt: skip
    """The SVG text. `commits` are the times of the steps, `losses` (time, loss). Raises ValueError without an era."""
    if not eras:
        raise ValueError("there is no era; expected what each place holds, from some time on")
    places = sorted({place for era in eras for place in era.holds})
    frame = Plot(_LEFT, 72.0, width - _LEFT - 24, _ROW * len(places), (0.0, end), (0.0, 1.0))
    sizes = [len(era.holds) for era in eras]
    caption = f"{min(sizes)} to {max(sizes)} workers, {len(commits):,} steps in {duration(end)}"
    body = [text(16, 28, title, font_size=16, font_weight="600"), text(16, 48, caption)]
    for row, place in enumerate(places):
        top = frame.top + row * _ROW
        body.append(text(_LEFT - 8, top + 16, f"place {place}", font_size=11, fill=MUTED, text_anchor="end"))
        for era, after in zip(eras, [*(each.start for each in eras[1:]), end], strict=True):
            if spans := era.holds.get(place):
                body.append(_box(frame, era.start, after, top, spans, num_layers))
    bottom = frame.top + frame.height
    speeds = _speeds(commits)
    for name, points in (("steps/s", speeds), ("loss", losses)):
        if points:
            values = [value for _, value in points]
            bounds = (0.0, 1.1 * max(values)) if name == "steps/s" else (min(values), max(values))
            panel = Plot(_LEFT, bottom + 30, frame.width, _PANEL, frame.steps, bounds)
            body += panel.axes(name, count=3)
            body.append(tag("path", d=panel.line(points), stroke=_LINE, stroke_width=1.5, fill="none"))
            bottom = panel.top + panel.height
    body += _across(marks, frame, bottom)
    numbers = [
        text(frame.x(at), bottom + 18, duration(at), font_size=11, fill=MUTED, text_anchor="middle")
        for at in ticks(0.0, end, 8)
    ]
    return document(width, bottom + 34, [*body, *numbers], title=title, description=caption)


def _box(
    frame: Plot, start: float, end: float, top: float, spans: Sequence[tuple[int, int]], num_layers: int
) -> str:  # fmt: skip
    """What a place holds in an era."""
    said = " ".join(f"{lo}:{hi}" for lo, hi in spans)
    middle = sum(lo + hi for lo, hi in spans) / (2 * len(spans) * max(1, num_layers))
    left, right = frame.x(start), frame.x(end)
    box = tag(
        "rect", tooltip(f"{said}, from {duration(start)} to {duration(end)}"), x=left, y=top + 2,
        width=max(0.5, right - left), height=_ROW - 4, fill=oklch(0.86, 0.09, 30 + 300 * middle), stroke=RULE,
        stroke_width=0.5,
    )  # fmt: skip
    fits = text_width(said, 10) + 6 < right - left
    return box + (
        text((left + right) / 2, top + 16, said, font_size=10, fill=INK, text_anchor="middle") if fits else ""
    )


def _speeds(commits: Sequence[float]) -> list[Point]:
    """(time, steps per second), each the median of the steps around it."""
    gaps = [(b, b - a) for a, b in pairwise(commits) if b > a]
    found: list[Point] = []
    for number, (at, _) in enumerate(gaps):
        near = gaps[max(0, number - _WINDOW // 2) : number + _WINDOW // 2 + 1]
        found.append((at, 1 / median(gap for _, gap in near)))
    return found


def _across(marks: Sequence[Mark], frame: Plot, bottom: float) -> list[str]:
    out: list[str] = []
    for mark in marks:
        line = f"M{coord(frame.x(mark.at))} {coord(frame.top - 8)}V{coord(bottom)}"
        colour = _LOST if mark.lost else _CAME
        out.append(tag("path", tooltip(mark.words), d=line, stroke=colour, stroke_dasharray="3 3", fill="none"))
    if marks:
        x = _LEFT + frame.width
        for words, colour in (("comes", _CAME), ("lost", _LOST)):
            x -= text_width(words, 11)
            out.append(text(x, 28, words, font_size=11, fill=MUTED))
            out.append(tag("path", d=f"M{coord(x - 18)} 24h14", stroke=colour, stroke_dasharray="3 3"))
            x -= 32
    out.append(tag("path", d=f"M{coord(_LEFT)} {coord(bottom)}h{coord(frame.width)}", stroke=FAINT))
    return out
