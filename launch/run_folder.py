"""What a run leaves behind: metrics.jsonl, events.jsonl, ledger.jsonl, config.toml and the pictures."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from launch.journal import Journal
from pipeline.runtime.peak_memory import PEAK_BYTES
from pipeline.wire import Kind, WireError, checked, parse

if TYPE_CHECKING:  # it reads the settings of all owners, torch among them; many who read a folder need neither
    from launch.trackers import Trackers

METRICS = ("step", "loss", "tokens", "tokens_per_s", "grad_norm", "lr", "view")
"""Of a committed step; `again` comes with them: how often the step had been taken before a rollback undid it."""
MEASURED = ("means", "tflops", "mfu", *PEAK_BYTES)
"""What comes with them where it is known: `means` of the job's terms, where it has several; model TFLOP/s of all
workers together (pipeline/model/flops.py), and their share of what the devices could do; the most resident memory that
a worker has had since it began, and the sum over workers, in which pages that they share count more than once; and the
same of device memory, since the step before."""
LEDGER = ("step", "view", "first_sample", "samples", "version", "sources")
"""Which samples a committed step was made of: `samples` global ids from `first_sample` on. `version`, under roundpipe,
is how many updates the weights had seen that every unit of the step has read. `sources`, of a mixture, counts the
samples from each source."""


_LOSSES = ("remedy", "taken_over", "redealt", "shrunk")
"""The events that say what was done about a lost worker."""


def _marked(event: dict[str, Any]) -> dict[str, Any]:
    return {**event, "label": f"worker {event['worker']} lost: {event['remedy']}"}


def pictured(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a picture of the loss shows of the events of a run: evaluations, and losses of workers by their labels."""
    found = list[dict[str, Any]]()
    for event in events:
        if event["event"] == "evaluation" and _has(event, loss=float, perplexity=float):
            found.append(event)
        elif event["event"] in _LOSSES and _has(event, worker=int, remedy=str):
            found.append(_marked(event))
    return found


class RunFolder:
    """The files of one run. A resumed run drops the metrics of steps that it will run again.

    `ledger` holds every committed step: of a step that a rollback undid, a line for each time. What cannot be written
    waits (see Journal), and `say` is told so once, and once it is there.
    """

    def __init__(
        self, path: Path, config_toml: str, first_step: int, trackers: Trackers | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self.path, self._say, self._trackers = path, say, trackers
        path.mkdir(parents=True, exist_ok=True)
        write_whole(path / "config.toml", config_toml)
        metrics = read_jsonl(path / "metrics.jsonl", step=int, view=int, loss=float)
        self.metrics = [m for m in metrics if m["step"] <= first_step]
        write_whole(path / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in self.metrics))
        ledger = [line for line in read_jsonl(path / "ledger.jsonl", step=int) if line["step"] <= first_step]
        write_whole(path / "ledger.jsonl", "".join(json.dumps(line) + "\n" for line in ledger))
        self._in_ledger = {line["step"] for line in ledger}
        if gap := sorted(set(range(1, first_step + 1)) - self._in_ledger):
            say(f"ledger.jsonl lacks {len(gap)} of the steps that were taken before, the first: {gap[0]}")
            self._in_ledger |= set(gap)  # nobody can fill it any more: it must not keep later steps from being saved
        self._taken = Counter(m["step"] for m in self.metrics)
        past = [e for e in read_jsonl(path / "events.jsonl", event=str, step=int) if e["step"] <= first_step]
        held_out = [e for e in past if e["event"] == "evaluation"]
        losses = [e for e in past if e["event"] in _LOSSES]
        self.evaluations = [e for e in held_out if _has(e, loss=float, perplexity=float)]
        self.marks = [_marked(e) for e in losses if _has(e, worker=int, remedy=str)]
        self._files = {name: Journal(path / f"{name}.jsonl") for name in ("metrics", "events", "ledger")}

    def step(self, record: dict[str, Any]) -> None:
        """Keep the metrics of a committed step."""
        metrics = {name: record[name] for name in METRICS}
        metrics |= {name: record[name] for name in MEASURED if name in record}
        if any(m["step"] == metrics["step"] and m["view"] == metrics["view"] for m in self.metrics[-1:]):
            return  # told again, in case that it had not been
        metrics["again"] = self._taken[metrics["step"]]
        self._taken[metrics["step"]] += 1
        self.metrics.append(metrics)
        self._append("metrics", metrics)
        self._append(
            "ledger",
            {**{name: record[name] for name in LEDGER if name in record}, "time": record.get("time", time.time())},
        )
        if metrics["step"] in self._in_ledger:  # what came after it the last time is undone with it
            self._in_ledger = {step for step in self._in_ledger if step < metrics["step"]}
        self._in_ledger.add(metrics["step"])
        if self._trackers is not None:
            self._trackers.step(metrics)

    def save_ledger(self, step: int) -> str:
        """Have the ledger on the disk, with every step up to `step` in it; why it is not, or ""."""
        missing = step - sum(1 <= taken <= step for taken in self._in_ledger)
        if missing > 0:
            first = next(number for number in count(1) if number not in self._in_ledger)
            return f"the ledger lacks {missing} steps up to step {step}, the first: {first}"
        return self._files["ledger"].sync()

    def event(self, event: str, **fields: Any) -> None:
        """Keep an event: {"time": unix seconds, "event": ..., ...}."""
        line = {"time": fields.pop("time", time.time()), "event": event, **fields}
        if event == "evaluation":
            self.evaluations.append(line)
        if event in _LOSSES:
            self.marks.append(_marked(line))
        if event == "rolled_back":  # the lines of steps that are undone do not stand for those that are to come
            self._in_ledger = {step for step in self._in_ledger if step <= line["step"]}
        self._append("events", line)
        if self._trackers is not None:
            self._trackers.event(event, fields)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        if (file := self._files.get(name)) is None:  # the run has ended: what comes now is said, and not kept
            return
        before = file.waiting
        file.append(line)
        if file.waiting and not before:
            self._say(f"{file.waiting}; training goes on, and it is tried again")
        elif before and not file.waiting:
            self._say(f"{file.path.name} is written again, and whole")

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
            if file.waiting:
                self._say(f"{file.waiting}: its last lines are lost")
        self._files = {}
        if self._trackers is not None:
            self._trackers.close()


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def standing(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the lines of metrics.jsonl or ledger.jsonl those that stand: a step undoes all that came from it on before."""
    found: list[dict[str, Any]] = []
    for line in lines:
        while found and found[-1]["step"] >= line["step"]:
            found.pop()
        found.append(line)
    return found


def read_jsonl(path: Path, **kinds: Kind) -> list[dict[str, Any]]:
    """The lines of a JSONL file that are whole: JSON objects in which every field of `kinds` is of its kind."""
    lines: list[dict[str, Any]] = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(WireError):  # a crash, or a disk, has damaged it; those after it are none the worse
            if _has(line := parse(text, path.name), **kinds):
                lines.append(line)
    return lines


def lines_after(file: BinaryIO, at: int, name: str) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects in the lines of a JSONL file that have come whole after so many bytes, without damaged ones; and
    the byte where the next line begins. Raises OSError. What is no file (a device, a pipe) has no lines: it may have no
    end."""
    size = os.fstat(file.fileno()).st_size  # 0 of what is no file: read to its end, /dev/full fills the memory
    file.seek(at)
    whole, newline, _ = file.read(max(0, size - at)).rpartition(b"\n")
    found: list[dict[str, Any]] = []
    for text in whole.splitlines():
        with suppress(WireError):
            found.append(parse(text, name))
    return found, at + len(whole) + len(newline)


def _has(line: dict[str, Any], **kinds: Kind) -> bool:
    """Whether every field of `kinds` is there and of its kind."""
    try:
        checked(line, "a line", **kinds)
    except WireError:
        return False
    return True
