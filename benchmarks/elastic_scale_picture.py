"""Goodput by the number of workers, as a picture: a line for each strategy, bars from the least to the most seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.drawing.plot import Plot
from pipeline.drawing.svg import FAINT, INK, MUTED, coord, document, oklch, tag, text, tooltip

HUES = (oklch(0.55, 0.17, 255), oklch(0.6, 0.13, 165), oklch(0.6, 0.15, 55))
PUBLISHED = (
    (100_000, 0.44, "synchronous", "arXiv 2602.00277, 100K GPUs, synchronous training"),
    (100_000, 0.80, "FT-HSDP", "arXiv 2602.00277, 100K GPUs, FT-HSDP"),
    (9_600, 0.97, "ByteRobust", "arXiv 2509.16293, 9,600 GPUs, ETTR"),
    (16_384, 0.90, "Llama 3, above", "arXiv 2407.21783, 16,384 GPUs: higher than 90 %"),
)
"""(workers, share, name, source) of real runs, on other models and machines."""


def picture(rows: Sequence[Mapping[str, Any]], strategies: Sequence[str]) -> str:
    """The SVG text of the rows of no variant."""
    shown = [row for row in rows if not row["variant"]]
    plot = Plot(64, 92, 640, 320, (2.9, 5.4), (0.0, 1.0))
    said = (
        "54 days of a 70B run, failures as in Llama 3, a hot spare for half of them; bars: least to most of the seeds"
    )
    body = [
        text(16, 28, "Goodput by the number of workers, simulated", font_size=16, font_weight="600"),
        text(16, 48, said, fill=MUTED), *plot.axes("goodput", 5),
    ]  # fmt: skip
    for at in range(3, 6):
        for times in range(1, 10):
            if (log := math.log10(times * 10**at)) <= plot.steps[1]:
                strength = MUTED if times == 1 else FAINT
                body.append(tag("path", d=f"M{coord(plot.x(log))} {coord(plot.y(0))}v6", stroke=strength))
        body.append(text(plot.x(at), plot.y(0) + 22, f"{10**at:,}", font_size=11, fill=MUTED, text_anchor="middle"))
    body.append(text(plot.left + plot.width, plot.y(0) + 40, "workers", font_size=11, fill=MUTED, text_anchor="end"))
    for shift, (name, ink) in enumerate(zip(strategies, HUES)):
        points = [(math.log10(row["workers"]), row[name]["mean"]) for row in shown]
        body.append(tag("path", tooltip(name), d=plot.line(points), stroke=ink, stroke_width=2, fill="none"))
        for (log, mean), row in zip(points, shown):
            x = plot.x(log) + 3 * (shift - 1)  # beside one another where they meet
            low, high = coord(plot.y(row[name]["least"])), coord(plot.y(row[name]["most"]))
            bar = f"M{coord(x - 3)} {low}h6m-3 0V{high}m-3 0h6"
            body.append(tag("path", d=bar, stroke=ink, stroke_width=1.2))
            about = tooltip(f"{name}, {row['workers']:,} workers: {mean:.3f}")
            body.append(tag("circle", about, cx=plot.x(log), cy=plot.y(mean), r=2.5, fill=ink))
    for workers, share, name, source in PUBLISHED:
        x, y = plot.x(math.log10(workers)), plot.y(share)
        cross = f"M{coord(x - 4)} {coord(y - 4)}l8 8m0 -8l-8 8"
        body.append(tag("path", tooltip(source), d=cross, stroke=INK, stroke_width=1.5))
        right = workers == 100_000  # there the lines end
        body.append(
            text(x + 10, y - 5, name, font_size=10, fill=MUTED) if right
            else text(x - 8, y + 18, name, font_size=10, fill=MUTED, text_anchor="end")
        )  # fmt: skip
    x = plot.left
    for name, ink in zip(strategies, HUES):
        body.append(tag("path", d=f"M{coord(x)} 68h18", stroke=ink, stroke_width=2.5))
        body.append(text(x + 24, 72, name))
        x += 48 + 6.8 * len(name)
    body.append(tag("path", d=f"M{coord(x)} 64l8 8m0 -8l-8 8", stroke=INK, stroke_width=1.5))
    body.append(text(x + 16, 72, "published, real runs"))
    return document(728, 466, body, title="Goodput by the number of workers, simulated", description=said)
