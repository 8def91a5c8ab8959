"""The one writer of views. It learns of losses, ends the step under way, names the remedy, and publishes the next view.

Losses reach it through the store, from whoever sees them: an agent whose worker ended, or this coordinator itself,
when a worker has stopped to say that it lives, or has neither voted nor waited for long.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist

from recovery.commit import Follower
from recovery.member import READY
from recovery.membership import View, publish, replace_workers
from recovery.remedy import CannotRestore

Event = Callable[..., None]
"""(event, **fields): what happened, for events.jsonl and for the person who watches."""


def report_loss(store: dist.Store, worker: int, reason: str, pid: int = 0) -> None:
    """Tell the coordinator that a worker is gone."""
    number = store.add("losses", 1) - 1
    store.set(f"loss/{number}", json.dumps({"worker": worker, "reason": reason, "pid": pid, "time": time.time()}))


@dataclass
class Coordinator:
    """Publishes `view` at once. `cure(next view)` adds the remedies, and raises CannotRestore where there is none.

    A worker whose heart has not beaten for `heartbeat_s` is lost, and so is one that neither votes nor waits while
    nothing is settled for `deadline_s`. More than `max_failures` losses end the run.
    """

    store: dist.Store
    view: View
    cure: Callable[[View], View]
    event: Event
    heartbeat_s: float
    deadline_s: float
    max_failures: int
    _follower: Follower = field(init=False)
    _reported: int = 0
    _failures: int = 0
    _beats: dict[int, tuple[bytes, float]] = field(default_factory=dict)
    _looked: float = 0.0
    _trained: bool = False

    def __post_init__(self) -> None:
        publish(self.store, self.view)
        self._follower = Follower(self.store, self.view.number)

    def tick(self) -> None:
        """Take note of what has happened since the last call. Raises CannotRestore, or TooManyFailures."""
        self._follower.follow()
        lost = self._reports() | self._silent()
        if lost:
            self._change(lost)

    def _reports(self) -> dict[int, str]:
        lost: dict[int, str] = {}
        while self.store.check([f"loss/{self._reported}"]):
            report = json.loads(self.store.get(f"loss/{self._reported}"))
            self._reported += 1
            if report["worker"] in self.view.workers:
                lost[report["worker"]] = report["reason"]
                self.event("detected", worker=report["worker"], reason=report["reason"], time=report["time"])
        return lost

    def _silent(self) -> dict[int, str]:
        """Workers that hang: looked for once a second."""
        now = time.monotonic()
        if now - self._looked < min(1.0, self.heartbeat_s / 4):
            return {}
        self._looked = now
        lost: dict[int, str] = {}
        stalled = now - self._follower.moved > self.deadline_s
        for worker in self.view.workers:
            if not self.store.check([f"beat/{worker}"]):
                continue  # it is still being started; its agent sees it end
            beat = self.store.get(f"beat/{worker}")
            known, since = self._beats.get(worker, (b"", now))
            self._beats[worker] = (beat, now if beat != known else since)
            if now - self._beats[worker][1] > self.heartbeat_s:
                lost[worker] = f"has given no sign of life for {self.heartbeat_s:g} s"
            elif stalled and not json.loads(beat)[1] and not self._follower.voted(worker):
                lost[worker] = f"has been busy with one step for {self.deadline_s:g} s"
        for worker, reason in lost.items():
            self.event("detected", worker=worker, reason=reason)
        return lost

    def _change(self, lost: Mapping[int, str]) -> None:
        self._failures += len(lost)
        if self._failures > self.max_failures:
            raise TooManyFailures(
                f"{self._failures} workers were lost, the last: worker {max(lost)} {lost[max(lost)]}; "
                f"allowed by max_failures: {self.max_failures}"
            )
        self._follower.abort()
        view = replace_workers(self.view, tuple(sorted(lost)))
        settled = self._follower.iteration > READY
        if not settled:  # who joined then has no state yet, and who was to go back may have done so or not
            waiting = {new: old for new, old in self.view.joined.items() if new not in lost}
            view = replace(view, joined={**waiting, **view.joined})
        self._trained |= settled
        if self._trained:  # until then, what a worker builds by itself is what all have
            try:
                view = self.cure(view)
            except CannotRestore as error:
                told = ", ".join(f"worker {worker} {reason}" for worker, reason in lost.items())
                raise CannotRestore(f"{told}; {error}") from error
            if not settled and self.view.rollback is not None:
                view = replace(view, restores=(), rollback=self.view.rollback)
        publish(self.store, view)
        self.view, self._follower = view, Follower(self.store, view.number)
        self.event("view", view=view.number, workers=list(view.workers), joined=_as_text(view.joined))
        remedies = sorted({restore.remedy for restore in view.restores}) if view.rollback is None else ["checkpoint"]
        for joiner, old in view.joined.items():
            self.event("remedy", worker=old, replacement=joiner, remedy="+".join(remedies), view=view.number)


def _as_text(joined: Mapping[int, int]) -> dict[str, Any]:
    return {str(new): old for new, old in joined.items()}


class TooManyFailures(RuntimeError):
    """Workers are lost faster than it makes sense to replace them. Names the last loss."""
