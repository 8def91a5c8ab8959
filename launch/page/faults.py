"""What each loss cost, from the lines of events.jsonl and ledger.jsonl: when it was, what was done, and until when.

A loss costs the time from when the worker was gone to the next committed step, which takes the step that was cut off
again, and with a rollback the steps that came before it. Where the fault was injected its moment is known; else it
is when the loss was seen.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from launch.page.files import RunFiles, inner, items, number, whole, words
from pipeline.schedule.ops import ScheduleError, parse_span

_DONE = ("remedy", "taken_over", "redealt", "shrunk", "rerouted")
_KINDS = {"detected": "lost", "left": "left", "link": "link", "not_finite": "not finite", "failed": "failed"}
_INJECTED_S = 60.0
"""A fault that was injected into a worker longer before it was lost than this did not end it."""


@dataclass(frozen=True)
class Loss:
    """One fault of a run. Times are unix seconds; `until` is when the next step was committed, if one was. `moved` are
    bytes of state, where known; `parts` are the parts of the work until all went on, name -> seconds."""

    kind: str
    at: float
    step: int
    worker: int | None
    what: str
    remedy: str = ""
    replacement: int | None = None
    until: float | None = None
    redone: int = 0
    moved: float | None = None
    parts: tuple[tuple[str, float], ...] = ()

    @property
    def seconds(self) -> float | None:
        """From the loss to the next commit."""
        return None if self.until is None else max(0.0, self.until - self.at)

    @property
    def label(self) -> str:
        """The loss in a few words."""
        who = "" if self.worker is None else f"worker {self.worker} "
        return f"{who}{self.what}" + (f": {self.remedy}" if self.remedy else "")


def losses(run: RunFiles) -> list[Loss]:
    """Every fault, in order."""
    events, commits = sorted(run.events, key=lambda e: e["time"]), sorted(e["time"] for e in run.ledger)
    starts = [e["time"] for e in events if e.get("event") == "started"]
    layer_bytes = [number({"size": size}, "size") or 0.0 for size in items(run.last("described"), "layer_bytes")]
    found: list[Loss] = []
    for index, event in enumerate(events):
        if (kind := _KINDS.get(words(event, "event"))) is None:
            continue
        worker = None if number(event, "worker") is None else whole(event, "worker")
        at = event["time"]
        after = bisect_right(starts, at)
        end = starts[after] if after < len(starts) else float("inf")  # what comes then is of another start
        next_commit = bisect_right(commits, at)
        until = commits[next_commit] if next_commit < len(commits) and commits[next_commit] < end else None
        rest = [e for e in events[index + 1 :] if e["time"] <= (end if until is None else until)]
        if kind == "lost":
            at = _injected(events[:index], worker, at) or at
        done = next((e for e in rest if e.get("event") in _DONE and e.get("worker") == worker), event)
        back = next((e for e in rest if e.get("event") == "rolled_back"), {})
        resumed = next((e for e in rest if e.get("event") == "resumed"), {})
        moving = next((e for e in rest if e.get("event") == "moving"), {})
        parts = {k: v for k in inner(resumed, "seconds") if (v := number(resumed["seconds"], k)) is not None}
        ends = kind == "failed"
        found.append(
            Loss(
                kind, at, whole(event, "step"), worker,
                words(event, "reason") or words(event, "error") or ("leaves" if kind == "left" else kind),
                "the run ended" if ends else words(done, "remedy"),
                None if number(done, "replacement") is None else whole(done, "replacement"), None if ends else until,
                whole(back, "steps_lost"), number(moving, "bytes") or _restored(resumed, layer_bytes), _laps(parts),
            )
        )  # fmt: skip
    return found


def _injected(before: Sequence[Mapping[str, Any]], worker: int | None, seen: float) -> float | None:
    """When a fault that was injected hit the worker that was lost then."""
    for event in reversed(before):
        if event["time"] < seen - _INJECTED_S:
            return None
        if event.get("event") == "fault" and event.get("worker") == worker and event.get("fault") == "kill":
            return event["time"]
    return None


def _restored(resumed: Mapping[str, Any], layer_bytes: Sequence[float]) -> float | None:
    """Bytes of the layer states that came to a worker from elsewhere, where their sizes are known."""
    total = 0.0
    for each in items(resumed, "restores"):
        if not isinstance(each, list) or len(each) != 3 or not isinstance(each[1], str) or not layer_bytes:
            return None
        try:
            lo, hi = parse_span(each[1])
        except (ScheduleError, ValueError):  # a weight that layers share, or a part of a span
            return None
        total += sum(layer_bytes[lo:hi])
    return total or None


def _laps(seconds: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """How long each part took; the events say when each was done."""
    ends = sorted((value, name) for name, value in seconds.items() if name != "total")
    return tuple((name, value - before) for (before, _), (value, name) in pairwise([(0.0, ""), *ends]))


def in_recovery(found: Sequence[Loss]) -> list[tuple[float, float]]:
    """The spans of time [from, to) in which some loss had not been followed by a commit yet; none of them touch."""
    spans: list[tuple[float, float]] = []
    for at, until in sorted((each.at, each.until) for each in found if each.until is not None):
        if spans and at <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(until, spans[-1][1])
        else:
            spans.append((at, until))
    return spans
