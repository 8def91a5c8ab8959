"""What a record must have before it is kept and shown: records come through the store, where anybody may write."""

from __future__ import annotations

import math
import re
from typing import Any

from pipeline.runtime.peak_memory import PEAK_BYTES
from pipeline.schedule.ops import ScheduleError, parse_op
from pipeline.wire import Kind, WireError, checked

_FIELDS: dict[str, dict[str, Kind]] = {
    "step": {
        "step": int, "loss": float, "tokens": int, "tokens_per_s": float, "grad_norm": float, "lr": float, "view": int,
        "first_sample": int, "samples": int,
    },
    "evaluation": {"step": int, "loss": float, "perplexity": float, "means": dict},
    "stopped": {"step": int},
    "timeline": {"lanes": dict},
    "ledger": {"step": int, "view": int},
    "event": {"event": str},
}  # fmt: skip
_OPTIONAL: dict[str, dict[str, Kind]] = {
    "timeline": {"step": int},
    "step": {
        "means": dict, "sources": dict, **dict.fromkeys(("tflops", "mfu"), float), **dict.fromkeys(PEAK_BYTES, int),
    },
}  # fmt: skip
"""What a record may have besides."""
_EVENTS: dict[str, dict[str, Kind]] = {
    "fault": {"worker": int, "step": int, "fault": str, "at": str},
    "resumed": {"step": int, "view": int, "seconds": dict, "restores": list, "woken": float, "there": int},
    "rolled_back": {"step": int, "to": str},
    "rehearsed": {
        "worker": int, "span": str, "start": str, "tokens": int, "error_before": float, "error_after": float,
        "took": float,
    },
    "not_rehearsed": {"worker": int, "span": str, "reason": str},
    "not_finite": {"step": int, "error": str},
    "checkpoint": {"step": int},
    "checkpoint_failed": {"step": int, "error": str},
    "exported": {"step": int, "path": str},
    "export_failed": {"step": int, "error": str},
    "early_stop": {"step": int, "best": float, "evaluations": int},
}  # fmt: skip
"""The events that workers report; all others are the coordinator's own."""


_MOST = 2**63 - 1
_LONGEST_OP = 64
_LARGE = re.compile(r"\d{7,}")
"""Numbers in an op that are not of a schedule, which has none of a million or more."""


def check_record(record: dict[str, Any], steps: int) -> dict[str, Any]:
    """What a record of a run of so many steps says, without the fields that it should not have. Raises WireError.

    Every float is finite, every whole number one that a file and a picture can hold.
    """
    kind = checked(record, "a record", kind=str)["kind"]
    if kind not in _FIELDS:
        raise WireError(f"a record is of kind {kind!r}; expected {', '.join(_FIELDS)}")
    what = f"a record of kind {kind}"
    optional = {name: each for name, each in _OPTIONAL.get(kind, {}).items() if name in record}
    kinds: dict[str, Kind] = {"kind": str, "time": float, **_FIELDS[kind], **optional}
    if kind == "event":
        name = checked(record, what, event=str)["event"]
        if name not in _EVENTS:
            raise WireError(f"{what} is called {name!r}; expected {', '.join(_EVENTS)}")
        what = f"a record of {name}"
        kinds |= _EVENTS[name]
    found = checked(record, what, **kinds)
    if "seconds" in found:
        found["seconds"] = _seconds(found["seconds"], f"the seconds of {what}")
    if found.get("means"):
        found["means"] = _seconds(found["means"], f"the means of {what}")
    if "sources" in found:
        kinds = dict.fromkeys(found["sources"], int)
        found["sources"] = _counted(checked(found["sources"], f"the sources of {what}", **kinds), what)
    if "restores" in found:
        _check_restores(found["restores"])
    if "lanes" in found:
        _check_lanes(found["lanes"])
    for name, value in found.items():
        if isinstance(value, float):
            _check_finite(value, f"{name} of {what}")
        elif isinstance(value, int):
            most = steps if name == "step" else _MOST
            if not 0 <= value <= most:
                raise WireError(f"{name} of {what} is {value}; expected 0 to {most}")
    return found


def _check_finite(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise WireError(f"{what} is {value}; expected a finite number")


def _seconds(seconds: dict[str, Any], what: str) -> dict[str, float]:
    if not seconds:
        raise WireError(f"{what} are none; expected one at least")
    found = checked(seconds, what, **dict.fromkeys(seconds, float))
    for name, value in found.items():
        _check_finite(value, f"{name} of {what}")
    return found


def _counted(sources: dict[str, Any], what: str) -> dict[str, int]:
    """Source -> how many samples of a step are from it."""
    for name, count in sources.items():
        if not 0 < count <= _MOST:
            raise WireError(f"{count} samples of {what} are from {name!r:.80}; expected 1 to {_MOST}")
    return sources


def _check_restores(restores: list[Any]) -> None:
    """[[worker, part, remedy], ...]."""
    for each in restores:
        if not isinstance(each, list) or [type(field) for field in each] != [int, str, str]:
            raise WireError("a restore is not a worker, a part and a remedy")


def _check_lanes(lanes: dict[str, Any]) -> None:
    """{worker: [[op, start, end], ...]}."""
    for worker, lane in lanes.items():
        if not worker.isdecimal() or _LARGE.search(worker) or not isinstance(lane, list):
            raise WireError("a timeline has lanes of no worker, or that are no lists")
        for event in lane:
            if not isinstance(event, list) or [type(each) for each in event] != [str, float, float]:
                raise WireError(f"lane {worker} of a timeline holds what is not an op, its start and its end")
            _check_op(event[0])
            for second in event[1:]:
                _check_finite(second, f"a time of {event[0]}")


def _check_op(text: str) -> None:
    if len(text) > _LONGEST_OP or _LARGE.search(text):
        raise WireError(f"a timeline holds {text!r:.80}; expected an op of a schedule")
    try:
        parse_op(text)
    except ScheduleError as error:
        raise WireError(str(error)) from error
