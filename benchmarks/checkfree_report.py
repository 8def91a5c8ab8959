"""From the runs of checkfree.py to a table beside the paper's, gates, and a picture of loss over time.

python benchmarks/checkfree_report.py benchmarks/results/checkfree.json
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.drawing.svg import MUTED, RULE, coord, document, oklch, tag, text, ticks, tooltip

Found = Mapping[str, Any]
Row = dict[str, Any]
HUES = {
    "none": oklch(0.3, 0.0, 0), "checkpoint": oklch(0.6, 0.15, 55), "redundant": oklch(0.6, 0.13, 165),
    "checkfree": oklch(0.55, 0.17, 255), "checkfree+": oklch(0.55, 0.18, 305), "copy": oklch(0.65, 0.12, 220),
    "random": oklch(0.6, 0.2, 25), "rehearse": oklch(0.65, 0.16, 135), "checkfree+, all stages": oklch(0.7, 0.14, 330),
}  # fmt: skip
MARGIN = 0.05
"""The target of a seed is the final held-out loss of its run without failures, and this much more, or "margin"."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard error, and how many; the error of a single value is unknown."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": statistics.fmean(values), "error": error, "count": len(values)}


def time_to(curve: Sequence[Sequence[float]], target: float) -> float | None:
    """Seconds until the held-out loss is at `target` for good, between evaluations by a straight line; None where it
    is above at the end. A later failure may undo what was reached before."""
    if curve[-1][2] > target:
        return None
    for (_, t0, a), (_, t1, b) in reversed([*pairwise(curve)]):
        if a > target:
            return t0 + (t1 - t0) * (a - target) / (a - b)
    return curve[0][1]


def pick(found: Found, arm: str, rate: int | None) -> list[Row]:
    return [run for run in found["runs"] if run["arm"] == arm and run["rate"] == rate]


def summarise(found: Found) -> Row:
    """Per arm and rate: final loss, time to the target, step time; and the gates of the comparison."""
    calm = pick(found, "none", None)
    end = {run["seed"]: run["curve"][-1][2] for run in calm}
    margin = found.get("margin", MARGIN)
    target = {seed: loss + margin for seed, loss in end.items()}
    rows: list[Row] = []
    arms = dict.fromkeys(run["arm"] for run in found["runs"] if run["rate"] is not None)
    for arm, rate in [("none", None), *((arm, rate) for arm in HUES if arm in arms for rate in range(3))]:
        runs = pick(found, arm, rate)
        if not runs:
            continue
        times = [t for run in runs if (t := time_to(run["curve"], target[run["seed"]])) is not None]
        rows.append(
            {
                "arm": arm, "rate": rate, "runs": len(runs), "faults": sum(run["faults"] for run in runs),
                "behind": spread([run["curve"][-1][2] - end[run["seed"]] for run in runs]),
                "final": spread([run["curve"][-1][2] for run in runs]),
                "seconds": spread([run["seconds"] for run in runs]),
                "step_s": statistics.median(run["step_s"] for run in runs), "reached": len(times),
                "to_target_s": spread(times) if times else None,
            }
        )  # fmt: skip
    return {"target": statistics.fmean(target.values()), "margin": margin, "rows": rows, "gates": gates(found)}


def gates(found: Found) -> Row:
    """The statistical gates: random against the neighbours' mean, paired by seed, and the jump at the first stage."""
    out: Row = {}
    for rate in range(3):
        average = {run["seed"]: run["curve"][-1][2] for run in pick(found, "checkfree", rate)}
        drawn = {run["seed"]: run["curve"][-1][2] for run in pick(found, "random", rate)}
        if both := sorted(set(average) & set(drawn)):
            faults = sum(run["faults"] for run in pick(found, "checkfree", rate))
            out[f"random - average, rate {rate}"] = {**spread([drawn[s] - average[s] for s in both]), "faults": faults}
    jumps: dict[str, list[float]] = {}
    for arm in ("jump, swapped", "jump, not swapped"):
        runs = pick(found, arm, None)
        for seed in sorted({run["seed"] for run in runs}):
            pair = {bool(run["inject"]): run["losses"] for run in runs if run["seed"] == seed}
            if len(pair) == 2:
                at = found["jump_at"]
                jumps.setdefault(arm, []).append(pair[True][at] - pair[False][at])
    out |= {arm: spread(values) for arm, values in jumps.items()}
    if len(jumps) == 2:
        out["jump ratio"] = statistics.fmean(jumps["jump, swapped"]) / statistics.fmean(jumps["jump, not swapped"])
    return out


def print_report(found: Found, console: Console) -> None:
    """The table beside the paper's, and the gates."""
    summary, paper = found["summary"], found["paper"]
    rates = paper["failures_per_hour_and_stage"]
    base = next((row["to_target_s"] for row in summary["rows"] if row["arm"] == "none"), None)
    above = summary["margin"]
    table = Table(title=f"{found['seeds']} seeds, {found['steps']} steps; target: the calm run of the seed + {above}")
    for name in (
        "remedy",
        "rate",
        "losses of a stage",
        "s per step",
        "loss - calm",
        "s to target",
        "of calm",
        "reached",
        "paper: h",
        "of redundant",
    ):
        table.add_column(name, justify="left" if name == "remedy" else "right")
    for row in summary["rows"]:
        hours = paper["hours_to_loss"].get(row["arm"]) if row["rate"] is not None else None
        reached, behind = row["to_target_s"], row["behind"]
        table.add_row(
            row["arm"], "-" if row["rate"] is None else f"{rates[row['rate']]:.0%}", str(row["faults"]),
            f"{row['step_s']:.3f}",
            f"{behind['mean']:+.3f} ± {behind['error']:.3f}",
            f"{reached['mean']:.1f} ± {reached['error']:.1f}" if reached else "never",
            f"{reached['mean'] / base['mean']:.2f}" if reached and base else "-", f"{row['reached']} of {row['runs']}",
            str(hours[row["rate"]]) if hours else "-", f"{hours[row['rate']] / 420:.2f}" if hours else "-",
        )  # fmt: skip
    console.print(table)
    for name, gate in summary["gates"].items():
        said = (
            f"{gate['mean']:+.3f} ± {gate['error']:.3f} ({gate['count']} seeds)"
            if isinstance(gate, Mapping)
            else f"{gate:.3f}"
        )
        console.print(f"{name}: {said}")


# ---- the picture ----

_LEFT, _TOP, _WIDE, _HIGH, _GAP = 60.0, 84.0, 300.0, 300.0, 34.0


def picture(found: Found) -> str:
    """Held-out loss over time: a panel per rate, a line per remedy (mean over seeds), bars of one standard error."""
    summary, rates = found["summary"], found["paper"]["failures_per_hour_and_stage"]
    last = 1.04 * max(row["seconds"]["mean"] for row in summary["rows"])
    low = min(row["final"]["mean"] for row in summary["rows"]) - 0.03
    high = low + 1.0
    body = [text(16, 28, "Loss over time under failures", font_size=16, font_weight="600")]
    said = f"held-out loss, mean of {found['seeds']} seeds, bars of one standard error; dashed: the target of the table"
    body.append(text(16, 48, said, fill=MUTED))
    for rate in range(3):
        left = _LEFT + rate * (_WIDE + _GAP)
        body += _panel(found, rate, left, last, (low, high), summary["target"])
        inner = (row for row in summary["rows"] if row["rate"] == rate and row["arm"] == "checkfree")
        faults = next((row["faults"] for row in inner), 0)
        title = f"the paper's {rates[rate]:.0%}: {faults} stages lost in {found['seeds']} runs"
        body.append(text(left, _TOP - 10, title, font_weight="600", font_size=11))
    x, y, there = _LEFT, _TOP + _HIGH + 52, {row["arm"] for row in summary["rows"]}
    for arm, ink in ((arm, ink) for arm, ink in HUES.items() if arm in there):
        body.append(tag("path", d=f"M{coord(x)} {coord(y - 4)}h18", stroke=ink, stroke_width=2.5))
        body.append(text(x + 24, y, arm))
        x += 40 + 6.6 * len(arm)
    return document(_LEFT + 3 * _WIDE + 2 * _GAP + 20, y + 18, body, title="CheckFree and its peers", description=said)


def _panel(found: Found, rate: int, left: float, last: float, bounds: tuple[float, float], target: float) -> list[str]:
    low, high = bounds

    def x(seconds: float) -> float:
        return left + _WIDE * seconds / last

    def y(loss: float) -> float:
        return _TOP + _HIGH * (high - loss) / (high - low)

    out = [tag("rect", x=left, y=_TOP, width=_WIDE, height=_HIGH, fill="none", stroke=RULE)]
    for at in ticks(low, high, 6):
        out.append(tag("path", d=f"M{coord(left)} {coord(y(at))}h{coord(_WIDE)}", stroke=RULE, stroke_width=0.5))
        if rate == 0:
            out.append(text(left - 6, y(at) + 4, f"{at:g}", text_anchor="end", fill=MUTED))
    for at in ticks(0, last, 5):
        out.append(text(x(at), _TOP + _HIGH + 16, f"{at:g}", text_anchor="middle", fill=MUTED))
    out.append(text(left + _WIDE / 2, _TOP + _HIGH + 32, "seconds", text_anchor="middle", fill=MUTED))
    out.append(tag("path", d=f"M{coord(left)} {coord(y(target))}h{coord(_WIDE)}", stroke=MUTED, stroke_dasharray="4 3"))
    clip = f"panel{rate}"
    out.append(tag("defs", tag("clipPath", tag("rect", x=left, y=_TOP, width=_WIDE, height=_HIGH), id=clip)))
    drawn: list[str] = []
    for arm, ink in HUES.items():
        runs = pick(found, arm, None if arm == "none" else rate)
        if not runs:
            continue
        steps = sorted({int(step) for run in runs for step, _, _ in run["curve"]})
        points: list[tuple[float, dict[str, float]]] = []
        for step in steps:
            there = [next((t, l) for s, t, l in reversed(run["curve"]) if s == step) for run in runs]
            points.append((statistics.fmean(t for t, _ in there), spread([l for _, l in there])))
        path = "M" + "L".join(f"{coord(x(t))} {coord(y(s['mean']))}" for t, s in points)
        drawn.append(
            tag("path", tooltip(arm), d=path, stroke=ink, stroke_width=1.8, fill="none", stroke_linejoin="round")
        )
        for t, s in points[1::3]:
            if math.isfinite(s["error"]):
                bar = f"M{coord(x(t))} {coord(y(s['mean'] - s['error']))}V{coord(y(s['mean'] + s['error']))}"
                drawn.append(tag("path", d=bar, stroke=ink, stroke_width=1))
    return [*out, tag("g", "".join(drawn), clip_path=f"url(#{clip})")]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    data = json.loads(path.read_text())
    data["summary"] = summarise(data)
    path.with_suffix(".svg").write_text(picture(data))
    print_report(data, Console(width=140))
