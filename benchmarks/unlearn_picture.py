"""The picture of benchmarks/unlearn.py: a row for each method, a panel for each part of the goal."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pipeline.drawing.svg import coord, document, oklch, tag, text

_MET, _MISSED, _OTHER, _LINE = oklch(0.6, 0.13, 165), oklch(0.75, 0.02, 260), oklch(0.6, 0.1, 250), oklch(0.55, 0.2, 25)
_LEFT, _WIDTH, _GAP, _ROW, _TOP = 110.0, 190.0, 70.0, 30.0, 84.0
_NOT_METHODS = ("before", "oracle", "floor")


def picture(
    rows: Mapping[str, Mapping[str, float]], best: Collection[str], forget: float, retain: float, kl: float
) -> str:
    """`best` are the methods that meet the goal; `forget`, `retain` and `kl` are where its lines lie."""
    panels = [
        ("forget_probability", "forgotten answers: probability", 0.0, 1.0, forget, "at most"),
        ("retain_probability", "kept answers: probability, from 0.5", 0.5, 1.0, retain, "at least"),
        ("retain_kl", "kept answers: KL to the oracle, nats", 0.0, 4 * kl, kl, "at most"),
    ]
    names = [name for name in rows if name in _NOT_METHODS]
    names += sorted((name for name in rows if name not in _NOT_METHODS), key=lambda name: name not in best)
    bottom = _TOP + len(names) * _ROW
    body = [text(16, 28, "Forgetting 20 of 200 questions, by method", font_size=16, font_weight="600")]
    for place, (field, title, low, high, goal, how) in enumerate(panels):
        left = _LEFT + place * (_WIDTH + _GAP)
        body.append(text(left, 54, title, font_weight="600"))
        x = left + _WIDTH * (goal - low) / (high - low)
        body.append(text(x, 72, f"{how} {goal:.3g}", text_anchor="middle", fill=_LINE))
        for number, name in enumerate(names):
            y, value = _TOP + number * _ROW, rows[name].get(field, 0.0)
            share = min(1.0, max(0.0, (value - low) / (high - low)))
            fill = _OTHER if name in _NOT_METHODS else _MET if name in best else _MISSED
            body.append(
                tag("rect", x=coord(left), y=coord(y), width=coord(max(1.0, _WIDTH * share)), height=20, fill=fill)
            )
            end = left + _WIDTH * share
            at = x + 6 if end - 2 < x < end + 42 else end + 5  # not across the line
            body.append(text(at, y + 15, f"{value:.3f}"))
            if place == 0:
                body.append(text(left - 10, y + 15, "noise floor" if name == "floor" else name, text_anchor="end"))
        body.append(
            tag("line", x1=coord(x), x2=coord(x), y1=coord(_TOP - 6), y2=coord(bottom), stroke=_LINE, stroke_width=1.5)
        )
    body.append(
        text(
            16,
            bottom + 22,
            "Green: meets all three. Grey: does not. Blue: no method. What is beyond a panel ends at its edge.",
        )
    )
    title = "Forgetting 20 of 200 questions, by method"
    width = _LEFT + 3 * (_WIDTH + _GAP)
    return document(int(width), int(bottom + 40), body, title=title, description="each method beside its goal")
