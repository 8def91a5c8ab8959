"""Several runs on one page: their curves over each other, and where they differ."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

from launch.page.blocks import Cell, Section, Sheet, Table, Words
from launch.page.chart import Curve, chart
from launch.page.faults import Loss, losses
from launch.page.files import RunFiles, as_text, finite, inner, whole
from launch.page.goodput import RunClock, goodput
from launch.page.sheet import said_long, state_of
from launch.report import performance, smoothed
from pipeline.drawing.svg import data_size, duration, figure

_COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")
_OWN = ("out",)
"""Settings that differ between any two runs."""


def compared(runs: Sequence[RunFiles], now: float | None = None) -> Sheet:
    """The page of two runs or more."""
    names = named(runs)
    found = [losses(run) for run in runs]
    sections = [
        Section("loss", "Loss", _curves(runs, names, "loss", "Training loss, smoothed", zero=False)),
        Section("held-out", "Held-out loss", _held_out(runs, names)),
        Section("speed", "Throughput", _curves(runs, names, "tokens_per_s", "Tokens per second, smoothed", zero=True)),
        Section("results", "Results", [_results(runs, names, found)]),
        Section("settings", "Settings that differ", [_differences(runs, names)]),
        Section("losses", "Faults", [_faults(names, found)]),
        Section("environment", "Environments that differ", [_environments(runs, names)]),
    ]
    live = any(run.running for run in runs)
    drawn = time.time() if now is None else now
    return Sheet(
        " · ".join(names), "compared", f"{len(runs)} runs", "", (), [each for each in sections if each.blocks], drawn,
        live,
    )  # fmt: skip


def named(runs: Sequence[RunFiles]) -> list[str]:
    """What each is called: the name of its folder, or the whole path where two have the same."""
    names = [run.name for run in runs]
    return [str(run.folder) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]


def _style(index: int) -> tuple[str, str]:
    return _COLOURS[index % len(_COLOURS)], "line" if index < len(_COLOURS) else "dashed"


def _curves(runs: Sequence[RunFiles], names: Sequence[str], field: str, title: str, *, zero: bool) -> list[object]:
    curves = [
        Curve(name, smoothed(finite(run.standing, field)), *_style(index))
        for index, (run, name) in enumerate(zip(runs, names, strict=True))
    ]
    found = chart(f"{field.replace('_', '-')}-chart", title, curves, zero=zero, robust=True, short=zero)
    return [] if found is None else [found]


def _held_out(runs: Sequence[RunFiles], names: Sequence[str]) -> list[object]:
    curves: list[Curve] = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        points, (colour, _) = finite(run.named("evaluation"), "loss"), _style(index)
        curves.append(Curve(name, points, colour, "dots" if len(points) == 1 else "line"))
    found = chart("held-out-chart", "Held-out loss", curves, short=True)
    return [] if found is None else [found]


def _results(runs: Sequence[RunFiles], names: Sequence[str], found: Sequence[Sequence[Loss]]) -> Table:
    columns = ("Run", "How it ended", "Step", "Loss", "Held-out", "Tokens/s", "MFU", "Goodput", "Faults",
               "Loss to commit, p50", "Steps again", "Peak host", "Time")  # fmt: skip
    rows: list[list[Cell | str]] = []
    for run, name, lost in zip(runs, names, found, strict=True):
        clock = RunClock.of(run)
        reached, share = performance(run.standing), goodput(run, clock, lost).share
        smooth = smoothed(finite(run.standing, "loss"))
        evaluated = finite(run.named("evaluation"), "loss")
        seconds = [each.seconds for each in lost if each.seconds is not None]
        state, told = state_of(run)
        rows.append([
            name, Cell(state, told, looks={"done": "good", "failed": "bad", "broken": "bad"}.get(state, "")),
            f"{whole(run.standing[-1] if run.standing else {}, 'step'):,}",
            figure(smooth[-1][1]) if smooth else "", figure(evaluated[-1][1]) if evaluated else "",
            figure(reached["tokens_per_s"]) if "tokens_per_s" in reached else "",
            f"{100 * reached['mfu']:.1f} %" if "mfu" in reached else "",
            "" if share is None or not run.metrics else f"{100 * share:.1f} %", f"{len(lost):,}",
            duration(median(seconds)) if seconds else "", f"{sum(each.redone for each in lost):,}",
            data_size(peak) if (peak := reached.get("peak_host_bytes")) else "", said_long(clock.total),
        ])  # fmt: skip
    return Table(columns, rows, "The loss is the smoothed one of the last step", frozenset(range(2, len(columns))))


def _differences(runs: Sequence[RunFiles], names: Sequence[str]) -> object:
    asked = list(dict.fromkeys(name for run in runs for name in run.settings if name not in _OWN))
    rows = _differing(asked, [run.settings for run in runs])
    return Table(("Setting", *names), rows, "A dash: unset") if rows else Words("All settings are alike.")


def _environments(runs: Sequence[RunFiles], names: Sequence[str]) -> object:
    told = [inner(run.last("described"), "environment") for run in runs]
    asked = list(dict.fromkeys(name for each in told for name in each))
    rows = _differing(asked, told)
    return Table(("What", *names), rows, "A dash: not known") if rows else Words("As far as they tell, they are alike.")


def _differing(names: Sequence[str], values: Sequence[dict[str, object]]) -> list[list[Cell | str]]:
    rows: list[list[Cell | str]] = []
    for name in names:
        told = [as_text(each[name]) if name in each else "–" for each in values]
        if len(set(told)) > 1:
            rows.append([name, *told])
    return rows


def _faults(names: Sequence[str], found: Sequence[Sequence[Loss]]) -> object:
    rows: list[list[Cell | str]] = [
        [name, f"{loss.step:,}", loss.label, "none since" if loss.seconds is None else duration(loss.seconds),
         f"{loss.redone:,}"]
        for name, lost in zip(names, found, strict=True)
        for loss in lost
    ]  # fmt: skip
    columns = ("Run", "Step", "What happened, and what was done", "To the next commit", "Steps again")
    return Table(columns, rows, "In order, run by run", frozenset({1, 3, 4})) if rows else Words("Nothing was lost.")
