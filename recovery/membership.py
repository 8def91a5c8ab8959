"""Views: numbered memberships, written to the store by one coordinator and read by every worker."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pipeline.schedule import Op, Schedule, Span, dumps, loads
from pipeline.store import shard_holders


class MembershipError(RuntimeError):
    """A view that did not come in time, or that this worker has no part in."""


@dataclass(frozen=True)
class Restore:
    """How one span of a worker that joined gets its state: a remedy by name, and (worker, its span) to take from."""

    worker: int
    span: Span
    remedy: str
    sources: tuple[tuple[int, Span], ...] = ()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Restore:
        sources = tuple((int(w), (int(s[0]), int(s[1]))) for w, s in values["sources"])
        return cls(int(values["worker"]), (values["span"][0], values["span"][1]), values["remedy"], sources)


@dataclass(frozen=True)
class View:
    """Who does what from now on. `schedules` are texts by purpose: "train" and "evaluate".

    `joined` says whose place each worker takes that was not in the view before; `restores` how it gets its state, and
    `rollback` the checkpoint that all go back to, if that is the remedy. `places` is the place of each worker: the id
    of who was there at first, by which devices, links and agents are dealt.
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
    shadows: tuple[tuple[Span, int], ...] = ()
    """(span, worker): copies of a span's state that are kept up to date for recovery, and compute nothing."""
    awaited: Mapping[int, int] = field(default_factory=dict)
    """Workers that are being started and join a later view -> whose place they will take; `places` has them already."""
    next_worker: int = 0
    """The id of the next worker that is started; ids are never used again."""

    def schedule(self, purpose: str) -> Schedule:
        """The schedule for a purpose, parsed. Raises KeyError, or ScheduleError for a text it cannot read."""
        return loads(self.schedules[purpose])


def shards_of(view: View, num_layers: int, tied: bool) -> dict[Span, tuple[int, ...]]:
    """Shard -> all workers that hold its state in `view`: those that compute with it, and its shadows."""
    holders = {span: set(workers) for span, workers in view.schedule("train").holders.items()}
    for span, worker in view.shadows:
        holders[span].add(worker)
    return shard_holders({span: tuple(sorted(workers)) for span, workers in holders.items()}, num_layers, tied)


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
        shadows=tuple((span, moved.get(worker, worker)) for span, worker in view.shadows),
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
    """A view that is there."""
    fields = json.loads(store.get(f"view/{number}"))
    fields["workers"] = tuple(fields["workers"])
    fields["places"] = {int(worker): place for worker, place in fields["places"].items()}
    for name in ("agents", "joined", "awaited"):
        fields[name] = {int(new): old for new, old in fields[name].items()}
    fields["shadows"] = tuple(((lo, hi), worker) for (lo, hi), worker in fields["shadows"])
    fields["restores"] = tuple(map(Restore.from_json, fields["restores"]))
    return View(**fields)


def await_view(store: dist.Store, number: int, timeout_s: float) -> View:
    """The view with this number, or the newest after it. Raises MembershipError when it does not come in time."""
    try:
        store.wait([f"view/{number}"], timedelta(seconds=timeout_s))
    except dist.DistNetworkError as error:
        raise MembershipError(f"the store is gone: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        raise MembershipError(f"view {number} did not come within {timeout_s:.0f} s") from error
    while store.check([f"view/{number + 1}"]):
        number += 1
    return read_view(store, number)
