"""One worker's part in the membership: it joins a view, is woken when the view changes, and moves to the next one.

A watcher thread with a store client of its own waits for the next view, wakes whatever the worker waits in, says twice
a second that the process is alive, and passes on that the run is to stop. Everything else happens in the worker's own
thread, between steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.runtime.peak_flops import UNKNOWN, Capability, together
from pipeline.runtime.probe import Pulse
from pipeline.runtime.step_commit import StepCommit
from pipeline.runtime.transport import LinkError, link_pairs
from pipeline.runtime.worker import Worker
from pipeline.schedule.layout import Assignment, Excerpt
from pipeline.store.waiting import came
from pipeline.wire import WireError, listed
from recovery.certificate import Witness, certify, write
from recovery.commit import Aborted, Ballot, CommitError
from recovery.communicator import Communicator, Shapes, all_kept
from recovery.keys import Beat, ask_to_stop, beat, complain, read_migration, stop_asked, view_key
from recovery.lifeline import Lifeline
from recovery.membership import Evicted, MembershipError, Move, View, await_view, parts_of, read_layout, read_view
from recovery.migration import Migration, Plan
from recovery.rehearse import Rehearsal
from recovery.remedy import Remedy, states_of
from recovery.restore import restore, roll_back
from recovery.shards import with_ranges

INTERRUPTIONS = (Aborted, CommitError, LinkError)
"""What a worker raises when a view ends under it. Its state is that of the last committed step; it can go on."""

BEAT_S = 0.5
_SETTLE_S = 60.0  # for sums among workers that live: they are under way, or ended already


@dataclass(frozen=True)
class Joined:
    """How a worker came into its view: where the training stands, what was told `last`, when it was woken
    (time.monotonic seconds), and the seconds from then until the view was there, all members were, links were edited,
    and state was restored."""

    view: View
    position: Mapping[str, Any]
    last: dict[str, Any] | None
    woken: float
    parts: Mapping[str, float]
    there: int = 0
    """States that were there already, as they had moved in the background."""
    peak_flops: float | None = None
    """FLOP/s of which the devices of the view are capable together, where that is known of all."""


@dataclass
class Member:
    """Moves `worker` from view to view. It waits for views, and for other workers on the way into one, as long as
    `guided()` says that there is a coordinator."""

    worker: Worker
    communicator: Communicator
    store: dist.Store
    remedies: Mapping[str, Remedy]
    shapes: Callable[[View], Shapes | None]
    guided: Lifeline
    checkpoints: Path
    """Where the run saves."""
    keys: Callable[[int], Mapping[str, Any]] = lambda step: {}
    """What a worker counts samples and draws random numbers by at a step: the same on all, or the view is refused."""
    rehearsal: Rehearsal | None = None
    """What rebuilds a stage from what its neighbours know of it."""
    migration: Migration | None = None
    """What moves in the background before a view, if anything does."""
    capability: Capability = UNKNOWN
    """Of this worker's device."""
    view: View | None = None
    assignment: Assignment | None = None
    """What its place does in the view."""

    def excerpt(self, purpose: str) -> Excerpt:
        """What is done for a purpose. Raises KeyError."""
        assert self.assignment is not None
        return self.assignment.excerpts[purpose]

    def complain(self, error: Exception) -> None:
        """An interruption that no view has brought is the coordinator's to know: a link may have broken by itself."""
        if isinstance(error, LinkError) and self.worker.transport.mailbox.woken() is None:
            with suppress(RuntimeError):  # without a store there is no view to come, which is told by who waits for it
                complain(self.store, self.worker.transport.view, self.worker.id, str(error)[:300])

    def enter(self, number: int, position: Mapping[str, Any] | None, last: dict[str, Any] | None = None) -> Joined:
        """Take part in view `number` or the newest after it, again and again until all its members are ready.

        `position` is where the training of this worker stands (JSON; equal on all who were there before), None for a
        worker that joins; `last` is what it would tell of the last step (JSON), which may differ. Raises
        MembershipError when no view comes, Evicted when this worker has no part in it.
        """
        began = time.monotonic()
        while True:
            view = await_view(self.store, number, self.guided)
            number = view.number + 1
            if self.worker.id in view.awaited:
                continue
            if self.worker.id not in view.workers:
                raise Evicted(f"worker {self.worker.id} is not in view {view.number}")
            try:
                return self._enter(view, position, last, began)
            except INTERRUPTIONS as error:
                self.complain(error)

    def _enter(
        self, view: View, position: Mapping[str, Any] | None, last: dict[str, Any] | None, began: float
    ) -> Joined:
        worker, probe = self.worker, self.worker.probe
        deadline = time.monotonic() + _SETTLE_S
        times = {"view": time.monotonic()}
        worker.transport.view = view.number
        worker.transport.mailbox.advance(view.number, 0)
        self.communicator.quiesce(set(view.workers), deadline)
        worker.commit = StepCommit(Ballot(self.store, view.number, worker.id, view.workers, self.guided))
        mine = self._read(view)
        # where all stay as they are there is nothing that could have changed on its way
        still = self.view is None or (self.view.layout == view.layout and not view.moves)
        held = () if view.rollback or still else worker.store.states.values()
        before = {
            name: crc for state in held for name, crc in state.fingerprints().items()
        }  # others are awaited anyway
        ready = {} if self.migration is None else self.migration.finish(view.number, view.layout)
        told = {
            "position": position, "last": last, "norms": dict(worker.norms), "ready": ready, **self.communicator.kept(),
            "capability": self.capability.as_json(),
        }  # fmt: skip
        found = worker.commit.agree(told, combine_ready)
        times["ready"] = time.monotonic()
        probe("join" if position is None else "recovery", int((position or {}).get("step", 0)))
        if len(found["positions"]) > 1:
            raise MembershipError(f"the workers of view {view.number} stand at different places: {found['positions']}")
        self.communicator.agree(found, deadline)
        worker.boundaries.enter(view.generation)
        worker.store.drop()  # after the last sum: one that was under way still wrote into the gradients
        model = worker.store.model
        worker.workers = view.at
        parts = parts_of(view, mine.holders, model.num_layers, model.tied)
        sends = {pair for excerpt in mine.excerpts.values() for pair in excerpt.sends}
        pairs = link_pairs({(worker.workers[a], worker.workers[b]) for a, b in sends})
        self.communicator.edit(view.number, pairs, parts, self.shapes(view))
        times["edited"] = time.monotonic()
        known = dict(found["norms"])
        where = dict(*found["positions"])
        step = int(where.get("step", view.first_step))
        there = {
            int(w): {name for name, version in had.items() if version == step} for w, had in found["ready"].items()
        }
        worker.store.adopt(there.get(worker.id, ()) if view.rollback is None else ())
        worker.store.hold(
            mine.spans, fill=False
        )  # what this place holds no more may be what others take: it lies aside
        if view.moves or view.rollback is not None:
            worker.spare.clear()  # it was computed with other weights
        if view.rollback is not None:
            where["step"] = step = roll_back(worker, view, self.checkpoints)
            worker.boundaries.clear()
            known = {}
        else:
            restore(worker, view, self.communicator, self.remedies, known, step, there, self.rehearsal)
        self._check_states(view, step)
        times["restored"] = time.monotonic()
        self._certify(view, parts, before, step)
        times["certified"] = time.monotonic()
        self.communicator.confirm()
        worker.norms = known
        self.view, self.assignment = view, mine
        return Joined(view, where, last or found["last"], began, {name: at - began for name, at in times.items()},
                      sum(map(len, there.values())), found["peak_flops"])  # fmt: skip

    def _read(self, view: View) -> Assignment:
        """What this worker's place needs of the layout, which most views have in common."""
        place, old = view.places[self.worker.id], self.assignment
        if old is not None and self.view is not None and (self.view.layout, old.train.place) == (view.layout, place):
            return old
        return read_layout(self.store, view, place)

    def _certify(self, view: View, parts: Mapping[str, tuple[int, ...]], before: Mapping[str, int], step: int) -> None:
        """All testify, and the view becomes true, or its moves are made again (LinkError), or nobody knows what is
        right (MembershipError)."""
        worker, keys = self.worker, self.keys(step)
        copied = [move for move in view.moves if self.remedies[move.remedy].carries == "state"]
        known = worker.store.aside | worker.store.states
        told = Witness.of(worker.id, worker.store.states, known, before, view.moves, keys)
        names = {state.name for state in worker.store.model.states}  # a layer may own nothing but a shared weight
        holders = {name: workers for part, workers in parts.items() for name in states_of(part) & names}
        holders = with_ranges(worker.store, holders, view.places)
        found = worker.commit.agree(asdict(told), partial(certify, holders, copied))
        if found["again"]:
            raise LinkError(f"view {view.number}: {found['error']}")
        if found["error"]:
            raise MembershipError(f"view {view.number}: {found['error']}")
        if worker.id == min(view.workers):
            write(self.checkpoints.parent / "certificates", view, step, found["states"], keys)

    def _check_states(self, view: View, step: int) -> None:
        """All that is held is of the committed step and of the run's generation. Raises MembershipError."""
        for state in self.worker.store.states.values():
            if (state.version, state.generation) != (step, view.generation):
                raise MembershipError(
                    f"view {view.number}: worker {self.worker.id} has layer {state.name} of step {state.version}, "
                    f"generation {state.generation}; the run is at step {step}, generation {view.generation}"
                )


def combine_ready(votes: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """What the workers of a view come to before anything moves: the places where they stand (one, or they have gone
    apart), what is known of the last step, and which links and sums all have kept."""
    each = [vote for _, vote in sorted(votes.items())]
    positions = [vote["position"] for vote in each if vote["position"] is not None]
    return {
        "positions": list({str(sorted(position.items())): position for position in positions}.values()),
        "last": next((vote["last"] for vote in each if vote["last"] is not None), None),
        "ready": {str(worker): vote["ready"] for worker, vote in sorted(votes.items()) if vote.get("ready")},
        "norms": {state: norm for vote in each for state, norm in vote["norms"].items()},
        "peak_flops": together(Capability.from_json(vote["capability"]) for vote in each),
        **all_kept(votes),
    }


class Watcher:
    """The thread beside a worker: says that it lives, wakes it for a new view, and passes on that the run is to stop.

    `stop` is set when the run was asked to stop; where it is set first, as by a signal, the run is asked by it.
    """

    def __init__(self, store: dist.Store, worker: int, number: int, stop: threading.Event) -> None:
        """Watch for the views after `number`."""
        self._store, self._id, self._number, self._stop = store, worker, number, stop
        self.member: Member | None = None
        """Who is watched, once it is there."""
        self._migration = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self.pulse = Pulse()
        self._thread.start()

    def attach(self, member: Member) -> None:
        """The worker has been built: from now on it is woken, and can take a place."""
        self.member = member

    def stop(self) -> None:
        """Have the thread end, with its next beat at the latest; nobody needs to wait for that."""
        self._ended.set()

    def _watch(self) -> None:
        beats = 0
        try:
            while not self._ended.is_set():
                beats += 1
                waiting = "" if self.member is None else self.member.worker.transport.mailbox.waiting
                beat(self._store, self._id, Beat(beats, waiting, self.pulse.count, self.member is not None))
                self._pass_on()
                self._begin_migration()
                if came(self._store, [view_key(self._number + 1)], BEAT_S):
                    self._number += 1
                    self._wake()
        except dist.DistNetworkError:
            if self.member is not None:
                self.member.worker.transport.mailbox.wake(self._number + 1_000_000, "the store is gone")

    def _begin_migration(self) -> None:
        """Layers may be about to move."""
        if self.member is None or self.member.migration is None:
            return
        with suppress(WireError):
            found = read_migration(self._store)
            joins = self.member.view is None  # then it waits for the view of its number
            if found is None or found["number"] == self._migration or found["view"] < self._number + (not joins):
                return
            self._migration = found["number"]
            moves = listed(found.pop("moves"), "the moves of a migration", Move.from_json)
            self.member.migration.begin(Plan(**found, moves=moves), joins=joins)

    def _pass_on(self) -> None:
        if stop_asked(self._store):
            self._stop.set()
        elif self._stop.is_set():
            ask_to_stop(self._store)

    def _wake(self) -> None:
        if self.member is None:
            return
        self.member.worker.transport.mailbox.wake(self._number, f"view {self._number} has begun")
        communicator = self.member.communicator
        with suppress(MembershipError):  # what cannot be read is told by who enters it
            communicator.poison(communicator.peers - set(read_view(self._store, self._number).workers))
