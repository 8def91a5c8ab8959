"""What a record must have before it is kept and shown: records come through the store, where anybody may write."""

from __future__ import annotations

import math
from typing import Any

from pipeline.schedule import ScheduleError, parse_op
from pipeline.wire import Kind, WireError, checked

_FIELDS: dict[str, dict[str, Kind]] = {
    "step": {
        "step": int, "loss": float, "tokens": int, "tokens_per_s": float, "grad_norm": float, "lr": float, "view": int,
        "first_sample": int, "samples": int,
    },
    "evaluation": {"step": int, "loss": float, "perplexity": float},
    "stopped": {"step": int},
    "timeline": {"lanes": dict},
    "event": {"event": str},
}  # fmt: skip
_EVENTS: dict[str, dict[str, Kind]] = {
    "fault": {"worker": int, "step": int, "fault": str, "at": str},
    "resumed": {"step": int, "view": int, "seconds": dict, "restores": list, "woken": float},
    "rolled_back": {"step": int, "to": str, "steps_lost": int},
    "not_finite": {"step": int, "error": str},
    "checkpoint": {"step": int},
    "checkpoint_failed": {"step": int, "error": str},
    "exported": {"step": int, "path": str},
}  # fmt: skip
"""The events that workers report; all others are the coordinator's own."""


def check_record(record: dict[str, Any]) -> dict[str, Any]:
    """The record itself, if it is one. Raises WireError."""
    kind = checked(record, "a record", kind=str, time=float)["kind"]
    if kind not in _FIELDS:
        raise WireError(f"a record is of kind {kind!r}; expected {', '.join(_FIELDS)}")
    what = f"a record of kind {kind}"
    checked(record, what, **_FIELDS[kind])
    if kind == "event":
        if record["event"] not in _EVENTS:
            raise WireError(f"{what} is called {record['event']!r}; expected {', '.join(_EVENTS)}")
        checked(record, f"a record of {record['event']}", **_EVENTS[record["event"]])
    if kind == "timeline":
        _check_lanes(record["lanes"])
    if kind == "evaluation" and not math.isfinite(record["loss"]):
        raise WireError(f"{what} has the loss {record['loss']}; expected a finite one")
    if record.get("event") == "resumed" and not all(isinstance(s, float) for s in record["seconds"].values()):
        raise WireError(f"{what} has seconds that are none")
    return record


def _check_lanes(lanes: dict[str, Any]) -> None:
    """{worker: [[op, start, end], ...]}."""
    for worker, lane in lanes.items():
        if not worker.isdecimal() or not isinstance(lane, list):
            raise WireError("a timeline has lanes of no worker, or that are no lists")
        for event in lane:
            if not isinstance(event, list) or [type(each) for each in event] != [str, float, float]:
                raise WireError(f"a timeline holds {event!r}; expected an op, its start and its end")
            try:
                parse_op(event[0])
            except ScheduleError as error:
                raise WireError(str(error)) from error
