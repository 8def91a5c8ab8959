"""The tables of benchmarks/gpu.py: what each section found, what is missing and why, and how the goals stand."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpu_sections import Goal, Section
from rich.console import Console
from rich.markup import escape
from rich.table import Table

MIB, GIB = 1 << 20, 1 << 30
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "passed": ("passed", str), "failed": ("failed", str), "skipped": ("skipped", str), "link": ("link", str),
    "gb_per_s": ("GB/s", "{:.1f}".format), "copy_gb_per_s": ("a copy, GB/s", "{:.1f}".format),
    "of_a_copy": ("of a copy", "{:.2f}".format), "parameters_millions": ("parameters, 10^6", "{:.1f}".format),
    "seconds": ("s", "{:.1f}".format), "tokens_per_s": ("tokens/s", "{:,.0f}".format), "mfu": ("MFU", "{:.1%}".format),
    "last_loss": ("last loss", "{:.4f}".format), "kills": ("kills", str), "total_p50_s": ("p50, s", "{:.3f}".format),
    "total_p95_s": ("p95, s", "{:.3f}".format),
    **{f"{part}_p50_s": (part.replace("_", " "), "{:.3f}".format)
       for part in ("detect", "decide", "woken", "ready", "edit", "restore", "first_step")},
    "kept_after_kills_bytes": ("kept after kills, MiB", lambda value: f"{value / MIB:.0f}"),
    "kept_in_the_end_bytes": ("kept in the end, MiB", lambda value: f"{value / MIB:.0f}"),
    "device_peak_bytes": ("device, GiB", lambda value: f"{value / GIB:.2f}"),
    "host_peak_bytes": ("host, GiB", lambda value: f"{value / GIB:.2f}"),
}  # fmt: skip
"""Field of a row -> its column and form; other fields stand in the file alone."""


def goals(wanted: Sequence[Goal], found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How each goal of the sections that were run stands: `value` is None where a figure is missing."""
    told: list[dict[str, Any]] = []
    for goal in wanted:
        if goal.section not in found:
            continue
        mine = _values(found[goal.section], goal.row, goal.column)
        value: float | None = None
        if goal.over is None:
            value = max(mine.values(), default=None)
        else:
            others = _values(found[goal.section], goal.over, goal.column)
            ratios = [figure / others[round_] for round_, figure in mine.items() if round_ in others]
            value = statistics.median(ratios) if ratios else None
        met = None if value is None or goal.bound is None else (value >= goal.bound) == goal.at_least
        if value is not None and value == goal.bound:
            met = True
        told.append(
            {
                "section": goal.section, "row": goal.row, "column": goal.column, "over": goal.over,
                "bound": goal.bound, "at_least": goal.at_least, "value": value, "met": met,
            }
        )  # fmt: skip
    return told


def _values(section: Mapping[str, Any], row: str, column: str) -> dict[int, float]:
    """Round -> a figure of a row."""
    return {
        part["round"]: each[column]
        for part in section["parts"]
        for each in part["rows"]
        if each["row"] == row and each.get(column) is not None
    }


def show(
    about: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]], stand: Sequence[Mapping[str, Any]],
    sections: Sequence[Section],
) -> None:  # fmt: skip
    """Print everything."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(
        f"{about.get('device') or 'CPU'}, driver {about.get('driver')}, torch {about.get('torch')}, transformers "
        f"{about.get('transformers')}, commit {str(about.get('commit'))[:12]}, {about.get('seconds')} s"
        + (", DRY: the figures mean nothing" if about.get("dry") else "")
        + ("" if about.get("whole") else ", ENDED before its last part"),
        highlight=False,
    )
    for section in sections:
        if section.letter in found:
            _section(console, section, found[section.letter]["parts"])
    if stand:
        table = Table("section", "figure", "value", "goal", "", title="goals", title_justify="left")
        for goal in stand:
            over = f" / {goal['over']}" if goal["over"] else ""
            table.add_row(
                goal["section"], escape(f"{goal['row']}: {goal['column']}{over}"), _told(goal["column"], goal),
                "" if goal["bound"] is None else f"{'>=' if goal['at_least'] else '<='} {_bound(goal)}",
                {None: "", True: "met", False: "MISSED"}[goal["met"]],
            )  # fmt: skip
        console.print(table)


def _told(column: str, goal: Mapping[str, Any]) -> str:
    if goal["value"] is None:
        return "no figure"
    return f"{goal['value']:.3f}" if goal["over"] else COLUMNS[column][1](goal["value"])


def _bound(goal: Mapping[str, Any]) -> str:
    return f"{goal['bound']:g}" if goal["over"] else COLUMNS[goal["column"]][1](goal["bound"])


def _section(console: Console, section: Section, parts: Sequence[Mapping[str, Any]]) -> None:
    """One section: its rows, and a line for each part that is not done."""
    rows = [(part, row) for part in parts for row in part["rows"]]
    used = [name for name in COLUMNS if any(row.get(name) is not None for _, row in rows)]
    table = Table("row", *(COLUMNS[name][0] for name in used), title=f"{section.letter}. {section.title}",
                  title_justify="left")  # fmt: skip
    several = any(part["round"] > 1 for part in parts)
    for part, row in rows:
        name = f"{row['row']} ({part['round']})" if several else row["row"]
        cells = ["" if row.get(column) is None else COLUMNS[column][1](row[column]) for column in used]
        table.add_row(escape(name), *cells)
    if rows:
        console.print(table)
    for part in parts:
        if part["state"] != "done":
            why = part.get("missing") or part.get("error") or ""
            console.print(f"{section.letter}. {escape(part['part'])}: {part['state']}: {escape(why)}", highlight=False)
            for line in (*part.get("traceback", ()), *part.get("said", ())):
                console.print(f"    {escape(line)}", highlight=False)
