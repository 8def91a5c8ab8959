"""From the runs of engine.py to what a reader wants: ratios formed within a round, medians with spread, a table, bars.

Everything is a function of the JSON alone, so a report can be made again from engine.json:

    python benchmarks/engine_report.py benchmarks/results/engine.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.drawing.svg import FAINT, INK, MUTED, RULE, document, figure, oklch, tag, text, text_width, ticks, tooltip
from pipeline.runtime.peak_memory import PEAK_BYTES

PLAIN = ("one_thread", "all_cores")
OURS = "ours_"
GOAL_PEER, GOAL_PREDICTION, LOSS_TOLERANCE = 1.10, 0.97, 1e-4

Facts = Mapping[str, Any]
Run = Mapping[str, Any]
Row = dict[str, Any]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, least and greatest; None of nothing."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None


def is_pipeline_peer(name: str) -> bool:
    return not name.startswith(OURS) and name not in PLAIN


def speeds(runs: Sequence[Run]) -> dict[int, dict[str, float]]:
    """Round -> contender -> tokens per second, of the runs that succeeded."""
    found: dict[int, dict[str, float]] = {}
    for run in runs:
        if "error" not in run:
            found.setdefault(run["round"], {})[run["peer"]] = run["tokens_per_s"]
    return found


def references(facts: Facts, runs: Sequence[Run]) -> dict[str, dict[int, float]]:
    """What speeds are held against, by round: the best pipeline peer, all cores, and the bound without bubble."""
    best, cores, bound = {}, {}, {}
    for round_, by in speeds(runs).items():
        if peers := [speed for name, speed in by.items() if is_pipeline_peer(name)]:
            best[round_] = max(peers)
        if "all_cores" in by:
            cores[round_] = by["all_cores"]
        if "one_thread" in by:
            bound[round_] = by["one_thread"] * min(facts["workers"], facts["cpus"])
    return {"best_peer": best, "all_cores": cores, "bound": bound}


def summarise(facts: Facts, runs: Sequence[Run]) -> list[Row]:
    """One row per contender, in the order of their first run, fastest first."""
    held = references(facts, runs)
    reference = reference_losses(runs)
    rows: list[Row] = []
    for name in dict.fromkeys(run["peer"] for run in runs):
        mine = [run for run in runs if run["peer"] == name]
        good = [run for run in mine if "error" not in run]
        row: Row = {"contender": name, "rounds": len(good)}
        if errors := [run["error"] for run in mine if "error" in run]:
            row["errors"] = errors
        if good:
            row["tokens_per_s"] = spread([run["tokens_per_s"] for run in good])
            for against, by_round in held.items():
                ratios = [run["tokens_per_s"] / by_round[run["round"]] for run in good if run["round"] in by_round]
                row[f"over_{against}"] = spread(ratios)
            if "tflops" in good[0]:
                for key in ("tflops", "mfu", "peak_tflops"):
                    row[key] = spread([run[key] for run in good])
                row["peak_of"] = good[0]["peak_of"]
                row |= {key: max(run[key] for run in good) for key in PEAK_BYTES if key in good[0]}
            row["peak_bytes"] = middle([run["peak_rss_bytes"] for run in good])
            row["grown_bytes"] = middle(
                [[a - b for a, b in zip(run["peak_rss_bytes"], run["rss_before_bytes"], strict=True)] for run in good]
            )
            row["loss_gap"] = max(loss_gap(run["loss"], reference) for run in good) if reference else None
            if "predicted_tokens_per_s" in good[0]:
                row["predicted_tokens_per_s"] = spread([run["predicted_tokens_per_s"] for run in good])
                row["over_predicted"] = spread([run["measured_over_predicted"] for run in good])
        rows.append(row)
    return sorted(rows, key=lambda row: -row["tokens_per_s"]["median"] if "tokens_per_s" in row else 0.0)


def middle(values: Sequence[Sequence[int]]) -> list[int]:
    """The median over runs, worker by worker."""
    return [int(statistics.median(each)) for each in zip(*values, strict=True)]


def reference_losses(runs: Sequence[Run]) -> Sequence[float] | None:
    """The losses of plain PyTorch on one thread, or else of the first contender that is not ours."""
    good = [run for run in runs if "error" not in run and not run["peer"].startswith(OURS)]
    return min(good, key=lambda run: run["peer"] != "one_thread")["loss"] if good else None


def loss_gap(losses: Sequence[float], reference: Sequence[float]) -> float:
    """The largest difference of any step."""
    return max(abs(a - b) for a, b in zip(losses, reference, strict=True))


def goals(facts: Facts, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What was set as a goal, what was measured, and whether the median reaches it. Of ours, the fastest counts."""
    ours = [row for row in summarise(facts, runs) if row["contender"].startswith(OURS) and "tokens_per_s" in row]
    gaps = {row["contender"]: row["loss_gap"] for row in ours if row["loss_gap"] is not None}
    found: list[dict[str, Any]] = []
    for name, key, goal in (("ours / best peer", "over_best_peer", GOAL_PEER),
                            ("ours / prediction", "over_predicted", GOAL_PREDICTION)):  # fmt: skip
        if ours and ours[0].get(key):
            measured = ours[0][key]
            found.append({"goal": name, "contender": ours[0]["contender"], "at_least": goal, "measured": measured,
                          "met": measured["median"] >= goal})  # fmt: skip
    if gaps:
        worst = max(gaps, key=lambda name: gaps[name])
        found.append({"goal": "loss difference per step", "contender": worst, "at_most": LOSS_TOLERANCE,
                      "measured": spread([gaps[worst]]), "met": gaps[worst] <= LOSS_TOLERANCE})  # fmt: skip
    return found


# ---- terminal ----


def print_report(console: Console, facts: Facts, rows: Sequence[Row], reached: Sequence[Mapping[str, Any]]) -> None:
    """The table, errors and goals."""
    table = Table(title=caption(facts, rows), title_justify="left")
    for name in ("contender", "tokens/s", "min-max", "MFU", "/ best peer", "/ all cores", "/ bound", "/ simulated",
                 "peak MiB", "loss gap"):  # fmt: skip
        table.add_column(name, justify="left" if name == "contender" else "right", no_wrap=name != "peak MiB")
    for row in rows:
        name = row["contender"]
        shown = f"[bold]{name}[/bold]" if name.startswith(OURS) else name
        if "tokens_per_s" not in row:
            table.add_row(shown, "failed")
            continue
        speed = row["tokens_per_s"]
        gap = row["loss_gap"]
        table.add_row(
            shown, f"{speed['median']:,.0f}", f"{speed['min']:,.0f}-{speed['max']:,.0f}",
            f"{row['mfu']['median']:.1%}" if row.get("mfu") else "",
            ratio(row["over_best_peer"]), ratio(row["over_all_cores"]), ratio(row["over_bound"]),
            ratio(row.get("over_predicted")), " ".join(f"{b / 2**20:,.0f}" for b in row["peak_bytes"]),
            "" if gap is None else f"{gap:.0e}" if gap <= LOSS_TOLERANCE else f"[red]{gap:.0e}[/red]",
        )  # fmt: skip
    console.print(table)
    for row in rows:
        for error in dict.fromkeys(row.get("errors", ())):
            console.print(f"[red]{row['contender']}[/red]: {escape(error)}", highlight=False)
    if facts["quick"]:
        console.print("a quick run of a tiny model: the figures mean nothing")
        return
    for goal in reached:
        sign, limit = (">=", goal["at_least"]) if "at_least" in goal else ("<=", goal["at_most"])
        verdict = "[green]reached[/green]" if goal["met"] else "[red]not reached[/red]"
        measured = goal["measured"]
        said = f"{measured['median']:.3g} ({measured['min']:.3g} to {measured['max']:.3g})"
        console.print(f"{goal['goal']}, {goal['contender']}: {said}; goal {sign} {limit:g}: {verdict}", highlight=False)


def ratio(value: Mapping[str, float] | None) -> str:
    """A median and, where there was more than one round, its spread."""
    if value is None:
        return ""
    spread_ = "" if value["min"] == value["max"] else f" ({value['min']:.2f}-{value['max']:.2f})"
    return f"{value['median']:.2f}{spread_}"


def caption(facts: Facts, rows: Sequence[Row]) -> str:
    """What all did, in a line; rounds are those that were run."""
    work, rounds = facts["work"], max((row["rounds"] for row in rows), default=0)
    return (
        f"Llama {work['hidden']} x {work['layers']}, sequence {work['sequence']}, {work['microbatches']} microbatches "
        f"of {work['batch']}, fp32, {facts['workers']} workers of one thread, {facts['cpus']} cores, "
        f"{rounds} round{'s' * (rounds > 1)} of {facts['steps']} steps, torch {facts['torch']}"
    )


# ---- picture ----

_OURS, _PEER, _PLAIN = oklch(0.62, 0.15, 255), oklch(0.74, 0.05, 255), oklch(0.84, 0.0, 0)
_BOUND, _PREDICTED = oklch(0.55, 0.2, 25), oklch(0.4, 0.12, 255)
_ROW, _TOP = 28, 92


def picture(facts: Facts, rows: Sequence[Row], width: int = 900) -> str:
    """Bars of tokens per second, fastest first, with spread; the bound and the simulator's prediction, where known."""
    shown = [row for row in rows if "tokens_per_s" in row]
    names = [row["contender"].replace("_", " ") for row in shown]
    one = next((row["tokens_per_s"]["median"] for row in shown if row["contender"] == "one_thread"), None)
    bound = None if one is None else one * min(facts["workers"], facts["cpus"])
    predicted = [row["predicted_tokens_per_s"]["median"] for row in shown if "predicted_tokens_per_s" in row]
    most = max([bound or 0.0, *predicted, *(row["tokens_per_s"]["max"] for row in shown)]) * 1.02
    left = 24 + max(text_width(name) for name in names)
    scale = (width - left - 176) / most
    bottom = _TOP + _ROW * len(shown)

    body = [text(16, 28, "training speed, tokens per second", font_size=16, font_weight="600")]
    body += [text(16, 48 + 17 * i, line, fill=MUTED) for i, line in enumerate(folded(caption(facts, rows), width - 32))]
    for value in ticks(0, most, 6):
        x = left + value * scale
        body.append(tag("line", x1=x, x2=x, y1=_TOP, y2=bottom, stroke=FAINT))
        body.append(text(x, bottom + 16, figure(value), text_anchor="middle", fill=MUTED, font_size=11))
    for i, (row, name) in enumerate(zip(shown, names, strict=True)):
        body += bar(row, name, left, _TOP + _ROW * i, scale, left + most * scale)
    if bound is not None:
        x = left + bound * scale
        body.append(tag("line", tooltip(f"bound {figure(bound)}"), x1=x, x2=x, y1=_TOP - 6, y2=bottom, stroke=_BOUND,
                        stroke_dasharray="4 3"))  # fmt: skip
        body.append(text(x, bottom + 32, f"bound {figure(bound)}: one thread x {min(facts['workers'], facts['cpus'])}",
                         text_anchor="end", fill=_BOUND, font_size=11))  # fmt: skip
    if predicted:
        body.append(tag("line", x1=16, x2=16, y1=bottom + 39, y2=bottom + 51, stroke=_PREDICTED, stroke_width=2))
        body.append(text(24, bottom + 49, "what the simulator gives the measured ops; whiskers: least and greatest "
                         "round", fill=MUTED, font_size=11))  # fmt: skip
    said = "; ".join(f"{name} {figure(row['tokens_per_s']['median'])}" for row, name in zip(shown, names, strict=True))
    return document(width, bottom + 62, body, title="training speed, tokens per second", description=said) + "\n"


def bar(row: Row, name: str, left: float, top: float, scale: float, aside: float) -> list[str]:
    """One contender: bar, whiskers, prediction, and its figures from `aside` on."""
    speed, contender = row["tokens_per_s"], row["contender"]
    ours = contender.startswith(OURS)
    colour = _OURS if ours else _PLAIN if contender in PLAIN else _PEER
    mid = top + _ROW / 2
    lo, hi, end = (left + speed[key] * scale for key in ("min", "max", "median"))
    words = f"{name}: {figure(speed['median'])} tokens/s ({figure(speed['min'])} to {figure(speed['max'])})"
    parts = [
        text(left - 8, mid + 4, name, text_anchor="end", font_weight="600" if ours else None),
        tag("rect", tooltip(words), x=left, y=top + 5, width=end - left, height=_ROW - 10, rx=2, fill=colour),
        tag("path", d=f"M{lo:.1f} {mid - 4}v8M{lo:.1f} {mid}H{hi:.1f}M{hi:.1f} {mid - 4}v8", stroke=INK, fill="none"),
    ]
    if "predicted_tokens_per_s" in row:
        x = left + row["predicted_tokens_per_s"]["median"] * scale
        parts.append(tag("line", x1=x, x2=x, y1=top + 3, y2=top + _ROW - 3, stroke=_PREDICTED, stroke_width=2))
    parts.append(text(aside + 56, mid + 4, figure(speed["median"]), text_anchor="end"))
    if (against := row.get("over_best_peer")) and contender not in PLAIN:
        parts.append(text(aside + 68, mid + 4, f"{against['median']:.2f} × best peer", fill=MUTED, font_size=11))
    parts.append(tag("line", x1=left, x2=left, y1=top, y2=top + _ROW, stroke=RULE))
    return parts


def folded(words: str, width: float) -> list[str]:
    """Words in lines of at most `width` pixels."""
    lines: list[str] = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if text_width(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


if __name__ == "__main__":
    saved = json.loads(Path(sys.argv[1]).read_text())
    again = summarise(saved["about"], saved["runs"])
    print_report(
        Console(width=None if sys.stdout.isatty() else 140), saved["about"], again, goals(saved["about"], saved["runs"])
    )
    Path(sys.argv[1]).with_name("engine.svg").write_text(picture(saved["about"], again))
