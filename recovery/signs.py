"""Signs of life: who beats, who comes on, and since when not."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

import torch.distributed as dist

from recovery.commit import Follower
from recovery.keys import read_agent, read_beat
from recovery.membership import View


@dataclass
class _Sign:
    """The last sign of life of somebody, when it was first seen, and when its work was last seen to come on."""

    number: object
    at: float
    progress: int = 0
    progress_at: float = 0.0


class Signs:
    """Whose sign of life is how old. Agents and workers whose heart has not beaten for `heartbeat_s` are gone; who has
    work that does not come on for `deadline_s` hangs."""

    def __init__(self, store: dist.Store, heartbeat_s: float, deadline_s: float) -> None:
        self._store, self._heartbeat_s, self._deadline_s = store, heartbeat_s, deadline_s
        self._seen: dict[str, _Sign] = {}

    def alive(self, agents: Collection[int]) -> set[int]:
        """The agents that have given a sign of life of late, or may begin yet; 0 is the coordinator's own."""
        alive, now = {0}, time.monotonic()
        for agent in set(agents):
            found = read_agent(self._store, agent)
            patience = self._deadline_s if found is None else self._heartbeat_s / 2
            if now - self._sign(f"agent/{agent}", found).at <= patience:
                alive.add(agent)
        return alive

    def hangs(
        self, worker: int, view: View, follower: Follower, alive: Collection[int], *, searching: bool, vacant: bool
    ) -> str | None:
        """Why a worker is given up, if it is. While the next view is being found out (`searching`) nobody is to come
        on; a `vacant` place has nobody who could."""
        now, beat, awaited = time.monotonic(), read_beat(self._store, worker), worker in view.awaited
        if beat is None:
            if vacant:
                self._seen.pop(f"start/{worker}", None)
                return None
            if view.agents[view.places[worker]] not in alive:
                return "was being started by an agent that has given no sign of life since"
            # nobody waits for who is awaited: the others come on without
            since = self._sign(f"start/{worker}", 0).at if awaited else follower.moved
            if not searching and now - since > self._deadline_s:
                return f"has not come up within {self._deadline_s:g} s"
            return None  # it is still being started; its agent sees it end
        sign = self._sign(f"beat/{worker}", beat.number, beat.progress)
        if now - sign.at > self._heartbeat_s:
            return f"has given no sign of life for {self._heartbeat_s:g} s"
        if awaited:
            stuck = not beat.built and now - sign.progress_at > self._deadline_s
            return f"has not come up within {self._deadline_s:g} s" if stuck else None
        came_on = max(follower.moved, sign.progress_at)
        busy = not searching and not beat.waiting and now - came_on > self._deadline_s
        if busy and not follower.voted(worker):
            return f"has been busy with one step for {self._deadline_s:g} s"
        return None

    def _sign(self, key: str, number: object, progress: int = 0) -> _Sign:
        """Take note of a sign of life."""
        now = time.monotonic()
        sign = self._seen.setdefault(key, _Sign(number, now, progress, now))
        if number != sign.number:
            sign.number, sign.at = number, now
        if progress != sign.progress:
            sign.progress, sign.progress_at = progress, now
        return sign
