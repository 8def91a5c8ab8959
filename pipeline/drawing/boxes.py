"""The ops and transfers of one worker's row as SVG: boxes while they can be told apart, else cells of mean colour.

Hue is the microbatch, lightness the kind of work. Half a million ops do not fit on a screen, so past a budget they are
averaged over cells, and a picture stays about as large however many ops it shows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.drawing.svg import INK, coord, duration, mix, oklch, tag, text, text_width, tooltip
from pipeline.schedule.ops import COMPUTE, LOAD, OFFLOAD, RECV, REDUCE, SEND, STEP, B, F, I, R, Span, W
from pipeline.schedule.timeline import Event, Timeline

TONE = {F: (0.885, 0.075), I: (0.75, 0.115), B: (0.67, 0.13), W: (0.52, 0.115), R: (0.93, 0.035)}
PLAIN = {REDUCE: "#7d8590", STEP: "#444c56", SEND: "#8f6fb0", RECV: "#b79fd0", LOAD: "#3f8f86", OFFLOAD: "#8cc5bd"}
SAID = {F: "forward", B: "backward", I: "input gradient", W: "weight gradient", R: "forward run again"}
SAID |= {REDUCE: "reduce", STEP: "step", SEND: "send", RECV: "receive", LOAD: "load", OFFLOAD: "offload"}
_STAFF = 10.0  # px; the lower part of a row, where a bar's height tells which span an op belongs to
_THIN = 0.3  # px; a narrower op cannot be seen alone
BUDGET = 5000  # ops drawn one by one; beyond it, cells
_CELLS = 40_000  # cells in one panel at most
_ARROWS = 240  # transfers drawn as arrows; beyond it, a line under the row while the link is busy
BUBBLE = "#e9eaec"
DEFINITIONS = tag(
    "defs",
    tag(
        "pattern",
        tag("rect", width=6, height=6, fill=BUBBLE)
        + tag("path", d="M-1 1l2-2M0 6l6-6M5 7l2-2", stroke="#d3d6da", stroke_width=1),
        id="bubble",
        width=6,
        height=6,
        patternUnits="userSpaceOnUse",
    )
    + tag(
        "marker",
        tag("path", d="M0 0L6 3L0 6z", fill="#30363d"),
        id="tip",
        viewBox="0 0 6 6",
        refX=5.5,
        refY=3,
        markerWidth=4.5,
        markerHeight=4.5,
        orient="auto",
    ),
)
"""What every picture declares once: the hatching of a bubble, the head of an arrow."""


@dataclass(frozen=True)
class Frame:
    """Where a panel's plot lies: pixels of its left edge and rows, pixels per second, and what counts as a row."""

    left: float
    width: float
    scale: float
    rows: tuple[int, ...]
    height: float
    gap: float
    microbatches: int

    def hue(self, microbatch: float) -> float:
        """Degrees; short of a full turn, so that the first and the last microbatch differ."""
        return (28 + 315 * microbatch / max(self.microbatches, 1)) % 360

    def bars(self, spans: Sequence[Span]) -> bool:
        """Whether a worker's ops carry a bar whose height in the row says which of its spans they belong to."""
        return 1 < len(spans) <= 8 and self.height >= 26

    def colour(self, kind: str, microbatch: int) -> str:
        return oklch(*TONE[kind], self.hue(microbatch)) if kind in TONE else PLAIN[kind]


def row(events: Iterable[Event], spans: Sequence[Span], frame: Frame, zero: float, dense: bool) -> list[str]:
    """The ops of one worker: boxes with a label and a tooltip where there is room, cells of mixed colour elsewhere."""
    boxes: list[str] = []
    labels: list[str] = []
    bars: list[str] = []
    thin: list[Event] = []
    staff = _STAFF if frame.bars(spans) else 0.0
    line = staff / max(len(spans), 1)
    for event in events:
        op, width = event.op, (event.end - event.start) * frame.scale
        compute = op.kind in COMPUTE
        edge = op.kind in (SEND, RECV, LOAD, OFFLOAD)  # copies run beside the work, so they take the row's lower edge
        if width < _THIN or (dense and (compute or edge)):
            thin += [event] if compute else []
            continue
        x = frame.left + (event.start - zero) * frame.scale
        shown = width - (0.6 if width > 3 else 0.0)  # a hair of background keeps neighbours of one colour apart
        y, height = (frame.height * 0.86, frame.height * 0.14) if edge else (None, frame.height)
        box = {"x": x, "y": y, "width": shown, "height": height, "rx": 2.0 if width > 8 and not edge else None}
        boxes.append(tag("rect", tooltip(_said(event, zero)), **box, fill=frame.colour(op.kind, op.microbatch)))
        if staff and compute:
            at = frame.height - staff + spans.index(op.span) * line
            bars.append(f"M{coord(x)} {coord(at)}h{coord(shown)}v{coord(line)}h{coord(-shown)}z")
        if frame.height >= 12 and not edge:
            words = _words(event, shown, staff > 0)
            ink = "#fff" if op.kind in (W, REDUCE, STEP) else None
            labels += [text(x + shown / 2, (frame.height - staff) / 2 + 3.5, words, fill=ink)] if words else []
    out = _cells(thin, frame, zero) + boxes
    if bars:
        out.append(tag("path", d="".join(bars), fill=INK, fill_opacity=0.55, pointer_events="none"))
    if labels:
        out.append(tag("g", "".join(labels), font_size=10, text_anchor="middle", pointer_events="none"))
    return out


def _said(event: Event, zero: float) -> str:
    op = event.op
    which = f" of microbatch {op.microbatch}" if op.microbatch >= 0 else ""
    when = f"{duration(event.start - zero)} to {duration(event.end - zero)}, {duration(event.end - event.start)} long"
    lo, hi = op.span
    layers = f"layer {lo}" if hi == lo + 1 else f"layers {lo} to {hi - 1}"
    return f"{SAID[op.kind]}{which}, {layers}, worker {event.worker}, {when}"


def _words(event: Event, room: float, several: bool) -> str:
    """The longest of an op's names that fits in `room` pixels; '' where none does."""
    op = event.op
    number = str(op.microbatch) if op.microbatch >= 0 else ""
    choices = [f"{op.kind}{number}", number]
    if several:
        choices.insert(0, f"{op.kind}{number} {op.span[0]}:{op.span[1]}")
    return next((c for c in choices if text_width(c, 10) <= room - 3), "")


def _cells(events: Sequence[Event], frame: Frame, zero: float) -> list[str]:
    """Ops too many or too narrow to draw alone, averaged over cells: mean hue and tone, as opaque as the cell is busy.

    A cell is as wide as several ops, else the beat of ops against cells would be seen as a pattern. Equal neighbours
    are joined and one path holds all cells of a colour, so the size follows the picture, not the number of ops.
    """
    if not events:
        return []
    mean = sum(e.end - e.start for e in events) * frame.scale / len(events)
    fair = frame.width * len(frame.rows) / _CELLS
    cell = float(math.ceil(max(1.0, fair, 4 * mean if mean < 3 else 0.0)))
    number = int(frame.width / cell) + 1
    busy, light, chroma, batch = ([0.0] * number for _ in range(4))
    rate = frame.scale / cell
    for _, op, begun, ended in events:
        start, end = (begun - zero) * rate, (ended - zero) * rate
        tone = TONE[op[0]]
        for at in range(int(start), min(int(end), number - 1) + 1):
            share = min(end, at + 1) - max(start, at)
            busy[at] += share
            light[at] += share * tone[0]
            chroma[at] += share * tone[1]
            batch[at] += share * op[2]
    band = max(1.0, frame.microbatches / 64)  # a finer difference of hue is not seen
    fills: list[str] = []
    for i, work in enumerate(busy):
        opacity = min(round(work * 16), 16) / 16
        if opacity:
            tone = round(light[i] / work * 40) / 40, round(chroma[i] / work * 60) / 60
            hue = frame.hue(round(batch[i] / work / band) * band)
            fills.append(mix(BUBBLE, oklch(*tone, hue), opacity))
        else:
            fills.append("")
    runs: dict[str, list[str]] = defaultdict(list)
    start = 0
    for i in range(1, number + 1):
        if i == number or fills[i] != fills[start]:
            if fills[start]:
                wide = coord(min(i, frame.width / cell) - start)
                runs[fills[start]].append(f"M{start} 0h{wide}v1h-{wide}z")
            start = i
    paths = "".join(tag("path", d="".join(path), fill=fill) for fill, path in runs.items())
    place = f"translate({coord(frame.left)} 0) scale({coord(cell)} {coord(frame.height)})"
    return [tag("g", paths, transform=place, shape_rendering="crispEdges")]


def transfers(timeline: Timeline, frame: Frame, zero: float, top: float) -> list[str]:
    """Few transfers: an arrow from the row that sent to the row that received. Many: a line below the sender's row."""
    row = {worker: index for index, worker in enumerate(frame.rows)}
    pitch = frame.height + frame.gap
    moves = [t for t in timeline.transfers if t.source in row and t.target in row and t.source != t.target]
    if not moves or frame.gap < 4:
        return []
    if len(moves) <= _ARROWS:
        near: list[str] = []
        far: list[str] = []
        for t in moves:
            down = row[t.target] > row[t.source]
            x1, x2 = (frame.left + (at - zero) * frame.scale for at in (t.start, t.end))
            y1 = top + row[t.source] * pitch + (frame.height if down else 0.0)
            y2 = top + row[t.target] * pitch + (0.0 if down else frame.height)
            said = f"{t.op} from worker {t.source} to worker {t.target}, {duration(t.end - t.start)}"
            path = tag("path", tooltip(said), d=f"M{coord(x1)} {coord(y1)}L{coord(x2)} {coord(y2)}")
            (near if abs(row[t.target] - row[t.source]) == 1 else far).append(path)
        ink = {"marker_end": "url(#tip)", "stroke": "#30363d", "stroke_width": 0.9, "fill": "none"}
        return [tag("g", "".join(far), **ink, opacity=0.3), tag("g", "".join(near), **ink, opacity=0.85)]
    lines: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for t in sorted(moves, key=lambda t: t.start):
        a, b = (int((at - zero) * frame.scale) for at in (t.start, t.end))
        held = lines[t.source]
        if held and a <= held[-1][1]:
            held[-1] = (held[-1][0], max(held[-1][1], b))
        else:
            held.append((a, b))
    path = "".join(
        f"M{coord(frame.left + a)} {coord(top + row[source] * pitch + frame.height + frame.gap / 2)}h{max(b - a, 1)}"
        for source, runs in lines.items()
        for a, b in runs
    )
    return [tag("path", d=path, stroke="#57606a", stroke_width=1.2, fill="none")]
