"""Where a process stands among the agents of a run: alone on a machine, a slot of torchrun, or placed by a cluster; and
the run's store."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from jobs.config import ConfigError, TrainConfig
from launch.agent_process import PARENT
from pipeline.runtime.groups import address_towards
from pipeline.store.client import SealedStore, TokenRefused
from pipeline.store.handshake import LEAST_BYTES
from pipeline.store.hosting import StoreProcess

_AGENT = "UNBROKEN_AGENT"


@dataclass(frozen=True)
class Slot:
    """This agent's place: `rank` among `agents`. Where `torchrun` started them, each has one worker; where a `cluster`
    places them, the one that coordinates has none."""

    rank: int = 0
    agents: int = 1
    torchrun: bool = False
    local_rank: int = 0
    local_world: int = 0
    host: str = "127.0.0.1"
    port: int = 0
    agent_store: bool = False
    prefix: str = "unbroken"
    attempt: int = 0
    """How many times torchrun has started everybody again."""
    cluster: bool = False
    parent: int = 0
    """The process without which this agent must not live on, where there is one."""

    @property
    def coordinates(self) -> bool:
        """Whether this agent plans, writes the run folder and speaks to the user."""
        return self.rank == 0

    def workers(self, total: int) -> list[int]:
        """The workers that this agent supervises. Raises ConfigError when they cannot be dealt to the agents."""
        if self.torchrun and total != self.agents:
            raise ConfigError(f"workers is {total}; allowed under this torchrun: {self.agents}, one per slot")
        if total < self.agents - self.cluster:
            raise ConfigError(f"workers is {total}; allowed on {self.agents} nodes: {self.agents} or more")
        return [worker for worker, agent in self.dealt(total).items() if agent == self.rank]

    def dealt(self, total: int) -> dict[int, int]:
        """Worker -> the rank of its agent: an even share of neighbours each."""
        return {worker: worker * (self.agents - self.cluster) // total + self.cluster for worker in range(total)}

    def local_index(self, worker: int, total: int) -> int:
        """The worker's number among those of its machine: which device it takes."""
        return self.local_rank if self.torchrun else worker - self.workers(total)[0]

    def workers_here(self, total: int) -> int:
        """How many workers share this machine."""
        return self.local_world if self.torchrun else len(self.workers(total))


def find_slot(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> Slot:
    """The slot that torchrun's environment variables describe, or the whole machine where they are not set.

    Of several nodes (`config.nodes`) each has an agent, or a torchrun, of its own; all meet at `config.store`. Agents
    that a cluster places are told by `environment_of`.
    """
    parent = int(environment.get(PARENT, "0"))
    if (told := environment.get(_AGENT)) is not None:
        rank, agents, host, port, prefix = told.split(",", 4)
        return Slot(int(rank), int(agents), host=host, port=int(port), prefix=prefix, cluster=True, parent=parent)
    if config.cluster:
        agents = 1 - (-config.workers // config.agent_workers)
        return Slot(0, agents, port=config.store_port, cluster=True, parent=parent)
    host, _, port = config.store.rpartition(":") if config.nodes > 1 else ("", "", "0")
    if "TORCHELASTIC_RUN_ID" not in environment and not {"RANK", "MASTER_ADDR"} <= set(environment):
        return Slot(config.node_rank, config.nodes, host=host or "127.0.0.1", port=int(port) or config.store_port)
    attempt, here = environment.get("TORCHELASTIC_RESTART_COUNT", "0"), int(environment["WORLD_SIZE"])
    if config.nodes > 1:
        return Slot(
            config.node_rank * here + int(environment["RANK"]), config.nodes * here, True,
            int(environment["RANK"]), here, host, int(port),
        )  # fmt: skip
    return Slot(
        rank=int(environment["RANK"]),
        agents=here,
        torchrun=True,
        local_rank=int(environment.get("LOCAL_RANK", environment["RANK"])),
        local_world=int(environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])),
        host=environment["MASTER_ADDR"],
        port=int(environment["MASTER_PORT"]),
        agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        # torchrun starts everybody again after a failure: a new attempt must not read the keys of the old one
        prefix=f"unbroken/{environment.get('TORCHELASTIC_RUN_ID', 'run')}/{attempt}",
        attempt=int(attempt),
    )


@dataclass(frozen=True)
class StoreHandle:
    """The store, and where others reach it."""

    store: dist.Store
    host: str
    port: int
    prefix: str
    token: bytes = field(repr=False)
    process: StoreProcess | None = None
    """The store itself, where this agent hosts it."""

    def address(self) -> dict[str, object]:
        """What `launch.worker_main.connect` takes. It has the token in it: for this run's own processes alone."""
        return {"host": self.host, "port": self.port, "prefix": self.prefix, "token": self.token.hex()}

    def close(self) -> None:
        """Leave the store; whoever hosts it ends it."""
        if self.process is not None:
            self.process.close()


def environment_of(slot: Slot, handle: StoreHandle) -> dict[str, str]:
    """The environment variable by which `find_slot` knows an agent that a cluster places. Who starts it adds PARENT."""
    return {_AGENT: f"{slot.rank},{slot.agents},{handle.host},{handle.port},{handle.prefix}"}


def open_store(slot: Slot, timeout_s: float = 60.0, token: bytes | None = None) -> StoreHandle:
    """Host the store, on the interface that its address names, or join it. Without a `token` who hosts it makes one.
    Raises ConfigError where that cannot be."""
    token = token or secrets.token_bytes(LEAST_BYTES)
    host, port, process = slot.host, slot.port, None
    try:
        if slot.agent_store:
            host, port = address_towards(slot.host, slot.port), 0
        if slot.coordinates:
            process = StoreProcess(host, port, token)
            port = process.port
        if slot.agent_store:
            host, port = _at(slot, f"{host}:{port}", timeout_s)
        store = SealedStore(host, port, token, slot.prefix, timeout_s)
    except TokenRefused as error:
        _close(process)
        raise ConfigError(
            f"token: {error}; allowed: that of node 0, by --out, --token-file or UNBROKEN_TOKEN on every machine"
        ) from error
    except dist.DistNetworkError as error:
        _close(process)
        raise ConfigError(
            f"there is no store at {host}:{port}, for {timeout_s:.0f} s; allowed: the address of node 0, "
            "where the same command runs"
        ) from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE and slot.agents == 1:
            raise ConfigError(
                f"store_port is {slot.port}, which is in use; allowed: a free port, or 0 to take one"
            ) from error
        raise ConfigError(
            f"store is {host}:{port}, where this machine cannot listen: {os.strerror(error.errno or 0)}; "
            "allowed on node 0: an address of its own, and a free port"
        ) from error
    return StoreHandle(store, host, port, slot.prefix, token, process)


def _close(process: StoreProcess | None) -> None:
    if process is not None:
        process.close()


def _at(slot: Slot, mine: str, timeout_s: float) -> tuple[str, int]:
    """Where the run's store is, which slot 0 tells the others through torchrun's: anybody may have written there, and
    who answers has to know the token. Raises ConfigError for what is no address."""
    timeout = timedelta(seconds=timeout_s)
    meeting = dist.TCPStore(slot.host, slot.port, is_master=False, wait_for_workers=False, timeout=timeout)
    key = f"{slot.prefix}/store"
    if slot.coordinates:
        meeting.set(key, mine)
    try:
        host, _, port = (mine if slot.coordinates else meeting.get(key).decode("ascii", "replace")).rpartition(":")
    except dist.DistStoreError as error:
        raise ConfigError(f"slot 0 of torchrun has not said where the store is, for {timeout_s:.0f} s") from error
    if not host or not port.isdecimal() or not 0 < int(port[:6]) < 65536:
        raise ConfigError(
            f"the store of torchrun says that ours is at {host[:80]!r}:{port[:10]!r}, which is no address"
        )
    return host, int(port)
