"""The files of a run as the report reads them: again and again while the run goes on, and whatever is in them.

A folder may be of an older version, be damaged, or lack most of its files: what cannot be read is not there, and
nothing that stands in a file is taken for what it should be before it was looked at.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from launch.run_folder import lines_after, standing
from launch.run_lock import at_work
from pipeline.reading import FileError, read_json, read_toml

Line = Mapping[str, Any]
_MOST = 10**15
"""No step, count or time in a run is larger; what is larger is no number of a run."""
_MOST_FILE = 4 << 20
"""Bytes of a JSON file that the report reads whole."""
PAGE = "report.html"
_NUMBERS = (int, float)


def number(line: Any, name: str) -> float | None:
    """A field as a finite number of a size that a picture can hold, else None."""
    value = line.get(name) if isinstance(line, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= _MOST and math.isfinite(value) else None


def whole(line: Any, name: str, unset: int = 0) -> int:
    """A field as a whole number."""
    found = number(line, name)
    return unset if found is None else int(found)


def words(line: Any, name: str, unset: str = "") -> str:
    """A field as a text; a number is written as one."""
    value = line.get(name) if isinstance(line, Mapping) else None
    return value if isinstance(value, str) else unset if value is None else str(value)


def inner(line: Any, name: str) -> dict[str, Any]:
    """A field as an object, empty where it is none."""
    value = line.get(name) if isinstance(line, Mapping) else None
    return value if isinstance(value, dict) else {}


def items(line: Any, name: str) -> list[Any]:
    """A field as a list, empty where it is none."""
    value = line.get(name) if isinstance(line, Mapping) else None
    return value if isinstance(value, list) else []


def _fits(value: Any) -> bool:
    """Whether a field is no number, or one that a picture can hold."""
    return not isinstance(value, int | float) or (abs(value) <= _MOST and math.isfinite(value))


@dataclass(eq=False)
class Lines:
    """A file of JSON lines that is read on from where it was read to."""

    path: Path
    needs: tuple[str, ...]
    """Fields that must be numbers."""
    lines: list[dict[str, Any]] = field(default_factory=list)
    read: int = 0
    """Bytes that were read."""
    _file: int = 0

    def more(self) -> bool:
        """Read what has come; whether anything has. A file that was written anew is read anew."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._file or found.st_size < self.read:
                    self.lines, self.read, self._file = [], 0, found.st_ino
                came, end = lines_after(file, self.read, self.path.name)
        except OSError:
            return False
        for each in came:
            line = {name: value for name, value in each.items() if _fits(value)}
            if all(number(line, name) is not None for name in self.needs):
                self.lines.append(line)
        read, self.read = self.read, end
        return end > read


@dataclass(frozen=True)
class RunFiles:
    """What a run folder says now. `metrics` and `ledger` hold steps that were undone, too."""

    folder: Path
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    ledger: list[dict[str, Any]]
    settings: dict[str, Any]
    running: bool

    @cached_property
    def name(self) -> str:
        """What a person calls it."""
        return self.folder.resolve().name or str(self.folder)

    @cached_property
    def standing(self) -> list[dict[str, Any]]:
        """The lines of metrics that stand."""
        return standing(self.metrics)

    def named(self, *events: str) -> list[dict[str, Any]]:
        """The events of these names."""
        return [each for each in self.events if each.get("event") in events]

    def last(self, event: str) -> dict[str, Any]:
        """The newest event of a name, empty where there is none."""
        return next((each for each in reversed(self.events) if each.get("event") == event), {})

    def json(self, name: str) -> dict[str, Any]:
        """A file of the folder that holds a JSON object, empty where it holds none."""
        return json_object(self.folder / name)


class RunReader:
    """Reads a run folder, and reads on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics = Lines(folder / "metrics.jsonl", ("step", "loss"))
        self._events = Lines(folder / "events.jsonl", ("time",))
        self._ledger = Lines(folder / "ledger.jsonl", ("step", "time"))

    def more(self) -> bool:
        """Read on; whether something has come since the last time."""
        came = [each.more() for each in (self._metrics, self._events, self._ledger)]
        return any(came)

    @property
    def size(self) -> int:
        """Bytes that were read: another number once something has come."""
        return sum(each.read for each in (self._metrics, self._events, self._ledger))

    @property
    def events(self) -> int:
        """Bytes of events that were read."""
        return self._events.read

    def read(self, running: bool | None = None) -> RunFiles:
        """What the folder says. `running`: whether the run still is; unset, whether a process of this machine is at
        work in it."""
        self.more()
        settings: dict[str, Any] = {}
        with suppress(FileError):
            settings = read_toml(self.folder / "config.toml")
        if running is None:
            running = at_work(self.folder) is not None
        metrics, events, ledger = (list(each.lines) for each in (self._metrics, self._events, self._ledger))
        return RunFiles(self.folder, metrics, events, ledger, settings, running)


def json_object(path: Path) -> dict[str, Any]:
    """What a file of moderate size holds, if it is a JSON object; else an empty one."""
    with suppress(FileError, OSError):
        if path.stat().st_size <= _MOST_FILE and isinstance(found := read_json(path), dict):
            return found
    return {}


def is_run(folder: Path) -> bool:
    """Whether a folder has anything of a run in it."""
    return any((folder / name).is_file() for name in ("metrics.jsonl", "events.jsonl", "config.toml"))


def as_text(value: Any) -> str:
    """A setting's value as a person writes it."""
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value, default=str)


def finite(lines: Iterable[Line], name: str) -> list[tuple[float, float]]:
    """(step, value) of the lines that have both, ascending; of a step that was taken again, the last."""
    found: dict[float, float] = {}
    for line in lines:  # whose numbers were looked at when they were read
        step, value = line.get("step"), line.get(name)
        if type(step) in _NUMBERS and type(value) in _NUMBERS:
            found[cast(float, step)] = cast(float, value)
    return sorted(found.items())
