"""When each op ran, planned or measured: what the simulator returns, the worker records and the drawings read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.schedule.ops import Op


class Event(NamedTuple):
    """`worker` was busy with `op` from `start` to `end`, in seconds since the iteration began."""

    worker: int
    op: Op
    start: float
    end: float


class Transfer(NamedTuple):
    """The output of `op` was on the link from `source` to `target` from `start`; it could be used at `end`."""

    source: int
    target: int
    op: Op
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """One iteration. `peak_activations[w]` is the most microbatch activations, one per span, worker w held at once;
    `peak_messages[w]` the most messages that it may hold at once whatever the times, where that was asked for."""

    name: str
    events: tuple[Event, ...]
    transfers: tuple[Transfer, ...] = ()
    peak_activations: Mapping[int, int] = field(default_factory=dict)
    peak_bytes: Mapping[int, float] = field(default_factory=dict)
    measured: bool = False
    workers: tuple[int, ...] = ()
    """Who takes part, idle ones too; those that have events, unless given."""
    peak_messages: Mapping[int, int] = field(default_factory=dict)

    @property
    def makespan_s(self) -> float:
        """Seconds from the first start to the last end of any op."""
        return max((e.end for e in self.events), default=0.0) - min((e.start for e in self.events), default=0.0)

    @property
    def busy_s(self) -> dict[int, float]:
        """Worker -> seconds spent in F, B, I, W and R."""
        busy = dict.fromkeys(sorted({*self.workers, *(e.worker for e in self.events)}), 0.0)
        for event in self.events:
            if event.op.kind in "FBIWR":
                busy[event.worker] += event.end - event.start
        return busy

    @property
    def bubble(self) -> float:
        """The share of worker time, workers times makespan, in which nobody computed. 0 is perfect."""
        busy = self.busy_s
        total = self.makespan_s * len(busy)
        return 1.0 - sum(busy.values()) / total if total > 0 else 0.0
