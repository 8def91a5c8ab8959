"""Who worked when: a lane for each worker that was there at once, so that who takes a place lies behind who had it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launch.page.files import RunFiles, inner, items, whole, words
from launch.page.goodput import RunClock


@dataclass
class Stay:
    """A worker from `start` to `end` (seconds of the run's clock); `ended` says how it went, "" while it is there."""

    worker: int
    lane: int
    start: float
    end: float
    view: int
    layers: str = ""
    ended: str = ""


@dataclass
class _Watch:
    """Follows the events of a run."""

    clock: RunClock
    stays: list[Stay] = field(default_factory=list)
    here: dict[int, Stay] = field(default_factory=dict)
    lane_of: dict[int, int] = field(default_factory=dict)
    place_of: dict[int, int] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)
    view: int = 1

    def comes(self, worker: int, at: float, instead: int | None = None) -> None:
        if worker in self.here:
            return
        self.place_of.setdefault(worker, self.place_of.get(instead, instead) if instead is not None else worker)
        taken = {stay.lane for stay in self.here.values()}
        lane = self.lane_of.get(instead, -1) if instead is not None else -1
        if lane < 0 or lane in taken:
            lane = next(number for number in range(len(taken) + 1) if number not in taken)
        self.lane_of[worker] = lane
        self.here[worker] = stay = Stay(worker, lane, at, at, self.view, self._layers(worker))
        self.stays.append(stay)

    def goes(self, worker: int, at: float, ended: str) -> None:
        if (stay := self.here.pop(worker, None)) is not None:
            stay.end, stay.ended = at, ended

    def holds(self, layers: dict[str, Any], at: float) -> None:
        """Who has other layers from now on has a new stay in the same lane."""
        self.layers = layers
        for worker, stay in list(self.here.items()):
            if stay.layers != (now := self._layers(worker)):
                if at <= stay.start:
                    stay.layers = now
                    continue
                stay.end = at
                self.here[worker] = after = Stay(worker, stay.lane, at, at, self.view, now)
                self.stays.append(after)

    def _layers(self, worker: int) -> str:
        found = self.layers.get(str(self.place_of.get(worker, worker)))
        return " ".join(map(str, found)) if isinstance(found, list) else ""


def stays(run: RunFiles, clock: RunClock) -> list[Stay]:
    """Every stay of every worker."""
    watch = _Watch(clock)
    events = sorted(run.events, key=lambda e: e["time"])
    for event in events:
        name, at = words(event, "event"), clock.at(event["time"])
        if name == "started":
            for worker in list(watch.here):
                watch.goes(worker, at, "")
            watch.lane_of, watch.place_of, watch.view = {}, {}, 1
            watch.layers = _first_layers(events, event["time"])
            for worker in range(min(whole(event, "workers"), 1 << 14)):
                watch.comes(worker, at)
        elif name == "joined":
            watch.comes(whole(event, "worker"), at)
        elif name == "detected":
            watch.goes(whole(event, "worker"), at, words(event, "reason", "lost"))
        elif name == "view":
            watch.view = whole(event, "view")
            now, joined = _workers(items(event, "workers")), inner(event, "joined")
            for worker in set(watch.here) - set(now):
                watch.goes(worker, at, "left")
            for worker in now:
                instead = joined.get(str(worker))
                watch.comes(worker, at, instead if isinstance(instead, int) else None)
        elif name in ("resized", "shifted", "stayed") and inner(event, "layers"):
            watch.holds(inner(event, "layers"), at)
    for stay in watch.here.values():
        stay.end = max(stay.start, clock.total)
    return watch.stays


def _workers(values: list[Any]) -> list[int]:
    return [value for value in values if isinstance(value, int) and not isinstance(value, bool)][: 1 << 14]


def _first_layers(events: list[dict[str, Any]], began: float) -> dict[str, Any]:
    """Which place has which layers when a start begins."""
    described: list[Mapping[str, Any]] = [e for e in events if e.get("event") == "described"]
    near = min(described, key=lambda e: abs(e["time"] - began), default={})
    return inner(near, "layers")
