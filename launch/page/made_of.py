"""What a run was made of: settings, data, environment, and what was certified and forgotten."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.page.blocks import Cell, Facts, Fold, Section, Table, Words
from launch.page.files import RunFiles, as_text, inner, items, json_object, number, whole, words
from pipeline.drawing.svg import data_size, figure

_MOST_ROWS = 200
_QUIET = {"started", "described", "evaluation", "view", "checkpoint", "timeline", "fault"}
"""Events that are told elsewhere on the page, or of which nobody needs to hear."""


def made_of(run: RunFiles) -> list[Section]:
    """The sections below the pictures; those without anything in them are left out by who takes them."""
    return [
        Section("requests", "Forgetting", _requests(run)),
        Section("settings", "Settings", _settings(run), "Marked: what was changed from its default."),
        Section("data", "Data", _data(run)),
        Section("environment", "Environment", _environment(run)),
        Section("certificates", "Certificates and checkpoints", _certificates(run)),
        Section("events", "Events", _events(run)),
    ]


def defaults(run: RunFiles) -> dict[str, Any]:
    """The defaults of the run's own version, by setting; empty where it did not say them."""
    return inner(run.last("described"), "defaults")


def _settings(run: RunFiles) -> list[object]:
    known, groups = defaults(run), inner(run.last("described"), "groups")
    left = dict(run.settings)
    changed: list[list[Cell | str]] = []
    tables: list[object] = []
    for group, names in groups.items():
        rows: list[list[Cell | str]] = []
        for name in [each for each in map(str, names) if each in left] if isinstance(names, list) else []:
            value, unset = left.pop(name), known.get(name)
            differs = value != unset and as_text(value) != as_text(unset)
            row: list[Cell | str] = [name, Cell(as_text(value), looks="changed" if differs else ""),
                                     "unset" if unset is None else as_text(unset)]  # fmt: skip
            rows.append(row)
            changed += [[group, *row]] if differs else []
        if rows:
            tables.append(Table(("Setting", "Value", "Default"), rows, str(group)))
    if left:
        rest: list[list[Cell | str]] = [[name, as_text(value), as_text(known[name]) if name in known else ""]
                                        for name, value in left.items()]  # fmt: skip
        if not groups:
            return [Table(("Setting", "Value"), [row[:2] for row in rest], "As in config.toml")]
        tables.append(Table(("Setting", "Value", "Default"), rest, "others"))
    out: list[object] = []
    if changed:
        out.append(Table(("Group", "Setting", "Value", "Default"), changed, "Changed from their defaults"))
    return [*out, Fold(f"All {len(run.settings)} settings, by group", tables)] if tables else out


def _data(run: RunFiles) -> list[object]:
    meta = run.json("data/meta.json")
    asked = inner(meta, "request")
    pairs = [("source", words(asked, "data") or words(run.settings, "data"))]
    for name, said in (
        ("num_documents", "documents"), ("num_rows", "rows"), ("num_tokens", "tokens"),
        ("held_out_tokens", "held-out tokens"), ("sequence_length", "tokens in a sample"),
    ):  # fmt: skip
        if (value := number(meta, name)) is not None:
            pairs.append((said, f"{value:,.0f}"))
    total, held = number(meta, "num_tokens"), number(meta, "held_out_tokens")
    if total and held is not None:
        pairs.append(("held out", f"{100 * held / total:.2f} %, never trained on"))
    samples = sum(whole(line, "samples") for line in run.ledger)
    tokens = sum(whole(line, "tokens") for line in run.standing)
    if tokens:
        seen = f", {figure(tokens / total)} of what there is" if total else ""
        pairs.append(("tokens in steps that stand", f"{tokens:,}{seen}"))
    if samples:
        pairs.append(("samples in the ledger", f"{samples:,}"))
    if blank := items(meta, "blank"):
        pairs.append(("forgotten", f"{len(blank):,} spans of tokens are blank"))
    pairs += [("tokenizer", words(run.settings, "tokenizer")), ("fingerprint", words(meta, "fingerprint"))]
    return [Facts([(name, value) for name, value in pairs if value])] if meta or pairs[0][1] else []


def _environment(run: RunFiles) -> list[object]:
    told = inner(run.last("described"), "environment")
    started = run.last("started")
    pairs = [(name.replace("_", " "), as_text(value)) for name, value in told.items() if value not in (None, "")]
    pairs = [(name, _bytes(name, value)) for name, value in pairs]
    if not told and words(started, "torch"):
        pairs.append(("torch", words(started, "torch")))
    if (threads := number(started, "threads")) is not None:
        pairs.append(("compute threads per worker", f"{threads:g}"))
    starts = run.named("started")
    if starts:
        pairs.append(("starts", f"{len(starts)}, the first at {when(starts[0]['time'])}"))
    return [Facts(pairs)] if pairs else []


def _bytes(name: str, value: str) -> str:
    return data_size(float(value)) if name.endswith("memory") and value.isdecimal() else value


def when(seconds: float) -> str:
    """A time in UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g}"


def _certificates(run: RunFiles) -> list[object]:
    found = [json_object(path) for path in sorted((run.folder / "certificates").glob("view-*.json"))[-_MOST_ROWS:]]
    rows: list[list[Cell | str]] = []
    for each in found:
        if not each:
            continue
        moves = items(each, "moves")
        remedies = sorted({words(move, "remedy") for move in moves} - {""})
        rows.append([
            f"{whole(each, 'view')}", f"{whole(each, 'step'):,}", f"{whole(each, 'generation')}",
            " ".join(map(str, items(each, "workers")[:32])), f"{len(moves)}", ", ".join(remedies),
            f"{len(inner(each, 'states'))}",
        ])  # fmt: skip
    out: list[object] = []
    if rows:
        columns = ("View", "Step", "Generation", "Workers", "Moves", "Remedies", "States")
        caption = "Before a view became true, all holders of each state had the same bits"
        out.append(Fold(f"{len(rows)} certified views", [Table(columns, rows, caption, frozenset({0, 1, 2, 4, 6}))]))
    saved = run.named("checkpoint")
    failed = run.named("checkpoint_failed")
    if saved or failed:
        last = f", the newest at step {whole(saved[-1], 'step'):,}" if saved else ""
        bad = f"; {len(failed)} could not be saved" if failed else ""
        out.insert(0, Words(f"{len(saved)} checkpoints were saved{last}{bad}."))
    return out


def _requests(run: RunFiles) -> list[object]:
    folders = sorted(path for path in (run.folder / "requests").glob("[0-9][0-9][0-9][0-9]") if path.is_dir())
    rows: list[list[Cell | str]] = []
    for folder in folders[:_MOST_ROWS]:
        request, report = json_object(folder / "request.json"), json_object(folder / "report.json")
        if not request:
            continue
        status = words(request, "status")
        rows.append([
            f"{whole(request, 'number')}", words(request, "asked"), words(request, "method"),
            f"{len(items(request, 'rows')):,}", f"{whole(request, 'generation')}",
            Cell(status, looks="good" if status == "complete" else "changed"),
            *(_before_after(report, kind) for kind in ("forget", "retain")),
            _signed(folder),
        ])  # fmt: skip
    out: list[object] = []
    if generation := whole(run.json("generation.json"), "generation"):
        out.append(Words(f"The run is in generation {generation}: nothing of an older one is used again."))
    if rows:
        columns = ("#", "Asked", "Method", "Rows", "Generation", "Status", "Probability, to forget",
                   "Probability, to keep", "Manifest")  # fmt: skip
        out.append(Table(columns, rows, "Requests to forget: probabilities before and after",
                         frozenset({0, 3, 4, 6, 7})))  # fmt: skip
    if slices := run.json("slices.json"):
        stages, gone = inner(slices, "stages"), items(slices, "gone")
        told = f"{whole(slices, 'slices')} slices in {len(items(slices, 'sequences'))} sequences; {len(stages)} stages"
        out.append(Words(told + (f"; of slices {' '.join(map(str, gone))} rows were forgotten." if gone else ".")))
    return out


def _before_after(report: Mapping[str, Any], kind: str) -> str:
    found = [number(inner(report, which), f"{kind}_probability") for which in ("before", "after")]
    return " → ".join("?" if value is None else f"{value:.4f}" for value in found) if any(found) else ""


def _signed(folder: Path) -> str:
    if not (folder / "manifest.json").is_file():
        return ""
    return "signed" if (folder / "manifest.sig").is_file() else "not signed"


def _events(run: RunFiles) -> list[object]:
    known = [e for e in run.events if words(e, "event") not in _QUIET]
    rows: list[list[Cell | str]] = []
    for event in known[-_MOST_ROWS:]:
        more = {name: value for name, value in event.items() if name not in ("time", "event", "step")}
        told = ", ".join(f"{name} {_brief(value)}" for name, value in more.items())
        rows.append([when(event["time"]), f"{whole(event, 'step'):,}", words(event, "event"), told])
    if not rows:
        return []
    more = f" (the last {_MOST_ROWS})" if len(known) > _MOST_ROWS else ""
    table = Table(("Time", "Step", "Event", "What it says"), rows, "As in events.jsonl", frozenset({1}))
    return [Fold(f"{len(known):,} events{more}", [table])]


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else as_text(value)
    return text if len(text) <= 160 else text[:160] + "…"
