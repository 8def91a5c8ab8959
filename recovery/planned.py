"""Changes of a run that nobody's loss has brought: who is ready joins, who is about to go hands over, and a worker that
has become slow has less to do. Each begins at the end of a step, where it costs least, and a loss comes before it.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch.distributed as dist

from pipeline.runtime.step_commit import busy_seconds
from pipeline.schedule.costs import Costs
from pipeline.schedule.simulate import simulate
from recovery.keys import ask_to_stop, has_migrated, leavers, leaves, read_beat, stop_asked, tell_migration
from recovery.membership import View
from recovery.migration import Plan, layers_of
from recovery.notice import Notices
from recovery.policy import Recovery
from recovery.remedy import CannotRestore
from recovery.shifting import Shifter, Speed

JOINED, LEFT, STAYED, SHIFTED = "rejoined", "left", "stayed", "shifted"
AT_ONCE_S = 0.05
"""What is found out within it needs no further tick."""
_PATIENCE_S = 3.0  # until workers have heard of a migration, and have met
_FORESEEN_S = 10.0  # of planning after a view: with a thousand workers it would go on for ever, beside the coordinator
_LAG_STEPS = 3  # after so many steps a worker that has become slow is seen to be
_STEPS = 20


@dataclass(frozen=True)
class Change:
    """The next view, being found out: what happens, to `who`."""

    event: str
    who: tuple[int, ...]
    found: Future[View]


@dataclass(frozen=True)
class _Moving:
    """Layers on their way before a change: the number of the migration, which moves of the view it makes, since when,
    and until when it is waited for."""

    number: int
    places: tuple[int, ...]
    began: float
    until: float


class Planned:
    """Says when a view changes for others than losses, and to what. `event(name, **fields)` tells of it."""

    def __init__(self, store: dist.Store, recovery: Recovery, event: Callable[..., None]) -> None:
        self._store, self._recovery, self._event = store, recovery, event
        self._under_way: Change | None = None
        self._resized = -math.inf
        self._short: float | None = None  # since when there have been fewer workers than the run goes on with
        self._notices = Notices()
        self._steps: deque[float] = deque(maxlen=_STEPS)  # seconds between commits
        self._last: float | None = None
        self._published: float | None = None
        self._members: tuple[int, ...] = ()
        self._newest = 0
        self._moving: _Moving | None = None
        self._migrations = 0
        self._shifter: Shifter | None = None

    # ---- what is told ----

    def interrupted(self) -> None:
        """Something else has happened: what was being found out is about a view that is over."""
        self._under_way = self._moving = None

    def published(self, view: View, resized: bool) -> None:
        """A view has begun."""
        self._under_way, self._moving, self._last = None, None, None
        self._published = time.monotonic()
        self._resized = time.monotonic() if resized else self._resized
        self._newest = view.number
        if self._recovery.resize is not None:
            aside(self._foresee, view)

    def _foresee(self, view: View) -> View:
        """Have the layouts ready that a loss of any worker, or of any machine, leads to: the planner keeps them."""
        machines: dict[int, set[int]] = {}
        for place in view.at:
            machines.setdefault(view.agents[place], set()).add(place)
        speeds, until = self._recovery.speeds(view), time.monotonic() + _FORESEEN_S
        for gone in (*({place} for place in view.at), *machines.values()):
            if self._newest != view.number or time.monotonic() > until:
                break
            with suppress(CannotRestore):
                self._recovery.layout_over(set(view.at) - gone, speeds)
        return view

    def stepped(self, view: View, outcome: Mapping[str, Any]) -> None:
        """A step was committed, with this outcome."""
        resize = self._recovery.resize
        if resize is None:
            return
        now = time.monotonic()
        if self._last is not None:
            self._steps.append(now - self._last)
        elif self._published is not None and self._steps:
            stall = max(0.0, now - self._published - median(self._steps))
            self._notices.took(stall, resize.moved_bytes(view))
            if self._shifter is not None:
                self._shifter.cost_s += 0.5 * (stall - self._shifter.cost_s)
        self._last = now
        busy = dict[int, float]()
        with suppress(ValueError, TypeError, AttributeError):  # anybody may have written it
            busy = busy_seconds(outcome.get("busy_s", ""))
        resize.speeds.note(view, self._recovery.layouts[view.layout], busy)

    # ---- what is due ----

    def due(self, view: View, committed: bool) -> tuple[Change, View] | None:
        """The change whose time has come, with the view that it leads to. `committed`: a step has just ended."""
        if not self._goes_on(view):
            wanted = self._wanted(view, committed)
            if wanted is None:
                return None
            event, who, find = wanted
            self._under_way, self._moving = Change(event, who, aside(find)), None
            wait([self._under_way.found], AT_ONCE_S)
        change = self._under_way
        if change is None or not committed or not change.found.done():
            return None
        if isinstance(change.found.exception(), CannotRestore):
            self._under_way = None
            return None  # the others go on without, and it is tried again
        after = change.found.result()
        if self._moves_beforehand(after):
            return None
        self._under_way = None
        return change, after

    def _moves_beforehand(self, after: View) -> bool:
        """Whether layers are on their way in the background, and are waited for: as long as that is shorter than to
        wait for them in the change of the view."""
        resize, recovery, now = self._recovery.resize, self._recovery, time.monotonic()
        if resize is None or not resize.migrates or not self._steps or after.rollback is not None:
            return False
        step_s, moved = median(self._steps), resize.moved_bytes(after)
        if self._moving is None:
            moves = [(place, move) for place, move in enumerate(after.moves)
                     if layers_of(move, recovery.num_layers, recovery.tied)]  # fmt: skip
            if not moves or self._notices.seconds(moved, 0.0) < step_s:
                return False
            self._migrations += 1
            plan = Plan(self._migrations, after.number, after.layout, after.moves)
            tell_migration(self._store, asdict(plan))
            patience = _PATIENCE_S + (2 + moved / resize.migrates) * 3 * step_s + 4 * self._notices.seconds(moved, 0.0)
            self._moving = _Moving(plan.number, tuple(place for place, _ in moves), now, now + patience)
            self._event("moving", view=after.number, bytes=round(moved), moves=len(moves))
            return True
        moving = self._moving
        left = self._notices.least_left()
        there = has_migrated(self._store, moving.number, moving.places)
        if not there and now < moving.until and (left is None or left > self._notices.seconds(moved, step_s)):
            return True
        self._event("moved", view=after.number, seconds=round(now - moving.began, 3), in_time=there)
        self._moving = None
        return False

    def _goes_on(self, view: View) -> bool:
        """Whether what is being found out is still what should happen."""
        change = self._under_way
        if change is None:
            return False
        leaving = self._leaving(view)
        return change.who == leaving if change.event == LEFT else not leaving

    def _wanted(self, view: View, committed: bool) -> tuple[str, tuple[int, ...], Callable[[], View]] | None:
        """What should happen next: the event, to whom, and what finds out the view."""
        recovery = self._recovery
        if recovery.resize is not None and committed:
            if leaving := self._leaving(view):
                return LEFT, leaving, lambda: recovery.without(view, leaving)
            if stayed := self._notices.stay(view.workers):
                return STAYED, stayed, lambda: recovery.with_ready(view, ())
        if ready := self._ready(view):
            return JOINED, ready, lambda: recovery.with_ready(view, ready)
        if recovery.resize is not None and recovery.resize.shifts and committed and self._cool:
            layout = self._shift(view)
            if layout != view.layout:
                slow = tuple(recovery.resize.speeds.of(view.workers))
                return SHIFTED, slow, lambda: recovery.in_layout(view, layout)
        return None

    @property
    def _cool(self) -> bool:
        resize = self._recovery.resize
        return resize is None or time.monotonic() - self._resized >= resize.cooldown_s

    def _ready(self, view: View) -> tuple[int, ...]:
        """Awaited workers that may join."""
        if not view.awaited or not (self._short is not None or self._cool):
            return ()
        ready = (w for w in view.awaited if (b := read_beat(self._store, w)) is not None and b.built)
        told = self._recovery.resize is not None and leavers(self._store)
        return tuple(w for w in ready if not told or leaves(self._store, view.agents[view.places[w]]) is None)

    # ---- machines that go ----

    def _leaving(self, view: View) -> tuple[int, ...]:
        """The workers of the view whose machines are about to go, and may hand over what they hold."""
        if self._recovery.resize is None or not leavers(self._store):
            return ()
        agents = {view.agents[view.places[w]] for w in view.workers}
        left_s = {a: seconds for a in agents if (seconds := leaves(self._store, a)) is not None}
        self._notices.see(view, left_s)
        return tuple(w for w in view.workers if view.agents[view.places[w]] in left_s)

    def too_late(self, view: View) -> tuple[int, ...]:
        """The workers that are about to go, and cannot hand over in the time that they have, where what they hold is
        elsewhere as well: nothing is won by waiting for them."""
        resize = self._recovery.resize
        if resize is None or self._under_way is not None or not (leaving := self._leaving(view)):
            return ()
        if not (new := self._notices.undecided(view, leaving)):
            return ()
        step_s = median(self._steps) if self._steps else 0.0
        needed = self._notices.seconds(resize.bytes_of(self._recovery.layouts[view.layout], view, leaving), step_s)
        fits = needed <= self._notices.left(new)
        alone = self._recovery.alone_on(view, leaving)
        plan = "hand over" if fits or alone else "the others have copies"
        self._notices.decide(new)
        self._event("notice", workers=list(leaving), left=round(self._notices.left(new), 3), needs=round(needed, 3),
                    plan=plan)  # fmt: skip
        return () if fits or alone else leaving

    # ---- workers that are slow ----

    def _shift(self, view: View) -> str:
        """The layout to be in, by how fast the workers are."""
        recovery, resize = self._recovery, self._recovery.resize
        assert resize is not None
        if len(self._steps) < _LAG_STEPS:
            return view.layout
        step_s = median(self._steps)
        if self._shifter is None or self._members != view.workers:
            places = tuple(view.at)

            def seconds(speeds: Speed, layout: str) -> float:
                costs = Costs(resize.speeds.costs.forward, speed=dict(speeds))
                return simulate(recovery.layouts[layout].train, costs).makespan_s

            cost_s = self._shifter.cost_s if self._shifter is not None else _LAG_STEPS * step_s
            self._shifter = Shifter(lambda speeds: recovery.layout_over(places, speeds), seconds, cost_s)
            self._members = view.workers
        self._shifter.lag_s = _LAG_STEPS * step_s
        try:
            return self._shifter.consider(time.monotonic(), recovery.speeds(view), view.layout)
        except CannotRestore:  # a layout for that is not known: all stay
            return view.layout

    # ---- too few ----

    def give_up_short(self, view: View) -> None:
        """A run of too few workers saves itself and ends, once nobody has come for long enough."""
        resize = self._recovery.resize
        if resize is None or len(view.workers) >= resize.least:
            self._short = None
            return
        now = time.monotonic()
        self._short = now if self._short is None else self._short
        if now - self._short >= resize.wait_s and not stop_asked(self._store):
            self._event("too_few", workers=len(view.workers), least=resize.least, waited=resize.wait_s)
            ask_to_stop(self._store)


def aside(function: Callable[..., View], *arguments: Any) -> Future[View]:
    """What a function returns or raises, in a thread that does not keep the process from ending."""
    future: Future[View] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="next-view", daemon=True).start()
    return future
