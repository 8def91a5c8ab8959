"""Supervises the workers of one machine, or the one worker of a torchrun slot. Holds no model.

It starts them from the forkserver, sees a death as the operating system reports it, makes a signal that asks it to
stop a state of the whole run, and ends every worker it started, whatever happens.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from jobs.config import ConfigError
from launch.forkserver import Exit, ForkServer, ForkServerGone, StartError
from launch.signals import NotStarted
from pipeline.exit_codes import STOPPED
from recovery import keys
from recovery.membership import EVICTED, View, read_view

_POLL_S = 0.02
_BEAT_S = 0.5
_GRACE_S = 3.0
_LAST_S = 15.0
_TRIES = 5
_TRY_AGAIN_S = 0.2  # doubled every time
_REFILL_S = 1.0  # after a view: until then all the machine has is for those who recover


_NOT_STARTED = "the run was asked to stop before its first step"


class RunFailed(RuntimeError):
    """The run ended before its last step. The message names the worker and its error; `code` is that of the process."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class _Unstarted:
    """A worker that does not run yet, how often there was no room for it, and when it is tried again."""

    worker: int
    payload: dict[str, Any]
    joins: bool
    tries: int = 0
    due: float = 0.0


@dataclass
class Agent:
    """The supervisor of the workers of `places`, view after view. `payload(worker, place, view, joins)` starts one.

    Where another agent is gone with its machine, the coordinator gives its places to those that are left.
    """

    rank: int
    forkserver: ForkServer
    store: dist.Store
    places: Sequence[int]
    payload: Callable[[int, int, int, bool], dict[str, Any]]
    num_spares: int = 0
    """Workers that are kept waiting with everything loaded, to take the next places without being started first."""
    pids: dict[int, int] = field(default_factory=dict)
    _unstarted: list[_Unstarted] = field(default_factory=list)
    _spares: dict[int, str] = field(default_factory=dict)  # pid -> the key by which it is called
    _spares_made: int = 0
    _refill_at: float = math.inf
    """When spare workers are to be started for those that were called."""
    _prepared: bool = False
    _view: int = 1
    _awaited: set[int] = field(default_factory=set)
    """Workers that hold nothing yet."""
    _late: set[int] = field(default_factory=set)
    """Workers that may find nobody any more when the run is over: those that are awaited, and those who joined last."""
    _stopping: int = 0
    _told_to_stop: bool = False
    _saved: bool = False
    """A worker has ended well: there is nothing left to be asked for."""
    _leave_by: float | None = None
    """The machine is about to go: until when its workers may hand over what they hold."""
    _told_to_leave: bool = False
    _beats: int = 0
    _beaten: float = -math.inf

    def start(self) -> None:
        """Fork the workers of the first view, each with the number of its place. Where there is a view already, those
        of its members that nobody has started: whom an agent of this rank before has seen join may live, and may have
        voted. Raises ConfigError where that agent lives."""
        comes_back, newest = self._comes_back(), self._newest_view()
        keys.stay(self.store, self.rank)
        if not newest:
            for place in self.places:
                self._start(place, place, 1, joins=False)
        else:
            self._view, view = newest, read_view(self.store, newest)
            for worker in () if comes_back else view.workers:
                if view.places[worker] == worker and worker in self.places:  # of the first view
                    self._start(worker, worker, 1, joins=False)
            self._start_those(view, view.awaited if comes_back else (*view.joined, *view.awaited))
        self._keep_spares()

    def _comes_back(self) -> bool:
        """Whether there has been an agent of this rank."""
        before = keys.read_agent(self.store, self.rank)
        if before is None:
            return False
        time.sleep(2.5 * _BEAT_S)
        if keys.read_agent(self.store, self.rank) != before:
            raise ConfigError(f"node_rank is {self.rank}; allowed: one whose agent does not live")
        return True

    def _newest_view(self) -> int:
        number = 0
        while self.store.check([keys.view_key(number + 1)]):
            number += 1
        return number

    def _start(self, worker: int, place: int, view: int, *, joins: bool) -> None:
        """Have a worker in a place: a spare one that is called, or a new one."""
        self._place(_Unstarted(worker, self.payload(worker, place, view, joins), joins))

    def _place(self, one: _Unstarted) -> None:
        """Have it run, or put it off: the machine may have room again in a moment."""
        if one.joins and self._spares:
            pid = next(iter(self._spares))
            told = {name: value for name, value in one.payload.items() if name != "store"}  # no token in the store
            self.store.set(self._spares.pop(pid), json.dumps(told))
            self.pids[pid] = one.worker
            return
        try:
            self.pids[self.forkserver.start(one.payload)] = one.worker
        except StartError as error:
            one.tries += 1
            if one.tries == _TRIES:
                keys.report_loss(self.store, one.worker, str(error))
            else:
                one.due = time.monotonic() + _TRY_AGAIN_S * 2 ** (one.tries - 1)
                self._unstarted.append(one)

    def _try_again(self) -> None:
        now = time.monotonic()
        due = [one for one in self._unstarted if one.due <= now]
        self._unstarted = [one for one in self._unstarted if one.due > now]
        for one in due:
            self._place(one)

    def _keep_spares(self) -> None:
        self._refill_at = math.inf
        while self.places and len(self._spares) < self.num_spares:
            key = keys.spare_key(self.rank, self._spares_made)
            self._spares_made += 1
            payload = self.payload(-1, self.places[0], 1, True)
            try:
                self._spares[self.forkserver.start({**payload, "spare": key})] = key
            except StartError:
                return  # there is no room for one: the next view change tries again

    def supervise(self, tick: Callable[[], None]) -> int:
        """Wait for the workers to end; returns 0 or STOPPED. Raises RunFailed when the run cannot go on.

        `tick` is called many times a second. Workers that are lost are reported to the coordinator; those that it
        names in their place are started.
        """
        code, over, ended = None, None, math.inf
        # Once one has ended well, all is committed and saved: nobody is worth a long wait any more.
        while (self.pids or code is None) and time.monotonic() < ended + _LAST_S:
            for exit_ in self.forkserver.poll(_POLL_S):
                self._spares.pop(exit_.pid, None)
                worker = self.pids.pop(exit_.pid, None)
                if worker is None or exit_.code == EVICTED:
                    continue
                if exit_.code in (0, STOPPED):
                    self._saved = True
                    code, ended = max(code or 0, exit_.code), time.monotonic()
                    keys.end(self.store, code)  # all is done on every machine, also on one that only waits to join
                elif code is None and over is None:  # once one has ended well, all have committed all there is
                    self._lost(worker, exit_)
            self._beat()
            self._pass_on()
            if (by := self._leave_by) is not None:
                if self._has_left(by):
                    return STOPPED
            elif self._told_to_leave:
                self._told_to_leave = False
                keys.stay(self.store, self.rank)
                self._start_those(view := read_view(self.store, self._view), view.awaited)
            self._prepare()
            self._try_again()
            if time.monotonic() >= self._refill_at:
                self._keep_spares()
            tick()
            over = keys.ended(self.store)
            self._follow(code is not None or over is not None)
            if not self.pids and code is None and over is not None:
                return over  # its places have gone to others
            if (failure := keys.failure(self.store)) is not None:
                raise NotStarted if failure.reason == _NOT_STARTED else RunFailed(failure.reason, failure.code)
        assert code is not None
        return code

    def _prepare(self) -> None:
        """Have the forkserver load what every worker of this run needs, once that is known."""
        if not self._prepared and self.store.check([keys.view_key(1)]):
            self._prepared = True
            self.forkserver.prepare(dict(read_view(self.store, 1).details))

    def _pass_on(self) -> None:
        """Make a signal that has come a state of the run: who joins later knows of it too."""
        if self._stopping and not self._told_to_stop:
            self._told_to_stop = True
            keys.ask_to_stop(self.store)

    def leave(self, grace_s: float) -> None:
        """A handler of signals: the machine goes in `grace_s` seconds; the others go on without its workers."""
        self._leave_by = self._leave_by or time.monotonic() + grace_s

    def stay(self) -> None:
        """A handler of signals: the machine does not go after all."""
        self._leave_by = None

    def _has_left(self, by: float) -> bool:
        """Whether all of its workers have handed over, or there is no more time: then they are lost."""
        if not self._told_to_leave:
            self._told_to_leave = True
            keys.leave(self.store, self.rank, max(0.0, by - time.monotonic()))
        left = set(self.pids.values()) - self._awaited
        if left and time.monotonic() > by:
            for worker in left:
                keys.report_loss(self.store, worker, "was on a machine that is gone")
            return True
        return not left

    def _beat(self) -> None:
        if time.monotonic() - self._beaten >= _BEAT_S:
            self._beats, self._beaten = self._beats + 1, time.monotonic()
            keys.beat_agent(self.store, self.rank, self._beats)

    def _lost(self, worker: int, exit_: Exit) -> None:
        error = keys.read_error(self.store, worker)
        if error is not None and error.fatal:
            keys.fail(self.store, f"worker {worker}: {error.text}")
        else:
            keys.report_loss(self.store, worker, str(exit_) if error is None else error.text, told=error is not None)

    def _follow(self, over: bool) -> None:
        """Start who joins in the views that came since, and end who is in none, or when it is `over` comes too late."""
        while self.store.check([keys.view_key(self._view + 1)]):
            view = read_view(self.store, self._view + 1)
            self._view = view.number
            _send([pid for pid, worker in self.pids.items() if worker not in view.places], signal.SIGKILL)
            self._unstarted = [one for one in self._unstarted if one.worker in view.places]
            self._awaited, self._late = set(view.awaited), {*view.awaited, *view.joined}
            self._start_those(view, (*view.joined, *view.awaited))
            self._refill_at = time.monotonic() + _REFILL_S
        if over:
            _send([pid for pid, worker in self.pids.items() if worker in self._late], signal.SIGKILL)

    def _start_those(self, view: View, workers: Iterable[int]) -> None:
        """Start those of the workers that are this agent's and do not run yet."""
        running = {*self.pids.values(), *(one.worker for one in self._unstarted)}
        for worker in workers:
            mine = view.agents[place := view.places[worker]] == self.rank and self._leave_by is None
            if mine and worker not in running:
                self._start(worker, place, view.number + (worker in view.awaited), joins=True)

    def end(self) -> None:
        """End the workers that still run, gently first, and the spare ones."""
        with contextlib.suppress(ForkServerGone):  # then all of them have ended with it
            self._end(self._spares, signal.SIGKILL, 2.0)
            self._end(self.pids, signal.SIGTERM, _GRACE_S if self._stopping else 0.0)
            self._end(self.pids, signal.SIGKILL, 2.0)

    def _end(self, pids: Mapping[int, Any], signum: int, grace_s: float) -> None:
        _send(pids, signum)
        deadline = time.monotonic() + grace_s
        while pids and time.monotonic() < deadline:
            for exit_ in self.forkserver.poll(0.05):
                self._spares.pop(exit_.pid, None)
                self.pids.pop(exit_.pid, None)

    def asked_to_stop(self, signum: int) -> None:
        """A handler of signals: each asks the run to save itself and stop; a second Ctrl-C does not wait."""
        if self._saved:
            return
        self._stopping += 1
        if signum == signal.SIGINT and self._stopping > 1:
            raise KeyboardInterrupt
        _send(self.pids, signal.SIGTERM)  # at once; the store is no place for a signal handler to wait in


def fail_before_start(store: dist.Store, error: BaseException) -> None:
    """End the run on every agent before its first step, for what one of them has met."""
    keys.fail(store, _NOT_STARTED if isinstance(error, NotStarted) else f"{type(error).__name__}: {error}")


def _send(pids: Iterable[int], signum: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)
