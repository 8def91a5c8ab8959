"""The one writer of views. It learns of losses, ends the step under way, names the remedy, and publishes the next view.

Losses reach it through the store, from whoever sees them: an agent whose worker ended, or this coordinator itself,
when a worker has stopped to say that it lives, or has neither voted nor waited for long. An agent that is silent takes
its workers along, and others start their replacements. A link that breaks between two who live is a complaint.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist

from recovery.commit import READY, Follower
from recovery.membership import View, publish, replace_workers
from recovery.policy import CHECKPOINT, REROUTE, Recovery
from recovery.remedy import CannotRestore

Event = Callable[..., None]
"""(event, **fields): what happened, for events.jsonl and for the person who watches."""


_GRACE_S = 1.0  # a broken link is most often a lost worker, of which a report is on its way
_COMPLAINTS = 3


def complain(store: dist.Store, view: int, worker: int, reason: str) -> None:
    """Tell the coordinator that this worker has met a broken link in `view`."""
    store.set(f"complaint/{view}", json.dumps({"worker": worker, "reason": reason}))


def beat(store: dist.Store, agent: int, number: int) -> None:
    """Say that an agent lives: twice a second, with ascending numbers."""
    store.set(f"agent/{agent}", str(number))


def report_loss(store: dist.Store, worker: int, reason: str, pid: int = 0) -> None:
    """Tell the coordinator that a worker is gone."""
    number = store.add("losses", 1) - 1
    store.set(f"loss/{number}", json.dumps({"worker": worker, "reason": reason, "pid": pid, "time": time.time()}))


@dataclass
class Coordinator:
    """Publishes `view` at once; `recovery` says what comes after it.

    A worker whose heart has not beaten for `heartbeat_s` is lost, and so is one that neither votes nor waits while
    nothing is settled for `deadline_s`. After a complaint about a link a view of the same workers gives them new ones;
    after three without a step between them who complained is replaced. More than `max_failures` losses end the run.
    """

    store: dist.Store
    view: View
    recovery: Recovery
    event: Event
    heartbeat_s: float
    deadline_s: float
    max_failures: int
    _follower: Follower = field(init=False)
    _reported: int = 0
    _failures: int = 0
    _beats: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    _looked: float = 0.0
    _trained: bool = False
    _complained: float | None = None
    _complaints: int = 0

    def __post_init__(self) -> None:
        publish(self.store, self.view)
        self._follower = Follower(self.store, self.view.number)

    def tick(self) -> None:
        """Take note of what has happened since the last call. Raises CannotRestore, or TooManyFailures."""
        committed = self._follower.follow()
        if committed and self._settled:
            self._complaints = 0
        lost = self._reports() | self._silent() or self._broken()
        if lost is None or lost:
            self._change(lost or {})  # where everybody lives: the same workers, with new links
        elif committed and self._settled and (ready := self._ready()):
            self._follower.abort()  # at the end of a step: it costs least when the next one has only begun
            self._publish(self.recovery.with_ready(self.view, ready), event="rejoined")

    def _ready(self) -> tuple[int, ...]:
        """The awaited workers that have been started and have built what they need."""
        return tuple(worker for worker in self.view.awaited if self.store.check([f"beat/{worker}"]))

    def _reports(self) -> dict[int, str]:
        lost: dict[int, str] = {}
        while self.store.check([f"loss/{self._reported}"]):
            report = json.loads(self.store.get(f"loss/{self._reported}"))
            self._reported += 1
            if report["worker"] in self.view.places:
                lost[report["worker"]] = report["reason"]
                self.event("detected", worker=report["worker"], reason=report["reason"], time=report["time"])
        return lost

    def _broken(self) -> dict[int, str] | None:
        """After a complaint: None where a new view may mend the link; who complains, where several did not."""
        if not self.store.check([f"complaint/{self.view.number}"]):
            return {}
        now = time.monotonic()
        self._complained = self._complained or now
        if now - self._complained < _GRACE_S:
            return {}
        self._complaints += 1
        complaint = json.loads(self.store.get(f"complaint/{self.view.number}"))
        worker, reason = int(complaint["worker"]), f"cannot reach another one: {complaint['reason']}"
        again = self._complaints > _COMPLAINTS
        self.event("detected" if again else "link", worker=worker, reason=reason)
        return {worker: reason} if again else None

    def _silent(self) -> dict[int, str]:
        """Workers that hang: looked for once a second."""
        now = time.monotonic()
        if now - self._looked < min(1.0, self.heartbeat_s / 4):
            return {}
        self._looked = now
        alive = self.alive  # looked at as often as workers are
        lost: dict[int, str] = {}
        stalled = now - self._follower.moved > self.deadline_s
        for worker in self.view.workers:
            if not self.store.check([f"beat/{worker}"]):
                if self.view.agents[self.view.places[worker]] in alive:
                    continue  # it is still being started; its agent sees it end
                lost[worker] = "was being started by an agent that has given no sign of life since"
                continue
            if self._silence_s(f"beat/{worker}") > self.heartbeat_s:
                lost[worker] = f"has given no sign of life for {self.heartbeat_s:g} s"
            elif stalled and not json.loads(self._beats[f"beat/{worker}"][0])[1] and not self._follower.voted(worker):
                lost[worker] = f"has been busy with one step for {self.deadline_s:g} s"
        for worker, reason in lost.items():
            self.event("detected", worker=worker, reason=reason)
        return lost

    def _silence_s(self, key: str) -> float:
        """Seconds since what stands under a key has changed, as far as was seen."""
        now, found = time.monotonic(), self.store.get(key)
        known, since = self._beats.get(key, (b"", now))
        self._beats[key] = (found, now if found != known else since)
        return now - self._beats[key][1]

    @property
    def alive(self) -> set[int]:
        """The agents that have given a sign of life of late, or have not begun yet; 0 is the coordinator's own."""
        return {0} | {
            agent
            for agent in self.view.agents.values()
            if not self.store.check([f"agent/{agent}"]) or self._silence_s(f"agent/{agent}") < self.heartbeat_s / 2
        }

    def _with_agents(self, view: View) -> View:
        """Places that are to be filled, where the agent is gone with its machine, go to those with the fewest."""
        agents, alive = dict(view.agents), self.alive
        for worker in (*view.joined, *view.awaited):
            if agents[view.places[worker]] not in alive:
                count = Counter(agents[place] for place in agents)
                agents[view.places[worker]] = min(alive, key=lambda agent: (count[agent], agent))
        return replace(view, agents=agents)

    def _change(self, lost: Mapping[int, str]) -> None:
        self._failures += len(lost)
        if self._failures > self.max_failures:
            raise TooManyFailures(
                f"{self._failures} workers were lost, the last: worker {max(lost)} {lost[max(lost)]}; "
                f"allowed by max_failures: {self.max_failures}"
            )
        self._follower.abort()
        # Before a view is settled, who joined it has no state yet, and who was to go back may have done so or not.
        view = replace(self.view, joined={}, restores=(), rollback=None) if self._settled else self.view
        self._trained |= self._settled
        gone = tuple(sorted(lost))
        try:  # until something was trained, what a worker builds by itself is what all have
            view = self.recovery.after_loss(view, gone) if self._trained else replace_workers(view, gone)
        except CannotRestore as error:
            told = ", ".join(f"worker {worker} {reason}" for worker, reason in lost.items())
            raise CannotRestore(f"{told}; {error}") from error
        self._publish(view, gone)

    @property
    def _settled(self) -> bool:
        return self._follower.iteration > READY

    def _publish(self, view: View, lost: Sequence[int] = (), event: str = "remedy") -> None:
        view = self._with_agents(view)
        publish(self.store, view)
        self.view, self._follower, self._complained = view, Follower(self.store, view.number), None
        self.event("view", view=view.number, workers=list(view.workers), joined=_as_text(view.joined))
        remedies = sorted({restore.remedy for restore in view.restores}) if view.rollback is None else [CHECKPOINT]
        for joiner, old in view.joined.items():
            self.event(event, worker=old, replacement=joiner, remedy="+".join(remedies), view=view.number)
        for replacement, old in view.awaited.items():
            if old in lost:
                name = "rerouted" if self.recovery.meanwhile == REROUTE else "taken_over"
                self.event(name, worker=old, replacement=replacement, remedy=self.recovery.meanwhile, view=view.number)


def _as_text(joined: Mapping[int, int]) -> dict[str, Any]:
    return {str(new): old for new, old in joined.items()}


class TooManyFailures(RuntimeError):
    """Workers are lost faster than it makes sense to replace them. Names the last loss."""
