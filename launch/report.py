"""The loss curve of a run, as a picture and as text for a terminal, from the lines of metrics.jsonl and events.jsonl.

A curve answers three questions: does the loss fall, does the held-out loss fall with it, and what did a failure cost.
So the noise is drawn pale behind its smoothed line, evaluations are points, every event is a labelled line across, and
the speed runs below on the same steps, where a failure shows as a dent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from statistics import median
from typing import Any

from pipeline.drawing.plot import Plot, Point
from pipeline.drawing.svg import (
    MUTED,
    coord,
    document,
    figure,
    oklch,
    tag,
    text,
    text_width,
    ticks,
    tooltip,
)
from pipeline.runtime.peak_memory import PEAK_BYTES

_LOSS, _PALE, _HELD_OUT = oklch(0.52, 0.16, 255), oklch(0.82, 0.07, 255), oklch(0.65, 0.17, 55)
_MARK, _SPEED = oklch(0.55, 0.2, 25), oklch(0.6, 0.1, 165)
_TALL, _SHORT, _LABEL_ROWS = 300.0, 70.0, 3

Record = Mapping[str, Any]


def loss_svg(records: Sequence[Record], events: Iterable[Record] = (), *, width: int = 900, title: str = "loss") -> str:
    """The SVG text of a loss curve over steps.

    `records` are lines of metrics.jsonl: `step`, `loss` and, where known, `tokens` and `tokens_per_s`. Of `events`,
    lines of events.jsonl, those with `event` "evaluation" are the held-out loss; every other one that has a `step` is
    marked, labelled by its `label`, else by its `event` and `worker`: pass those that the reader should see. A step
    that was run again counts as it ended. A loss that is not finite leaves a gap. Raises ValueError if none is finite.
    """
    if width < 400:
        raise ValueError(f"width is {width}; expected at least 400 pixels")
    events = list(events)
    losses, speeds = _series(records, "loss"), _series(records, "tokens_per_s")
    if not _finite(losses):
        raise ValueError(f"no finite loss in {len(records)} records; expected records with a step and a loss")
    held_out = _series([e for e in events if e.get("event") == "evaluation"], "loss")
    held_out = [p for p in held_out if math.isfinite(p[1])]
    marks = [(float(e["step"]), _name(e)) for e in events if e.get("event") != "evaluation" and _is_number(e, "step")]
    smooth = smoothed(losses)

    steps = [p[0] for p in (*losses, *held_out, *marks)]
    x_range = min(steps), max(steps)
    plot = Plot(64.0, 84.0, width - 88.0, _TALL, x_range, _bounds(losses, [*smooth, *held_out]))
    body = [tag("defs", tag("clipPath", plot.frame, id="plot"))]
    caption = _caption(losses, smooth, held_out, records)
    body += [text(16, 28, title, font_size=16, font_weight="600"), text(16, 48, caption)]
    body += plot.axes("loss", count=7)
    body.append(tag("path", d=plot.line(losses), stroke=_PALE, fill="none", clip_path="url(#plot)"))
    body.append(tag("path", d=plot.line(smooth), stroke=_LOSS, stroke_width=2, fill="none", stroke_linejoin="round"))
    if len(smooth) == 1:  # a line of one point is not drawn
        body.append(tag("circle", cx=plot.x(smooth[0][0]), cy=plot.y(smooth[0][1]), r=3, fill=_LOSS))
    if held_out:
        body.append(tag("path", d=plot.line(held_out), stroke=_HELD_OUT, stroke_dasharray="3 3", fill="none"))
        for step, loss in held_out:
            said = tooltip(f"held-out loss {figure(loss)} at step {step:g}")
            body.append(tag("circle", said, cx=plot.x(step), cy=plot.y(loss), r=3.5, fill=_HELD_OUT, stroke="#fff"))
    bottom = plot.top + plot.height
    if any(math.isfinite(s) for _, s in speeds):
        below = Plot(plot.left, bottom + 26, plot.width, _SHORT, x_range, (0.0, max(_finite_values(speeds)) * 1.08))
        body += below.axes("tokens/s", count=3)
        body.append(tag("path", d=below.line(speeds), stroke=_SPEED, stroke_width=1.5, fill="none"))
        bottom = below.top + below.height
    body += _marks(marks, plot, bottom)
    body += _legend(plot, bool(held_out), bool(marks))
    body += _steps(plot, bottom)
    return document(width, bottom + 46, body, title=title, description=caption)


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Each finite point as the mean of about a twenty-fifth of all, half before it and half after: nothing lags.

    The window shrinks to the first point, where a loss falls fastest; to the last it only loses what is not there yet.
    """
    finite = _finite(points)
    sums = [0.0, *accumulate(value for _, value in finite)]
    out: list[Point] = []
    for i, (step, _) in enumerate(finite):
        half = min(max(len(finite) // 50, 1), i)
        lo, hi = i - half, min(i + half + 1, len(finite))
        out.append((step, (sums[hi] - sums[lo]) / (hi - lo)))
    return out


def _caption(
    losses: Sequence[Point], smooth: Sequence[Point], held_out: Sequence[Point], records: Sequence[Record]
) -> str:
    parts = [f"loss {figure(_finite(losses)[0][1])} to {figure(smooth[-1][1])} in {len(losses):,} steps"]
    if held_out:
        last = held_out[-1][1]
        parts.append(f"held-out {figure(last)}" + (f", perplexity {figure(math.exp(last))}" if last < 50 else ""))
    if tokens := sum(_finite_values(_series(records, "tokens"))):
        parts.append(f"{figure(tokens)} tokens")
    found = performance(records)
    if "tokens_per_s" in found:
        parts.append(f"median {figure(found['tokens_per_s'])} tokens/s")
    if "tflops" in found:
        parts.append(f"MFU {100 * found['mfu']:.1f} %" if "mfu" in found else f"{found['tflops']:.3g} TFLOP/s")
    return " · ".join(parts)


def _legend(plot: Plot, held_out: bool, marks: bool) -> list[str]:
    entries = [(_PALE, 1.0, "each step"), (_LOSS, 2.0, "smoothed")]
    entries += [(_HELD_OUT, 2.0, "held out")] if held_out else []
    entries += [(_MARK, 1.0, "event")] if marks else []
    out, x = [], plot.left + plot.width
    for colour, size, words in reversed(entries):
        x -= text_width(words, 11)
        out.append(text(x, 28, words, font_size=11, fill=MUTED))
        out.append(tag("path", d=f"M{coord(x - 22)} 24h16", stroke=colour, stroke_width=size))
        x -= 38
    return out


def _marks(marks: Sequence[tuple[float, str]], plot: Plot, bottom: float) -> list[str]:
    """A dashed line per event; its label on the first of a few rows where it meets no other, else only as a tooltip."""
    out: list[str] = []
    free = [plot.left] * _LABEL_ROWS
    for step, name in sorted(marks):
        x = plot.x(step)
        said = tooltip(f"{name}, step {step:g}")
        line = f"M{coord(x)} {coord(plot.top)}V{coord(bottom)}"
        out.append(tag("path", said, d=line, stroke=_MARK, stroke_dasharray="4 3", fill="none"))
        size = text_width(name, 10)
        at = min(x + 4, plot.left + plot.width - size)
        for row, until in enumerate(free):
            if at >= until:
                out.append(text(at, plot.top + 10 + 13 * row, name, font_size=10, fill=_MARK))
                free[row] = at + size + 8
                break
    return out


def _steps(plot: Plot, bottom: float) -> list[str]:
    marks = [m for m in ticks(*plot.steps, max(2, int(plot.width // 90))) if m == int(m)]
    numbers = [text(plot.x(m), bottom + 18, f"{m:,.0f}") for m in marks]
    return [
        tag("g", "".join(numbers), text_anchor="middle", font_size=11, fill=MUTED),
        text(plot.left + plot.width / 2, bottom + 36, "step", text_anchor="middle", font_size=11, fill=MUTED),
    ]


def loss_terminal(records: Sequence[Record], width: int = 72, height: int = 12, *, ascii_only: bool = False) -> str:
    """The loss over steps as `height` lines of at most `width` characters and a line of steps below.

    Drawn in braille dots (2 x 4 to a character), or in ASCII for terminals without them; a column shows the mean of
    its steps. Says so in words where no loss is finite. Raises ValueError for less than 20 x 3 characters.
    """
    if width < 20 or height < 3:
        raise ValueError(f"width {width} and height {height}; expected at least 20 and 3 characters")
    points = _finite(_series(records, "loss"))
    if not points:
        return f"no finite loss in {len(records)} records"
    left = 11
    dot_x, dot_y = (1, 1) if ascii_only else (2, 4)
    columns, rows = (width - left) * dot_x, height * dot_y
    first, last = points[0][0], points[-1][0]
    held: dict[int, list[float]] = {}
    for step, loss in points:
        held.setdefault(round((step - first) / max(last - first, 1) * (columns - 1)), []).append(loss)
    means = {column: sum(values) / len(values) for column, values in held.items()}
    lo, hi = min(means.values()), max(means.values())
    labels = {row: f"{hi - (hi - lo) * row / (height - 1):.3g}" for row in (0, height // 2, height - 1)}
    grid = [[False] * columns for _ in range(rows)]
    before: tuple[int, int] | None = None
    for column, mean in means.items():
        row = round(((hi - mean) / (hi - lo) if hi > lo else 0.5) * (rows - 1))
        for x, y in _steps_between(before or (column, row), (column, row)):
            grid[y][x] = True
        before = column, row
    lines: list[str] = []
    for i in range(height):
        cells = (
            "".join("*" if dot else " " for dot in grid[i])
            if ascii_only
            else "".join(_braille(grid, 4 * i, 2 * x) for x in range(width - left))
        )
        lines.append(f"{labels.get(i, ''):>{left - 2}} {'|' if ascii_only else '│'}{cells}".rstrip())
    end = f"{last:,.0f}"
    lines.append(" " * (left - 1) + f" {first:,.0f} step".ljust(width - left + 1 - len(end)) + end)
    return "\n".join(lines)


def _steps_between(a: tuple[int, int], b: tuple[int, int]) -> Iterable[tuple[int, int]]:
    """The dots on the straight line from a to b."""
    count = max(abs(b[0] - a[0]), abs(b[1] - a[1]), 1)
    for i in range(count + 1):
        yield round(a[0] + (b[0] - a[0]) * i / count), round(a[1] + (b[1] - a[1]) * i / count)


def _braille(grid: Sequence[Sequence[bool]], top: int, left: int) -> str:
    """The character for 2 x 4 dots; Unicode numbers them down the left column, then the right, the last row after."""
    order = ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (3, 1))
    code = sum(1 << bit for bit, (y, x) in enumerate(order) if grid[top + y][left + x])
    return chr(0x2800 + code) if code else " "


def performance(records: Sequence[Record]) -> dict[str, float]:
    """What a run came to, where its steps tell it: the median `tokens_per_s`, `tflops` and `mfu`, and the most of each
    of PEAK_BYTES."""
    middle = {name: _finite_values(_series(records, name)) for name in ("tokens_per_s", "tflops", "mfu")}
    most = {name: _finite_values(_series(records, name)) for name in PEAK_BYTES}
    found = {name: median(values) for name, values in middle.items() if values}
    return found | {name: int(max(values)) for name, values in most.items() if values}


def performance_text(records: Sequence[Record]) -> str:
    """The same in a line, or "" """
    found, parts = performance(records), list[str]()
    if "tokens_per_s" in found:
        parts.append(f"median {figure(found['tokens_per_s'])} tokens/s")
    if "tflops" in found:
        parts.append(f"{found['tflops']:.3g} TFLOP/s")
    if "mfu" in found:
        parts.append(f"MFU {100 * found['mfu']:.1f} %")
    for kind in ("host", "device"):
        if (most := f"peak_{kind}_bytes") in found:
            each, all_ = (found[name] / 2**20 for name in (most, f"{most}_sum"))
            parts.append(f"{kind} memory {each:,.0f} MiB at most in one process, {all_:,.0f} in all")
    return ", ".join(parts)


# ---- records ----


def _series(records: Iterable[Record], name: str) -> list[Point]:
    """(step, value) of the records that have both, ascending; of a step that was run again, the last."""
    found = {float(r["step"]): float(r[name]) for r in records if _is_number(r, "step") and _is_number(r, name)}
    return sorted(found.items())


def _is_number(record: Record, name: str) -> bool:
    return isinstance(record.get(name), (int, float)) and not isinstance(record[name], bool)


def _finite(points: Iterable[Point]) -> list[Point]:
    return [p for p in points if math.isfinite(p[1])]


def _finite_values(points: Iterable[Point]) -> list[float]:
    return [value for _, value in points if math.isfinite(value)]


def _bounds(noisy: Sequence[Point], points: Sequence[Point]) -> tuple[float, float]:
    """A little more than the range of `points` and of all but the wildest 1% of `noisy` at either end."""
    values = sorted(_finite_values(noisy))
    cut = len(values) // 100
    inside = [values[cut], values[-1 - cut], *_finite_values(points)]
    lo, hi = min(inside), max(inside)
    room = 0.05 * (hi - lo) or 0.05 * abs(hi) or 1.0
    return lo - room, hi + room


def _name(event: Record) -> str:
    if "label" in event:
        return str(event["label"])
    return str(event.get("event", "event")) + (f" worker {event['worker']}" if "worker" in event else "")
