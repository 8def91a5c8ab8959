"""Views: numbered memberships, written to the store by one coordinator and read by every worker."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pipeline.schedule.ops import Op, Schedule, Span, dumps, loads
from pipeline.state.resident import part_holders
from pipeline.wire import WireError, checked, listed, numbered, parse, whole

START = "start"
"""What a view rolls back to where there is no checkpoint yet: the weights that the run began with."""
EVICTED = 3
"""The exit code of a worker that is in no view any more: it is nobody's loss."""
_SLICE_S = 0.5  # how often who waits for a view asks whether there is a coordinator


class MembershipError(RuntimeError):
    """A view that did not come, cannot be read, or whose workers do not agree."""


class Evicted(RuntimeError):
    """This worker is in no view any more: another has its place, and nothing that it says counts."""


@dataclass(frozen=True)
class Restore:
    """How one part of a worker that joined gets its state: a remedy by name, and (worker, its part) to take from.

    A part is a span, as `span_text` writes it, or a weight that several layers share, by the name of its state.
    """

    worker: int
    part: str
    remedy: str
    sources: tuple[tuple[int, str], ...] = ()

    @classmethod
    def from_json(cls, values: Any) -> Restore:
        """Raises WireError."""
        if not isinstance(values, dict):
            raise WireError(f"a restore is {values!r}; expected an object")
        found = checked(values, "a restore", worker=int, part=str, remedy=str, sources=list)
        sources = listed(found["sources"], "the sources of a restore", _source)
        return cls(found["worker"], found["part"], found["remedy"], sources)


def _span(value: Any) -> Span:
    lo, hi = _pair(value, "a span")
    return whole(lo, "a span"), whole(hi, "a span")


def _source(value: Any) -> tuple[int, str]:
    worker, part = _pair(value, "a source")
    if not isinstance(part, str):
        raise WireError(f"the part of a source is {part!r}; expected a text")
    return whole(worker, "a source"), part


def _backup(value: Any) -> tuple[Span, int]:
    span, worker = _pair(value, "a backup")
    return _span(span), whole(worker, "a backup")


def _pair(value: Any, what: str) -> Sequence[Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise WireError(f"{what} is {value!r}; expected a pair")
    return value


@dataclass(frozen=True)
class View:
    """Who does what from now on. `schedules` are texts by purpose: "train" and "evaluate".

    `joined` says whose place each worker takes that was not in the view before; `restores` how it gets its state, and
    `rollback` the checkpoint (or START) that all go back to, if that is the remedy. `places` is the place of each
    worker: the id of who was there at first, by which devices, links and agents are dealt.
    """

    number: int
    workers: tuple[int, ...]
    schedules: Mapping[str, str]
    first_step: int = 0
    first_sample: int = 0
    checkpoint: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[int, int] = field(default_factory=dict)
    agents: Mapping[int, int] = field(default_factory=dict)
    """Place -> the agent (by rank) that starts and supervises the worker there."""
    joined: Mapping[int, int] = field(default_factory=dict)
    restores: tuple[Restore, ...] = ()
    rollback: str | None = None
    backups: tuple[tuple[Span, int], ...] = ()
    """(span, worker): copies of a span's state that are kept up to date for recovery, and compute nothing."""
    awaited: Mapping[int, int] = field(default_factory=dict)
    """Workers that are being started and join a later view -> whose place they will take; `places` has them already."""
    next_worker: int = 0
    """The id of the next worker that is started; ids are never used again."""
    generation: int = 0
    """That of the run: nothing of another one is used."""

    @property
    def fence(self) -> tuple[int, int]:
        """(attempt, view), of `checkpoint.Fence`: what is saved in this view."""
        return int(self.details["attempt"]), self.number

    def schedule(self, purpose: str) -> Schedule:
        """The schedule for a purpose, parsed. Raises KeyError, or ScheduleError for a text it cannot read."""
        return loads(self.schedules[purpose])


def part_name(part: str) -> str:
    """A part for a person."""
    return f"span {part}" if ":" in part else f"the {part} weight"


def parts_of(view: View, num_layers: int, tied: bool) -> dict[str, tuple[int, ...]]:
    """Part -> all workers that hold its state in `view`: those that compute with it, and its backups."""
    holders = {span: set(workers) for span, workers in view.schedule("train").holders.items()}
    for span, worker in view.backups:
        holders[span].add(worker)
    return part_holders({span: tuple(sorted(workers)) for span, workers in holders.items()}, num_layers, tied)


def substitute(schedule: Schedule, places: Mapping[int, int]) -> Schedule:
    """The schedule with other workers in some places: old id -> new id."""

    def op(old: Op) -> Op:
        return old if old.peer not in places else old._replace(peer=places[old.peer])

    lanes = {places.get(worker, worker): tuple(map(op, lane)) for worker, lane in schedule.lanes.items()}
    return Schedule(schedule.routes, lanes, schedule.name)


def replace_workers(view: View, lost: tuple[int, ...]) -> View:
    """The next view, in which a new worker takes the place of each lost one; how it is restored is still open.

    Who has joined `view` without having got its state yet joins again, and a rollback is still to be done.
    """
    after, new = succeed(view, lost)
    moved = {old: worker for worker, old in new.items()}
    return replace(
        after,
        workers=tuple(sorted(moved.get(worker, worker) for worker in view.workers)),
        schedules={purpose: dumps(substitute(loads(text), moved)) for purpose, text in view.schedules.items()},
        joined={**after.joined, **new},
        backups=tuple((span, moved.get(worker, worker)) for span, worker in view.backups),
    )


def succeed(view: View, lost: Sequence[int]) -> tuple[View, dict[int, int]]:
    """The next view as far as it follows from who is lost: new workers have their places, and are still to be put to
    work. And the new workers -> whom they follow, without those who follow one that was itself awaited."""
    moved = {old: view.next_worker + i for i, old in enumerate(lost)}
    after = replace(
        view,
        number=view.number + 1,
        places={moved.get(worker, worker): place for worker, place in view.places.items()},
        joined={worker: old for worker, old in view.joined.items() if worker not in lost},
        awaited={moved.get(worker, worker): old for worker, old in view.awaited.items()},
        restores=(),
        next_worker=view.next_worker + len(moved),
    )
    return after, {new: old for old, new in moved.items() if old not in view.awaited}


def leave(view: View, lost: Sequence[int]) -> View:
    """The next view without `lost`, whose replacements are awaited; who does their work is still open."""
    after, new = succeed(view, lost)
    left = tuple(worker for worker in view.workers if worker not in lost)
    return replace(after, workers=left, awaited={**after.awaited, **new})


def come(view: View, ready: Sequence[int]) -> View:
    """The next view, in which awaited workers that are ready have their places back; their work and their state are
    still to come."""
    return replace(
        view,
        number=view.number + 1,
        workers=tuple(sorted({*view.workers, *ready})),
        joined={worker: view.awaited[worker] for worker in ready},
        awaited={worker: old for worker, old in view.awaited.items() if worker not in ready},
        restores=(),
        rollback=None,
    )


def publish(store: dist.Store, view: View) -> None:
    """Write a view. Only the coordinator does; numbers ascend."""
    store.set(f"view/{view.number}", json.dumps(asdict(view)))


def read_view(store: dist.Store, number: int) -> View:
    """A view that is there. Raises MembershipError for what is none."""
    try:
        return _view(parse(store.get(f"view/{number}"), f"view {number}"), number)
    except WireError as error:
        raise MembershipError(f"view {number} cannot be read: {error}") from error


def _view(values: Mapping[str, Any], number: int) -> View:
    what = f"view {number}"
    found = checked(
        values, what, number=int, workers=list, schedules=dict, first_step=int, first_sample=int,
        checkpoint=str | None, details=dict, places=dict, agents=dict, joined=dict, restores=list,
        rollback=str | None, backups=list, awaited=dict, next_worker=int, generation=int,
    )  # fmt: skip
    checked(found["schedules"], f"the schedules of {what}", **dict.fromkeys(found["schedules"], str))
    found["workers"] = listed(found["workers"], f"the workers of {what}", lambda each: whole(each, "a worker"))
    for name in ("places", "agents", "joined", "awaited"):
        found[name] = numbered(found[name], f"{name} of {what}")
    found["backups"] = listed(found["backups"], f"the backups of {what}", _backup)
    found["restores"] = listed(found["restores"], f"the restores of {what}", Restore.from_json)
    if found["number"] != number or not set(found["workers"]) <= set(found["places"]):
        raise WireError(f"{what} has number {found['number']}, or workers without a place")
    return View(**found)


def within(seconds: float) -> Callable[[], bool]:
    """Says whether it is still so early: for who waits for a view and has no coordinator to watch."""
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() < deadline


def await_view(store: dist.Store, number: int, guided: Callable[[], bool] = lambda: True) -> View:
    """The view with this number, or the newest after it, as soon as there is one.

    Raises MembershipError when there is no coordinator any more (`guided`) that could write it, or no store.
    """
    try:
        while True:
            try:
                store.wait([f"view/{number}"], timedelta(seconds=_SLICE_S))
                break
            except dist.DistNetworkError:
                raise
            except RuntimeError as error:
                if not guided():
                    raise MembershipError(
                        f"view {number} does not come: the coordinator gives no sign of life"
                    ) from error
        while store.check([f"view/{number + 1}"]):
            number += 1
        return read_view(store, number)
    except dist.DistNetworkError as error:
        raise MembershipError(f"the store is gone: {str(error).splitlines()[0]}") from error
