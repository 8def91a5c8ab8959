"""All that a planner decides: the schedules, by purpose, and the copies that are kept beside them.

A layout speaks of *places*: a worker has a place for as long as it lives, and its successor has it after that. So as
long as all places are taken the layout stays the same, and its text is read once. What one worker needs of it is an
`Excerpt` for each purpose: of a schedule of many thousand ops it reads its own lane alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.schedule.ops import (
    SEND,
    Op,
    Route,
    Schedule,
    ScheduleError,
    Span,
    lane_text,
    parse_lane,
    parse_routes,
    parse_span,
    routes_text,
    span_text,
)  # fmt: skip
from pipeline.wire import WireError, checked, listed, pair, parse, whole

TRAIN, EVALUATE, FULL = "train", "evaluate", "full"
"""Purposes: a step, an evaluation, and a step in which no span is skipped."""


@dataclass(frozen=True)
class Excerpt:
    """What the worker in `place` needs of a schedule: all routes, its own lane, which places compute each span, and
    between which (source, target) something is sent."""

    routes: tuple[Route, ...]
    place: int
    lane: tuple[Op, ...]
    holders: Mapping[Span, tuple[int, ...]]
    sends: frozenset[tuple[int, int]]

    @classmethod
    def of(cls, schedule: Schedule, place: int) -> Excerpt:
        return cls(schedule.routes, place, schedule.lanes.get(place, ()), schedule.holders, sends(schedule))

    @property
    def num_microbatches(self) -> int:
        return len(self.routes)

    @cached_property
    def visits(self) -> Mapping[int, frozenset[int]]:
        """Layer -> the microbatches that visit it; empty where they all visit the same layers."""
        found: dict[int, set[int]] = {}
        for m, route in enumerate(self.routes):
            for lo, hi in route.forward:
                for layer in range(lo, hi):
                    found.setdefault(layer, set()).add(m)
        if all(len(microbatches) == len(self.routes) for microbatches in found.values()):
            return {}
        return {layer: frozenset(microbatches) for layer, microbatches in found.items()}

    @property
    def trains(self) -> bool:
        """Whether anything goes back."""
        return any(route.backward for route in self.routes)


def sends(schedule: Schedule) -> frozenset[tuple[int, int]]:
    """The (source, target) places between which a lowered schedule sends."""
    return frozenset((place, op.peer) for place, op in schedule.ops() if op.kind == SEND)


@dataclass(frozen=True)
class Layout:
    """`schedules` by purpose; `backups` as (span, place): copies that are kept up to date and compute nothing."""

    schedules: Mapping[str, Schedule]
    backups: tuple[tuple[Span, int], ...] = ()

    @property
    def train(self) -> Schedule:
        return self.schedules[TRAIN]

    @property
    def holders(self) -> dict[Span, tuple[int, ...]]:
        """Span -> the places that hold it: those that compute it in a step, and its backups."""
        return with_backups(self.train.holders, self.backups)

    @cached_property
    def text(self) -> str:
        """For `read_assignment`."""
        made = {
            purpose: {
                "routes": routes_text(schedule.routes),
                "lanes": {str(place): lane_text(lane) for place, lane in schedule.lanes.items()},
                "holders": {span_text(span): list(places) for span, places in schedule.holders.items()},
                "sends": sorted(sends(schedule)),
            }
            for purpose, schedule in self.schedules.items()
        }  # fmt: skip
        backups = [[span_text(span), place] for span, place in self.backups]
        return json.dumps({"schedules": made, "backups": backups}, sort_keys=True)

    @cached_property
    def key(self) -> str:
        """What it is known by: the same for equal layouts."""
        return hashlib.blake2b(self.text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Assignment:
    """What the worker in one place needs of a layout."""

    excerpts: Mapping[str, Excerpt]
    backups: tuple[tuple[Span, int], ...]

    @property
    def train(self) -> Excerpt:
        return self.excerpts[TRAIN]

    @property
    def holders(self) -> dict[Span, tuple[int, ...]]:
        """See Layout."""
        return with_backups(self.train.holders, self.backups)

    @property
    def spans(self) -> tuple[Span, ...]:
        """What this place holds."""
        return tuple(span for span, places in self.holders.items() if self.train.place in places)


def with_backups(
    holders: Mapping[Span, tuple[int, ...]], backups: tuple[tuple[Span, int], ...]
) -> dict[Span, tuple[int, ...]]:
    """Span -> those that hold it to compute it or for others, ascending."""
    found = {span: set(places) for span, places in holders.items()}
    for span, place in backups:
        found.setdefault(span, set()).add(place)
    return {span: tuple(sorted(places)) for span, places in sorted(found.items())}


def read_assignment(text: str | bytes, place: int) -> Assignment:
    """What `place` needs of the text of a layout. Raises WireError for what is none."""
    what = "a layout"
    values = checked(parse(text, what), what, schedules=dict, backups=list)
    excerpts: dict[str, Excerpt] = {}
    for purpose, made in values["schedules"].items():
        name = f"schedule {purpose!r} of a layout"
        if not isinstance(made, dict):
            raise WireError(f"{name} is no object")
        found = checked(made, name, routes=list, lanes=dict, holders=dict, sends=list)
        try:
            excerpts[purpose] = Excerpt(
                parse_routes(listed(found["routes"], f"the routes of {name}", str)), place,
                parse_lane(str(found["lanes"].get(str(place), ""))),
                {parse_span(span): listed(places, f"the holders in {name}", lambda each: whole(each, "a place"))
                 for span, places in found["holders"].items()},
                frozenset(listed(found["sends"], f"the sends of {name}", _send)),
            )  # fmt: skip
        except (ScheduleError, ValueError) as error:
            raise WireError(f"{name} cannot be read: {error}") from error
    if TRAIN not in excerpts:
        raise WireError(f"{what} has no schedule {TRAIN!r}")
    return Assignment(excerpts, listed(values["backups"], "the backups of a layout", _backup))


def _send(value: Any) -> tuple[int, int]:
    source, target = pair(value, "a send")
    return whole(source, "a place"), whole(target, "a place")


def _backup(value: Any) -> tuple[Span, int]:
    span, place = pair(value, "a backup")
    try:
        return parse_span(str(span)), whole(place, "a place")
    except ValueError as error:
        raise WireError(f"a backup is {value!r}; expected a span and a place") from error
