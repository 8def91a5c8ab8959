"""From the runs of skippipe_training.py to tables and a picture.

python benchmarks/skippipe_training_report.py benchmarks/results/skippipe-training.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path[0] = str(Path(__file__).parent.parent)  # else benchmarks/recovery.py would hide the package of that name

from benchmarks.checkfree_report import spread, time_to  # noqa: E402
from pipeline.drawing.svg import MUTED, RULE, coord, document, oklch, tag, text, ticks, tooltip  # noqa: E402

Found = Mapping[str, Any]
Row = dict[str, Any]
ARMS = {"full": oklch(0.35, 0.0, 0), "skip": oklch(0.55, 0.17, 255), "skip, every 10th full": oklch(0.6, 0.15, 55)}
MARGIN = 0.05
"""The target of a seed is the final held-out loss of its full run, and this much more."""


def loss_at(curve: Sequence[Sequence[float]], seconds: float) -> float:
    """Held-out loss at a time, between evaluations by a straight line; that of the last one after it."""
    before = curve[0]
    for now in curve:
        if now[1] >= seconds:
            share = 0.0 if now[1] == before[1] else (seconds - before[1]) / (now[1] - before[1])
            return before[2] + max(0.0, share) * (now[2] - before[2])
        before = now
    return curve[-1][2]


def summarise(runs: Sequence[Row]) -> list[Row]:
    """Per setting and arm, over the seeds that have all arms: losses, times, and perplexities without a stage."""
    rows: list[Row] = []
    for stages in sorted({run["stages"] for run in runs}):
        by_seed: dict[int, dict[str, Row]] = {}
        for run in runs:
            if run["stages"] == stages:
                by_seed.setdefault(run["seed"], {})[run["arm"]] = run
        whole = [arms for arms in by_seed.values() if len(arms) == len(ARMS)]
        for arm in ARMS if whole else ():
            mine = [arms[arm] for arms in whole]
            times = [time_to(arms[arm]["curve"], arms["full"]["curve"][-1][2] + MARGIN) for arms in whole]
            until = [min(each["curve"][-1][1] for each in arms.values()) for arms in whole]
            full = [time_to(arms["full"]["curve"], arms["full"]["curve"][-1][2] + MARGIN) for arms in whole]
            reached = [(t, f) for t, f in zip(times, full, strict=True) if t is not None and f is not None]
            rows.append(
                {
                    "stages": stages, "arm": arm, "seeds": len(whole),
                    "step_s": statistics.median(run["step_s"] for run in mine),
                    "loss": spread([run["curve"][-1][2] for run in mine]),
                    "behind": spread([a[arm]["curve"][-1][2] - a["full"]["curve"][-1][2] for a in whole]),
                    "same_time": spread([
                        loss_at(a[arm]["curve"], t) - loss_at(a["full"]["curve"], t)
                        for a, t in zip(whole, until, strict=True)
                    ]),
                    "reached": len(reached),
                    "of_full": spread([t / f for t, f in reached]) if reached else None,
                    "perplexity_without": {
                        name: spread([run["perplexity_without"][name] for run in mine])
                        for name in mine[0]["perplexity_without"]
                    },
                }
            )  # fmt: skip
    return rows


def print_report(found: Found, console: Console) -> None:
    """Loss and time by arm, then perplexity by the stage that is left out."""
    table = Table(title=f"{found['settings']['steps']} steps on links of 20 to 100 ms; mean ± standard error")
    for number, name in enumerate((
        "stages", "arm", "seeds", "s per step", "held-out loss", "less full's", "less full's at the same time",
        f"time to full's loss + {MARGIN}", "reached",
    )):  # fmt: skip
        table.add_column(name, justify="left" if number == 1 else "right")
    for row in found["summary"]:
        of = row["of_full"]
        table.add_row(
            str(row["stages"]), row["arm"], str(row["seeds"]), f"{row['step_s']:.3f}", f"{row['loss']['mean']:.3f}",
            f"{row['behind']['mean']:+.3f} ± {row['behind']['error']:.3f}",
            f"{row['same_time']['mean']:+.3f} ± {row['same_time']['error']:.3f}",
            f"{of['mean']:.2f} ± {of['error']:.2f} of full's" if of else "never", f"{row['reached']} of {row['seeds']}",
        )  # fmt: skip
    console.print(table)
    for stages in sorted({row["stages"] for row in found["summary"]}):
        rows = [row for row in found["summary"] if row["stages"] == stages]
        table = Table("trained", "whole", *(f"without stage {k}" for k in range(stages)),
                      title=f"perplexity, {stages} stages")  # fmt: skip
        for row in rows:
            table.add_row(row["arm"], *(f"{each['mean']:.2f}" for each in row["perplexity_without"].values()))
        console.print(table)


# ---- the picture ----

_LEFT, _TOP, _WIDE, _HIGH, _GAP = 60.0, 84.0, 420.0, 260.0, 70.0


def picture(found: Found) -> str:
    """Above, held-out loss over time, a line per arm and seed; below, perplexity by the stage that is left out."""
    said = "above: held-out loss of the whole model over real time, a line per seed; below: its perplexity at the end"
    body = [text(16, 28, "Training with stages skipped", font_size=16, font_weight="600"), text(16, 48, said,
            fill=MUTED)]  # fmt: skip
    settings = sorted({run["stages"] for run in found["runs"]})
    for number, stages in enumerate(settings):
        left = _LEFT + number * (_WIDE + _GAP)
        share = {4: "25 %", 6: "33 %"}[stages]
        body.append(text(left, _TOP - 10, f"{stages} stages, {share} skipped", font_weight="600"))
        body += _curves([run for run in found["runs"] if run["stages"] == stages], left)
        body += _bars([row for row in found["summary"] if row["stages"] == stages], left, _TOP + _HIGH + 76)
    x, y = _LEFT, _TOP + 2 * _HIGH + 124
    for arm, ink in ARMS.items():
        body.append(tag("path", d=f"M{coord(x)} {coord(y - 4)}h18", stroke=ink, stroke_width=2.5))
        body.append(text(x + 24, y, arm))
        x += 60 + 6.6 * len(arm)
    width = _LEFT + len(settings) * (_WIDE + _GAP) - _GAP + 20
    return document(max(width, 620), y + 18, body, title="Training with stages skipped", description=said)


def _frame(left: float, top: float, low: float, high: float) -> list[str]:
    out = [tag("rect", x=left, y=top, width=_WIDE, height=_HIGH, fill="none", stroke=RULE)]
    for at in ticks(low, high, 6):
        y = top + _HIGH * (high - at) / (high - low)
        out.append(tag("path", d=f"M{coord(left)} {coord(y)}h{coord(_WIDE)}", stroke=RULE, stroke_width=0.5))
        out.append(text(left - 6, y + 4, f"{at:g}", text_anchor="end", fill=MUTED))
    return out


def _curves(runs: Sequence[Row], left: float) -> list[str]:
    last = 1.03 * max(run["curve"][-1][1] for run in runs)
    losses = [loss for run in runs for _, _, loss in run["curve"]]
    low, high = min(losses) - 0.05, max(losses) + 0.05
    out = _frame(left, _TOP, low, high)
    for at in ticks(0, last, 6):
        x = left + _WIDE * at / last
        out.append(text(x, _TOP + _HIGH + 16, f"{at:g}", text_anchor="middle", fill=MUTED))
    out.append(text(left + _WIDE / 2, _TOP + _HIGH + 32, "seconds", text_anchor="middle", fill=MUTED))
    for arm, ink in ARMS.items():
        for run in (run for run in runs if run["arm"] == arm):
            path = "M" + "L".join(
                f"{coord(left + _WIDE * t / last)} {coord(_TOP + _HIGH * (high - loss) / (high - low))}"
                for _, t, loss in run["curve"]
            )
            out.append(tag("path", tooltip(f"{arm}, seed {run['seed']}"), d=path, stroke=ink, stroke_width=1.5,
                           fill="none", stroke_linejoin="round"))  # fmt: skip
    return out


def _bars(rows: Sequence[Row], left: float, top: float) -> list[str]:
    if not rows:
        return []
    names = [*rows[0]["perplexity_without"]]
    high = 1.05 * max(each["mean"] for row in rows for each in row["perplexity_without"].values())
    out = _frame(left, top, 0.0, high)
    room = _WIDE / len(names)
    thick = room * 0.8 / len(ARMS)
    for number, name in enumerate(names):
        label = "whole" if name == "none" else f"no stage {name}"
        out.append(text(left + room * (number + 0.5), top + _HIGH + 16, label, text_anchor="middle", fill=MUTED,
                        font_size=10))  # fmt: skip
        for place, row in enumerate(rows):
            each = row["perplexity_without"][name]
            tall = _HIGH * each["mean"] / high
            out.append(
                tag("rect", tooltip(f"{row['arm']}, {label}: perplexity {each['mean']:.2f}"),
                    x=left + room * number + room * 0.1 + place * thick, y=top + _HIGH - tall, width=thick - 1,
                    height=tall, fill=ARMS[row["arm"]])
            )  # fmt: skip
    return out


if __name__ == "__main__":
    path = Path(sys.argv[1])
    data = json.loads(path.read_text())
    data["summary"] = summarise(data["runs"])
    path.with_suffix(".svg").write_text(picture(data))
    print_report(data, Console(width=140))
