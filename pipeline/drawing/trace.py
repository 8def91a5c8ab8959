"""A timeline as a Chrome trace: the JSON that ui.perfetto.dev and chrome://tracing open.

One process holds a thread per worker, another a thread per link, and a flow leads from the op that made a tensor over
its transfer to the op that used it. Format: "Trace Event Format", Google, 2016. Slices of one thread must nest, so
whatever overlaps another slice without lying inside it (a copy beside the work) gets a thread of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

from pipeline.schedule.ops import COMPUTE, REDUCE, STEP, Op
from pipeline.schedule.timeline import Event, Timeline

_WORKERS, _LINKS = 1, 2


def perfetto(timeline: Timeline) -> dict[str, Any]:
    """The trace of one iteration, ready for `json.dump`; times in microseconds from the first op's start."""
    zero = min((e.start for e in timeline.events), default=0.0)
    rows = _Threads()
    out: list[dict[str, Any]] = []
    made: dict[tuple[int, Op], tuple[int, Event]] = {}
    used: dict[tuple[int, int], list[tuple[float, int]]] = defaultdict(list)
    for event in sorted(timeline.events, key=lambda e: (e.worker, e.start)):
        main = event.op.kind in COMPUTE or event.op.kind in (REDUCE, STEP)
        name = f"worker {event.worker}" if main else f"worker {event.worker} copies"
        thread = rows.thread(_WORKERS, (event.worker, not main), name, event.start, event.end)
        if event.op.kind in COMPUTE:
            made[event.worker, event.op] = thread, event
            used[event.worker, event.op.microbatch].append((event.start, thread))
        out.append(_slice(_WORKERS, thread, event.op, event.start - zero, event.end - event.start))
    for number, move in enumerate(sorted(timeline.transfers, key=lambda t: (t.source, t.target, t.start))):
        name = f"link {move.source} to {move.target}"
        thread = rows.thread(_LINKS, (move.source, move.target), name, move.start, move.end)
        out.append(_slice(_LINKS, thread, move.op, move.start - zero, move.end - move.start))
        flow = {"cat": "transfer", "name": "transfer", "id": number}
        if (move.source, move.op) in made:
            # a flow binds to the slice around its time, so it leaves from inside the op, not from its end
            source, event = made[move.source, move.op]
            at = _us((event.start + event.end) / 2 - zero)
            out.append({**flow, "ph": "s", "pid": _WORKERS, "tid": source, "ts": at})
            out.append({**flow, "ph": "t", "pid": _LINKS, "tid": thread, "ts": _us(move.start - zero)})
            later = used[move.target, move.op.microbatch]
            first = bisect_left(later, (move.end - 1e-9, -1))
            if first < len(later):
                start, target = later[first]
                out.append({**flow, "ph": "f", "bp": "e", "pid": _WORKERS, "tid": target, "ts": _us(start - zero)})
    out.sort(key=lambda e: e["ts"])
    state = "measured" if timeline.measured else "planned"
    about = {
        "name": timeline.name,
        "state": state,
        "makespan_s": timeline.makespan_s,
        "bubble": timeline.bubble,
        "peak_activations": {str(w): n for w, n in timeline.peak_activations.items()},
        "peak_messages": {str(w): n for w, n in timeline.peak_messages.items()},
        "peak_bytes": {str(w): n for w, n in timeline.peak_bytes.items()},
    }
    names = [_named("process_name", _WORKERS, 0, f"{timeline.name} ({state})")]
    names += [_named("process_name", _LINKS, 0, "links")] if timeline.transfers else []
    return {"displayTimeUnit": "ms", "otherData": about, "traceEvents": [*names, *rows.names, *out]}


class _Threads:
    """Hands out thread numbers: one per row while its slices follow each other, another where they would overlap."""

    def __init__(self) -> None:
        self.names: list[dict[str, Any]] = []
        self._free: dict[tuple[int, Hashable], list[tuple[int, float]]] = defaultdict(list)

    def thread(self, process: int, key: Hashable, name: str, start: float, end: float) -> int:
        """The thread for a slice of the row `key`; slices of a row must come in order of `start`."""
        lanes = self._free[process, key]
        for index, (number, until) in enumerate(lanes):
            if start >= until - 1e-9:
                lanes[index] = number, end
                return number
        number = len(self.names) // 2 + 1
        shown = f"{name} ({len(lanes) + 1})" if lanes else name
        self.names.append(_named("thread_name", process, number, shown))
        order = {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": number}
        self.names.append({**order, "args": {"sort_index": number}})
        lanes.append((number, end))
        return number


def _named(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}


def _slice(process: int, thread: int, op: Op, start: float, length: float) -> dict[str, Any]:
    about: dict[str, Any] = {"span": f"{op.span[0]}:{op.span[1]}"}
    if op.microbatch >= 0:
        about["microbatch"] = op.microbatch
    if op.peer >= 0:
        about["peer"] = op.peer
    place = {"pid": process, "tid": thread, "ts": _us(start), "dur": _us(length)}
    return {"ph": "X", "name": str(op), "cat": op.kind, **place, "args": about}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
