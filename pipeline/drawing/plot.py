"""A curve's place in a picture: which pixel a step and a value are, the axes, and a line through points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.drawing.svg import FAINT, MUTED, RULE, coord, figure, tag, text, ticks

Point = tuple[float, float]


@dataclass(frozen=True)
class Plot:
    """A rectangle of pixels over a range of steps, or of seconds, and of values."""

    left: float
    top: float
    width: float
    height: float
    steps: tuple[float, float]
    values: tuple[float, float]

    @property
    def frame(self) -> str:
        """Its outline, to clip by."""
        return tag("rect", x=self.left, y=self.top, width=self.width, height=self.height)

    def x(self, step: float) -> float:
        """The pixel column of a step."""
        lo, hi = self.steps
        return self.left + self.width * ((step - lo) / (hi - lo) if hi > lo else 0.5)

    def y(self, value: float) -> float:
        """The pixel row of a value."""
        lo, hi = self.values
        return self.top + self.height * (1 - ((value - lo) / (hi - lo) if hi > lo else 0.5))

    def line(self, points: Sequence[Point]) -> str:
        """A path through the points, broken where a value is not finite, with at most two points per pixel column."""
        columns: list[list[Point]] = []
        last = None
        for step, value in points:
            column = int(self.x(step)) if math.isfinite(value) else None
            if column is None or column != last or len(points) <= 2 * self.width:
                columns.append([])
            columns[-1].append((step, value))
            last = column
        out, pen = [], "M"
        for column in columns:
            if not math.isfinite(column[0][1]):
                pen = "M"
                continue
            low, high = min(column, key=lambda p: p[1]), max(column, key=lambda p: p[1])
            for step, value in sorted({low, high}):
                out.append(f"{pen}{coord(self.x(step))} {coord(self.y(value))}")
                pen = "L"
        return "".join(out)

    def axes(self, name: str, count: int) -> list[str]:
        """Lines and numbers of about `count` values, under a name."""
        marks = ticks(*self.values, count)
        grid = "".join(f"M{coord(self.left)} {coord(self.y(m))}h{coord(self.width)}" for m in marks)
        base = f"M{coord(self.left)} {coord(self.top + self.height)}h{coord(self.width)}"
        out = [tag("path", d=grid, stroke=FAINT), tag("path", d=base, stroke=RULE)]
        numbers = [text(self.left - 8, self.y(m) + 4, figure(m)) for m in marks]
        out.append(tag("g", "".join(numbers), text_anchor="end", font_size=11, fill=MUTED))
        out.append(text(self.left, self.top - 8, name, font_size=11, fill=MUTED, text_anchor="end"))
        return out
