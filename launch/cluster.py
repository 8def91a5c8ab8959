"""The agents that a cluster places: asked for at the start, waited for, and asked for again when they are lost.

The coordinator stays with who started the run, so that no node's loss ends it. Each agent has a rank, and with it the
places of a share of the workers; who is asked for in a lost one's stead gets its rank, and starts whom the newest view
awaits in these places. An agent is lost when the cluster says so, or sooner, when it gives no sign of life.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch.distributed as dist

from jobs.cluster import RAY
from jobs.config import ConfigError, TrainConfig
from launch.agent import RunFailed
from launch.config import to_toml
from launch.slots import Slot, StoreHandle, environment_of
from launch.token import VARIABLE
from pipeline.exit_codes import STOPPED
from recovery import keys

_POLL_S = 0.1
_LOOK_S = 0.5
_TRIES = 3
"""Times that one agent may end before a first sign of life: then the next would end the same way."""
_SILENT_S, _START_S = 2.0, 120.0
_AGAIN_S, _MOST_AGAIN_S = 1.0, 60.0  # doubled every time


@dataclass(frozen=True)
class AgentStart:
    """What a node needs to start an agent: the settings as TOML, the environment variables and the folder."""

    rank: int
    settings: str
    environment: Mapping[str, str]
    folder: str
    cpus: float
    gpus: float


class Cluster(Protocol):
    """Somebody who places agents on nodes."""

    @property
    def host(self) -> str:
        """The address of this machine, as its nodes reach it."""
        ...

    def reserve(self, agents: Sequence[AgentStart]) -> None:
        """Have these agents placed all at once or not at all, on nodes of their own where that can be."""
        ...

    def reserved(self) -> bool:
        """Whether they have been placed."""
        ...

    def start(self, what: AgentStart) -> Any:
        """Ask for an agent; it may come at any time. Returns a handle."""
        ...

    def where(self, handle: Any) -> str | None:
        """The node on which an agent has been placed, if it has."""
        ...

    def ended(self, handle: Any) -> str | None:
        """Why an agent has ended, if it has."""
        ...

    def end(self, handle: Any) -> None:
        """End an agent with all that it has started, or ask for it no more."""
        ...

    def room(self) -> str:
        """What the cluster has, for a person."""
        ...

    def close(self, handles: Collection[Any]) -> None:
        """End all agents, and leave the cluster."""
        ...


def connect(config: TrainConfig) -> Cluster:
    """The cluster of the settings. Raises ConfigError where its package is not installed, or where it is not there."""
    try:
        from launch.ray_cluster import RayCluster  # an extra: imported only when asked for
    except ImportError as error:
        raise ConfigError(
            f"cluster is {config.cluster!r}, and the package ray is missing ({error}); allowed after: "
            "pip install 'unbroken[ray]'"
        ) from error
    return RayCluster("" if config.cluster == RAY else config.cluster)


def on_nodes(config: TrainConfig) -> TrainConfig:
    """The settings with all that depends on this machine told: what an agent computes is the same on every node."""
    threads = config.threads or max(1, int(config.agent_cpus))
    return replace(config, out=config.out.absolute(), threads=threads)


@dataclass
class _Seat:
    """An agent that was asked for. `before` is the sign of life of who had its rank before, `sign` its own newest."""

    start: AgentStart
    handle: Any = None
    before: bytes | None = None
    sign: bytes | None = None
    since: float = 0.0
    came: bool = False
    tries: int = 0
    due: float = 0.0


@dataclass
class Crew:
    """The agents of a run, by rank. `tell(event, **fields)` hears of who comes and goes."""

    cluster: Cluster
    store: dist.Store
    silence_s: float
    """How long an agent may give no sign of life."""
    seats: dict[int, _Seat]
    tell: Callable[..., None] = lambda *_, **__: None
    together: int = 0
    """Agents, the first ones, without which the run cannot begin. The others are asked for once these have been placed:
    else they would hold room in which the run cannot begin, and which these may need."""
    gone: Callable[[int], None] = lambda _: None
    """Is called with the rank of an agent that is lost: so are its workers."""
    _looked: float = -math.inf
    _reason: str = ""

    @classmethod
    def of(cls, config: TrainConfig, slot: Slot, cluster: Cluster, handle: StoreHandle) -> Crew:
        """The crew of a run, of which nobody has been asked for yet."""
        seats, together, workers_before = dict[int, _Seat](), 0, 0
        known = (name for name in os.environ if name.startswith("UNBROKEN_"))
        environment = {name: os.environ[name] for name in known if name != VARIABLE}  # that they read in the run folder
        text = to_toml(config)
        for rank in range(1, slot.agents):
            workers = len((own := replace(slot, rank=rank)).workers(config.workers))
            told = {**environment, **environment_of(own, handle)}
            gpus = workers if config.device == "cuda" else 0
            seats[rank] = _Seat(AgentStart(rank, text, told, os.getcwd(), workers * config.agent_cpus, gpus))
            together += workers_before < config.min_workers
            workers_before += workers
        return cls(cluster, handle.store, config.heartbeat, seats, together=together)

    def ask(self) -> None:
        """Ask for those without which the run cannot begin; `tick` asks for the others."""
        first = list(self.seats.values())[: self.together]
        self.cluster.reserve([seat.start for seat in first])
        for seat in first:
            self._ask(seat)

    @property
    def here(self) -> set[int]:
        """The ranks of those that have come, and have not been lost since."""
        return {rank for rank, seat in self.seats.items() if seat.came}

    def tick(self) -> None:
        """See who has come, and ask again for who is lost: called many times a second."""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        for place, (rank, seat) in enumerate(self.seats.items()):
            if seat.handle is None:
                if now >= seat.due and (place < self.together or self.cluster.reserved()):
                    self._ask(seat)
                continue
            self._look(rank, seat, now)

    def _ask(self, seat: _Seat) -> None:
        seat.before = seat.sign = keys.read_agent(self.store, seat.start.rank)
        seat.handle, seat.came = self.cluster.start(seat.start), False

    def _look(self, rank: int, seat: _Seat, now: float) -> None:
        if (sign := keys.read_agent(self.store, rank)) != seat.sign:
            seat.sign, seat.since = sign, now
            if not seat.came:
                seat.came, seat.tries = True, 0
                self.tell("agent_came", agent=rank, node=self.cluster.where(seat.handle))
        reason = self.cluster.ended(seat.handle)
        if reason is None and seat.came and now - seat.since > self.silence_s:
            reason = f"has given no sign of life for {self.silence_s:g} s"
        speaks = seat.came and now - seat.since < _SILENT_S  # its node is lost to the cluster, but not to the run
        if reason is None or speaks or keys.ended(self.store) is not None:
            return
        self._reason = f"agent {rank} {reason}"
        if seat.came:
            self.gone(rank)
        self.cluster.end(seat.handle)
        wait_s = 0.0 if seat.came else min(_MOST_AGAIN_S, _AGAIN_S * 2**seat.tries)
        seat.handle, seat.came, seat.tries, seat.due = None, False, seat.tries + (not seat.came), now + wait_s
        self.tell("agent_lost", agent=rank, reason=reason)

    @property
    def _coming(self) -> bool:
        """Whether somebody has been placed, and is being started."""
        seats = (seat for seat in self.seats.values() if seat.handle is not None and not seat.came)
        return any(self.cluster.where(seat.handle) is not None for seat in seats)

    def await_first(
        self, agents: Mapping[int, int], least: int, begin_s: float, most_s: float, say: Callable[[str], None]
    ) -> tuple[int, ...]:
        """Wait until a run can begin: with all, or from `begin_s` seconds on with `least` workers. `agents` has the
        rank of the agent of each worker. Who has been placed by then has some time to start. Returns the workers whose
        agents have not come.

        Raises RunFailed after `most_s` seconds (with STOPPED: later there may be room), or when an agent has ended
        again and again before a first sign of life.
        """
        began, said = time.monotonic(), False
        while True:
            self.tick()
            absent = tuple(sorted(worker for worker, rank in agents.items() if rank not in self.here))
            waited, found = time.monotonic() - began, len(agents) - len(absent)
            late = waited >= begin_s and not (self._coming and waited < begin_s + _START_S)
            if not absent or (late and found >= least):
                return absent
            if any(seat.tries >= _TRIES for seat in self.seats.values()):
                raise RunFailed(f"{self._reason}; {_TRIES} times in a row, before a sign of life")
            told = f"of {len(agents)} workers {found} have come; {self.cluster.room()}"
            if late and waited >= most_s:
                last = f"; the last that happened: {self._reason}" if self._reason else ""
                raise RunFailed(f"{told}, after {waited:.0f} s; {least} are the fewest{last}", STOPPED)
            if waited > 5.0 and not said:
                said = True
                say(told)
            time.sleep(_POLL_S)

    def close(self) -> None:
        """End all of them, and leave the cluster."""
        self.cluster.close([seat.handle for seat in self.seats.values() if seat.handle is not None])
