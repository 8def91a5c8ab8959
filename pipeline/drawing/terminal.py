"""A timeline as plain text for a terminal: one line per worker, one column per slice of time.

Each op is its microbatch and then a mark for its kind, as long as it took (`3>>` forward, `3<<<<` backward), so that
the picture reads without colour and survives a log file.
"""

from __future__ import annotations

import textwrap
from collections import defaultdict

from pipeline.drawing.boxes import SAID, Frame
from pipeline.drawing.svg import clean, duration
from pipeline.schedule.ops import COMPUTE, REDUCE, STEP, B, F, I, R, W
from pipeline.schedule.timeline import Event, Timeline

_MARK = {F: ">", B: "<", I: "-", W: "+", R: "~", REDUCE: "R", STEP: "S"}


def terminal(timeline: Timeline, width: int = 100, *, rich: bool = False, rows: int = 64) -> str:
    """Lines of at most `width` columns; with `rich`, the same text in colour as markup for `rich.print`.

    Of more than `rows` workers, `rows` evenly spaced ones are shown and the text says so. Raises ValueError for an
    empty timeline, a `width` under 50 or `rows` under 1.
    """
    if not timeline.events:
        raise ValueError(f"timeline {timeline.name!r} has no events; expected at least one op to draw")
    if width < 50 or rows < 1:
        raise ValueError(f"width {width} and rows {rows}; expected a width of at least 50 and at least one row")
    events: dict[int, list[Event]] = defaultdict(list)
    for event in timeline.events:
        events[event[0]].append(event)
    workers = sorted(events)
    shown = [workers[i * len(workers) // rows] for i in range(rows)] if len(workers) > rows else workers
    left = len(f"worker {workers[-1]} ")
    zero, span = min(e.start for e in timeline.events), timeline.makespan_s
    plot = width - left
    scale = plot / span if span > 0 else 0.0
    count = 1 + max((e.op.microbatch for e in timeline.events), default=0)
    frame = Frame(0, plot, scale, tuple(shown), 1, 0, count)
    work = [e.end - e.start for e in timeline.events if e.op.kind in COMPUTE]
    crowded = count > 10 and sum(work) * scale < 2 * len(work)

    state = "measured" if timeline.measured else "planned"
    head = f"{timeline.name}, {state}: makespan {duration(span)}, bubble {100 * timeline.bubble:.1f} %"
    kinds = {e.op.kind for e in timeline.events}
    head = clean(head)
    lines = textwrap.wrap(head.replace("[", "\\[") if rich else head, width)
    for worker in shown:
        lines.append(f"worker {worker}".ljust(left) + _line(events[worker], frame, zero, crowded, rich))
    if len(shown) < len(workers):
        lines.append(f"{len(shown)} of {len(workers)} workers shown")
    what = f"digit: microbatch in tenths of {count}" if crowded else "number: microbatch"
    lines.append(f"{'':{left}}|{duration(span):>{plot - 2}}|")
    legend = [what, *(f"{mark} {SAID[kind]}" for kind, mark in _MARK.items() if kind in kinds), ". bubble"]
    line = ""
    for entry in legend:
        if line and left + len(line) + 2 + len(entry) > width:
            lines.append(" " * left + line)
            line = ""
        line += f"  {entry}" if line else entry
    lines.append(" " * left + line)
    return "\n".join(line.rstrip() for line in lines)


def _line(events: list[Event], frame: Frame, zero: float, crowded: bool, rich: bool) -> str:
    """One worker's ops over the frame's width; what is narrower than a column shows where the column is free."""
    columns = int(frame.width)
    cells = ["."] * columns
    fills = [""] * columns
    for event in sorted(events, key=lambda e: e.start - e.end):
        kind, microbatch = event.op.kind, event.op.microbatch
        if kind not in _MARK:
            continue
        first, last = (min(round((at - zero) * frame.scale), columns) for at in (event.start, event.end))
        first = min(first, columns - 1)
        if last <= first:
            last = first + 1
            if cells[first] != ".":
                continue
        number = str(microbatch * 10 // frame.microbatches if crowded else microbatch) if kind in COMPUTE else ""
        body = number if len(number) <= last - first else number[-1]
        for i, char in enumerate(body.ljust(last - first, _MARK[kind])):
            cells[first + i] = char
            fills[first + i] = frame.colour(kind, microbatch)
    if not rich:
        return "".join(cells)
    out, start = [], 0
    for i in range(1, columns + 1):
        if i == columns or fills[i] != fills[start]:
            chunk = "".join(cells[start:i])
            ink = "white" if fills[start] in (frame.colour(REDUCE, 0), frame.colour(STEP, 0)) else "black"
            out.append(f"[{ink} on {fills[start]}]{chunk}[/]" if fills[start] else f"[dim]{chunk}[/]")
            start = i
    return "".join(out)
