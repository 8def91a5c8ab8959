"""Views: numbered memberships, written to the store by one coordinator and read by every worker."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch.distributed as dist

from pipeline.schedule.layout import Assignment, Layout, read_assignment
from pipeline.state.resident import Holders, part_holders, part_span
from pipeline.store.waiting import came
from pipeline.wire import WireError, as_runs, checked, listed, numbered, pair, parse, whole
from recovery.keys import layout_key, view_key

START = "start"
"""What a view rolls back to where there is no checkpoint yet: the weights that the run began with."""
EVICTED = 3
"""The exit code of a worker that is in no view any more: it is nobody's loss."""
_NUMBERED = ("places", "agents", "joined", "awaited")  # mappings among numbers
_SLICE_S = 0.5  # how often who waits for a view asks whether there is a coordinator


class MembershipError(RuntimeError):
    """A view that did not come, cannot be read, or whose workers do not agree."""


class Evicted(RuntimeError):
    """This worker is in no view any more: another has its place, and nothing that it says counts."""


@dataclass(frozen=True)
class Move:
    """How one part of a worker gets its state: a remedy by name, and (worker, its part) to take from.

    A part is a span, as `span_text` writes it, or a weight that several layers share, by the name of its state.
    """

    worker: int
    part: str
    remedy: str
    sources: tuple[tuple[int, str], ...] = ()

    @classmethod
    def from_json(cls, values: Any) -> Move:
        """Raises WireError."""
        if not isinstance(values, dict):
            raise WireError(f"a move is {values!r}; expected an object")
        found = checked(values, "a move", worker=int, part=str, remedy=str, sources=list)
        sources = listed(found["sources"], "the sources of a move", _source)
        return cls(found["worker"], found["part"], found["remedy"], sources)


def _source(value: Any) -> tuple[int, str]:
    worker, part = pair(value, "a source")
    if not isinstance(part, str):
        raise WireError(f"a source is {value!r}; expected a worker and a part")
    return whole(worker, "a source"), part


@dataclass(frozen=True)
class View:
    """Who is in which place of a layout from now on, and how they get there.

    `places` has the place of every worker, of those that are `awaited` as well: they are being started and join a later
    view. `joined` says whose place each worker takes that was not in the view before. `moves` say how state gets where
    the layout wants it, and `rollback` the checkpoint (or START) that all go back to instead, if that is the remedy.
    """

    number: int
    workers: tuple[int, ...]
    layout: str
    """The key of its layout, which lies in the store by itself."""
    first_step: int = 0
    first_sample: int = 0
    checkpoint: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[int, int] = field(default_factory=dict)
    agents: Mapping[int, int] = field(default_factory=dict)
    """Place -> the agent (by rank) that starts and supervises the worker there."""
    joined: Mapping[int, int] = field(default_factory=dict)
    moves: tuple[Move, ...] = ()
    rollback: str | None = None
    awaited: Mapping[int, int] = field(default_factory=dict)
    """Worker -> whose place it will take."""
    next_worker: int = 0
    """The id of the next worker that is started; ids are never used again."""
    generation: int = 0
    """That of the run: nothing of another one is used."""

    @property
    def fence(self) -> tuple[int, int]:
        """(attempt, view), of `checkpoint.Fence`: what is saved in this view."""
        return int(self.details["attempt"]), self.number

    @property
    def at(self) -> dict[int, int]:
        """Place -> the worker of the view that is there."""
        return {self.places[worker]: worker for worker in self.workers}

    def settled(self) -> View:
        """The same, once all its members have what it wanted to give them."""
        return replace(self, joined={}, moves=(), rollback=None)


def part_name(part: str) -> str:
    """A part for a person."""
    return f"the {part} weight" if part_span(part) is None else f"span {part}"


def parts_of(view: View, holders: Holders, num_layers: int, tied: bool) -> dict[str, tuple[int, ...]]:
    """Part -> all workers that hold its state in `view`, ascending; `holders` are those of its layout, by place."""
    at = view.at
    found = part_holders(holders, num_layers, tied)
    return {part: tuple(sorted(at[place] for place in places)) for part, places in found.items()}


def next_view(
    view: View, lost: Sequence[int] = (), ready: Sequence[int] = (), *, wait: bool = False, layout: str | None = None
) -> View:
    """The view after `view`. Each of `lost` has a successor with its place, who joins, or with `wait` is awaited; those
    awaited that are `ready` join. What all do from now on the layout says, the same as before where none is given; what
    moves is still open. Who has joined `view` without having got its state yet joins again, and a rollback is still to
    be done."""
    heirs = {old: view.next_worker + i for i, old in enumerate(lost)}
    new = {heir: old for old, heir in heirs.items() if old not in view.awaited}
    awaited = {heirs.get(worker, worker): old for worker, old in view.awaited.items() if worker not in ready}
    joined = {worker: old for worker, old in view.joined.items() if worker not in lost}
    joined |= {worker: view.awaited[worker] for worker in ready}
    return replace(
        view,
        number=view.number + 1,
        workers=tuple(sorted({*view.workers, *ready, *(() if wait else new)} - set(lost))),
        layout=view.layout if layout is None else layout,
        places={heirs.get(worker, worker): place for worker, place in view.places.items()},
        joined=joined if wait else {**joined, **new},
        awaited={**awaited, **new} if wait else awaited,
        moves=(),
        next_worker=view.next_worker + len(lost),
    )


def publish(store: dist.Store, view: View, layout: Layout) -> None:
    """Write a view, and its layout if that is new. Only the coordinator does; numbers ascend."""
    assert layout.key == view.layout
    if not store.check([key := layout_key(view.layout)]):
        store.set(key, layout.text)
    assert set(view.workers) == set(view.places) - set(view.awaited)
    text = {name: value for name, value in vars(view).items() if name != "workers"}
    text |= {name: as_runs(text[name]) for name in _NUMBERED}
    store.set(view_key(view.number), json.dumps({**text, "moves": [asdict(move) for move in view.moves]}))


def read_layout(store: dist.Store, view: View, place: int) -> Assignment:
    """What a place needs of a view's layout. Raises MembershipError for what is none."""
    try:
        return _assignment(store.get(layout_key(view.layout)), place)
    except WireError as error:
        raise MembershipError(f"the layout of view {view.number} cannot be read: {error}") from error


@lru_cache(maxsize=4)
def _assignment(text: bytes, place: int) -> Assignment:
    """A worker asks for the same one several times while it is built."""
    return read_assignment(text, place)


def read_view(store: dist.Store, number: int) -> View:
    """A view that is there. Raises MembershipError for what is none."""
    try:
        return _view(parse(store.get(view_key(number)), f"view {number}"), number)
    except WireError as error:
        raise MembershipError(f"view {number} cannot be read: {error}") from error


def _view(values: Mapping[str, Any], number: int) -> View:
    what = f"view {number}"
    found = checked(
        values, what, number=int, layout=str, first_step=int, first_sample=int, checkpoint=str | None,
        details=dict, moves=list, rollback=str | None, **dict.fromkeys(_NUMBERED, list),
        next_worker=int, generation=int,
    )  # fmt: skip
    for name in _NUMBERED:
        found[name] = numbered(found[name], f"{name} of {what}")
    found["moves"] = listed(found["moves"], f"the moves of {what}", Move.from_json)
    places, awaited = found["places"], found["awaited"]
    if found["number"] != number or not set(awaited) <= set(places) or len(set(places.values())) < len(places):
        raise WireError(f"{what} has number {found['number']}, or workers without a place of their own")
    return View(workers=tuple(sorted(set(places) - set(awaited))), **found)


def within(seconds: float) -> Callable[[], bool]:
    """Says whether it is still so early: for who waits for a view and has no coordinator to watch."""
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() < deadline


def await_view(store: dist.Store, number: int, guided: Callable[[], bool] = lambda: True) -> View:
    """The view with this number, or the newest after it, as soon as there is one.

    Raises MembershipError when there is no coordinator any more (`guided`) that could write it, or no store.
    """
    try:
        while not came(store, [view_key(number)], _SLICE_S):
            if not guided():
                raise MembershipError(f"view {number} does not come: the coordinator gives no sign of life")
        while store.check([view_key(number + 1)]):
            number += 1
        return read_view(store, number)
    except dist.DistNetworkError as error:
        raise MembershipError(f"the store is gone: {str(error).splitlines()[0]}") from error
