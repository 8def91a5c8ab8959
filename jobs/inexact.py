"""Which steps of a run do not follow from its data, by its events: others have to be run again from before them.

A lost state that came back by a remedy which carries weights alone (CheckFree and its like) depends on when the worker
was lost, as do the routes that microbatches take around it, and the number of replicas that gradients are summed over.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.schedule.ops import parse_span
from recovery.policy import remedies

APPROXIMATE = frozenset(name for name, remedy in remedies().items() if remedy.carries != "state")
"""The remedies after which weights are others than without the loss."""

Event = Mapping[str, Any]


@dataclass
class _Change:
    """What an event changed when `first` steps were committed, up to `last`; `kept`: a checkpoint of `first` that was
    made afterwards has it in it."""

    event: Event
    first: int
    last: float
    kept: bool = False

    def undone(self, step: int) -> bool:
        """Whether going back to the checkpoint of a step leaves nothing of it."""
        return self.first > step or (self.first == step and not self.kept)


def inexact(
    events: Iterable[Event], start: int, step: int, replicas: int | None = None, tied: bool = False
) -> Event | None:
    """The first event that makes the steps after `start`, up to `step`, others than the data alone would; None where
    they follow from the state at `start` and the data. `events` are lines of events.jsonl, in order; with `replicas`,
    sums depend on how many there are, and the run began with so many; `tied`: also on whether the embedding, which is
    the head, is in two places."""
    for change in _changes(events, replicas, tied):
        begins = change.first < step and change.last >= start
        if begins and not (change.kept and change.first == change.last == start):
            return change.event
    return None


def changed_at(events: Iterable[Event], step: int) -> Event | None:
    """The first event that made the weights others when `step` steps were committed: what was saved of that step may
    have them or not."""
    return next((each.event for each in _changes(events) if each.first == step), None)


def _changes(events: Iterable[Event], replicas: int | None = None, tied: bool = False) -> list[_Change]:
    """Those that stand in the end: a rollback, or a resumed run, undoes what came after its checkpoint."""
    found: list[_Change] = []
    for event in events:
        name, step = event["event"], int(event["step"])
        if name == "started":
            found = [each for each in found if not each.undone(step)]
            for each in found:
                each.last = min(each.last, step)  # all places have workers again
        elif name == "rolled_back":
            found = [each for each in found if each.last == math.inf or not each.undone(step)]
            for each in found:
                each.first = min(each.first, step)
        elif name == "checkpoint":
            for each in found:
                each.kept |= each.first == step
        elif name == "rejoined":
            _end(found, ("rerouted", "taken_over"), step, event.get("worker"))
        elif name == "rerouted" or (name == "taken_over" and tied and replicas is not None):
            found.append(_Change(event, step, math.inf))
        elif name == "resized" and replicas is not None:
            _end(found, ("resized",), step)
            if tied or _replicas(event) != {replicas}:
                found.append(_Change(event, step, math.inf))
        if _is_approximate(event):
            if name == "resumed":  # the workers know best after which step it was
                view = event.get("view")
                found = [each for each in found if each.last == math.inf or each.event.get("view") != view]
            found.append(_Change(event, step, step))
    return found


def _end(found: Iterable[_Change], names: tuple[str, ...], step: int, worker: int | None = None) -> None:
    for each in found:
        if each.event["event"] in names and worker in (None, each.event.get("worker")):
            each.last = min(each.last, step)


def _is_approximate(event: Event) -> bool:
    """Whether it tells of a state that came back as another one."""
    said = {str(event.get("remedy", ""))} | {str(each[2]) for each in event.get("restores", ()) if len(each) == 3}
    return bool(APPROXIMATE & {word for text in said for word in text.split("+")})


def _replicas(event: Event) -> set[int]:
    """How many replicas layers have, by the `layers` of an event: place -> spans."""
    count = Counter(
        layer for spans in event.get("layers", {}).values() for span in spans for layer in range(*parse_span(span))
    )
    return set(count.values())


def told(event: Event) -> str:
    """An event for a person."""
    fields = ("worker", "remedy", "workers")
    about = ", ".join(f"{name} {event[name]}" for name in fields if name in event)
    if "restores" in event:
        about = ", ".join(sorted({f"worker {each[0]} by {each[2]}" for each in event["restores"]}))
    return f"{event['event']} at step {event['step']}" + (f" ({about})" if about else "")
