"""Every key of a run's store: written here, and read here. What is read is checked, since anybody may have written it.

    view/N              a view, by the coordinator                 failed      why the run ends, for every agent
    loss/W, losses      worker W is gone, by whoever saw it        over        the exit code of a run that has ended
    complaint/V         a link of view V is broken                 done/A      agent A has seen the end
    beat/W, agent/A     signs of life                              stop        somebody has asked the run to stop
    leave/A, leavers    agent A is about to go
    migration           moves that are about to be made        migrated/N/M  what move M of migration N carries is there
    error/W             the error that ended a worker              ledger/W/N  whether the ledger is on the disk, to N
    record/W/N          what worker W reports                      claim/X     whether fault X has happened
    spare/A/N           the place that a spare worker takes        layout/K    the text of a layout, by its key
    viewV/vote/I/W      the vote of worker W on iteration I        viewV/outcome/I  what became of it
    viewV/votes/I       how many have voted on it

The members of a group meet under its name (`pipeline/runtime/groups.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from pipeline.wire import WireError, checked, parse

_FAILED, _OVER, _STOP = "failed", "over", "stop"


def _put(store: dist.Store, key: str, values: dict[str, Any]) -> None:
    store.set(key, json.dumps(values))


def _take(store: dist.Store, key: str) -> dict[str, Any] | None:
    """What stands under a key, if anything does. Raises WireError for what is no JSON object."""
    return parse(store.get(key), key) if store.check([key]) else None


# ---- signs of life ----


@dataclass(frozen=True)
class Beat:
    """A worker's sign of life: `number` ascends, `waiting` is what it waits for, `progress` ascends with long work, and
    `built` says that it could take a place."""

    number: int
    waiting: str
    progress: int
    built: bool


def beat(store: dist.Store, worker: int, mine: Beat) -> None:
    """Say that a worker lives."""
    _put(store, f"beat/{worker}", vars(mine))


def read_beat(store: dist.Store, worker: int) -> Beat | None:
    """A worker's newest sign of life; None before the first, and for what is none."""
    with suppress(WireError):
        if (values := _take(store, f"beat/{worker}")) is not None:
            return Beat(**checked(values, "a beat", number=int, waiting=str, progress=int, built=bool))
    return None


def beat_agent(store: dist.Store, agent: int, number: int) -> None:
    """Say that an agent lives: twice a second, with ascending numbers. Agent 0 has the coordinator in it."""
    store.set(f"agent/{agent}", str(number))


def read_agent(store: dist.Store, agent: int) -> bytes | None:
    """An agent's newest sign of life, to be compared with the one before; None before the first."""
    return store.get(key) if store.check([key := f"agent/{agent}"]) else None


def leave(store: dist.Store, agent: int, seconds: float) -> None:
    """Say that an agent goes in so many seconds, with its machine."""
    store.set(f"leave/{agent}", str(seconds))
    store.set("leavers", "1")


def stay(store: dist.Store, agent: int) -> None:
    """It has come back, or was told that it may stay."""
    store.delete_key(f"leave/{agent}")


def leavers(store: dist.Store) -> bool:
    """Whether any agent has ever said that it is about to go."""
    return store.check(["leavers"])


def leaves(store: dist.Store, agent: int) -> float | None:
    """In how many seconds an agent goes, as of when it said so; None where it does not."""
    if not store.check([key := f"leave/{agent}"]):
        return None
    try:
        return max(0.0, float(store.get(key)))
    except ValueError:
        return 0.0


# ---- layers that move in the background ----


def tell_migration(store: dist.Store, plan: dict[str, Any]) -> None:
    """Say which moves are about to be made."""
    _put(store, "migration", plan)


def read_migration(store: dist.Store) -> dict[str, Any] | None:
    """The newest of these, if there is any. Raises WireError for what is none."""
    fields = {"number": int, "view": int, "layout": str, "moves": list}
    return None if (values := _take(store, "migration")) is None else checked(values, "a migration", **fields)


def say_migrated(store: dist.Store, number: int, place: int) -> None:
    """All that a move of a migration carries is there, or on its way."""
    store.set(f"migrated/{number}/{place}", "")


def has_migrated(store: dist.Store, number: int, places: Iterable[int]) -> bool:
    """Whether that was said of all these moves."""
    return all(store.check([f"migrated/{number}/{place}"]) for place in places)


# ---- losses and complaints ----


@dataclass(frozen=True)
class LossReport:
    """A worker that is gone. `told`: the reason is an error that it met, and not how the process ended."""

    worker: int
    reason: str
    told: bool
    time: float


def report_loss(store: dist.Store, worker: int, reason: str, told: bool = False) -> None:
    """Tell the coordinator that a worker is gone. A writer that dies in the middle keeps no other from being read."""
    _put(store, f"loss/{worker}", vars(LossReport(worker, reason, told, time.time())))
    store.set("losses", f"{worker} {time.time_ns()}")


def newest_loss(store: dist.Store) -> bytes:
    """Who was reported last, and when: changes when there is something to read."""
    return store.get("losses") if store.check(["losses"]) else b""


def read_loss(store: dist.Store, worker: int) -> LossReport | None:
    """The report of a worker's loss, if it is there. Raises WireError for what is none, which is gone then."""
    fields = {"worker": int, "reason": str, "told": bool, "time": float}
    found = _take_well(store, f"loss/{worker}", fields)
    return None if found is None else LossReport(**{**found, "worker": worker})


def _take_well(store: dist.Store, key: str, fields: dict[str, Any]) -> dict[str, Any] | None:
    """The fields that stand under a key, if anything does. Raises WireError for what lacks them, and deletes it."""
    try:
        values = _take(store, key)
        return None if values is None else checked(values, key, **fields)
    except WireError:
        store.delete_key(key)
        raise


def complain(store: dist.Store, view: int, worker: int, reason: str) -> None:
    """Tell the coordinator that this worker has met a broken link in `view`."""
    _put(store, f"complaint/{view}", {"worker": worker, "reason": reason})


def read_complaint(store: dist.Store, view: int) -> tuple[int, str] | None:
    """(worker, reason) of a complaint in `view`, if there is one. Raises WireError for what is none, which is gone
    then."""
    found = _take_well(store, f"complaint/{view}", {"worker": int, "reason": str})
    return None if found is None else (found["worker"], found["reason"])


@dataclass(frozen=True)
class ErrorReport:
    """The error that ended a worker. `fatal`: another worker in its place would meet it too."""

    text: str
    fatal: bool


def report_error(store: dist.Store, worker: int, error: ErrorReport) -> None:
    """Leave a worker's last words for its agent."""
    _put(store, f"error/{worker}", vars(error))


def read_error(store: dist.Store, worker: int) -> ErrorReport | None:
    """A worker's last words, if it has left any that can be read."""
    with suppress(WireError):
        if (values := _take(store, f"error/{worker}")) is not None:
            return ErrorReport(**checked(values, "an error", text=str, fatal=bool))
    return None


# ---- the run as a whole ----


@dataclass(frozen=True)
class Failure:
    """Why a run has been ended, and with which exit code."""

    reason: str
    code: int = 1


def fail(store: dist.Store, reason: str, code: int = 1) -> None:
    """End the run on every agent, unless somebody has ended it for another reason before."""
    store.compare_set(_FAILED, "", json.dumps({"reason": reason, "code": code}))


def failure(store: dist.Store) -> Failure | None:
    """Why the run has been ended, if it has; where that cannot be read, that is why."""
    try:
        values = _take(store, _FAILED)
        return None if values is None else Failure(**checked(values, "why the run has ended", reason=str, code=int))
    except WireError as error:
        return Failure(str(error))


def end(store: dist.Store, code: int) -> None:
    """Leave the exit code of a run that has come to its end: said by whoever sees a worker end well."""
    store.set(_OVER, str(code))


def ended(store: dist.Store) -> int | None:
    """The exit code of a run that has come to its end."""
    text = store.get(_OVER) if store.check([_OVER]) else b""
    return int(text) if text.isdigit() else None


def confirm_end(store: dist.Store, agent: int) -> None:
    """Say that an agent has seen the end."""
    store.set(f"done/{agent}", "")


def has_confirmed(store: dist.Store, agent: int) -> bool:
    """Whether an agent has seen the end."""
    return store.check([f"done/{agent}"])


def ask_to_stop(store: dist.Store) -> None:
    """Have the run save itself and stop: a state of the run, whoever was told of it and dies."""
    store.set(_STOP, "")


def stop_asked(store: dist.Store) -> bool:
    """Whether the run was asked to stop."""
    return store.check([_STOP])


def answer_ledger(store: dist.Store, worker: int, number: int, error: str) -> None:
    """To a worker's record that asks for it: the ledger is on the disk up to its step, or (`error`) why it is not."""
    _put(store, f"ledger/{worker}/{number}", {"error": error})


def take_ledger_answer(store: dist.Store, worker: int, number: int) -> str | None:
    """That answer, which is gone then: an error, "" for none, None as long as it has not come."""
    key = f"ledger/{worker}/{number}"
    try:
        values = _take(store, key)
        error = None if values is None else checked(values, "the ledger's answer", error=str)["error"]
    except WireError as problem:
        error = str(problem)
    if error is not None:
        store.delete_key(key)
    return error


# ---- records, claims, spare workers ----


def put_record(store: dist.Store, worker: int, number: int, record: dict[str, Any]) -> None:
    """Report something. Each worker has numbers of its own: a writer that dies leaves no gap."""
    _put(store, f"record/{worker}/{number}", {"time": time.time(), **record})


def take_records(store: dist.Store, worker: int, first: int) -> Iterator[dict[str, Any] | WireError]:
    """A worker's records from number `first` on, which are gone then; an error for one that cannot be read."""
    while store.check([key := f"record/{worker}/{first}"]):
        try:
            yield parse(store.get(key), key)
        except WireError as error:
            yield error
        store.delete_key(key)
        first += 1


def claim(store: dist.Store, name: str) -> bool:
    """Whether nobody has asked for `name` before."""
    return store.add(f"claim/{name}", 1) == 1


def view_key(number: int) -> str:
    """Where a view stands."""
    return f"view/{number}"


def layout_key(layout: str) -> str:
    """Where the text of a layout stands."""
    return f"layout/{layout}"


def vote_key(view: int, iteration: int, worker: int) -> str:
    """Where a worker votes."""
    return f"view{view}/vote/{iteration}/{worker}"


def votes_key(view: int, iteration: int) -> str:
    """Where votes are counted."""
    return f"view{view}/votes/{iteration}"


def outcome_key(view: int, iteration: int) -> str:
    """Where what an iteration has come to stands."""
    return f"view{view}/outcome/{iteration}"


def spare_key(agent: int, number: int) -> str:
    """Where a spare worker waits to be called."""
    return f"spare/{agent}/{number}"
