"""Supervises the workers of one machine, or the one worker of a torchrun slot. Holds no model.

It starts them from the warm parent, sees a death as the operating system reports it, passes SIGTERM on so that the
run saves itself, and ends every worker it started, whatever happens.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from jobs.train import STOPPED
from launch.nursery import Exit, Nursery

_CONSEQUENCES = ("LinkError", "CommitError", "MembershipError")
_GRACE_S = 3.0


class RunFailed(RuntimeError):
    """The run ended before its last step. The message names the worker and its error."""


@dataclass
class Agent:
    """The supervisor of `workers`. `tick` is called many times a second while they run."""

    nursery: Nursery
    store: dist.Store
    workers: Sequence[int]
    pids: dict[int, int] = field(default_factory=dict)
    _stopping: int = 0

    def start(self, payload: Callable[[int], dict[str, Any]]) -> None:
        """Fork every worker with its payload."""
        for worker in self.workers:
            self.pids[self.nursery.start(payload(worker))] = worker

    def supervise(self, tick: Callable[[], None]) -> int:
        """Wait for the workers to end; returns 0 or STOPPED. Raises RunFailed when one fails, here or elsewhere."""
        codes: dict[int, int] = {}
        with self._forward_signals():
            while len(codes) < len(self.workers):
                tick()
                for exit_ in self.nursery.poll(0.05):
                    worker = self.pids.pop(exit_.pid, None)
                    if worker is None:
                        continue
                    codes[worker] = exit_.code
                    if exit_.code not in (0, STOPPED):
                        self._fail(worker, exit_)
                if self.store.check(["failed"]):
                    raise RunFailed(self.store.get("failed").decode())
        return STOPPED if STOPPED in codes.values() else 0

    def end(self) -> None:
        """End the workers that still run, gently first."""
        for signum, grace in ((signal.SIGTERM, _GRACE_S if self._stopping else 0.0), (signal.SIGKILL, 2.0)):
            self._signal(signum)
            deadline = time.monotonic() + grace
            while self.pids and time.monotonic() < deadline:
                for exit_ in self.nursery.poll(0.05):
                    self.pids.pop(exit_.pid, None)

    def _fail(self, worker: int, exit_: Exit) -> None:
        """Find out what went wrong first, tell the other agents, and raise it."""
        cause = f"worker {worker} {exit_}"
        if exit_.code > 0:
            time.sleep(0.3)  # a worker that lost its peer may report before the peer's own agent has seen it end
        errors = [json.loads(self.store.get(f"error/{w}")) | {"worker": w} for w in self._reported()]
        roots = [e for e in errors if e["type"] not in _CONSEQUENCES]
        killed = [x for x in self.nursery.poll(0.0) if x.code < 0 and x.pid in self.pids]
        if exit_.code > 0 and roots:
            first = min(roots, key=lambda e: e["time"])
            cause = f"worker {first['worker']}: {first['error']}"
        elif exit_.code > 0 and killed:
            cause = f"worker {self.pids[killed[0].pid]} {killed[0]}"
        elif exit_.code > 0 and errors:
            first = min(errors, key=lambda e: e["time"])
            cause = f"worker {first['worker']}: {first['error']}"
        if not self.store.check(["failed"]):
            self.store.set("failed", cause)
        raise RunFailed(cause)

    def _reported(self) -> list[int]:
        world = int(self.store.get("world")) if self.store.check(["world"]) else max(self.workers) + 1
        return [w for w in range(world) if self.store.check([f"error/{w}"])]

    def _signal(self, signum: int) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    @contextmanager
    def _forward_signals(self) -> Iterator[None]:
        """SIGTERM and the first Ctrl-C ask the workers to save and stop; a second Ctrl-C does not wait."""

        def handle(signum: int, _: object) -> None:
            self._stopping += 1
            if signum == signal.SIGINT and self._stopping > 1:
                raise KeyboardInterrupt
            self._signal(signal.SIGTERM)

        before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
