"""The one writer of views. It learns of losses, ends the step under way, names the remedy, and publishes the next view.

Losses reach it through the store, from whoever sees them: an agent whose worker ended, or this coordinator itself,
when a worker has stopped to say that it lives, or does not come on. An agent that is silent takes its workers along,
and others start their replacements. A link that breaks between two who live is a complaint. What the next view is may
take long to find out (a checkpoint is verified, routes are searched), so a thread does it, and the coordinator goes on
to look after the run.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist

from pipeline.schedule.layout import Layout
from pipeline.schedule.ops import span_text
from pipeline.wire import WireError
from recovery.commit import READY, Follower
from recovery.keys import (
    LossReport,
    leaves,
    newest_loss,
    read_complaint,
    read_loss,
    report_loss,
    stop_asked,
)
from recovery.losses import LIMIT, STOPPING_LIMIT, Losses
from recovery.membership import View, publish
from recovery.planned import AT_ONCE_S, LEFT, SHIFTED, STAYED, Planned, aside
from recovery.policy import CHECKPOINT, REDUNDANT, REROUTE, RESIZE, Recovery
from recovery.remedy import CannotRestore
from recovery.signs import Signs

Event = Callable[..., None]
"""(event, **fields): what happened, for events.jsonl and for the person who watches."""


_GRACE_S = 1.0  # a broken link is most often a lost worker, of which a report is on its way
_COMPLAINTS = 3
_READ_S = 1.0
_MEANWHILE = {REROUTE: "rerouted", REDUNDANT: "taken_over", RESIZE: "shrunk"}
"""What is done until a replacement is ready -> the event that says so."""
_FRESH = "the weights of the start, as nothing was trained yet"
_NOTHING = "the others have all that it had"


@dataclass(frozen=True)
class _Search:
    """What the next view is, being found out. `lost` are the workers without which it will be, and why."""

    base: View
    lost: Mapping[int, LossReport]
    found: Future[View]
    began: float


@dataclass
class Coordinator:
    """Publishes `view` at once; `recovery` says what comes after it.

    A worker whose heart has not beaten for `heartbeat_s` is lost, and so is one that neither votes nor waits while
    nothing is settled and its own work does not come on for `deadline_s`; one that is awaited, if it does not come up
    and its own work does not come on for as long. After a complaint about a link a view of the
    same workers gives them new ones; after three without a step between them who complained is replaced. More than
    `max_failures` losses or `max_preemptions` machines that go end the run, and so do three losses of one place, or
    three views that all had entered, without a step between.
    """

    store: dist.Store
    view: View
    recovery: Recovery
    event: Event
    heartbeat_s: float
    deadline_s: float
    max_failures: int
    max_preemptions: float = math.inf
    _follower: Follower = field(init=False)
    _losses: Losses = field(init=False)
    _search: _Search | None = None
    _newest: bytes = b""
    _read: float = 0.0
    _signs: Signs = field(init=False)
    _looked: float = 0.0
    _trained: bool = False
    _complained: float | None = None
    _complaints: int = 0
    _gone: set[int] = field(default_factory=set)
    """Machines that are gone and counted."""
    _planned: Planned = field(init=False)

    def __post_init__(self) -> None:
        self._losses = Losses(self.max_failures, self.max_preemptions)
        self._planned = Planned(self.store, self.recovery, self.event)
        self._signs = Signs(self.store, self.heartbeat_s, self.deadline_s)
        publish(self.store, self.view, self.recovery.layouts[self.view.layout])
        self._follower = self._follow(self.view)
        self._planned.published(self.view, resized=False)

    def _follow(self, view: View) -> Follower:
        if self.recovery.resize is None:  # nobody asks how fast who is
            return Follower(self.store, view.number)
        return Follower(self.store, view.number, seen=lambda outcome: self._planned.stepped(view, outcome))

    def begin_without(self, absent: Sequence[int]) -> None:
        """Begin with those whose machines are there. The others are awaited, as who comes later is, and no losses."""
        if absent:
            self._follower.abort()
            self._publish(self.recovery.before_training(self.view, tuple(absent)))

    def machine_gone(self, agent: int) -> None:
        """Somebody knows that a machine is gone, before its silence would say so: its workers are lost."""
        for worker in self.view.workers:
            if self.view.agents[self.view.places[worker]] == agent:
                report_loss(self.store, worker, "was on a machine that is gone")

    def tick(self) -> None:
        """Take note of what has happened since the last call. Raises CannotRestore, or TooManyFailures."""
        committed = self._follower.follow() and self._settled
        if committed and self._follower.iteration > READY + 1:  # that all are ready is no step
            self._complaints = 0
            self._losses.progress()
        lost = self._reports() | self._silent()
        if lost or (self._search is None and self._mends(lost)):
            self._look_for_next(lost)
        elif self._search is not None:
            self._publish_found(self._search, 0.0)
        elif self._settled and (late := self._planned.too_late(self.view)):
            now = time.time()
            self._look_for_next({w: LossReport(w, "is on a machine that is about to go", False, now) for w in late})
        elif self._settled and (due := self._planned.due(self.view, committed)) is not None:
            change, view = due
            gone = set(change.who) - set(view.workers) if change.event == LEFT else set[int]()
            for machine in {self.view.agents[self.view.places[worker]] for worker in gone}:
                self._losses.preempted(machine)
            self._follower.abort()
            self._trained = True
            self._publish(view, change.who if change.event == LEFT else (), event=change.event)
        self._planned.give_up_short(self.view)

    @property
    def layout(self) -> Layout:
        """That of the view."""
        return self.recovery.layouts[self.view.layout]

    @property
    def valid(self) -> int | None:
        """The view in which something may become true; None while the next one is being found out."""
        return self.view.number if self._search is None else None

    # ---- what has happened ----

    def _reports(self) -> dict[int, LossReport]:
        """What was reported since: looked for when somebody says that there is something, and once a second."""
        newest, now = newest_loss(self.store), time.monotonic()
        if newest == self._newest and now - self._read < _READ_S:
            return {}
        self._newest, self._read = newest, now
        lost: dict[int, LossReport] = {}
        for worker in filter(self._concerns, self.view.places):
            try:
                if (report := read_loss(self.store, worker)) is not None:
                    lost[worker] = report
                    self.event("detected", worker=worker, reason=report.reason, time=report.time)
            except WireError as error:
                self.event("unreadable", error=str(error))
        return lost

    def _concerns(self, worker: int) -> bool:
        """Whether a worker has a place that it has not lost yet."""
        return worker in self.view.places and (self._search is None or worker not in self._search.lost)

    def _mends(self, lost: dict[int, LossReport]) -> bool:
        """Whether the same workers need a new view, because a link broke or they have waited in vain for a vote. Who
        is behind that again and again is added to `lost`."""
        worker, reason = -1, "has not voted in time"
        if self._follower.given_up:
            worker = next((w for w in self.view.workers if not self._follower.voted(w)), -1)
        elif (complaint := self._complaint()) is not None:
            worker, reason = complaint[0], f"cannot reach another one: {complaint[1]}"
        else:
            return False
        self._complaints += 1
        again = self._complaints > _COMPLAINTS and worker in self.view.places
        self.event("detected" if again else "link", worker=worker, reason=reason)
        if again:
            lost[worker] = LossReport(worker, reason, False, time.time())
        return True

    def _complaint(self) -> tuple[int, str] | None:
        """A complaint about a link that no report of a loss has explained for a while."""
        try:
            complaint = read_complaint(self.store, self.view.number)
        except WireError as error:
            self.event("unreadable", error=str(error))
            return None
        if complaint is None:
            return None
        self._complained = self._complained or time.monotonic()
        return complaint if time.monotonic() - self._complained >= _GRACE_S else None

    def _silent(self) -> dict[int, LossReport]:
        """Workers that hang: looked for once a second."""
        now = time.monotonic()
        if now - self._looked < min(1.0, self.heartbeat_s / 4):
            return {}
        self._looked = now
        alive = self.alive  # looked at as often as workers are
        lost: dict[int, LossReport] = {}
        for worker in (*self.view.workers, *self.view.awaited):
            if not self._concerns(worker):
                continue
            reason = self._signs.hangs(
                worker, self.view, self._follower, alive, searching=self._search is not None,
                vacant=self._vacant(worker, alive),
            )  # fmt: skip
            if reason is not None:
                lost[worker] = LossReport(worker, reason, False, time.time())
                self.event("detected", worker=worker, reason=reason)
        return lost

    def _vacant(self, worker: int, alive: Collection[int]) -> bool:
        """Whether a worker is to be started by a machine that is gone: where a run changes its size, the others go on
        without until it comes back."""
        waits = self.recovery.resize is not None and worker in self.view.awaited
        return waits and self.view.agents[self.view.places[worker]] not in alive

    @property
    def alive(self) -> set[int]:
        """The agents that live, as far as is known."""
        return self._signs.alive(self.view.agents.values())

    # ---- the next view ----

    def _look_for_next(self, lost: Mapping[int, LossReport]) -> None:
        """End the step under way, and find out what comes after it; losses that come meanwhile are added."""
        self._count(lost)
        self._follower.abort()
        # Before a view is settled, who joined it has no state yet, and who was to go back may have done so or not.
        base = self.view.settled() if self._settled else self.view
        self._trained |= self._settled
        every = {**(self._search.lost if self._search is not None else {}), **lost}
        gone = tuple(sorted(every))
        # until something was trained, what a worker builds by itself is what all have
        find = self.recovery.after_loss if self._trained else self.recovery.before_training
        if self._trained and self._spared(gone):
            find = self.recovery.replaced
        self._planned.interrupted()
        self._search = _Search(base, every, aside(find, base, gone), time.monotonic())
        self._publish_found(self._search, AT_ONCE_S)

    def _count(self, lost: Mapping[int, LossReport]) -> None:
        """Where a run goes on without them, workers that go with their machine are one preemption. Raises
        TooManyFailures."""
        limit, machines = STOPPING_LIMIT if stop_asked(self.store) else LIMIT, set[int]()
        alive = self.alive
        self._gone &= {agent for agent in self._gone if agent not in alive}
        for worker, report in lost.items():
            place = self.view.places[worker]
            agent = self.view.agents[place]
            goes = agent not in alive or leaves(self.store, agent) is not None
            if self.recovery.resize is not None and goes and agent not in self._gone:
                machines.add(agent)
            else:  # also who was to be started on a machine that is gone: that leads nowhere
                when = self.view.number
                self._losses.note(worker, place, report.reason, told=report.told, when=when, limit=limit)
        for machine in machines:
            self._losses.preempted(machine)
        self._gone |= machines
        if lost and self._settled:
            self._losses.cycle(self.view.number, _told(lost))

    def _spared(self, lost: Sequence[int]) -> bool:
        """Whether the machines of all that are lost have spare workers for them, where the run would shrink else."""
        spares = 0 if self.recovery.resize is None else self.recovery.resize.spares
        agents = [self.view.agents[self.view.places[worker]] for worker in lost]
        new = not {*self.view.joined, *self.view.awaited} & set(lost)  # a spare that does not come is not waited for
        return new and bool(spares) and set(agents) <= self.alive and max(Counter(agents).values()) <= spares

    def _publish_found(self, search: _Search, timeout_s: float) -> None:
        """Publish the next view, if it is known by now. Raises CannotRestore."""
        wait([search.found], timeout_s)
        if not search.found.done():
            since = max(search.began, self.recovery.verifier.came_on_at)
            if time.monotonic() - since <= self.deadline_s:
                return
            raise CannotRestore(
                f"{_told(search.lost)}; what brings it back has not been found out for {self.deadline_s:g} s"
            )
        try:
            view = search.found.result()
        except CannotRestore as error:
            raise CannotRestore("; ".join(filter(None, [_told(search.lost), str(error)]))) from error
        self._search = None
        self._publish(view, tuple(search.lost))

    @property
    def _settled(self) -> bool:
        return self._follower.iteration > READY

    def _speeds(self, view: View) -> dict[str, float]:
        speeds = {} if self.recovery.resize is None else self.recovery.resize.speeds.of(view.workers)
        return {str(worker): round(speed, 3) for worker, speed in speeds.items()}

    def _with_agents(self, view: View) -> View:
        """Places of workers that nobody was told to start yet, where the agent is gone with its machine, go to those
        with the fewest. A worker that was told of may live, or be started yet: it keeps its agent, or is lost. A run
        that changes its size is smaller without them: another machine has no device for more."""
        if self.recovery.resize is not None:
            return view
        agents, alive = dict(view.agents), self.alive
        for worker in (*view.joined, *view.awaited):
            if worker not in self.view.places and agents[view.places[worker]] not in alive:
                count = Counter(agents[place] for place in agents)
                agents[view.places[worker]] = min(alive, key=lambda agent: (count[agent], agent))
        return replace(view, agents=agents)

    def _publish(self, view: View, lost: Sequence[int] = (), event: str = "remedy") -> None:
        view = self._with_agents(view)
        publish(self.store, view, self.recovery.layouts[view.layout])
        resized = len(view.workers) != len(self.view.workers)
        self.view, self._follower, self._complained = view, self._follow(view), None
        self._planned.published(view, resized)
        self.event("view", view=view.number, workers=list(view.workers), joined=_as_text(view.joined))
        remedies = sorted({move.remedy for move in view.moves}) if view.rollback is None else [CHECKPOINT]
        remedy, size = "+".join(remedies) or (_NOTHING if self._trained else _FRESH), len(view.workers)
        if event in (STAYED, SHIFTED):
            speeds = self._speeds(view)
            told = "; ".join(f"worker {w} at {s:.2g} times the usual speed" for w, s in speeds.items())
            self.event(event, workers=list(view.workers), view=view.number, layers=as_layers(self.layout),
                       why=told or "all are as fast as usual", speeds=speeds)  # fmt: skip
        for joiner, old in view.joined.items():
            self.event(event, worker=old, replacement=joiner, remedy=remedy, view=view.number)
        meanwhile = self.recovery.meanwhile or ""
        for replacement, old in view.awaited.items():
            if old in lost:
                told = "handed over" if event == "left" else remedy if meanwhile == RESIZE else meanwhile
                fields = {"worker": old, "replacement": replacement, "remedy": told, "view": view.number}
                self.event(_MEANWHILE.get(meanwhile, "taken_over"), **fields, workers=size)
        if resized and meanwhile == RESIZE:
            self.event("resized", workers=size, layers=as_layers(self.layout), view=view.number)


def as_layers(layout: Layout) -> dict[str, list[str]]:
    """Place -> the spans that it computes, as text."""
    found: dict[str, list[str]] = {}
    for span, places in layout.train.holders.items():
        for place in places:
            found.setdefault(str(place), []).append(span_text(span))
    return found


def _as_text(joined: Mapping[int, int]) -> dict[str, Any]:
    return {str(new): old for new, old in joined.items()}


def _told(lost: Mapping[int, LossReport]) -> str:
    return ", ".join(f"worker {worker} {report.reason}" for worker, report in sorted(lost.items()))
