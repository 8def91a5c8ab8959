"""The report of one run, from its files: what happened, what it cost, and what it was made of."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from launch.page.blocks import Bar, Box, Card, Cell, Fold, Picture, Section, Share, Sheet, Strip, Table, Words
from launch.page.chart import Chart, Curve, chart, flags
from launch.page.faults import Loss, in_recovery, losses
from launch.page.files import RunFiles, finite, inner, number, whole, words
from launch.page.goodput import AGAIN, FIRST_STEP, RECOVERY, REST, STANDS, Goodput, RunClock, goodput
from launch.page.made_of import made_of
from launch.page.workers import stays
from launch.report import performance, smoothed
from pipeline.drawing.svg import data_size, duration, figure

_COLOURS = {STANDS: "good", AGAIN: "bad", RECOVERY: "warn", FIRST_STEP: "c2", REST: "quiet"}
_MOST_PICTURE = 3 << 20
"""Bytes of a picture that still goes into the page."""
_MOST_LANES = 64
_APART_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400, 604800)
"""Seconds between two marks of time."""


def sheet(run: RunFiles, now: float | None = None) -> Sheet:
    """The page of a run. `now` is unix seconds, for when it is drawn."""
    clock, found = RunClock.of(run), losses(run)
    account = goodput(run, clock, found)
    state, said = state_of(run)
    marks = [(float(loss.step), number, _told(loss)) for number, loss in enumerate(found, 1)]
    sections = [
        Section("loss", "Loss", _some(_loss_chart(run, marks)), "Dashed lines are faults, under their numbers below."),
        Section("speed", "Throughput", _some(*_speed_charts(run, marks)), wide=False),
        Section("workers", "Workers over time", _some(_strip(run, clock, found)),
                "A lane is a place; a box is the stay of one worker. Striped: from a loss to the next commit."),
        Section("losses", "What each loss cost", _losses(found)),
        Section("time", "Where the time went", _some(_bar(account)),
                "Goodput is the share of the time that made steps which stand."),
        Section("schedule", "Schedule, planned and measured", _some(_timeline(run))),
        Section("memory", "Memory", _memory(run, marks)),
        Section("optimizer", "Gradient norm and learning rate", _some(*_optimizer_charts(run, marks)), wide=False),
        *made_of(run),
    ]  # fmt: skip
    about = _about(run)
    return Sheet(
        run.name, state, said, about, _cards(run, clock, account, found),
        [each for each in sections if each.blocks], time.time() if now is None else now, run.running,
    )  # fmt: skip


def _some(*blocks: object | None) -> list[object]:
    return [block for block in blocks if block is not None]


def _told(loss: Loss) -> str:
    return f"step {loss.step}, {loss.label}"


def state_of(run: RunFiles) -> tuple[str, str]:
    """How it is with the run: a word, and a sentence."""
    last = next((e for e in reversed(run.events) if e.get("event") in ("started", "exported", "stopped", "failed")), {})
    name, step = words(last, "event"), whole(last, "step")
    if run.running and name in ("", "started"):
        return "running", "the run goes on"
    if name == "exported":
        return "done", f"done: all {step:,} steps"
    if name == "stopped":
        return "stopped", f"stopped and saved at step {step:,}; --resume goes on from there"
    if name == "failed":
        return "failed", f"ended at step {step:,}: {words(last, 'error')}"
    if not run.events and not run.metrics:
        return "broken", "nothing is known of how it went"
    return "broken", "it ended without a word; --resume goes on from its newest checkpoint"


def _about(run: RunFiles) -> str:
    told, settings = run.last("described"), run.settings
    model = words(told, "model") or words(settings, "model")
    size = number(told, "parameters")
    parts = [model + (f", {figure(size / 1e6)}M parameters" if size else "")] if model else []
    scheduler, workers = words(settings, "scheduler"), whole(settings, "workers")
    if scheduler:
        least = whole(settings, "min_workers")
        parts.append(f"{scheduler} on {f'{least} to ' if least else ''}{workers} worker{'s' * (workers != 1)}")
    if method := words(settings, "method"):
        parts.append(f"forgets by {method}")
    if recovery := words(settings, "recovery"):
        parts.append(f"recovery {recovery}")
    return " · ".join(parts)


def _cards(run: RunFiles, clock: RunClock, account: Goodput, found: Sequence[Loss]) -> list[Card]:
    reached = performance(run.standing)
    steps, last = whole(run.settings, "steps"), whole(run.standing[-1] if run.standing else {}, "step")
    out = [Card("Step", f"{last:,}" + (f" / {steps:,}" if steps else ""), _left(run, steps, last))]
    if smooth := smoothed(finite(run.standing, "loss")):
        out.append(Card("Loss", figure(smooth[-1][1]), f"from {figure(smooth[0][1])}"))
    evaluated = [e for e in run.named("evaluation") if number(e, "loss") is not None]
    if evaluated:
        perplexity = number(evaluated[-1], "perplexity")
        note = "" if perplexity is None else f"perplexity {figure(perplexity)}"
        out.append(Card("Held-out loss", figure(evaluated[-1]["loss"]), note))
    if "tokens_per_s" in reached:
        more = f"MFU {100 * reached['mfu']:.1f} %" if "mfu" in reached else ""
        more = more or (f"{figure(reached['tflops'])} TFLOP/s" if "tflops" in reached else "")
        out.append(Card("Tokens/s", figure(reached["tokens_per_s"]), ", ".join(filter(None, ["median", more]))))
    if account.share is not None and run.metrics:
        out.append(Card("Goodput", f"{100 * account.share:.1f} %", f"of {said_long(clock.total)}"))
    lost = [each.seconds for each in found if each.seconds is not None]
    redone = sum(each.redone for each in found)
    note = f"to the next commit, p50 {duration(median(lost))}" if lost else "nothing was lost"
    out.append(Card("Faults", f"{len(found):,}", note + (f", {redone:,} steps again" if redone else "")))
    return out


def _left(run: RunFiles, steps: int, last: int) -> str:
    if not run.running or not steps or last >= steps or len(run.ledger) < 2:
        return ""
    recent = run.ledger[-50:]
    gone = recent[-1]["time"] - recent[0]["time"]
    done = recent[-1]["step"] - recent[0]["step"]
    return f"about {said_long(gone / done * (steps - last))} left" if done > 0 and gone > 0 else ""


def said_long(seconds: float) -> str:
    """A time as a person says it."""
    seconds = max(0.0, seconds)
    if seconds < 90:
        return duration(seconds) if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 600 and seconds % 60 >= 1:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{minutes} min" if minutes < 90 else f"{int(hours)} h {round(60 * (hours % 1)):02d} min"


# ---- curves ----

Marks = Sequence[tuple[float, int, str]]


def _loss_chart(run: RunFiles, marks: Marks) -> Chart | None:
    points = finite(run.standing, "loss")
    smooth = smoothed(points)
    held_out = finite(run.named("evaluation"), "loss")
    curves = [Curve("each step", points, "c1", "pale"), Curve("smoothed", smooth, "c1")]
    if held_out:
        curves += [Curve("held out", held_out, "c2", "dots")]
    return chart("loss-chart", "Training loss over steps", curves, marks, robust=True)


def _speed_charts(run: RunFiles, marks: Marks) -> list[Chart | None]:
    found = [_one(run, "tokens_per_s", "Tokens per second", "tokens/s", marks, "c3")]
    if any("mfu" in m for m in run.standing):
        points = [(step, 100 * value) for step, value in finite(run.standing, "mfu")]
        found.append(_noisy("mfu-chart", "Model FLOP/s utilisation (MFU), %", "MFU", points, marks, "c4"))
    else:
        found.append(_one(run, "tflops", "Model TFLOP/s, all workers", "TFLOP/s", marks, "c4"))
    return found


def _one(run: RunFiles, name: str, title: str, called: str, marks: Marks, colour: str) -> Chart | None:
    return _noisy(f"{name.replace('_', '-')}-chart", title, called, finite(run.standing, name), marks, colour)


def _noisy(
    key: str, title: str, called: str, points: Sequence[tuple[float, float]], marks: Marks, colour: str, *,
    robust: bool = True,
) -> Chart | None:  # fmt: skip
    curves = [Curve("each step", points, colour, "pale"), Curve(f"{called}, smoothed", smoothed(points), colour)]
    return chart(key, title, curves, marks, zero=True, short=True, robust=robust)


def _optimizer_charts(run: RunFiles, marks: Marks) -> list[Chart | None]:
    return [
        _noisy("norm-chart", "Gradient norm, before clipping", "norm", finite(run.standing, "grad_norm"), marks, "c5",
               robust=False),
        chart("lr-chart", "Learning rate", [Curve("learning rate", finite(run.standing, "lr"), "c6")], zero=True,
              short=True),
    ]  # fmt: skip


def _memory(run: RunFiles, marks: Marks) -> list[object]:
    out: list[object] = []
    for kind, colour in (("host", "c1"), ("device", "c3")):
        each, total = (finite(run.standing, f"peak_{kind}_bytes{end}") for end in ("", "_sum"))
        if any(value for _, value in each):
            scale, unit = (30, "GiB") if max(value for _, value in [*each, *total]) >= 1 << 30 else (20, "MiB")
            every, most = ([(step, value / (1 << scale)) for step, value in line] for line in (total, each))
            curves = [Curve("all workers", every, colour, "dashed"), Curve("the largest worker", most, colour)]
            title = f"Peak {kind} memory, {unit}" + (" (resident, since each worker began)" if kind == "host" else "")
            out.append(chart(f"{kind}-chart", title, curves, marks, zero=True, short=True))
    proved = run.last("described")
    told: list[str] = []
    peaks = inner(proved, "peak_activations")
    if held := [value for place in peaks if (value := number(peaks, place)) is not None]:
        each = ", ".join(f"{value:g}" for value in held[:16]) + (" ..." if len(held) > 16 else "")
        told.append(f"The verifier has proved that no place holds activations of more microbatches than: {each}.")
    if host := number(run.last("started"), "host_bytes"):
        told.append(f"The host store was laid out with {data_size(host)}, and does not grow.")
    return _some(*out, *(Words(line) for line in told))


# ---- time ----


def _strip(run: RunFiles, clock: RunClock, found: Sequence[Loss]) -> Strip | None:
    total, here = clock.total, stays(run, clock)
    if total <= 0 or not here:
        return None
    boxes: list[Box] = []
    for stay in here:
        if stay.lane >= _MOST_LANES:
            continue
        held = f", layers {stay.layers}" if stay.layers else ""
        ended = f", then it {stay.ended}" if stay.ended else ""
        title = f"worker {stay.worker}: {said_long(stay.start)} to {said_long(stay.end)}{held}{ended}"
        text = f"worker {stay.worker}" + (f" · layers {stay.layers}" if stay.layers else "")
        left, width = (100 * second / total for second in (stay.start, stay.end - stay.start))
        boxes.append(Box(stay.worker, stay.lane, left, width, text, title, stay.ended not in ("", "left")))
    bands = [
        (100 * clock.at(a) / total, 100 * (clock.at(b) - clock.at(a)) / total, f"no commit for {duration(b - a)}")
        for a, b in in_recovery(found)
    ]
    marks = [(clock.at(loss.at), number, _told(loss)) for number, loss in enumerate(found, 1)]
    apart = next((step for step in _APART_S if total / step <= 7), total)
    at = [(100 * apart * n / total, said_long(apart * n)) for n in range(int(total / apart) + 1)]
    lanes = 1 + max((stay.lane for stay in here), default=0)
    caption = f"{len({stay.worker for stay in here})} worker(s) in {lanes} lane(s), {said_long(total)}"
    if lanes > _MOST_LANES:
        caption += f"; the first {_MOST_LANES} lanes are shown"
    return Strip(min(lanes, _MOST_LANES), boxes, bands, at, flags(marks, total), caption)


def _losses(found: Sequence[Loss]) -> list[object]:
    if not found:
        return [Words("Nothing was lost.")]
    rows: list[list[Cell | str]] = []
    for index, loss in enumerate(found, 1):
        laps = "; ".join(f"{name} {duration(seconds)}" for name, seconds in loss.parts)
        went_on = sum(seconds for _, seconds in loss.parts)
        rows.append([
            str(index), f"{loss.step:,}", "" if loss.worker is None else str(loss.worker), loss.what,
            loss.remedy, "" if loss.replacement is None else str(loss.replacement),
            Cell(duration(went_on) if went_on else "", laps),
            Cell("none since" if loss.seconds is None else duration(loss.seconds),
                 looks="bad" if loss.seconds is None else ""),
            f"{loss.redone:,}", "" if loss.moved is None else data_size(loss.moved),
        ])  # fmt: skip
    columns = ("#", "Step", "Worker", "What happened", "Remedy", "Replaced by", "All went on after",
               "To the next commit", "Steps again", "State moved")  # fmt: skip
    caption = "The step that was cut off is taken again, and counts; steps again are those that a rollback undid."
    table = Table(columns, rows, caption, frozenset({0, 1, 2, 5, 6, 7, 8, 9}), "loss-")
    if len(rows) <= 30:
        return [table]
    first = Table(columns, rows[:20], caption, table.numbers, "loss-")
    return [first, Fold(f"All {len(rows):,} faults", [Table(columns, rows, caption, table.numbers)])]


def _bar(account: Goodput) -> Bar | None:
    if account.total <= 0:
        return None
    shares = [
        Share(
            name,
            seconds / account.total,
            f"{said_long(seconds)}, {100 * seconds / account.total:.1f} %",
            _COLOURS[name],
        )
        for name, seconds in account.parts
        if seconds > 0
    ]
    return Bar(shares, f"{said_long(account.total)} of running time")


def _timeline(run: RunFiles) -> Picture | None:
    path = run.folder / "timeline.svg"
    data = _picture(path)
    step = number(run.last("timeline"), "step")
    measured = f"step {step:,.0f} as it was measured" if step is not None else "an early step as it was measured"
    caption = f"Above: the step as it was planned, with the measured time of each op. Below: {measured}."
    return None if data is None else Picture(data, caption)


def _picture(path: Path) -> str | None:
    try:
        if path.stat().st_size > _MOST_PICTURE:
            return None
        return base64.b64encode(path.read_bytes()).decode()
    except OSError:
        return None
