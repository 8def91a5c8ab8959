"""Supervises the workers of one machine, or the one worker of a torchrun slot. Holds no model.

It starts them from the warm parent, sees a death as the operating system reports it, passes SIGTERM on so that the
run saves itself, and ends every worker it started, whatever happens.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from jobs.train import STOPPED
from launch.nursery import Exit, Nursery
from recovery.coordinator import beat, report_loss
from recovery.membership import read_view

FATAL = ("NonFiniteLoss", "CheckpointError", "ModelError", "CorpusError", "ConfigError", "MembershipError")
"""Errors that another worker in the same place would meet too: the run ends with them."""
OVER = "over"
"""The key under which the coordinator leaves the exit code of the run."""
_POLL_S = 0.02
_BEAT_S = 0.5
_GRACE_S = 3.0
_LAST_S = 15.0


class RunFailed(RuntimeError):
    """The run ended before its last step. The message names the worker and its error."""


@dataclass
class Agent:
    """The supervisor of the workers of `places`, view after view. `payload(worker, place, view, joins)` starts one.

    Where another agent is gone with its machine, the coordinator gives its places to those that are left.
    """

    rank: int
    nursery: Nursery
    store: dist.Store
    places: Sequence[int]
    payload: Callable[[int, int, int, bool], dict[str, Any]]
    num_spares: int = 0
    """Workers that are kept waiting with everything loaded, to take the next places without being started first."""
    pids: dict[int, int] = field(default_factory=dict)
    _spares: dict[int, str] = field(default_factory=dict)  # pid -> the key by which it is called
    _spares_made: int = 0
    _view: int = 1
    _awaited: set[int] = field(default_factory=set)
    _stopping: int = 0
    _beats: int = 0
    _beaten: float = -math.inf

    def start(self) -> None:
        """Fork the workers of the first view, each with the number of its place."""
        for place in self.places:
            self._start(place, place, 1, joins=False)
        self._keep_spares()

    def _start(self, worker: int, place: int, view: int, *, joins: bool) -> None:
        """Have a worker in a place: a spare one that is called, or a new one."""
        payload = self.payload(worker, place, view, joins)
        if joins and self._spares:
            pid = next(iter(self._spares))
            self.store.set(self._spares.pop(pid), json.dumps(payload))
        else:
            pid = self.nursery.start(payload)
        self.pids[pid] = worker

    def _keep_spares(self) -> None:
        while len(self._spares) < self.num_spares:
            key = f"spare/{self.rank}/{self._spares_made}"
            self._spares_made += 1
            payload = self.payload(-1, self.places[0], 1, True)
            self._spares[self.nursery.start({**payload, "spare": key})] = key

    def supervise(self, tick: Callable[[], None]) -> int:
        """Wait for the workers to end; returns 0 or STOPPED. Raises RunFailed when the run cannot go on.

        `tick` is called many times a second. Workers that are lost are reported to the coordinator; those that it
        names in their place are started.
        """
        code, ended = None, math.inf
        with self._forward_signals():
            # Once one has ended well, all is committed and saved: nobody is worth a long wait any more.
            while (self.pids or code is None) and time.monotonic() < ended + _LAST_S:
                for exit_ in self.nursery.poll(_POLL_S):
                    self._spares.pop(exit_.pid, None)
                    worker = self.pids.pop(exit_.pid, None)
                    if worker is None:
                        continue
                    if exit_.code in (0, STOPPED):
                        code, ended = max(code or 0, exit_.code), time.monotonic()
                    elif code is None:  # once one has ended well, all have committed all there is
                        self._lost(worker, exit_)
                self._beat()
                tick()
                self._follow(code is not None)
                if not self.pids and code is None and self.store.check([OVER]):
                    return int(self.store.get(OVER))  # its places have gone to others
                if self.store.check(["failed"]):
                    raise RunFailed(self.store.get("failed").decode())
        assert code is not None
        return code

    def _beat(self) -> None:
        if time.monotonic() - self._beaten >= _BEAT_S:
            self._beats, self._beaten = self._beats + 1, time.monotonic()
            beat(self.store, self.rank, self._beats)

    def _lost(self, worker: int, exit_: Exit) -> None:
        reason = str(exit_)
        if self.store.check([f"error/{worker}"]):
            error = json.loads(self.store.get(f"error/{worker}"))
            reason = error["error"]
            if error["type"] in FATAL:
                self.store.set("failed", f"worker {worker}: {reason}")
                return
        report_loss(self.store, worker, reason)

    def _follow(self, over: bool) -> None:
        """Start who joins in the views that came since, and end who is in none, or when it is `over` is awaited."""
        while self.store.check([f"view/{self._view + 1}"]):
            view = read_view(self.store, self._view + 1)
            self._view = view.number
            _send([pid for pid, worker in self.pids.items() if worker not in view.places], signal.SIGKILL)
            self._awaited = set(view.awaited)
            running = set(self.pids.values())
            for worker in (*view.joined, *view.awaited):
                if view.agents[place := view.places[worker]] == self.rank and worker not in running:
                    self._start(worker, place, view.number + (worker in view.awaited), joins=True)
            self._keep_spares()
        if over:
            _send([pid for pid, worker in self.pids.items() if worker in self._awaited], signal.SIGKILL)

    def end(self) -> None:
        """End the workers that still run, gently first, and the spare ones."""
        self._end_spares()
        for signum, grace in ((signal.SIGTERM, _GRACE_S if self._stopping else 0.0), (signal.SIGKILL, 2.0)):
            _send(self.pids, signum)
            deadline = time.monotonic() + grace
            while self.pids and time.monotonic() < deadline:
                for exit_ in self.nursery.poll(0.05):
                    self.pids.pop(exit_.pid, None)

    def _end_spares(self) -> None:
        _send(self._spares, signal.SIGKILL)
        deadline = time.monotonic() + 2.0
        while self._spares and time.monotonic() < deadline:
            for exit_ in self.nursery.poll(0.05):
                self._spares.pop(exit_.pid, None)
                self.pids.pop(exit_.pid, None)

    @contextmanager
    def _forward_signals(self) -> Iterator[None]:
        """SIGTERM and the first Ctrl-C ask the workers to save and stop; a second Ctrl-C does not wait."""

        def handle(signum: int, _: object) -> None:
            self._stopping += 1
            if signum == signal.SIGINT and self._stopping > 1:
                raise KeyboardInterrupt
            _send(self.pids, signal.SIGTERM)

        before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def _send(pids: Iterable[int], signum: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)
