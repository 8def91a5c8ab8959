"""A timeline made visible: SVG for a page, a Chrome trace for Perfetto, text for a terminal; planned or measured alike.

A reader looks for three things, and each has a channel of its own. Hue is the microbatch, in order, so that a batch is
followed across workers as a band of one colour. Lightness is the kind of work, forward light and backward dark. What
is hatched is a bubble: time in which a worker computed nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from pipeline.drawing.boxes import BUDGET, DEFINITIONS, SAID, TONE, Frame, row, transfers
from pipeline.drawing.svg import (
    FAINT,
    INK,
    MUTED,
    RULE,
    coord,
    data_size,
    document,
    duration,
    figure,
    tag,
    text,
    text_width,
    ticks,
    time_unit,
)
from pipeline.drawing.terminal import terminal
from pipeline.drawing.trace import perfetto
from pipeline.schedule.ops import COMPUTE, Span
from pipeline.schedule.timeline import Event, Timeline

__all__ = ["compare_svg", "perfetto", "svg", "terminal"]


_SIGNS = {"transfer": (5, 1, 18), "bar": (10, 4, 18)}  # legend entries that are not a colour: rise, height, width


def svg(timeline: Timeline, *, width: int = 1200, title: str | None = None) -> str:
    """One iteration as a picture `width` pixels wide: a row per worker, time to the right. Returns the SVG file's text.

    Raises ValueError where there is nothing to draw, or no room (`width` under 400).
    """
    return _page((timeline,), width, title if title is not None else timeline.name)


def compare_svg(planned: Timeline, measured: Timeline, *, width: int = 1200, title: str | None = None) -> str:
    """Two timelines, one above the other, with the same workers, colours and pixels per second; otherwise as `svg`."""
    ratio = f"{figure(measured.makespan_s / planned.makespan_s)} × the plan" if planned.makespan_s else ""
    name = planned.name if planned.name == measured.name else f"{planned.name} and {measured.name}"
    return _page((planned, measured), width, title if title is not None else name, ratio)


def caption(timeline: Timeline) -> str:
    """Makespan, bubble and peaks in one line of text."""
    parts = [f"makespan {duration(timeline.makespan_s)}", f"bubble {100 * timeline.bubble:.1f} %"]
    for name, held in (("peak activations", timeline.peak_activations), ("messages at most", timeline.peak_messages)):
        if held:
            each = [held[w] for w in sorted(held)]
            shown = ", ".join(map(str, each)) if len(each) <= 8 else f"{min(each)} to {max(each)}"
            parts.append(f"{name} {shown}" + (" per worker" if len(each) > 1 else ""))
    if timeline.peak_bytes:
        parts.append(f"peak memory {data_size(max(timeline.peak_bytes.values()))}")
    return " · ".join(parts)


def _page(timelines: Sequence[Timeline], width: int, title: str, note: str = "") -> str:
    for timeline in timelines:
        if not timeline.events:
            raise ValueError(f"timeline {timeline.name!r} has no events; expected at least one op to draw")
    if width < 400:
        raise ValueError(f"width is {width}; expected at least 400 pixels")
    rows = tuple(sorted({e.worker for t in timelines for e in t.events}))
    spans = [_spans(t) for t in timelines]
    labels = [f"worker {w}" for w in rows] + [_span_label(s) for by in spans for s in by.values()]
    left = 28 + max(text_width(label, 11) for label in labels)
    most = max(len(t.events) for t in timelines)
    height = float(min(34, max(3, 900 // (len(rows) * len(timelines)))))
    gap = 0.0 if height < 5 else 9.0 if height > 20 and most < BUDGET else 2.0
    span = max(t.makespan_s for t in timelines)
    plot = width - left - 24
    count = 1 + max((e.op.microbatch for t in timelines for e in t.events), default=0)
    frame = Frame(left, plot, plot / span if span > 0 else 0.0, rows, height, gap, count)

    body = [DEFINITIONS, text(16, 28, title, font_size=16, font_weight="600")]
    if note:
        body.append(text(width - 24, 28, note, fill=MUTED, text_anchor="end"))
    bars = any(frame.bars(held) for by in spans for held in by.values())
    markup, y = _legend(timelines, frame, width, bars)
    body += markup
    captions = [caption(t) for t in timelines]
    for timeline, by_worker, said in zip(timelines, spans, captions, strict=True):
        panel, bottom = _panel(timeline, by_worker, frame, span, said)
        body.append(tag("g", "\n".join(panel), transform=f"translate(0 {coord(y)})"))
        y += bottom + 14
    told = "; ".join(f"{_state(t)}: {said}" for t, said in zip(timelines, captions, strict=True))
    return document(width, y + 4, body, title=title, description=f"Pipeline of {len(rows)} workers, {told}")


def _state(timeline: Timeline) -> str:
    return "measured" if timeline.measured else "planned"


def _spans(timeline: Timeline) -> dict[int, tuple[Span, ...]]:
    """Worker -> the spans it computes, ascending."""
    found: dict[int, set[Span]] = defaultdict(set)
    for worker, op, _, _ in timeline.events:
        if op[0] in COMPUTE:
            found[worker].add(op[1])
    return {worker: tuple(sorted(spans)) for worker, spans in found.items()}


def _span_label(spans: Sequence[Span]) -> str:
    return ", ".join(f"{lo}:{hi}" for lo, hi in spans) if len(spans) <= 4 else f"{len(spans)} spans"


def _legend(timelines: Sequence[Timeline], frame: Frame, width: float, bars: bool) -> tuple[list[str], float]:
    """What the colours mean, on as many lines as it takes; returns the y below it."""
    seen = Counter(e.op.kind for t in timelines for e in t.events)
    last = frame.microbatches - 1
    entries: list[tuple[list[str], str]] = []
    for kind in (k for k in SAID if seen[k]):
        if kind in TONE:  # three hues side by side: what tells the kind is how light they are
            entries.append(([frame.colour(kind, m) for m in (0, last // 2, last)], f"{SAID[kind]} ({kind})"))
        else:
            entries.append(([frame.colour(kind, 0)], SAID[kind]))
    entries.append((["url(#bubble)"], "bubble"))
    if frame.gap > 4 and any(t.transfers for t in timelines):
        entries.append((["transfer"], "transfer"))
    if bars:
        entries.append((["bar"], "bar: which span, the first on top"))
    steps = min(frame.microbatches, 32)
    band = [frame.colour("B", round(i * last / max(steps - 1, 1))) for i in range(steps)]
    entries.append((band, f"microbatch 0 to {last}" if last else "microbatch 0"))

    out: list[str] = []
    x, y = 16.0, 52.0
    for fills, words in entries:
        size = 18.0 if len(fills) <= 3 else 80.0
        need = size + 6 + text_width(words, 11) + 14
        if x + need > width - 16 and x > 16:
            x, y = 16.0, y + 20
        top, tall, wide = _SIGNS.get(fills[0], (10, 12, size / len(fills)))
        for i, fill in enumerate(fills):
            fill = INK if fill in _SIGNS else fill
            out.append(tag("rect", x=x + i * wide, y=y - top, width=wide + 0.2, height=tall, fill=fill))
        out.append(text(x + size + 6, y, words, fill=MUTED))
        x += need
    return out, y + 18


def _panel(
    timeline: Timeline, spans: Mapping[int, tuple[Span, ...]], frame: Frame, span: float, said: str
) -> tuple[list[str], float]:
    """One timeline with its caption and axis, from y = 0 down; returns the markup and its height."""
    zero = min(e.start for e in timeline.events)
    whole = timeline.makespan_s * frame.scale
    pitch = frame.height + frame.gap
    top = 26.0
    bottom = top + pitch * len(frame.rows)
    dark, light = (INK, "#fff") if timeline.measured else ("none", INK)
    out = [
        tag("rect", x=16, y=2, width=70, height=16, rx=8, fill=dark, stroke=INK),
        text(51, 13.5, _state(timeline), font_size=11, text_anchor="middle", fill=light),
        text(96, 14, said),
        *_axis(frame, span, top, bottom),
    ]
    events: dict[int, list[Event]] = defaultdict(list)
    for event in timeline.events:
        events[event[0]].append(event)
    dense = len(timeline.events) > BUDGET
    every = max(1, -(-13 // int(max(pitch, 1))))
    for index, worker in enumerate(frame.rows):
        held = spans.get(worker, ())
        parts = _row_label(worker, held, frame) if index % every == 0 else []
        parts.append(tag("rect", x=frame.left, width=whole, height=frame.height, fill="url(#bubble)"))
        parts += row(events[worker], held, frame, zero, dense)
        out.append(tag("g", "".join(parts), transform=f"translate(0 {coord(top + index * pitch)})"))
    out += transfers(timeline, frame, zero, top)
    return out, bottom + 24


def _axis(frame: Frame, span: float, top: float, bottom: float) -> list[str]:
    factor, unit = time_unit(span)
    marks = ticks(0.0, span * factor, max(2, int(frame.width // 90)))
    at = [frame.left + mark / factor * frame.scale for mark in marks]
    grid = "".join(f"M{coord(x)} {coord(top)}V{coord(bottom + 4)}" for x in at)
    line = f"M{coord(frame.left)} {coord(bottom)}h{coord(frame.width)}"
    out = [tag("path", d=grid, stroke=FAINT), tag("path", d=line, stroke=RULE)]
    numbers = [text(x, bottom + 17, figure(mark)) for x, mark in zip(at, marks, strict=True)]
    out.append(tag("g", "".join(numbers), fill=MUTED, font_size=11, text_anchor="middle"))
    out.append(text(frame.left - 10, bottom + 17, unit, fill=MUTED, font_size=11, text_anchor="end"))
    return out


def _row_label(worker: int, spans: Sequence[Span], frame: Frame) -> list[str]:
    right, middle = frame.left - 10, frame.height / 2
    if frame.height < 26 or not spans:
        return [text(right, middle + 4, f"worker {worker}", text_anchor="end", font_size=11)]
    return [
        text(right, middle - 2, f"worker {worker}", text_anchor="end"),
        text(right, middle + 12, _span_label(spans), text_anchor="end", font_size=10, fill=MUTED),
    ]
