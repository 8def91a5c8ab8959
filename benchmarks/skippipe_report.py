"""Tables and a picture of what skippipe.py found.

python benchmarks/skippipe_report.py benchmarks/results/skippipe.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.drawing.svg import INK, MUTED, RULE, coord, document, oklch, tag, text, ticks, tooltip

Row = Mapping[str, Any]
_LEFT, _TOP, _WIDE, _HIGH = 60.0, 76.0, 560.0, 260.0


def results_table(title: str, *columns: str) -> Table:
    """A table of numbers: the first column says what they are of."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def print_report(found: Row, console: Console) -> None:
    """One table per part."""
    summary, rows = found["summary"], found["rows"]
    table = results_table(
        "the published network: simulated seconds of an iteration", "plan", "microbatches", "stages visited", "seconds",
        "of seeds", "published or goal", "bound before", "bound", "gap", "searched s",
    )  # fmt: skip
    seen: set[str] = set()
    for row in rows:
        if row["part"] != "published" or row["name"] in seen:
            continue
        seen.add(row["name"])
        first = [row["name"], str(row["microbatches"]), str(row["path_length"])]
        found_ = summary.get(row["name"])
        if found_ is None:
            said = row["published_s"]
            table.add_row(
                *first, f"{row['iteration_s']:.2f}", "", "" if said is None else f"{said:.2f}", "", "", "", ""
            )
            continue
        table.add_row(
            *first, f"{found_['median_s']:.2f}", f"{found_['least_s']:.2f}-{found_['most_s']:.2f}",
            f"<= {found_['goal_s']}" if "goal_s" in found_ else "",
            f"{found_['bound_before_s']:.2f}", f"{found_['bound_s']:.2f}",
            f"{found_['gap']:.1%}", f"{found_['search_s']:.1f}",
        )  # fmt: skip
    if seen:
        console.print(table)
    table = results_table(
        "large networks", "nodes", "stages visited", "microbatches", "seconds", "bound", "gap", "searched s"
    )
    for row in (row for row in rows if row["part"] == "scale"):
        table.add_row(
            f"{row['nodes']:,}", f"{row['path_length']} of {row['stages']}", str(row["microbatches"]),
            f"{row['iteration_s']:.2f}", f"{row['bound_s']:.2f}", f"{row['gap']:.1%}", f"{row['search_s']:.1f}",
        )  # fmt: skip
    if table.row_count:
        console.print(table)
    table = results_table(
        "moves per second", "network", "chains", "estimate", "before", "times", "clock", "before", "times"
    )
    for row in (row for row in rows if row["part"] == "moves"):
        for many in dict.fromkeys((1, row["cores"])):
            said = [row["name"], str(many)]
            for kind in ("estimate", "clock"):
                now, old = row[f"{kind}, {many}"], row[f"{kind}_before"]
                said += [f"{now:,.0f}", f"{old:,}", f"{now / old:.1f}"]
            table.add_row(*said)
    if table.row_count:
        console.print(table)
    if "replan" in summary:
        console.print("a lost node of 1,000: " + ", ".join(f"{k} {v:.2f}" for k, v in summary["replan"].items()))
    if "second" in summary:
        quick = summary["second"]
        console.print(
            f"in a second, {quick['seeds']} seeds: {quick['iteration_s']:.2f} s at most, gap {quick['gap']:.1%}"
        )
    if "unseen" in summary:
        gaps = summary["unseen"]
        console.print(
            f"with the bound of before {gaps['median_before']:.1%} (median)\n"
            f"{gaps['networks']} networks not seen before: gap to the bound {gaps['median']:.1%} (median), "
            f"{gaps['p90']:.1%} (90th percentile), {gaps['least']:.1%} to {gaps['most']:.1%}; "
            f"{gaps['proved_best']} plans proved to be the best"
        )


def exact_table(rows: Sequence[Row]) -> Table:
    """Of small networks: the plan, the optimum and the bounds, and whose the gap is."""
    table = results_table(
        "12 nodes: simulated seconds of an iteration", "network", "stages", "visited", "microbatches", "bound before",
        "bound", "optimum is at least", "best known", "plan", "gap of the plan", "gap of the bound",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            str(row["network"]), " ".join(map(str, row["stages"])), str(row["path_length"]), str(row["microbatches"]),
            f"{row['bound_before_s']:.2f}", f"{row['bound_s']:.2f}",
            f"{row['exact_bound_s']:.2f}" + (" (proved)" if row["proved"] else ""), f"{row['exact_s']:.2f}",
            f"{row['iteration_s']:.2f}", f"{row['iteration_s'] / row['exact_s'] - 1:.1%}",
            f"{row['exact_s'] / row['bound_s'] - 1:.1%}",
        )  # fmt: skip
    return table


def gaps_svg(rows: Sequence[Row]) -> str:
    """A dot per unseen network in the order of their gaps; hollow where swaps were allowed."""
    unseen = sorted((row for row in rows if row["part"] == "unseen"), key=lambda row: row["gap"])
    most = max(0.01, *(row["gap"] for row in unseen)) * 1.08
    said = "a dot per network, in the order of the gap between the plan found and the lower bound; hollow: with swaps"
    body = [text(16, 28, f"SkipPipe's planner on {len(unseen)} networks it has not seen", font_size=16,
                 font_weight="600"), text(16, 48, said, fill=MUTED)]  # fmt: skip

    def y(gap: float) -> float:
        return _TOP + _HIGH * (1 - gap / most)

    for at in ticks(0, most, 6):
        body.append(tag("path", d=f"M{coord(_LEFT)} {coord(y(at))}h{coord(_WIDE)}", stroke=RULE, stroke_width=0.5))
        body.append(text(_LEFT - 6, y(at) + 4, f"{at:.0%}" if most > 0.06 else f"{at:.1%}", text_anchor="end",
                         fill=MUTED))  # fmt: skip
    for number, row in enumerate(unseen):
        x = _LEFT + _WIDE * (number + 0.5) / len(unseen)
        ink = oklch(0.55, 0.17, 60 * row["stages"])
        body.append(
            tag(
                "circle", tooltip(f"{row['name']}: {row['nodes']} nodes, {row['path_length']} of {row['stages']} "
                                  f"stages, {row['iteration_s']:.2f} s, gap {row['gap']:.1%}"),
                cx=x, cy=y(row["gap"]), r=4, fill="none" if row["swaps"] else ink, stroke=ink, stroke_width=1.5,
            )
        )  # fmt: skip
    x = _LEFT
    for stages in sorted({row["stages"] for row in unseen}):
        body.append(tag("circle", cx=x, cy=_TOP + _HIGH + 26, r=4, fill=oklch(0.55, 0.17, 60 * stages)))
        body.append(text(x + 10, _TOP + _HIGH + 30, f"{stages} stages", fill=INK))
        x += 90
    return document(_LEFT + _WIDE + 130, _TOP + _HIGH + 48, body, title="Gaps on unseen networks", description=said)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    data = json.loads(path.read_text())
    print_report(data, Console(width=150))
    (path.parent / "skippipe-gaps.svg").write_text(gaps_svg(data["rows"]))
